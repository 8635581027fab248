"""Sampling around codes that are given: inpainting for every prior."""

from __future__ import annotations

import re

import pytest
import torch
from prior_cases import (
    CODE_BY_CODE,
    DEEP,
    GRIDS,
    IMAGE,
    LAYOUTS,
    ROW,
    assert_shares,
    batch_sizes,
    each_prior_on,
    every_image,
    random_codes,
    sample_without_cache,
    shares,
    tiny_prior,
    vocab_sizes,
)
from torch import Tensor

from configs.layout import CodeGrid, CodeLayout
from configs.random_streams import mix, uniform
from prior import PRIORS, Prior
from prior.sampling import draw

GIVEN = CodeLayout((CodeGrid((1, 2), 3), CodeGrid((2, 3), 5)))
"""Of these, pixelcnn models the second grid given the first."""
FALLING = CodeLayout((CodeGrid((1, 2), 9), CodeGrid((2, 3), 3)))
"""The finer grid has fewer codes: most logits of its codes are of foreign ones."""

each_prior = pytest.mark.parametrize("name", PRIORS)


def random_mask(layout: CodeLayout, batch_size: int) -> Tensor:
    """Masks of all densities, from no known code in the first image to all of them in the last."""
    density = torch.linspace(0, 1, batch_size).view(-1, *[1] * len(layout.shape))
    return torch.rand(batch_size, *layout.shape) < density


def beginnings(layout: CodeLayout, *lengths: int) -> Tensor:
    """Masks whose first codes are known, `(len(lengths), *layout.shape)` bool."""
    return (torch.arange(layout.num_codes) < torch.tensor(lengths)[:, None]).view(-1, *layout.shape)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"temperature": 0.0}], ids=str)
@each_prior_on(*LAYOUTS)
def test_every_known_code_is_kept(name, layout, options):
    prior, labels = tiny_prior(name, layout, num_classes=2), torch.tensor([0, 1] * 8)
    known, mask = random_codes(layout, 16), random_mask(layout, 16)
    codes = prior.sample(16, labels, seeds=torch.arange(16), known=known, known_mask=mask, **options)
    assert codes.shape == (16, *layout.shape)
    assert torch.equal(codes[mask], known[mask])
    assert not torch.equal(codes[~mask], known[~mask])
    sizes = torch.tensor(vocab_sizes(layout))
    assert ((codes.flatten(1) >= 0) & (codes.flatten(1) < sizes)).all()


@each_prior_on(IMAGE, GRIDS)
def test_where_all_codes_are_known_they_come_back_and_nothing_is_computed(name, layout):
    prior, known = tiny_prior(name, layout, num_classes=2), random_codes(layout, 4)
    everything = torch.ones_like(known, dtype=torch.bool)
    with batch_sizes(prior) as seen:
        codes = prior.sample(4, torch.tensor([0, 1, 0, 1]), known=known, known_mask=everything, guidance_scale=2.0)
    assert torch.equal(codes, known)
    assert seen == []


@each_prior_on(IMAGE, GRIDS)
def test_an_empty_mask_is_no_mask(name, layout):
    prior, seeds = tiny_prior(name, layout), torch.arange(8)
    known = random_codes(layout, 8)
    codes = prior.sample(8, seeds=seeds, known=known, known_mask=torch.zeros_like(known, dtype=torch.bool))
    assert torch.equal(codes, prior.sample(8, seeds=seeds))


@each_prior_on(IMAGE, GRIDS)
def test_what_stands_outside_of_the_mask_means_nothing(name, layout):
    prior, mask = tiny_prior(name, layout), random_mask(layout, 8)
    known = random_codes(layout, 8)
    expected = prior.sample(8, seeds=torch.arange(8), known=known, known_mask=mask)
    for nonsense in (random_codes(layout, 8), torch.full_like(known, -1), torch.full_like(known, 99)):
        given = known.where(mask, nonsense)
        assert torch.equal(prior.sample(8, seeds=torch.arange(8), known=given, known_mask=mask), expected)


@torch.no_grad()
@each_prior
def test_a_code_after_known_ones_has_its_probability_given_them(name):
    prior, n = tiny_prior(name, ROW), 4000
    known, mask = torch.tensor([[[2, 0, 0]]]), torch.tensor([[[True, True, False]]])
    codes = prior.sample(n, seeds=torch.arange(n), known=known.expand(n, 1, 3), known_mask=mask.expand(n, 1, 3))
    logits = prior.logits(known, ~mask) if name == "maskgit" else prior.logits(known)
    assert_shares(codes[..., 2:], CodeLayout.single((1, 1), 3), logits[0, 2].softmax(-1))


@torch.no_grad()
def test_maskgit_draws_a_code_given_the_known_ones_on_both_sides():
    prior, n = tiny_prior("maskgit", ROW), 4000
    known, mask = torch.tensor([[[2, 0, 1]]]), torch.tensor([[[True, False, True]]])
    codes = prior.sample(n, seeds=torch.arange(n), known=known.expand(n, 1, 3), known_mask=mask.expand(n, 1, 3))
    assert_shares(codes[..., 1:2], CodeLayout.single((1, 1), 3), prior.logits(known, ~mask)[0, 1].softmax(-1))


@each_prior_on(IMAGE, GRIDS, DEEP)
def test_a_known_code_changes_later_draws(name, layout):
    prior, mask = tiny_prior(name, layout), beginnings(layout, 1).expand(64, *layout.shape)
    known = torch.zeros(64, *layout.shape, dtype=torch.int64)
    zero, one = (
        prior.sample(64, seeds=torch.arange(64), known=first, known_mask=mask).flatten(1)
        for first in (known, known + 1)
    )
    assert not torch.equal(zero[:, 1:], one[:, 1:])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@each_prior_on(IMAGE, GRIDS)
def test_an_image_with_known_codes_does_not_depend_on_its_batch(name, layout, guidance_scale):
    prior = tiny_prior(name, layout, num_classes=3)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7) + 50
    known, mask = random_codes(layout, 7), random_mask(layout, 7)

    def draw(i: Tensor) -> Tensor:
        given = {"known": known[i], "known_mask": mask[i], "guidance_scale": guidance_scale}
        return prior.sample(len(i), labels[i], seeds=seeds[i], **given)

    whole = draw(torch.arange(7))
    for size in (1, 3):
        assert torch.equal(torch.cat([draw(i) for i in torch.arange(7).split(size)]), whole)


INTERVALS = [
    {},
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_schedule": "cosine", "temperature": [1.5, 0.5]},
    {"guidance_scale": 3.0, "guidance_interval": [0.3, 0.6], "top_k": 4},
    {"guidance_scale": 3.0, "guidance_interval": [0.0, 0.2]},
]


@pytest.mark.parametrize("options", INTERVALS, ids=str)
@each_prior_on(IMAGE, GRIDS, DEEP, names=CODE_BY_CODE)
def test_reading_a_known_beginning_at_once_equals_recomputing_everything_at_each_code(name, layout, options):
    prior = tiny_prior(name, layout, num_classes=3).double()
    labels, seeds = torch.tensor([0, 1, 2, 0] * 4), torch.arange(16)
    L, known = layout.num_codes, random_codes(layout, 16)
    for mask in (
        beginnings(layout, *[L // 2] * 16),
        beginnings(layout, *[1, 2, 3, L - 1] * 4),
        random_mask(layout, 16),
    ):
        codes = prior.sample(16, labels, seeds=seeds, known=known, known_mask=mask, **options)
        assert torch.equal(codes, sample_without_cache(prior, seeds, labels, known, mask, **options))


@pytest.mark.parametrize("name", CODE_BY_CODE)
def test_a_known_beginning_is_read_in_one_pass(name):
    prior, known = tiny_prior(name, IMAGE, num_classes=2), random_codes(IMAGE, 4)
    labels, given = torch.tensor([0, 1, 0, 1]), {"known": known, "known_mask": beginnings(IMAGE, 10, 10, 12, 16)}
    with batch_sizes(prior) as seen:
        prior.sample(4, labels, **given)
    assert seen == [4] * 6
    # Guidance that ends within the beginning costs nothing.
    with batch_sizes(prior) as seen:
        prior.sample(4, labels, **given, guidance_scale=2.0, guidance_interval=[0, 0.5])
    assert seen == [4] * 6


def test_gpt_computes_every_position_once():
    prior, known = tiny_prior("gpt", IMAGE, num_classes=2), random_codes(IMAGE, 4)
    positions: list[int] = []
    handle = prior.transformer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[1]))
    for length in (0, 1, 10, 15):
        positions.clear()
        prior.sample(4, known=known, known_mask=beginnings(IMAGE, length).expand(4, 4, 4))
        assert positions == [length + 1] + [1] * (15 - length)
    handle.remove()


def test_pixelcnn_computes_every_row_once_and_those_of_a_known_beginning_together():
    prior, known = tiny_prior("pixelcnn", IMAGE, num_classes=2), random_codes(IMAGE, 4)
    rows: list[int] = []
    # The gates' biases come from a context of (B, rows, 1, width), or (B, 1, width) for one row.
    handle = prior.layers[0].biases.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0][:, ..., 0, 0].numel() // 4)
    )
    for length, expected in ((0, [1, 1, 1, 1]), (3, [1, 1, 1, 1]), (4, [1, 1, 1, 1]), (11, [2, 1, 1]), (15, [3, 1])):
        rows.clear()
        prior.sample(4, known=known, known_mask=beginnings(IMAGE, length).expand(4, 4, 4))
        assert rows == expected
    handle.remove()


@pytest.mark.parametrize("name", CODE_BY_CODE)
def test_after_the_interval_of_guidance_the_conditional_half_is_computed_alone(name):
    prior, labels = tiny_prior(name, IMAGE, num_classes=2).double(), torch.tensor([0, 1, 0, 1])
    options = {"guidance_scale": 4.0, "guidance_interval": [0.2, 0.6]}
    with batch_sizes(prior) as seen:
        codes = prior.sample(4, labels, seeds=torch.arange(4), **options)
    # Steps 3 to 9 of 0 to 15 are guided; the cache of those before is whole.
    assert seen == [8] * 10 + [4] * 6
    assert torch.equal(codes, sample_without_cache(prior, torch.arange(4), labels, **options))
    assert not torch.equal(codes, prior.sample(4, labels, seeds=torch.arange(4)))
    with batch_sizes(prior) as seen:
        prior.sample(4, labels, guidance_scale=1.0)
    assert seen == [4] * 16


@each_prior
def test_known_codes_without_a_mask_and_a_mask_without_codes_are_refused(name):
    prior, known = tiny_prior(name, IMAGE), random_codes(IMAGE, 2)
    for given in ({"known": known}, {"known_mask": torch.ones_like(known, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="known codes come with a known_mask of the same shape: give both"):
            prior.sample(2, **given)


@pytest.mark.parametrize(
    ("shape", "mask_shape", "dtype"),
    [
        ((2, 16), (2, 16), torch.bool),
        ((3, 4, 4), (3, 4, 4), torch.bool),
        ((2, 4, 4), (2, 4), torch.bool),
        ((4, 4), (4, 4), torch.bool),
        ((2, 4, 4), (2, 4, 4), torch.int64),
        ((2, 4, 4), (2, 4, 4), torch.float32),
    ],
    ids=str,
)
@each_prior
def test_known_codes_and_masks_of_another_shape_or_type_are_refused(name, shape, mask_shape, dtype):
    known, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(mask_shape).to(dtype)
    with pytest.raises(ValueError, match=r"known and known_mask \(bool\) have shape \(2, 4, 4\), got .* and .*"):
        tiny_prior(name, IMAGE).sample(2, known=known, known_mask=mask)


@each_prior_on(IMAGE, GRIDS)
def test_a_known_code_out_of_its_grid_is_refused_under_the_mask_only(name, layout):
    prior, grid = tiny_prior(name, layout), layout.grids[0]
    known, mask = torch.zeros(1, *layout.shape, dtype=torch.int64), beginnings(layout, 1)
    known.view(-1)[1] = grid.vocab_size
    assert prior.sample(1, known=known, known_mask=mask).view(-1)[0] == 0
    message = re.escape(f"codes of [{grid}] are in [0, {grid.vocab_size}), got 0 to {grid.vocab_size}")
    with pytest.raises(ValueError, match=message):
        prior.sample(1, known=known, known_mask=beginnings(layout, 2))


@torch.no_grad()
def posterior(prior: Prior) -> tuple[Tensor, Tensor]:
    """p(codes 0 and 1) and p(codes 0 and 1 | code 2 = 1) of a prior of `ROW`, `(9,)` each."""
    joint = prior.log_prob(every_image(ROW)).exp().view(9, 3)
    return joint.sum(1), joint[:, 1] / joint[:, 1].sum()


@pytest.mark.parametrize(("name", "seed"), [("gpt", 7), ("pixelcnn", 28)])
def test_with_more_candidates_codes_before_a_known_one_approach_their_probability_given_it(name, seed):
    torch.manual_seed(seed)  # of weights under which the last code tells much about those before it
    prior, before = tiny_prior(name, ROW), CodeLayout.single((1, 2), 3)
    alone, exact = posterior(prior)
    assert (alone - exact).abs().sum() > 0.3
    distances = []
    for n, num_images in ((1, 4000), (4, 2000), (32, 1000)):
        known = torch.tensor([0, 0, 1]).expand(num_images, 1, 3)
        given = {"known": known, "known_mask": torch.tensor([False, False, True]).expand(num_images, 1, 3)}
        codes = prior.sample(num_images, seeds=torch.arange(num_images), **given, num_candidates=n)
        assert (codes[..., 2] == 1).all()
        distances.append((shares(codes[..., :2], before) - exact).abs().sum())
        if n == 1:
            assert_shares(codes[..., :2], before, alone)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.15


@pytest.mark.parametrize("name", CODE_BY_CODE)
def test_candidates_of_an_image_do_not_depend_on_the_batch(name):
    prior = tiny_prior(name, IMAGE, num_classes=3)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7) + 50
    known, mask = random_codes(IMAGE, 7), random_mask(IMAGE, 7)

    def draw(i: Tensor) -> Tensor:
        given = {"known": known[i], "known_mask": mask[i], "num_candidates": 4, "guidance_scale": 1.5}
        return prior.sample(len(i), labels[i], seeds=seeds[i], **given)

    whole = draw(torch.arange(7))
    assert torch.equal(whole[mask], known[mask])
    for size in (1, 3):
        assert torch.equal(torch.cat([draw(i) for i in torch.arange(7).split(size)]), whole)


@torch.no_grad()
def choice_among_candidates(prior: Prior, seeds: Tensor, labels: Tensor, known: Tensor, mask: Tensor, n: int) -> Tensor:
    """The definition of `num_candidates`: n fills of each image, one drawn by the likelihood of its known codes."""
    candidates, log_likelihoods = [], []
    for number in range(n):
        codes = sample_without_cache(prior, mix(seeds, number), labels, known, mask, guidance_scale=2.0)
        log_p = prior.logits(codes, labels).log_softmax(-1).gather(-1, codes.flatten(1)[..., None])[..., 0]
        candidates.append(codes)
        log_likelihoods.append((log_p * mask.flatten(1)).sum(1))
    chosen = draw(torch.stack(log_likelihoods, dim=1), uniform(mix(seeds, n), 0))
    # Fills are told apart by known codes after unknown ones; without any the first is kept.
    flat = mask.flatten(1)
    later = (flat[:, None, :] & ~flat[:, :, None]).triu(1).any(-1).any(-1)
    return torch.stack(candidates, dim=1)[torch.arange(len(seeds)), chosen.where(later, 0)]


@each_prior_on(CodeLayout.single((2, 3), 5), FALLING, names=CODE_BY_CODE)
def test_candidates_are_weighed_without_guidance_by_the_known_codes_alone(name, layout):
    prior = tiny_prior(name, layout, num_classes=2).double()
    labels, seeds = torch.tensor([0, 1] * 32), torch.arange(64)
    known, mask = random_codes(layout, 64), random_mask(layout, 64)
    given = {"known": known, "known_mask": mask, "guidance_scale": 2.0}
    codes = prior.sample(64, labels, seeds=seeds, **given, num_candidates=3)
    assert torch.equal(codes, choice_among_candidates(prior, seeds, labels, known, mask, 3))
    assert not torch.equal(codes, prior.sample(64, labels, seeds=mix(seeds, 0), **given))


@pytest.mark.parametrize("num_candidates", [1, 4])
def test_a_pixelcnn_fills_in_each_image_given_its_own_condition(num_candidates):
    prior = tiny_prior("pixelcnn", GIVEN, num_classes=3, grid=1)
    codes, condition = prior.split_condition(random_codes(GIVEN, 7))
    labels, seeds, mask = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7), random_mask(prior.code_layout, 7)

    def draw_images(i: Tensor, conditions: Tensor) -> Tensor:
        given = {"known": codes[i], "known_mask": mask[i], "condition": conditions[i], "guidance_scale": 1.5}
        return prior.sample(len(i), labels[i], seeds=seeds[i], **given, num_candidates=num_candidates)

    whole = draw_images(torch.arange(7), condition)
    assert torch.equal(whole[mask], codes[mask])
    assert not torch.equal(draw_images(torch.arange(7), condition.flip(0)), whole)
    for size in (1, 3):
        assert torch.equal(torch.cat([draw_images(i, condition) for i in torch.arange(7).split(size)]), whole)


@pytest.mark.parametrize("name", CODE_BY_CODE)
def test_candidates_cost_nothing_without_known_codes_and_the_image_stays_the_same_beside_others(name, monkeypatch):
    prior, seeds = tiny_prior(name, IMAGE), torch.arange(5)
    known, mask = random_codes(IMAGE, 5), random_mask(IMAGE, 5)
    mask[1::2] = False
    whole = prior.sample(5, seeds=seeds, known=known, known_mask=mask, num_candidates=4)
    rows: list[int] = []
    draw_rows = type(prior)._draw_rows
    monkeypatch.setattr(
        type(prior), "_draw_rows", lambda *arguments: rows.append(len(arguments[1].seeds)) or draw_rows(*arguments)
    )
    assert torch.equal(prior.sample(2, seeds=seeds[1::2], num_candidates=4), whole[1::2])
    assert rows == [2]


@pytest.mark.parametrize("name", CODE_BY_CODE)
def test_the_candidate_that_is_kept_makes_the_known_code_likely(name):
    prior, n = tiny_prior(name, IMAGE), 200
    known, mask = torch.zeros(n, 4, 4, dtype=torch.int64), ~beginnings(IMAGE, 8).expand(n, 4, 4)
    one, many = (
        prior.sample(n, seeds=torch.arange(n), known=known, known_mask=mask, num_candidates=count) for count in (1, 32)
    )
    with torch.no_grad():
        one, many = (prior.logits(codes).log_softmax(-1)[:, 8:, 0].sum(1).mean() for codes in (one, many))
    assert many > one + 1


@pytest.mark.parametrize("count", [0, 2.5])
def test_a_number_of_candidates_below_one_is_refused(count):
    with pytest.raises(ValueError, match=f"num_candidates should be integer.*, got {count}"):
        tiny_prior("gpt", ROW).sample(1, num_candidates=count)


def test_maskgit_sees_known_codes_everywhere_and_has_no_candidates():
    with pytest.raises(TypeError, match="num_candidates"):
        tiny_prior("maskgit", ROW).sample(1, num_candidates=2)
