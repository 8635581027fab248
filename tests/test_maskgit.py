"""MaskGIT: its loss, its bound on the log probability, and the orders in which it reveals codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from prior_cases import (
    GRIDS,
    IMAGE,
    LAYOUTS,
    LINE,
    masks,
    random_codes,
    tiny_prior,
    vocab_sizes,
)
from torch import Tensor

from configs.layout import CodeLayout
from pipelines.evaluation import evaluate_prior
from prior.maskgit import MaskGIT
from prior.unmasking import Schedule


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_logits_do_not_depend_on_what_stands_under_the_mask(layout):
    prior = tiny_prior("maskgit", layout)
    codes, masked = random_codes(layout, 4), torch.rand(4, *layout.shape) < 0.5
    logits = prior.logits(codes, masked)
    assert logits.shape == (4, layout.num_codes, layout.vocab_size)
    assert torch.equal(prior.logits(random_codes(layout, 4).where(masked, codes), masked), logits)
    # Every visible code matters to the others.
    for image, j in (~masked.flatten(1)).nonzero().tolist():
        changed = codes.clone()
        changed.view(4, -1)[image, j] = (changed.view(4, -1)[image, j] + 1) % vocab_sizes(layout)[j]
        assert not torch.equal(prior.logits(changed, masked)[image], logits[image])


@torch.no_grad()
def test_logits_are_float32_in_any_precision():
    prior = tiny_prior("maskgit", IMAGE).to(torch.bfloat16)
    codes = random_codes(IMAGE, 2)
    assert prior.logits(codes, torch.ones_like(codes, dtype=torch.bool)).dtype == torch.float32


def expected_masked(schedule: Schedule, length: int) -> float:
    """The expected number of masked codes: that of ceil(share(u) * length), at least 1, for u uniform."""
    share = {"cosine": lambda u: (u * math.pi / 2).cos(), "linear": lambda u: 1 - u}[schedule]
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return (share(u) * length).ceil().clamp(1, length).mean().item()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@torch.no_grad()
def test_mask_shares_follow_the_schedule_and_places_are_equally_likely(schedule):
    prior = tiny_prior("maskgit", LINE, mask_schedule=schedule).train()
    n, L = 4000, LINE.num_codes
    with masks(prior) as seen:
        prior(random_codes(LINE, n), seeds=torch.arange(n))
    counts = seen[0].sum(1)
    # The number of masked codes is k where share(u) * L is in (k - 1, k].
    inverse = {"cosine": lambda s: math.acos(s) * 2 / math.pi, "linear": lambda s: 1 - s}[schedule]
    for k in range(1, L + 1):
        p = inverse((k - 1) / L) - inverse(k / L)
        assert abs((counts == k).float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    share = expected_masked(schedule, L) / L
    assert ((seen[0].float().mean(0) - share).abs() < 5 * math.sqrt(share * (1 - share) / n)).all()
    pairs = {tuple(mask.nonzero().flatten().tolist()) for mask in seen[0] if mask.sum() == 2}
    assert len(pairs) == math.comb(L, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@torch.no_grad()
def test_the_training_loss_is_the_smoothed_cross_entropy_over_masked_codes_by_their_expected_number(smoothing):
    prior = tiny_prior("maskgit", LINE, num_classes=2, label_smoothing=smoothing, label_dropout=0.0).train()
    codes, labels, seeds = random_codes(LINE, 64), torch.tensor([0, 1] * 32), torch.arange(64)
    with masks(prior) as seen:
        output = prior(codes, labels, seeds=seeds)
    logits = prior.logits(codes, seen[0], labels)
    total = F.cross_entropy(logits[seen[0]], codes[seen[0]], label_smoothing=smoothing, reduction="sum")
    expected = total / (64 * expected_masked("cosine", LINE.num_codes))
    torch.testing.assert_close(output.loss, expected, rtol=1e-3, atol=0)
    total = F.cross_entropy(logits[seen[0]], codes[seen[0]], reduction="sum")
    bits = total / (64 * expected_masked("cosine", LINE.num_codes)) / math.log(2)
    torch.testing.assert_close(output.metrics["masked_bits_per_code"], bits, rtol=1e-3, atol=0)


@torch.no_grad()
def test_over_many_images_the_training_loss_is_the_published_mean_over_masked_codes():
    prior = tiny_prior("maskgit", IMAGE, label_smoothing=0.1).train()
    n = 4000
    codes, seeds = random_codes(IMAGE, 1).expand(n, -1, -1), torch.arange(n)
    with masks(prior) as seen:
        loss = prior(codes, seeds=seeds).loss
    masked = seen[0].view_as(codes)
    published = F.cross_entropy(prior.logits(codes, masked)[seen[0]], codes[masked], label_smoothing=0.1)
    # The number of masked codes has a relative standard deviation of 0.48 an image.
    torch.testing.assert_close(loss, published, rtol=5 * 0.48 / math.sqrt(n), atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_the_training_loss_of_a_batch_is_the_mean_over_its_parts(layout):
    prior = tiny_prior("maskgit", layout, num_classes=2).train()
    codes, labels, seeds = random_codes(layout, 8), torch.tensor([0, 1] * 4), torch.arange(8)
    whole = prior(codes, labels, seeds=seeds).loss
    for size in (1, 2, 4):
        parts = [prior(codes[i], labels[i], seeds=seeds[i]).loss for i in torch.arange(8).split(size)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_label_smoothing_spreads_over_the_codes_of_a_code_s_own_grid():
    prior = tiny_prior("maskgit", GRIDS, label_smoothing=0.3).train()
    codes, seeds = random_codes(GRIDS, 16), torch.arange(16)
    with masks(prior) as seen:
        smoothed = prior(codes, seeds=seeds).loss
    logits, total = prior.logits(codes, seen[0]), torch.tensor(0.0)
    for j, K in enumerate(vocab_sizes(GRIDS)):
        here = seen[0][:, j]
        total += F.cross_entropy(logits[here, j, :K], codes[here, j], label_smoothing=0.3, reduction="sum")
    prior.config.label_smoothing = 0.0
    plain = prior(codes, seeds=seeds).loss
    total_plain = F.cross_entropy(
        prior.hide_foreign_codes(logits, slice(None))[seen[0]], codes[seen[0]], reduction="sum"
    )
    torch.testing.assert_close(smoothed / plain, total / total_plain, rtol=1e-5, atol=1e-6)


def nats_of_orders(prior: MaskGIT, codes: Tensor) -> Tensor:
    """-log p of one image in each order of revealing its codes, `(L!,)`."""
    L, K = codes.numel(), prior.code_layout.vocab_size
    subsets = torch.tensor(list(itertools.product([False, True], repeat=L)))
    masked = subsets.view(-1, *codes.shape)
    log_p = prior.logits(codes.expand(len(masked), *codes.shape), masked).log_softmax(-1)
    assert log_p.shape[-1] == K
    costs = {tuple(m): -row.gather(-1, codes.view(L, 1))[:, 0] for m, row in zip(subsets.tolist(), log_p, strict=True)}
    nats = []
    for order in itertools.permutations(range(L)):
        mask, total = [True] * L, torch.tensor(0.0)
        for j in order:
            total = total + costs[tuple(mask)][j]
            mask[j] = False
        nats.append(total)
    return torch.stack(nats)


TINY_LAYOUTS = [CodeLayout.single((1, 4), 3), CodeLayout.single((2,), 3, depth=2)]


@pytest.mark.parametrize("layout", TINY_LAYOUTS, ids=str)
@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders_of_revealing_code_after_code(layout):
    prior = tiny_prior("maskgit", layout)
    images, L, n = random_codes(layout, 3), layout.num_codes, 4000
    for image in images:
        nats = nats_of_orders(prior, image)
        # The bound over t and masks, each mask of t codes as likely as any other.
        sizes = []
        for t in range(1, L + 1):
            chosen = torch.tensor([[j in c for j in range(L)] for c in itertools.combinations(range(L), t)])
            log_p = prior.logits(image.expand(len(chosen), *layout.shape), chosen).log_softmax(-1)
            losses = -log_p.gather(-1, image.flatten().expand(len(chosen), L)[..., None])[..., 0]
            sizes.append(L / t * (losses * chosen).sum(1).mean())
        torch.testing.assert_close(torch.stack(sizes).mean(), nats.mean(), rtol=1e-5, atol=1e-5)
        drawn = prior.negative_log_prob_bound(image.expand(n, *layout.shape), seeds=torch.arange(n))
        assert abs(drawn.mean() - nats.mean()) < 5 * drawn.std() / math.sqrt(n)
        # What it bounds: the image's probability where orders are drawn evenly, which is their mean (Jensen).
        log_prob = (-nats).logsumexp(0) - math.log(len(nats))
        assert nats.mean() > -log_prob + 1e-3


@torch.no_grad()
def test_several_draws_of_the_bound_are_as_good_as_as_many_images():
    prior, n = tiny_prior("maskgit", TINY_LAYOUTS[0], num_classes=2), 2000
    image, label = random_codes(TINY_LAYOUTS[0], 1), torch.ones(n, dtype=torch.int64)
    once = prior.negative_log_prob_bound(image.expand(n, 1, 4), label, seeds=torch.arange(n))
    often = prior.negative_log_prob_bound(image.expand(n // 10, 1, 4), label[: n // 10], num_draws=10)
    assert abs(once.mean() - often.mean()) < 5 * once.std() * math.sqrt(2 / n)
    torch.testing.assert_close(often.std() * math.sqrt(10), once.std(), rtol=0.3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_the_evaluation_loss_is_the_bound_per_code_and_is_named_a_bound(layout):
    prior = tiny_prior("maskgit", layout, num_classes=2)
    codes, labels, seeds = random_codes(layout, 6), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    bound = prior.negative_log_prob_bound(codes, labels, seeds=seeds)
    assert bound.shape == (6,)
    output = prior(codes, labels, seeds=seeds)
    torch.testing.assert_close(output.loss, bound.mean() / layout.num_codes, rtol=1e-6, atol=1e-6)
    assert output.metrics.keys() == {"bits_per_code_bound"}
    torch.testing.assert_close(output.metrics["bits_per_code_bound"], output.loss / math.log(2))
    assert not hasattr(prior, "log_prob")


def test_figures_of_a_split_are_bounds_and_do_not_depend_on_the_batch_size():
    prior, codes = tiny_prior("maskgit", IMAGE), random_codes(IMAGE, 7)
    figures, one = (
        evaluate_prior(prior, codes, None, Accelerator(cpu=True), batch_size=size, image_shape=(3, 16, 16))
        for size in (7, 2)
    )
    bounds = {"loss_bound", "bits_per_code_bound", "bits_per_pixel_bound", "perplexity_bound"}
    assert figures.keys() == bounds | {"first_order_bits_per_code", "per_position_bits_per_code"}
    assert figures == pytest.approx(one, rel=1e-5)
    assert figures["bits_per_pixel_bound"] == pytest.approx(figures["bits_per_code_bound"] / 16)
