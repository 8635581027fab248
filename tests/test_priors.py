"""The contract of every prior in the table: a distribution, its loss, and its sampler."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prior_cases import (
    CODE_BY_CODE,
    GRIDS,
    IMAGE,
    LINE,
    ROW,
    assert_shares,
    each_prior_on,
    every_image,
    fresh_prior,
    labels_seen,
    random_codes,
    sample_without_cache,
    tiny_prior,
    vocab_sizes,
)

from configs.layout import CodeGrid, CodeLayout
from prior import PRIORS, Prior, build_prior

TALL = CodeLayout.single((3, 2), 5)
MIXED = CodeLayout((CodeGrid((1, 1), 2), CodeGrid((1, 2), 3)))
PAIRS = CodeLayout.single((1, 2), 2, depth=2)
LAYOUTS = [ROW, TALL, MIXED, PAIRS, GRIDS, LINE, CodeLayout.single((2, 2, 3), 4)]
each_prior = pytest.mark.parametrize("name", PRIORS)


def verbs(prior: Prior) -> list[Callable[..., Any]]:
    """What takes codes and labels: the loss, and how likely an image is, exactly or by a bound."""
    return [prior, prior.log_prob if prior.has_log_prob else prior.negative_log_prob_bound]


# The distribution and its loss


@each_prior_on(ROW, MIXED, PAIRS, names=CODE_BY_CODE)
@torch.no_grad()
def test_the_probabilities_of_all_images_sum_to_one(name, layout):
    prior, every = tiny_prior(name, layout, num_classes=2), every_image(layout)
    for labels in (None, torch.zeros(len(every), dtype=torch.int64), torch.full((len(every),), 2)):
        log_prob = prior.log_prob(every, labels)
        assert log_prob.shape == (len(every),)
        assert log_prob.std() > 0.1
        torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-5)


@each_prior_on(*LAYOUTS, names=CODE_BY_CODE)
@torch.no_grad()
def test_the_evaluation_loss_is_the_mean_negative_log_probability_of_a_code(name, layout):
    prior = tiny_prior(name, layout, num_classes=3)
    codes, labels = random_codes(layout, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    for given in (labels, None):
        expected = -prior.log_prob(codes, given).mean() / layout.num_codes
        output = prior(codes, given)
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.metrics, {"bits_per_code": output.loss / math.log(2)})


@each_prior_on(*LAYOUTS)
@torch.no_grad()
def test_the_evaluation_loss_is_the_mean_over_images_each_with_its_own_seed(name, layout):
    prior = tiny_prior(name, layout, num_classes=3)
    codes, labels, seeds = random_codes(layout, 6), torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(6)
    loss = prior(codes, labels, seeds=seeds).loss
    assert torch.equal(prior(codes, labels, seeds=seeds).loss, loss)
    for size in (1, 2):
        parts = [prior(codes[i], labels[i], seeds=seeds[i]).loss for i in torch.arange(6).split(size)]
        torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-5, atol=1e-5)


@each_prior
@torch.no_grad()
def test_the_evaluation_loss_is_exact_for_a_prior_with_log_prob_and_else_depends_on_the_seeds(name):
    prior, codes = tiny_prior(name, IMAGE), random_codes(IMAGE, 6)
    losses = [prior(codes, seeds=seeds).loss for seeds in (torch.arange(6), torch.arange(6) + 6)]
    assert torch.equal(*losses) == prior.has_log_prob
    assert hasattr(prior, "log_prob") == prior.has_log_prob


@each_prior_on(*LAYOUTS, names=CODE_BY_CODE)
@torch.no_grad()
def test_a_code_changes_only_the_logits_of_later_codes(name, layout):
    prior = tiny_prior(name, layout)
    codes = random_codes(layout, 3)
    before = prior.logits(codes)
    for j, K in enumerate(vocab_sizes(layout)):
        changed = codes.flatten(1).clone()
        changed[:, j] = (changed[:, j] + 1) % K
        after = prior.logits(changed.view_as(codes))
        torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], rtol=0, atol=1e-6)
        assert all(not torch.equal(after[:, i], before[:, i]) for i in range(j + 1, layout.num_codes))


@each_prior_on(MIXED, GRIDS)
@torch.no_grad()
def test_codes_of_other_grids_have_probability_zero(name, layout):
    prior, codes = tiny_prior(name, layout), random_codes(layout, 4)
    logits = prior.logits(codes) if name in CODE_BY_CODE else prior.logits(codes, torch.rand(codes.shape) < 0.5)
    probabilities = logits.softmax(-1)
    for j, K in enumerate(vocab_sizes(layout)):
        assert (probabilities[:, j, :K] > 0).all()
        assert (probabilities[:, j, K:] == 0).all()


@each_prior_on(*LAYOUTS)
def test_a_training_step_on_any_layout_lowers_the_loss(name, layout):
    prior = tiny_prior(name, layout, num_classes=3).train()
    codes, labels, seeds = random_codes(layout, 8), torch.randint(0, 3, (8,)), torch.arange(8)
    before = prior(codes, labels, seeds=seeds).loss
    assert before.dtype == torch.float32
    before.backward()
    for parameter_name, parameter in prior.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    torch.optim.SGD(prior.parameters(), lr=1e-3).step()
    assert prior(codes, labels, seeds=seeds).loss < before


@each_prior_on(IMAGE, MIXED, GRIDS)
@torch.no_grad()
def test_a_fresh_prior_starts_near_the_uniform_distribution_over_each_grids_own_codes(name, layout):
    loss = fresh_prior(name, layout)(random_codes(layout, 1000), seeds=torch.arange(1000)).loss
    expected = torch.tensor(vocab_sizes(layout)).log().mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0.03)


@each_prior_on(IMAGE, GRIDS)
@torch.no_grad()
def test_a_saved_prior_is_loaded_as_it_was(name, layout, tmp_path):
    prior = tiny_prior(name, layout, num_classes=3)
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert type(loaded) is type(prior)
    assert loaded.config.options() == prior.config.options()
    torch.testing.assert_close(dict(loaded.state_dict()), dict(prior.state_dict()), rtol=0, atol=0)
    codes, labels, seeds = random_codes(layout, 4), torch.tensor([0, 1, 2, 3]), torch.arange(4)
    # Not to the bit: loaded weights are aligned otherwise in memory, and products may sum in another order.
    expected = prior(codes, labels, seeds=seeds).loss
    torch.testing.assert_close(loaded(codes, labels, seeds=seeds).loss, expected, rtol=1e-5, atol=1e-5)


# Sampling


@each_prior_on(*LAYOUTS)
def test_samples_are_codes_of_the_layout(name, layout):
    prior = tiny_prior(name, layout, num_classes=2)
    labels, seeds = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    sizes = torch.tensor(vocab_sizes(layout))
    for options in ({}, {"temperature": 10.0}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "top_p": 0.9}):
        codes = prior.sample(200, labels, seeds=seeds, **options)
        assert codes.shape == (200, *layout.shape)
        assert codes.dtype == torch.int64
        assert ((codes.flatten(1) >= 0) & (codes.flatten(1) < sizes)).all()
    hot = prior.sample(200, labels, seeds=seeds, temperature=10.0)
    for j, K in enumerate(vocab_sizes(layout)):
        assert hot.flatten(1)[:, j].unique().tolist() == list(range(K))


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
        {"guidance_scale": 3.0, "guidance_interval": [0.2, 0.6], "temperature": [1.5, 0.5]},
    ],
    ids=str,
)
@each_prior_on(GRIDS, CodeLayout.single((3, 3), 16), names=CODE_BY_CODE)
def test_sampling_with_a_cache_equals_recomputing_everything(name, layout, options):
    prior, L = tiny_prior(name, layout, num_classes=3).double(), layout.num_codes
    labels, seeds = torch.tensor([0, 1, 2, 3] * 8), torch.arange(32) * 1000
    sampled = prior.sample(32, labels, seeds=seeds, **options)
    assert torch.equal(sampled, sample_without_cache(prior, seeds, labels, **options))
    # Around codes that are known: the first four in all images, and others here and there.
    known, mask = random_codes(layout, 32), (torch.arange(L) < 4) | (torch.rand(32, L) < 0.3)
    mask = mask.view_as(known)
    sampled = prior.sample(32, labels, seeds=seeds, known=known, known_mask=mask, **options)
    assert torch.equal(sampled, sample_without_cache(prior, seeds, labels, known, mask, **options))


@pytest.mark.parametrize("name", CODE_BY_CODE)
@torch.no_grad()
def test_samples_have_the_frequencies_of_log_prob(name):
    prior, every, n = tiny_prior(name, ROW, num_classes=2), every_image(ROW), 4000
    for label in (0, 2):
        codes = prior.sample(n, torch.full((n,), label), seeds=torch.arange(n))
        assert_shares(codes, ROW, prior.log_prob(every, torch.full((len(every),), label)).exp())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@each_prior
def test_an_image_does_not_depend_on_its_batch(name, guidance_scale):
    prior = tiny_prior(name, IMAGE, num_classes=3)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7) + 50
    whole = prior.sample(7, labels, seeds=seeds, guidance_scale=guidance_scale)
    for size in (1, 3):
        parts = [
            prior.sample(len(part), labels[part], seeds=seeds[part], guidance_scale=guidance_scale)
            for part in torch.arange(7).split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@each_prior
def test_guidance_by_zero_draws_as_without_a_class_and_by_more_than_one_otherwise(name):
    prior, labels, seeds = tiny_prior(name, IMAGE, num_classes=2), torch.tensor([0, 1] * 4), torch.arange(8)
    none, zero, one, three = (
        prior.sample(8, given, seeds=seeds, guidance_scale=scale)
        for given, scale in ((None, 1.0), (labels, 0.0), (labels, 1.0), (labels, 3.0))
    )
    assert torch.equal(zero, none)
    assert not torch.equal(one, none)
    assert not torch.equal(three, one)


@each_prior_on(IMAGE, GRIDS)
def test_where_a_filter_leaves_one_code_it_is_that_of_temperature_zero(name, layout):
    prior, labels, seeds = tiny_prior(name, layout, num_classes=2), torch.tensor([0, 1] * 4), torch.arange(8)
    for guidance in ({}, {"guidance_scale": 3.0}):
        greedy = prior.sample(8, labels, seeds=seeds, temperature=0, **guidance)
        for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
            assert torch.equal(prior.sample(8, labels, seeds=seeds, **options, **guidance), greedy)
        assert not torch.equal(prior.sample(8, labels, seeds=seeds, **guidance), greedy)


@pytest.mark.parametrize("autocast", [True, False])
@each_prior_on(IMAGE, GRIDS)
def test_half_precision_samples_codes_of_the_layout_and_trains(name, layout, autocast):
    prior, labels = tiny_prior(name, layout, num_classes=2), torch.tensor([0, 1] * 4)
    prior = prior if autocast else prior.bfloat16()
    options = {"guidance_scale": 2.0, "guidance_interval": [0.2, 0.6], "temperature": [1.5, 0], "top_p": 0.9}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = prior.sample(8, labels, seeds=torch.arange(8), **options)
        loss = prior.train()(codes, labels, seeds=torch.arange(8)).loss
    loss.backward()
    assert ((codes.flatten(1) >= 0) & (codes.flatten(1) < torch.tensor(vocab_sizes(layout)))).all()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters())


@each_prior
def test_equal_seeds_give_equal_images_and_different_seeds_different_ones(name):
    prior = tiny_prior(name, IMAGE)
    seeds = torch.arange(20)
    codes = prior.sample(20, seeds=seeds, temperature=2.0)
    assert torch.equal(prior.sample(20, seeds=seeds, temperature=2.0), codes)
    assert len(codes.flatten(1).unique(dim=0)) == 20
    assert not torch.equal(prior.sample(20), prior.sample(20))


@pytest.mark.parametrize("training", [True, False])
@each_prior
def test_sampling_uses_no_dropout_and_leaves_the_mode_as_it_was(name, training):
    prior = tiny_prior(name, IMAGE, dropout=0.5)
    expected = prior.sample(2, seeds=torch.arange(2))
    assert torch.equal(prior.train(training).sample(2, seeds=torch.arange(2)), expected)
    assert prior.training == training


# Classes, and how training hides them


@each_prior
@torch.no_grad()
def test_each_class_has_a_loss_and_images_of_its_own_and_the_class_after_the_last_is_no_class(name):
    prior, codes, seeds = tiny_prior(name, IMAGE, num_classes=3), random_codes(IMAGE, 4), torch.arange(4)
    labels = [torch.full((4,), label) for label in range(4)]
    losses = [prior(codes, label, seeds=seeds).loss for label in labels]
    images = [prior.sample(4, label, seeds=seeds) for label in labels]
    assert len(torch.stack(losses).unique()) == 4
    assert len(torch.stack(images).unique(dim=0)) == 4
    assert torch.equal(prior(codes, seeds=seeds).loss, losses[3])
    assert torch.equal(prior.sample(4, seeds=seeds), images[3])


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@each_prior
@torch.no_grad()
def test_label_dropout_hides_its_share_of_the_classes(name, rate):
    prior, n = tiny_prior(name, ROW, num_classes=2, label_dropout=rate).train(), 4000
    codes, labels = random_codes(ROW, n), torch.tensor([0, 1] * (n // 2))
    for seeds in (torch.arange(n), None):
        with labels_seen(prior) as seen:
            prior(codes, labels, seeds=seeds)
        hidden = seen[0] == 2
        assert torch.equal(seen[0][~hidden], labels[~hidden])
        assert abs(hidden.float().mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / n)


@each_prior
@torch.no_grad()
def test_an_image_whose_class_is_hidden_has_the_loss_of_one_without_a_class(name):
    prior = tiny_prior(name, IMAGE, num_classes=2, label_dropout=0.5).train()
    codes, labels, seeds = random_codes(IMAGE, 16), torch.tensor([0, 1] * 8), torch.arange(16)
    with labels_seen(prior) as seen:
        loss = prior(codes, labels, seeds=seeds).loss
    prior.config.label_dropout = 0.0
    assert torch.equal(prior(codes, seen[0], seeds=seeds).loss, loss)
    assert not torch.equal(prior(codes, labels, seeds=seeds).loss, loss)


@each_prior
@torch.no_grad()
def test_label_dropout_belongs_to_an_image(name):
    prior = tiny_prior(name, IMAGE, num_classes=2, label_dropout=0.5).train()
    codes, labels, seeds = random_codes(IMAGE, 16), torch.tensor([0, 1] * 8), torch.arange(16)
    with labels_seen(prior) as seen:
        loss = prior(codes, labels, seeds=seeds).loss
        parts = [prior(codes[i], labels[i], seeds=seeds[i]).loss for i in torch.arange(16).split(4)]
        again = prior(codes, labels, seeds=seeds).loss
        prior(codes, labels, seeds=seeds + 16)
    assert torch.equal(again, loss)
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-5, atol=1e-6)
    whole, *quarters, _, others = seen
    assert torch.equal(torch.cat(quarters), whole)
    assert not torch.equal(others, whole)


@each_prior
@torch.no_grad()
def test_evaluation_hides_no_class(name):
    prior = tiny_prior(name, IMAGE, num_classes=2, label_dropout=1.0)
    codes, labels, seeds = random_codes(IMAGE, 8), torch.tensor([0, 1] * 4), torch.arange(8)
    with labels_seen(prior) as seen:
        prior(codes, labels, seeds=seeds)
    assert torch.equal(seen[0], labels)


# What is refused


@each_prior_on(MIXED)
def test_codes_of_another_shape_or_out_of_range_are_refused(name, layout):
    for verb in verbs(tiny_prior(name, layout)):
        with pytest.raises(ValueError, match=r"codes of \[1x1 of 2 \+ 1x2 of 3\] have shape \(B, 3\), got .*2, 2"):
            verb(torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes of \[1x1 of 2\] are in \[0, 2\), got 2 to 2"):
            verb(torch.tensor([[2, 0, 0]]))
        with pytest.raises(ValueError, match=r"codes of \[1x2 of 3\] are in \[0, 3\), got -1 to 0"):
            verb(torch.tensor([[1, 0, -1]]))


@each_prior
def test_codes_of_one_grid_of_another_shape_or_out_of_range_are_refused(name):
    for verb in verbs(tiny_prior(name, ROW)):
        with pytest.raises(ValueError, match=r"codes of \[1x3 of 3\] have shape \(B, 1, 3\), got .*2, 3"):
            verb(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes of \[1x3 of 3\] are in \[0, 3\), got 0 to 3"):
            verb(torch.tensor([[[3, 0, 1]]]))


@each_prior
def test_guidance_without_labels_or_without_label_dropout_is_refused(name):
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs labels to guide towards"):
        tiny_prior(name, ROW, num_classes=3).sample(2, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a prior trained with label dropout"):
        tiny_prior(name, ROW, num_classes=3, label_dropout=0.0).sample(2, torch.tensor([0, 1]), guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature should be number at least 0 | list of number at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature should be number at least 0 | list of number at least 0, got nan"),
        ({"top_k": 0}, "top_k should be integer at least 1 | none, got 0"),
        ({"top_p": 0.0}, "top_p should be number from 1e-06 to 1 | none, got 0.0"),
        ({"top_p": 1.1}, "top_p should be number from 1e-06 to 1 | none, got 1.1"),
        ({"guidance_scale": -1.0}, "guidance_scale should be number from 0 to 1000, got -1.0"),
    ],
    ids=str,
)
@each_prior
def test_sampling_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny_prior(name, ROW, num_classes=3).sample(2, torch.tensor([0, 1]), **options)


@each_prior
def test_a_sampling_option_of_another_prior_is_refused(name):
    options = {key: {f.name for f in dataclasses.fields(prior.sampling_options)} for key, prior in PRIORS.items()}
    foreign = set().union(*options.values()) - options[name]
    assert foreign
    for option in (*foreign, "nonsense"):
        with pytest.raises(TypeError, match=option):
            tiny_prior(name, ROW).sample(2, **{option: 1})


@each_prior
def test_seeds_of_another_number_than_the_images_are_refused(name):
    with pytest.raises(ValueError, match=r"expected one seed an image, \(2,\), got \(3,\)"):
        tiny_prior(name, ROW).sample(2, seeds=torch.arange(3))


@pytest.mark.parametrize("labels", [[0, -1], [0, 4]], ids=str)
@each_prior
def test_labels_out_of_range_are_refused(name, labels):
    prior = tiny_prior(name, ROW, num_classes=3)
    message = rf"this prior has classes 0 to 2, got {min(labels)} to {max(labels)}"
    codes, labels = random_codes(ROW, 2), torch.tensor(labels)
    for verb in verbs(prior):
        with pytest.raises(ValueError, match=message):
            verb(codes, labels)
    with pytest.raises(ValueError, match=message):
        prior.sample(2, labels)


@each_prior
def test_labels_of_another_number_than_the_images_are_refused(name):
    prior = tiny_prior(name, ROW, num_classes=3)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0])):
        message = rf"expected labels \(2,\), got \({len(labels)},\)"
        for verb in verbs(prior):
            with pytest.raises(ValueError, match=message):
                verb(random_codes(ROW, 2), labels)
        with pytest.raises(ValueError, match=message):
            prior.sample(2, labels)


@pytest.mark.parametrize("training", [True, False])
@each_prior
def test_an_unconditional_prior_refuses_labels(name, training):
    prior = tiny_prior(name, ROW).train(training)
    codes, labels = random_codes(ROW, 2), torch.zeros(2, dtype=torch.int64)
    for verb in verbs(prior):
        with pytest.raises(ValueError, match="trained without classes, but labels were given"):
            verb(codes, labels)
    with pytest.raises(ValueError, match="trained without classes, but labels were given"):
        prior.sample(2, labels)


@pytest.mark.parametrize("training", [True, False])
@each_prior
def test_a_prior_of_all_codes_refuses_a_condition(name, training):
    prior, condition = tiny_prior(name, ROW).train(training), torch.zeros(2, 1, dtype=torch.int64)
    message = rf"this {name} models all of \[1x3 of 3\], but a condition was given; leave it out"
    with pytest.raises(ValueError, match=message):
        prior(random_codes(ROW, 2), condition=condition)
    with pytest.raises(ValueError, match=message):
        prior.sample(2, condition=condition)


def test_an_unknown_prior_or_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'gtp'; did you mean 'gpt'\? choose one of"):
        build_prior({"name": "gtp"}, ROW)
    with pytest.raises(ValueError, match=r"unknown option of gpt 'model.widht'; did you mean 'model.width'\?"):
        build_prior({"name": "gpt", "widht": 4}, ROW)


# The embedding of the transformers


@pytest.mark.parametrize(("name", "special"), [("gpt", []), ("maskgit", [3 * 5])])
def test_a_transformer_has_embedding_rows_of_its_own_for_each_grid_and_depth_and_the_mask(name, special):
    prior = tiny_prior(name, GRIDS).train()
    prior(torch.ones(32, GRIDS.num_codes, dtype=torch.int64), seeds=torch.arange(32)).loss.backward()
    seen = prior.code_embedding.weight.grad.any(1).nonzero().squeeze(1)
    assert seen.tolist() == [1, 5 + 1, 2 * 5 + 1, *special]
