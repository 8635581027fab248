"""The orders in which MaskGIT reveals codes, and the passes that it needs for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prior_cases import (
    DEEP,
    GRIDS,
    IMAGE,
    LAYOUTS,
    LINE,
    ROW,
    assert_shares,
    batch_sizes,
    every_image,
    masks,
    random_codes,
    tiny_prior,
)
from torch import Tensor, nn

from configs.layout import CodeLayout
from prior.maskgit import MaskGIT
from prior.sampling import guide
from prior.unmasking import halton_order, masked_counts

ORDERS = ["confidence", "halton"]
each_order = pytest.mark.parametrize("order", ORDERS)
GREEDY: dict[str, dict[str, Any]] = {
    "confidence": {"order": "confidence", "temperature": 0.0, "choice_temperature": 0.0},
    "halton": {"order": "halton", "temperature": 0.0},
}


@pytest.mark.parametrize("steps", [1, 3, 12, 100])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_order
def test_every_code_is_revealed_exactly_once_in_as_many_passes_as_steps_or_codes(order, layout, steps):
    prior, L = tiny_prior("maskgit", layout), layout.num_codes
    with masks(prior) as seen:
        codes = prior.sample(5, seeds=torch.arange(5), order=order, steps=steps)
    assert len(seen) == min(steps, L)
    assert seen[0].all()
    after = [*seen[1:], torch.zeros(5, L, dtype=torch.bool)]
    revealed = torch.stack([before & ~then for before, then in zip(seen, after, strict=True)])
    assert not any((then & ~before).any() for before, then in zip(seen, after, strict=True))
    assert (revealed.sum(0) == 1).all()
    assert (revealed.sum(2) >= 1).all()
    schedule = "cosine" if order == "confidence" else "arccos"
    counts = masked_counts(schedule, steps, torch.full((5,), L))[: len(after)]
    assert torch.equal(torch.stack(after).sum(2), counts)
    assert codes.shape == (5, *layout.shape)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "arccos", "root"])
@each_order
def test_a_schedule_says_how_many_codes_are_still_masked(order, schedule):
    prior = tiny_prior("maskgit", IMAGE)
    with masks(prior) as seen:
        prior.sample(2, seeds=torch.arange(2), order=order, steps=5, schedule=schedule)
    expected = masked_counts(schedule, 5, torch.full((2,), 16))[:-1]
    assert torch.equal(torch.stack(seen[1:]).sum(2), expected)


@each_order
def test_around_known_codes_the_schedule_is_that_of_the_unknown_ones(order):
    prior, known = tiny_prior("maskgit", IMAGE), random_codes(IMAGE, 4)
    mask = torch.arange(16).view(1, 4, 4) >= torch.tensor([16, 12, 7, 2]).view(4, 1, 1)  # so many are unknown
    with masks(prior) as seen:
        prior.sample(4, seeds=torch.arange(4), order=order, steps=5, schedule="linear", known=known, known_mask=mask)
    expected = masked_counts("linear", 5, torch.tensor([16, 12, 7, 2]))[:-1]
    assert torch.equal(torch.stack(seen[1:]).sum(2), expected)
    assert torch.equal(seen[0].view_as(mask), ~mask)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_halton_reveals_codes_in_the_halton_order(layout):
    prior, L = tiny_prior("maskgit", layout), layout.num_codes
    with masks(prior) as seen:
        prior.sample(3, seeds=torch.arange(3), order="halton", steps=5)
    for mask in seen:
        done = L - mask.sum(1)
        for image, n in enumerate(done.tolist()):
            assert set((~mask[image]).nonzero().flatten().tolist()) == set(halton_order(layout)[:n].tolist())


def test_revealed_codes_stay():
    prior = tiny_prior("maskgit", IMAGE)
    rows: list[Tensor] = []
    handle = prior.code_embedding.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    codes = prior.sample(3, seeds=torch.arange(3), steps=6).flatten(1)
    handle.remove()
    assert len(rows) == 6
    for seen in rows:
        visible = seen < 16
        assert torch.equal(seen[visible], codes[visible])


@torch.no_grad()
def test_one_code_after_the_other_in_halton_order_has_the_probabilities_of_that_order():
    prior, n = tiny_prior("maskgit", ROW), 4000
    images = every_image(ROW)
    masked, log_p = torch.ones_like(images, dtype=torch.bool), torch.zeros(len(images))
    for j in halton_order(ROW).tolist():
        log_p += prior.logits(images, masked).log_softmax(-1)[:, j].gather(1, images[:, 0, j : j + 1])[:, 0]
        masked[:, 0, j] = False
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-5)
    assert_shares(prior.sample(n, seeds=torch.arange(n), order="halton", steps=3), ROW, log_p.exp())


@torch.no_grad()
def test_each_step_has_its_own_temperature():
    prior, n = tiny_prior("maskgit", ROW), 4000
    codes = prior.sample(n, seeds=torch.arange(n), order="halton", steps=3, temperature=[4, 2, 0])
    first, second, third = halton_order(ROW).tolist()
    masked = torch.ones_like(codes, dtype=torch.bool)
    p = (prior.logits(codes[:1], masked[:1])[0, first] / 4).softmax(-1)
    assert_shares(codes[..., first : first + 1], CodeLayout.single((1, 1), 3), p)
    masked[..., first] = False
    p = (prior.logits(codes, masked)[:, second] / 2).softmax(-1)  # (n, 3)
    drawn = F.one_hot(codes[:, 0, second], 3)
    assert ((drawn - p).sum(0).abs() < 5 * (p * (1 - p)).sum(0).sqrt()).all()
    masked[..., second] = False
    assert torch.equal(codes[:, 0, third], prior.logits(codes, masked)[:, third].argmax(-1))


@torch.no_grad()
@each_order
def test_one_step_draws_every_code_on_its_own(order):
    prior, n = tiny_prior("maskgit", ROW, num_classes=2), 4000
    images, labels = every_image(ROW), torch.ones(n, dtype=torch.int64)
    log_p = prior.logits(images, torch.ones_like(images, dtype=torch.bool), labels[: len(images)]).log_softmax(-1)
    p = log_p.gather(-1, images.view(-1, 3, 1))[..., 0].sum(1).exp()
    assert_shares(prior.sample(n, labels, seeds=torch.arange(n), order=order, steps=1), ROW, p)


@torch.no_grad()
def greedy(prior: MaskGIT, order: str, steps: int, labels: Tensor, **sampling: Any) -> Tensor:
    """The definition of filling in without randomness, image by image: the likeliest codes, the surest ones first."""
    layout, options = prior.code_layout, prior.sampling_options(steps=steps, **sampling)
    L, schedule = layout.num_codes, "cosine" if order == "confidence" else "arccos"
    images = []
    for label in labels:
        codes, left = torch.zeros(1, L, dtype=torch.int64), list(range(L))
        for step, count in enumerate(masked_counts(schedule, steps, torch.tensor([L]))[:, 0].tolist()):
            mask = torch.tensor([[j in left for j in range(L)]])
            shape = (1, *layout.shape)
            logits = prior.logits(codes.view(shape), mask.view(shape), label[None])
            without = prior.logits(codes.view(shape), mask.view(shape))
            if (scale := options.guidance_at(step, steps)) != 1:
                logits = guide(logits, without, scale)
            log_p, best = prior.hide_foreign_codes(logits, slice(None))[0].log_softmax(-1).max(-1)
            queue = halton_order(layout).tolist() if order == "halton" else log_p.argsort(descending=True).tolist()
            for j in [j for j in queue if j in left][: len(left) - count]:
                codes[0, j] = best[j]
                left.remove(j)
        images.append(codes)
    return torch.cat(images).view(-1, *layout.shape)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "guidance_schedule": "linear"},
        {"guidance_scale": 4.0, "guidance_interval": [0.3, 0.7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [IMAGE, GRIDS], ids=str)
@each_order
def test_sampling_without_randomness_equals_its_definition(order, layout, sampling):
    prior, labels = tiny_prior("maskgit", layout, num_classes=3), torch.tensor([0, 1, 2, 0])
    codes = prior.sample(4, labels, seeds=torch.arange(4), steps=5, **GREEDY[order], **sampling)
    assert torch.equal(codes, greedy(prior, order, 5, labels, **sampling))
    # The last image has the class of the first, and another seed.
    assert torch.equal(codes[0], codes[3])


def test_the_order_of_confidence_alone_has_noise_by_default():
    prior = tiny_prior("maskgit", IMAGE)
    options = {"temperature": 0.0, "steps": 8}
    assert len(prior.sample(16, seeds=torch.arange(16), **options).unique(dim=0)) > 1
    assert len(prior.sample(16, seeds=torch.arange(16), **options, choice_temperature=0).unique(dim=0)) == 1
    default, explicit = (prior.sample(16, seeds=torch.arange(16), **o) for o in ({}, {"choice_temperature": 4.5}))
    assert torch.equal(default, explicit)


@torch.no_grad()
def test_a_code_is_revealed_with_the_softmax_of_its_confidence_over_a_temperature_that_falls():
    prior, n, choice_temperature = tiny_prior("maskgit", ROW), 4000, 0.4
    with masks(prior) as seen:
        codes = prior.sample(
            n, seeds=torch.arange(n), steps=3, temperature=0, choice_temperature=choice_temperature
        ).flatten(1)
    orders = [(~seen[1]).int().argmax(1), (seen[1] & ~seen[2]).int().argmax(1)]
    places = torch.arange(n)
    # Gumbel noise of weight w makes a maximum a draw from softmax(confidence / w); w falls to 0 at the last step.
    for step, weight in ((0, 2 / 3), (1, 1 / 3)):
        confidence = prior.logits(codes.view(n, 1, 3), seen[step]).log_softmax(-1).max(-1).values
        p = (confidence / (weight * choice_temperature)).masked_fill(~seen[step], float("-inf")).softmax(-1)
        drawn = torch.zeros(n, 3)
        drawn[places, orders[step]] = 1
        assert ((drawn - p).sum(0).abs() < 5 * (p * (1 - p)).sum(0).sqrt()).all()


def test_a_high_choice_temperature_reveals_places_at_random():
    prior, n = tiny_prior("maskgit", LINE), 3000
    with masks(prior) as seen:
        prior.sample(n, seeds=torch.arange(n), steps=6, choice_temperature=1e6)
    share = (~seen[1]).float().mean(0)
    assert ((share - 1 / 6).abs() < 5 * math.sqrt(1 / 6 * 5 / 6 / n)).all()


@torch.no_grad()
def test_what_is_drawn_depends_neither_on_the_noise_of_the_order_nor_on_earlier_steps():
    prior, n = tiny_prior("maskgit", ROW), 3000
    prior.head.weight *= 0.1  # nearly even probabilities
    for block in prior.transformer.blocks:  # codes no longer depend on each other
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.feed_forward.out.weight)
    empty = torch.zeros(1, 1, 3, dtype=torch.int64)
    probabilities = prior.logits(empty, torch.ones_like(empty, dtype=torch.bool))[0].softmax(-1)
    # With noise alone any place comes first; without, an unlikely draw waits for the last step, and is drawn anew.
    for choice_temperature, step in ((1e6, 0), (0.0, 2)):
        with masks(prior) as seen:
            codes = prior.sample(n, seeds=torch.arange(n), steps=3, choice_temperature=choice_temperature)
        for j in range(3):
            here = (~seen[1] if step == 0 else seen[2])[:, j]
            assert here.sum() > 100
            assert_shares(codes[here, :, j : j + 1], CodeLayout.single((1, 1), 3), probabilities[j])


def test_a_choice_temperature_of_zero_reveals_the_surest_of_the_drawn_codes():
    prior = tiny_prior("maskgit", IMAGE)
    with masks(prior) as seen, torch.no_grad():
        codes = prior.sample(8, seeds=torch.arange(8), steps=16, choice_temperature=0, temperature=0)
        log_p = prior.logits(codes, torch.ones_like(codes, dtype=torch.bool)).log_softmax(-1).max(-1).values
    assert torch.equal((~seen[1]).nonzero()[:, 1], log_p.argmax(1))


def test_a_choice_temperature_with_the_halton_order_is_refused():
    with pytest.raises(ValueError, match=r"choice_temperature=2.0 is the noise of order=confidence, but order=halton"):
        tiny_prior("maskgit", ROW).sample(2, order="halton", choice_temperature=2.0)


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"guidance_scale": 3.0}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("layout", [DEEP, GRIDS], ids=str)
@each_order
def test_no_code_of_another_grid_is_drawn(order, layout, options):
    prior, labels = tiny_prior("maskgit", layout, num_classes=2), torch.tensor([0, 1] * 100)
    codes = prior.sample(200, labels, seeds=torch.arange(200), order=order, steps=4, **options)
    for grid, part in zip(layout.grids, layout.split(codes), strict=True):
        assert part.min() == 0
        assert part.max() == grid.vocab_size - 1


@pytest.mark.parametrize("layout", [IMAGE, GRIDS], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@each_order
def test_an_image_does_not_depend_on_its_batch(order, guidance_scale, layout):
    prior = tiny_prior("maskgit", layout, num_classes=3)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7) + 50
    known, mask = (
        random_codes(layout, 7),
        torch.rand(7, *layout.shape) < torch.linspace(0, 1, 7).view(-1, *[1] * len(layout.shape)),
    )
    options = {"order": order, "guidance_scale": guidance_scale, "steps": 5}
    whole = prior.sample(7, labels, seeds=seeds, known=known, known_mask=mask, **options)
    for size in (1, 3):
        parts = [
            prior.sample(len(i), labels[i], seeds=seeds[i], known=known[i], known_mask=mask[i], **options)
            for i in torch.arange(7).split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4, 4, 4, 4, 4]),
        ({"guidance_scale": 2.0}, [8, 8, 8, 8, 8]),
        ({"guidance_scale": 2.0, "guidance_interval": [0.0, 0.5]}, [8, 8, 8, 4, 4]),
        ({"guidance_scale": 2.0, "guidance_interval": [0.5, 0.5]}, [8, 8, 8, 4, 4]),
        ({"guidance_scale": 2.0, "guidance_interval": [0.1, 0.2]}, [4, 4, 4, 4, 4]),
    ],
    ids=str,
)
@each_order
def test_guidance_doubles_the_batch_up_to_the_last_guided_step(order, options, expected):
    prior, labels = tiny_prior("maskgit", IMAGE, num_classes=2), torch.tensor([0, 1, 0, 1])
    with batch_sizes(prior) as seen:
        prior.sample(4, labels, order=order, steps=5, **options)
    assert seen == expected
