"""What quantizers with a codebook share: its start, its steps, revival and growth."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from quantizer_cases import CODEBOOKS, assert_same_state, rows, state_of, tiny_quantizer
from torch import Tensor

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.search import squared_distances

every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
# Without an optimizer step these move no code in `update` but by revival; ema moves all, cvq little-used ones.
STILL = ["ibq", "simvq", "vq"]


def euclidean(name: str, **options: object) -> Quantizer:
    """A tiny quantizer that takes the nearest code, which ibq by itself does not."""
    return tiny_quantizer(name, **({"distance": "euclidean"} | options))


def vectors_of(quantizer: Quantizer, codes: Tensor | None = None) -> Tensor:
    """The code vectors `(M, D)` of codes, by default of all."""
    codes = torch.arange(quantizer.vocab_size) if codes is None else codes
    return quantizer.decode(codes[None])[0].t().detach()


def near_codes(quantizer: Quantizer, codes: list[int]) -> Tensor:
    """Latents `(1, D, len(codes))` that choose these codes, each a little off."""
    latents = quantizer.decode(torch.tensor([codes])).detach()
    return latents + 1e-3 * torch.randn_like(latents)


def quantize_and_update(quantizer: Quantizer, latents: Tensor, step: int) -> None:
    quantizer(latents)
    quantizer.update(step)


def on_rows(vectors: Tensor, latents: Tensor) -> Tensor:
    """Which of vectors `(M, D)` are rows of the latents, up to rounding."""
    return (vectors[:, None] - rows(latents)).abs().amax(2).amin(1) < 1e-5


# The start


@every_codebook
def test_a_uniform_start_is_within_one_over_k_and_a_normal_one_is_standard(name):
    uniform = vectors_of(tiny_quantizer(name, vocab_size=512, codebook_start="uniform"))
    assert uniform.abs().max() <= 1 / 512
    assert uniform.std() == pytest.approx(1 / 512 / math.sqrt(3), rel=0.05)
    normal = vectors_of(tiny_quantizer(name, vocab_size=512, codebook_start="normal"))
    assert normal.mean() == pytest.approx(0, abs=0.1)
    assert normal.std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("start", ["uniform", "normal"])
@every_codebook
def test_a_random_start_asks_for_no_vectors_and_ignores_them(name, start):
    quantizer = tiny_quantizer(name, codebook_start=start)
    assert quantizer.num_start_vectors == 0
    before = state_of(quantizer)
    quantizer.initialize(torch.randn(2, 4, 30))
    assert_same_state(quantizer, before)


def test_a_kmeans_start_asks_for_64_vectors_a_code_and_at_least_2_with_many_codes():
    for vocab_size, expected in ((16, 1024), (2048, 1 << 17), (8192, 1 << 17), (100_000, 200_000)):
        quantizer = tiny_quantizer("vq", vocab_size=vocab_size, codebook_start="kmeans")
        assert quantizer.num_start_vectors == expected
    assert tiny_quantizer("vq", codebook_start="kmeans", initial_vocab_size=4).num_start_vectors == 4 * 64


@every_codebook
def test_a_kmeans_start_puts_the_codes_on_the_centres_of_separated_clusters(name):
    points = 20 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    latents = (points.repeat(6, 1) + 0.1 * torch.randn(96, 4)).view(4, 24, 4).movedim(-1, 1)
    expected = torch.stack(
        [rows(latents)[squared_distances(rows(latents), p.expand(96, 4)) < 9].mean(0) for p in points]
    )
    quantizer = tiny_quantizer(name, codebook_start="kmeans")
    quantizer.initialize(latents)
    found = vectors_of(quantizer)
    nearest = found[torch.cdist(expected, found).argmin(1)]
    torch.testing.assert_close(nearest, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_vectors", [1, 5, 40])
@every_codebook
def test_a_kmeans_start_fills_all_codes_with_few_or_many_vectors(name, num_vectors):
    quantizer = tiny_quantizer(name, codebook_start="kmeans")
    latents = torch.randn(1, 4, num_vectors)
    quantizer.initialize(latents)
    found = vectors_of(quantizer)
    assert found.isfinite().all()
    assert len(found.unique(dim=0)) == 16
    if num_vectors < 16:
        assert torch.cdist(rows(latents), found).amin(1).max() < 1e-2


@every_codebook
def test_a_kmeans_start_of_a_cosine_codebook_is_on_the_unit_sphere(name):
    quantizer = tiny_quantizer(name, codebook_start="kmeans", distance="cosine")
    quantizer.initialize(torch.randn(2, 4, 50))
    torch.testing.assert_close(vectors_of(quantizer).norm(dim=1), torch.ones(16), rtol=1e-5, atol=1e-5)
    assert quantizer.eval()(torch.randn(2, 4, 50)).codes.unique().numel() > 12


# Batches and steps


@pytest.mark.parametrize("name", [*[n for n in CODEBOOKS if n != "cvq"], "product", "residual", "residual-shared"])
def test_two_accumulated_forwards_and_one_update_equal_one_forward_of_the_joined_batch(name):
    # The entropy over the batch is over a micro-batch, so its term is off.
    accumulated = tiny_quantizer(name, entropy_weight=0.0)
    joined = copy.deepcopy(accumulated)
    before = state_of(accumulated)
    first, second = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    for latents in (first, second):
        (sum(accumulated(latents.requires_grad_()).losses.values()) / 2).backward()
    assert_same_state(accumulated, before)
    sum(joined(torch.cat([first, second]).detach().requires_grad_()).losses.values()).backward()
    for mine, theirs in zip(accumulated.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    accumulated.update(0)
    joined.update(0)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in accumulated.state_dict().items())
    torch.testing.assert_close(dict(accumulated.state_dict()), dict(joined.state_dict()), rtol=1e-5, atol=1e-6)


def test_cvq_counts_all_micro_batches_and_takes_anchors_from_all():
    quantizer = tiny_quantizer("cvq", decay=0.9)
    before = quantizer.codebook.detach().clone()
    first, second = near_codes(quantizer, [0, 1, 2]), near_codes(quantizer, [3, 4])
    quantizer(first)
    quantizer(second)
    quantizer.update(0)
    counts = torch.tensor([1.0] * 5 + [0.0] * 11)
    torch.testing.assert_close(quantizer.recent_counts, counts)
    torch.testing.assert_close(quantizer.usage, 0.1 * counts / 5)
    unused = before[5:]
    latents = torch.cat([rows(first), rows(second)])
    anchors = latents[torch.cdist(unused, latents).argmin(1)]
    expected = torch.lerp(unused, anchors, math.exp(-1e-3))
    torch.testing.assert_close(quantizer.codebook[5:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STILL)
def test_revival_takes_latents_of_all_micro_batches(name):
    quantizer = euclidean(name, revive_after=1, revive_below=0.0)
    first, second = near_codes(quantizer, [0, 1] * 20), near_codes(quantizer, [2, 3] * 20)
    quantizer(first)
    quantizer(second)
    quantizer.update(0)
    moved = vectors_of(quantizer)[4:]
    assert (on_rows(moved, first) ^ on_rows(moved, second)).all()
    assert on_rows(moved, first).any()
    assert on_rows(moved, second).any()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@every_codebook
def test_a_code_that_nobody_chose_never_gives_nan(name, distance):
    quantizer = tiny_quantizer(name, decay=0.5, distance=distance)
    quantizer.set_codes(torch.tensor([3]), torch.full((1, 4), 1e3))
    for step in range(200):
        output = quantizer(torch.randn(1, 4, 6))
        assert output.quantized.isfinite().all()
        quantizer.update(step)
    assert all(tensor.isfinite().all() for tensor in state_of(quantizer).values())


# Revival


@pytest.mark.parametrize(("progress", "expected"), [(0.0, [15]), (0.5, [14, 15]), (0.89, [13, 14, 15])])
@pytest.mark.parametrize("name", STILL)
def test_exactly_the_codes_in_little_use_move_onto_different_latents_of_the_last_batch(name, progress, expected):
    # Sixteen codes in 4 steps of 40 vectors: a mean of 10, of which 0 to 0.3 is little, the more the later.
    counts = [24, 24, 20, 16, 12, 11, 10, 10, 9, 8, 5, 4, 4, 2, 1, 0]
    quantizer = euclidean(name, revive_after=4, revive_below=0.3)
    quantizer.anneal(progress)
    chosen = torch.arange(16).repeat_interleave(torch.tensor(counts))[torch.randperm(160)].view(4, 40)
    before = vectors_of(quantizer)
    for step, codes in enumerate(chosen):
        torch.testing.assert_close(vectors_of(quantizer), before, rtol=0, atol=0)
        latents = near_codes(quantizer, codes.tolist())
        assert quantizer(latents).codes.tolist() == [codes.tolist()]
        quantizer.update(step)
    after = vectors_of(quantizer)
    moved = (after != before).any(1)
    assert moved.nonzero().squeeze(1).tolist() == expected
    assert on_rows(after[moved], latents).all()
    assert len(after[moved].unique(dim=0)) == len(expected)
    assert quantizer.recent_counts.tolist() == [0] * 16


@pytest.mark.parametrize("name", STILL)
def test_no_code_is_revived_in_the_last_200th_of_training(name):
    quantizer = euclidean(name, revive_after=1, revive_below=1.0)
    before = vectors_of(quantizer)
    for step, progress in enumerate((0.9951, 0.999, 1.0)):
        quantizer.anneal(progress)
        quantize_and_update(quantizer, near_codes(quantizer, [0] * 100), step)
        torch.testing.assert_close(vectors_of(quantizer), before, rtol=0, atol=0)
    quantizer.anneal(0.97)
    quantize_and_update(quantizer, near_codes(quantizer, [0] * 100), 3)
    assert (vectors_of(quantizer) != before).any(1).sum() == 15


@pytest.mark.parametrize("name", STILL)
def test_with_revive_below_zero_only_codes_that_nobody_chose_move(name):
    quantizer = euclidean(name, revive_after=1, revive_below=0.0)
    quantizer.anneal(0.5)
    before = vectors_of(quantizer)
    latents = near_codes(quantizer, [0] * 100 + list(range(1, 13)))
    quantize_and_update(quantizer, latents, 0)
    after = vectors_of(quantizer)
    assert (after != before).any(1).nonzero().squeeze(1).tolist() == [13, 14, 15]
    assert on_rows(after[13:], latents).all()


@every_codebook
def test_a_window_with_fewer_than_4_vectors_a_code_goes_on_counting(name):
    quantizer = euclidean(name, revive_after=2, revive_below=0.0)
    never = euclidean(name, revive_after=0)
    never.load_state_dict(quantizer.state_dict())
    for step in range(4):
        latents = near_codes(quantizer, [0, 1] * 11)
        moved = not torch.equal(vectors_of(quantizer), vectors_of(never))
        assert not moved, step
        for each in (quantizer, never):
            quantize_and_update(each, latents, step)
        assert quantizer.recent_counts.sum() == (22 * (step + 1) if step < 3 else 0)
    # 88 vectors are more than 64.
    assert not torch.equal(vectors_of(quantizer), vectors_of(never))


@pytest.mark.parametrize("name", STILL)
def test_counting_starts_anew_after_each_window(name):
    quantizer = euclidean(name, revive_after=2, revive_below=0.0)
    quantize_and_update(quantizer, near_codes(quantizer, list(range(16)) * 4), 0)
    quantize_and_update(quantizer, near_codes(quantizer, [0]), 1)
    before = vectors_of(quantizer)
    for step in (2, 3):
        latents = near_codes(quantizer, [0] * 40)
        quantize_and_update(quantizer, latents, step)
    after = vectors_of(quantizer)
    assert (after != before).any(1).tolist() == [False] + [True] * 15
    assert on_rows(after[1:], latents).all()


@every_codebook
def test_revived_codes_are_latents_of_the_last_batch_for_every_codebook(name):
    quantizer = euclidean(name, revive_after=3, revive_below=0.0, decay=0.99)
    # One far point and all others near it: most codes are in disuse, and cvq's own anchors are off.
    for step in range(3):
        latents = 50 + torch.randn(2, 4, 6, 6)
        output = quantizer(latents)
        used = output.codes.unique()
        before = quantizer.recent_counts.clone().index_add_(0, output.codes.flatten(), torch.ones(72))
        quantizer.update(step)
    assert len(used) < 16
    unused = (before == 0).nonzero().squeeze(1)
    assert len(unused)
    assert on_rows(vectors_of(quantizer, unused), latents).all()


@pytest.mark.parametrize(
    ("sizes", "first_new"),
    [
        ({"vocab_size": 16, "revive_after": 1}, 1),
        ({"vocab_size": 16, "initial_vocab_size": 4}, 4),
        ({"vocab_size": 32, "initial_vocab_size": 16, "revive_after": 1}, 1),
    ],
    ids=["revival", "growth", "revival and growth"],
)
@pytest.mark.parametrize("name", ["ema", *STILL])
def test_with_more_codes_to_move_than_vectors_each_vector_is_taken_once_and_no_two_codes_are_equal(
    name, sizes, first_new
):
    quantizer = euclidean(name, **sizes)
    quantizer.anneal(0.5)
    quantizer.recent_counts[0] = 100  # enough to tell what little use is
    latents = near_codes(quantizer, [0] * 3)
    quantize_and_update(quantizer, latents, 0)
    vectors = vectors_of(quantizer)
    assert quantizer.active_size == len(vectors.unique(dim=0)) == sizes["vocab_size"]
    moved = vectors[first_new:]
    assert on_rows(moved, latents).tolist() == [True] * 3 + [False] * (len(moved) - 3)
    assert len(moved[:3].unique(dim=0)) == 3
    assert torch.cdist(moved, rows(latents)).amin(1).max() < 1e-2


@every_codebook
def test_revive_after_zero_never_moves_a_code_onto_a_latent(name):
    quantizer = euclidean(name, revive_after=0)
    for step in range(20):
        latents = near_codes(quantizer, [0, 1] * 40)
        quantize_and_update(quantizer, latents, step)
        assert not on_rows(vectors_of(quantizer), latents)[5:].any() or name == "cvq"


# Growth


@every_codebook
def test_a_growing_codebook_has_sizes_in_geometric_progression_and_new_codes_on_latents(name):
    quantizer = euclidean(name, vocab_size=64, initial_vocab_size=4, grow_until=0.5, decay=0.999999)
    sizes = []
    for step in range(10):
        quantizer.anneal(step / 10)
        old = quantizer.active_size
        latents = torch.randn(4, 4, 10)
        codes = quantizer(latents).codes
        assert codes.max() < old
        quantizer.update(step)
        assert on_rows(vectors_of(quantizer, torch.arange(old, quantizer.active_size)), latents).all()
        sizes.append(quantizer.active_size)
    expected = [min(64, round(4 * 16 ** (step / 5))) for step in range(10)]
    assert sizes == expected
    assert sizes[5:] == [64] * 5
    assert quantizer(torch.randn(8, 4, 200)).codes.max() >= 32


@every_codebook
def test_codes_that_grow_beside_a_revival_are_other_latents(name):
    quantizer = euclidean(name, vocab_size=64, initial_vocab_size=16, grow_until=0.9, revive_after=1, revive_below=0.5)
    num_moved = 0
    for step in range(8):
        quantizer.anneal((step + 1) / 10)
        latents = torch.randn(8, 4, 50)
        latents[:, :, :40] = latents[:1, :, :1]  # most of them choose one code, so that others are in little use
        latents += 1e-3 * torch.randn(8, 4, 50)
        quantizer(latents)
        quantizer.update(step)
        vectors = vectors_of(quantizer, torch.arange(quantizer.active_size))
        moved = vectors[on_rows(vectors, latents)]
        assert len(moved.unique(dim=0)) == len(moved)
        num_moved += len(moved)
    assert num_moved > 2 * 64  # more than grew


@every_codebook
def test_codes_beyond_the_active_size_are_never_chosen_even_where_they_are_nearest(name):
    quantizer = euclidean(name, initial_vocab_size=4)
    latents = near_codes(quantizer, list(range(4, 16)) * 3)
    for training in (True, False):
        assert quantizer.train(training)(latents).codes.max() < 4
    quantizer.num_active.fill_(16)
    assert quantizer(latents).codes.tolist() == [list(range(4, 16)) * 3]


@every_codebook
def test_a_start_by_kmeans_fills_the_first_codes_of_a_growing_codebook(name):
    quantizer = tiny_quantizer(name, codebook_start="kmeans", initial_vocab_size=4)
    before = vectors_of(quantizer)
    quantizer.initialize(100 + torch.randn(2, 4, 40))
    assert (vectors_of(quantizer)[:4] > 90).all()
    torch.testing.assert_close(vectors_of(quantizer)[4:], before[4:])


@every_codebook
def test_new_codes_of_a_growing_codebook_have_a_window_to_be_chosen_in(name):
    quantizer = euclidean(name, initial_vocab_size=4, grow_until=1.0, revive_after=2, revive_below=0.5)
    quantizer.anneal(0)
    quantize_and_update(quantizer, near_codes(quantizer, [0, 1, 2, 3] * 8), 0)
    quantizer.anneal(1)
    quantize_and_update(quantizer, near_codes(quantizer, [0, 1, 2, 3] * 8), 2)
    assert quantizer.active_size == 16
    assert quantizer.recent_counts.tolist() == [16.0] * 16
