"""The contract of every prior in the table: a distribution, its loss, and its sampler."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor, nn

from configs.layout import CodeGrid, CodeLayout
from configs.loading import options_of
from configs.random_streams import uniform
from prior import PRIOR_CONFIGS, PRIORS, Prior, build_prior
from prior.sampling import draw, filter_logits

TINY = {"width": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "label_dropout": 0.1}

ROW = CodeLayout.single((1, 2), 3)
MIXED = CodeLayout((CodeGrid((1, 1), 2), CodeGrid((1, 2), 3)))
DEEP = CodeLayout.single((1, 2), 2, depth=2)
MIXED_DEEP = CodeLayout((CodeGrid((1, 2), 3), CodeGrid((2, 2), 5, 2)))
IMAGE = CodeLayout.single((4, 4), 16)
TALL = CodeLayout.single((3, 2), 5)
LAYOUTS = [ROW, TALL, MIXED, DEEP, MIXED_DEEP, CodeLayout.single((6,), 7), CodeLayout.single((2, 2, 3), 4)]
OF_ONE_GRID = {"pixelcnn"}
"""Priors that model one 2-D grid of depth 1; the others model every layout."""


def can_model(name: str, layout: CodeLayout) -> bool:
    one_grid = len(layout.grids) == 1 and len(layout.grids[0].shape) == 2 and layout.grids[0].depth == 1
    return one_grid or name not in OF_ONE_GRID


def each_prior_on(*layouts: CodeLayout):
    """Run a test for every prior on those of the layouts that it can model."""
    cases = [(name, layout) for name in PRIORS for layout in layouts if can_model(name, layout)]
    return pytest.mark.parametrize(("name", "layout"), cases, ids=str)


def tiny(name: str, layout: CodeLayout, num_classes: int = 0, **options: object) -> Prior:
    """A prior in eval mode with those of the tiny options that it has, and weights that give uneven probabilities."""
    known = options_of(PRIOR_CONFIGS[name])
    model = {"name": name, **{k: v for k, v in (TINY | options).items() if k in known}}
    prior = build_prior(model, layout, num_classes=num_classes).eval()
    for parameter in prior.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 / math.sqrt(parameter[0].numel()))  # mostly 0.5: the width is 16
    return prior


def random_codes(layout: CodeLayout, batch_size: int) -> Tensor:
    parts = [torch.randint(0, grid.vocab_size, (batch_size, grid.num_codes)) for grid in layout.grids]
    return torch.cat(parts, dim=1).view(batch_size, *layout.shape)


def vocab_sizes(layout: CodeLayout) -> list[int]:
    """The K of every code."""
    return [grid.vocab_size for grid in layout.grids for _ in range(grid.num_codes)]


@each_prior_on(ROW, MIXED, DEEP)
@torch.no_grad()
def test_the_probabilities_of_all_images_sum_to_one(name, layout):
    prior = tiny(name, layout, num_classes=2)
    every = torch.tensor(list(itertools.product(*map(range, vocab_sizes(layout))))).view(-1, *layout.shape)
    for labels in (None, torch.zeros(len(every), dtype=torch.int64), torch.full((len(every),), 2)):
        log_prob = prior.log_prob(every, labels)
        assert log_prob.shape == (len(every),)
        assert log_prob.std() > 0.1
        torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-5)


@each_prior_on(*LAYOUTS)
@torch.no_grad()
def test_the_evaluation_loss_is_the_mean_negative_log_probability_of_a_code(name, layout):
    prior = tiny(name, layout, num_classes=3)
    codes, labels = random_codes(layout, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    for given in (labels, None):
        expected = -prior.log_prob(codes, given).mean() / layout.num_codes
        torch.testing.assert_close(prior(codes, given).loss, expected, rtol=1e-5, atol=1e-5)


@each_prior_on(*LAYOUTS)
@torch.no_grad()
def test_a_code_changes_only_the_logits_of_later_codes(name, layout):
    prior = tiny(name, layout)
    codes = random_codes(layout, 3)
    before = prior.logits(codes)
    for j, K in enumerate(vocab_sizes(layout)):
        changed = codes.flatten(1).clone()
        changed[:, j] = (changed[:, j] + 1) % K
        after = prior.logits(changed.view_as(codes))
        torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], rtol=0, atol=1e-6)
        assert all(not torch.equal(after[:, i], before[:, i]) for i in range(j + 1, layout.num_codes))


@each_prior_on(MIXED, MIXED_DEEP)
@torch.no_grad()
def test_codes_of_other_grids_have_probability_zero(name, layout):
    prior = tiny(name, layout, num_classes=2)
    probabilities = prior.logits(random_codes(layout, 4)).softmax(-1)
    for j, K in enumerate(vocab_sizes(layout)):
        assert (probabilities[:, j, :K] > 0).all()
        assert (probabilities[:, j, K:] == 0).all()
    labels, seeds = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    for options in ({}, {"temperature": 3.0}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "top_p": 0.9}):
        for grid, part in zip(
            layout.grids, layout.split(prior.sample(200, labels, seeds=seeds, **options)), strict=True
        ):
            assert part.min() >= 0
            assert part.max() < grid.vocab_size


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in PRIORS for layout in LAYOUTS if not can_model(name, layout)],
    ids=str,
)
def test_a_layout_that_a_prior_cannot_model_is_refused(name, layout):
    with pytest.raises(
        ValueError, match=rf"^{name} models .*, but the codes are laid out as \[{re.escape(str(layout))}\]"
    ):
        tiny(name, layout)


@each_prior_on(MIXED)
def test_codes_of_another_shape_or_out_of_range_are_refused(name, layout):
    prior = tiny(name, layout)
    for verb in (prior, prior.log_prob):
        with pytest.raises(ValueError, match=r"codes of \[1x1 of 2 \+ 1x2 of 3\] have shape \(B, 3\), got"):
            verb(torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes of \[1x1 of 2\] are in \[0, 2\), got 2 to 2"):
            verb(torch.tensor([[2, 0, 0]]))
        with pytest.raises(ValueError, match=r"codes of \[1x2 of 3\] are in \[0, 3\), got -1 to 0"):
            verb(torch.tensor([[1, 0, -1]]))


@pytest.mark.parametrize("name", PRIORS)
def test_codes_of_one_grid_of_another_shape_or_out_of_range_are_refused(name):
    prior = tiny(name, ROW)
    for verb in (prior, prior.log_prob):
        with pytest.raises(ValueError, match=r"codes of \[1x2 of 3\] have shape \(B, 1, 2\), got"):
            verb(torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes of \[1x2 of 3\] are in \[0, 3\), got 0 to 3"):
            verb(torch.tensor([[[3, 0]]]))


def sample_without_cache(
    prior: Prior,
    labels: Tensor,
    seeds: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The definition of sampling: code j from the logits of the whole sequence, everything computed anew."""
    layout = prior.code_layout
    codes = torch.zeros(len(labels), layout.num_codes, dtype=torch.int64)
    for j in range(layout.num_codes):
        conditional = prior.logits(codes.view(-1, *layout.shape), labels)[:, j]
        unconditional = prior.logits(codes.view(-1, *layout.shape))[:, j]
        guided = unconditional + guidance_scale * (conditional - unconditional)
        logits = guided.where(conditional.isfinite(), float("-inf"))
        logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        codes[:, j] = draw(logits, uniform(seeds, j))
    return codes.view(-1, *layout.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 2},
        {"top_p": 0.7},
        {"temperature": 0.0},
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 1.5, "temperature": 1.2, "top_k": 3, "top_p": 0.9},
    ],
    ids=str,
)
@each_prior_on(MIXED_DEEP, CodeLayout.single((3, 3), 16))
@torch.no_grad()
def test_sampling_with_a_cache_equals_recomputing_everything(name, layout, options):
    prior = tiny(name, layout, num_classes=3).double()
    labels, seeds = torch.tensor([0, 1, 2, 3] * 8), torch.arange(32) * 1000
    sampled = prior.sample(32, labels, seeds=seeds, **options)
    assert sampled.dtype == torch.int64
    assert torch.equal(sampled, sample_without_cache(prior, labels, seeds, **options))


@pytest.mark.parametrize("name", PRIORS)
def test_samples_have_the_frequencies_of_log_prob(name):
    prior = tiny(name, ROW, num_classes=2)
    every = torch.tensor(list(itertools.product(range(3), range(3)))).view(-1, 1, 2)
    n = 4000
    for label in (0, 2):
        codes = prior.sample(n, torch.full((n,), label), seeds=torch.arange(n)).flatten(1)
        counts = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9)
        with torch.no_grad():
            p = prior.log_prob(every, torch.full((9,), label)).exp()
        # Five standard deviations of a binomial.
        assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("name", PRIORS)
def test_an_image_does_not_depend_on_its_batch(name, guidance_scale):
    prior = tiny(name, IMAGE, num_classes=3)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7) + 50
    whole = prior.sample(7, labels, seeds=seeds, guidance_scale=guidance_scale)
    for size in (1, 3):
        parts = [
            prior.sample(len(part), labels[part], seeds=seeds[part], guidance_scale=guidance_scale)
            for part in torch.arange(7).split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", PRIORS)
def test_equal_seeds_give_equal_images_and_different_seeds_different_ones(name):
    prior = tiny(name, IMAGE)
    seeds = torch.arange(20)
    codes = prior.sample(20, seeds=seeds, temperature=2.0)
    assert torch.equal(prior.sample(20, seeds=seeds, temperature=2.0), codes)
    assert len(codes.flatten(1).unique(dim=0)) == 20
    assert not torch.equal(prior.sample(20), prior.sample(20))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PRIORS)
def test_sampling_uses_no_dropout_and_leaves_the_mode_as_it_was(name, training):
    prior = tiny(name, IMAGE, dropout=0.5)
    expected = prior.sample(2, seeds=torch.arange(2))
    assert torch.equal(prior.train(training).sample(2, seeds=torch.arange(2)), expected)
    assert prior.training == training


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_label_dropout_hides_its_share_of_the_classes(name):
    prior = tiny(name, ROW, num_classes=2, label_dropout=0.3)
    n = 4000
    # All images are equal, so that the loss is the mean of two values, weighted by the share of each.
    codes, labels = torch.tensor([[0, 2]]).expand(n, 1, 2), torch.zeros(n, dtype=torch.int64)
    conditional, unconditional = prior(codes, labels).loss, prior(codes).loss
    assert (conditional - unconditional).abs() > 0.1
    prior.train()
    for seeds in (torch.arange(n), None):
        share = (prior(codes, labels, seeds=seeds).loss - conditional) / (unconditional - conditional)
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


@pytest.mark.parametrize(("rate", "hidden"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_label_dropout_of_zero_hides_no_class_and_of_one_every_class(name, rate, hidden):
    prior = tiny(name, IMAGE, num_classes=2, label_dropout=rate)
    codes, labels = random_codes(IMAGE, 8), torch.tensor([0, 1] * 4)
    expected = prior(codes, None if hidden else labels).loss
    assert torch.equal(prior.train()(codes, labels, seeds=torch.arange(8)).loss, expected)


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_label_dropout_belongs_to_an_image(name):
    prior = tiny(name, IMAGE, num_classes=2, label_dropout=0.5).train()
    codes, labels, seeds = random_codes(IMAGE, 16), torch.tensor([0, 1] * 8), torch.arange(16)
    loss = prior(codes, labels, seeds=seeds).loss
    assert torch.equal(prior(codes, labels, seeds=seeds).loss, loss)
    parts = [prior(codes[i], labels[i], seeds=seeds[i]).loss for i in torch.arange(16).split(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-5, atol=1e-6)
    assert not torch.equal(prior(codes, labels, seeds=seeds + 16).loss, loss)


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_evaluation_hides_no_class(name):
    prior = tiny(name, IMAGE, num_classes=2, label_dropout=1.0)
    codes, labels = random_codes(IMAGE, 8), torch.tensor([0, 1] * 4)
    assert not torch.equal(prior(codes, labels).loss, prior(codes).loss)


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_the_class_after_the_last_means_no_class(name):
    prior = tiny(name, IMAGE, num_classes=3)
    codes, none = random_codes(IMAGE, 4), torch.full((4,), 3)
    assert torch.equal(prior.log_prob(codes, none), prior.log_prob(codes))
    seeds = torch.arange(4)
    assert torch.equal(prior.sample(4, none, seeds=seeds), prior.sample(4, seeds=seeds))


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_without_labels_or_without_label_dropout_is_refused(name):
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs labels to guide towards"):
        tiny(name, ROW, num_classes=3).sample(2, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a prior trained with label dropout"):
        tiny(name, ROW, num_classes=3, label_dropout=0.0).sample(2, torch.tensor([0, 1]), guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature should be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature should be 0 or more, got nan"),
        ({"top_k": 0}, "top_k should be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p should be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p should be above 0 and at most 1, got 1.1"),
        ({"guidance_scale": -1.0}, "guidance_scale should be 0 or more, got -1.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", PRIORS)
def test_sampling_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, ROW, num_classes=3).sample(2, torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("name", PRIORS)
def test_a_sampling_option_of_another_prior_is_refused(name):
    with pytest.raises(TypeError, match="nonsense"):
        tiny(name, ROW).sample(2, nonsense=1)


@pytest.mark.parametrize("labels", [[0, -1], [0, 4]], ids=str)
@pytest.mark.parametrize("name", PRIORS)
def test_labels_out_of_range_are_refused(name, labels):
    prior = tiny(name, ROW, num_classes=3)
    codes, labels = random_codes(ROW, 2), torch.tensor(labels)
    for verb in (lambda: prior(codes, labels), lambda: prior.log_prob(codes, labels), lambda: prior.sample(2, labels)):
        with pytest.raises(ValueError, match="this prior has classes 0 to 2, got"):
            verb()


@pytest.mark.parametrize("name", PRIORS)
def test_labels_of_another_number_than_the_images_are_refused(name):
    prior = tiny(name, ROW, num_classes=3)
    labels = torch.tensor([0, 1, 2])
    for verb in (lambda: prior(random_codes(ROW, 2), labels), lambda: prior.sample(2, labels)):
        with pytest.raises(ValueError, match=r"expected labels \(2,\), got \(3,\)"):
            verb()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PRIORS)
def test_an_unconditional_prior_refuses_labels(name, training):
    prior = tiny(name, ROW).train(training)
    codes, labels = random_codes(ROW, 2), torch.zeros(2, dtype=torch.int64)
    for verb in (lambda: prior(codes, labels), lambda: prior.log_prob(codes, labels), lambda: prior.sample(2, labels)):
        with pytest.raises(ValueError, match="trained without classes, but labels were given"):
            verb()


@each_prior_on(*LAYOUTS)
def test_a_training_step_on_any_layout_lowers_the_loss(name, layout):
    prior = tiny(name, layout, num_classes=3).train()
    codes, labels, seeds = random_codes(layout, 8), torch.randint(0, 3, (8,)), torch.arange(8)
    before = prior(codes, labels, seeds=seeds).loss
    assert before.dtype == torch.float32
    before.backward()
    for parameter_name, parameter in prior.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    torch.optim.SGD(prior.parameters(), lr=1e-3).step()
    assert prior(codes, labels, seeds=seeds).loss < before


@pytest.mark.parametrize("name", PRIORS)
def test_a_fresh_prior_starts_near_the_uniform_distribution(name):
    known = options_of(PRIOR_CONFIGS[name])
    prior = build_prior({"name": name, **{k: v for k, v in TINY.items() if k in known}}, IMAGE).eval()
    with torch.no_grad():
        loss = prior(random_codes(IMAGE, 8)).loss
    torch.testing.assert_close(loss, torch.tensor(16.0).log(), rtol=0, atol=0.1)


def test_an_unknown_prior_or_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'gtp'; did you mean 'gpt'\? choose one of"):
        build_prior({"name": "gtp"}, ROW)
    with pytest.raises(ValueError, match=r"unknown option of gpt 'model.widht'; did you mean 'model.width'\?"):
        build_prior({"name": "gpt", "widht": 4}, ROW)


def test_the_gpt_has_embedding_rows_of_its_own_for_each_grid_and_depth():
    prior = tiny("gpt", MIXED_DEEP)
    prior(torch.ones(1, MIXED_DEEP.num_codes, dtype=torch.int64)).loss.backward()
    seen = prior.code_embedding.weight.grad.any(1).nonzero().squeeze(1)
    assert seen.tolist() == [1, 5 + 1, 2 * 5 + 1]
