"""The contract of every quantizer in the table, and the published equations of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.loading import options_of
from tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer
from tokenizer.quantizers.codebook import CodebookQuantizer
from tokenizer.quantizers.search import kmeans, nearest_codes

CODEBOOKS = [name for name, cls in QUANTIZERS.items() if issubclass(cls, CodebookQuantizer)]
GRIDS = [(7,), (3, 5), (2, 3, 4)]
TINY = {"vocab_size": 16, "codebook_start": "normal", "revive_after": 0}


def tiny_quantizer(name: str, dim: int = 4, **options: object) -> Quantizer:
    """A quantizer of `dim` channels with those of the tiny options that it has."""
    known = options_of(QUANTIZERS[name])
    return build_quantizer({"name": name, **{k: v for k, v in (TINY | options).items() if k in known}}, dim)


def state_of(quantizer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)


def near_codes(quantizer: Quantizer, codes: list[int]) -> Tensor:
    """Latents `(1, D, len(codes))` that choose these codes, each a little off."""
    latents = quantizer.decode(torch.tensor([codes])).detach()
    return latents + 1e-3 * torch.randn_like(latents)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_decoding_the_codes_gives_the_quantized_latents(name, grid):
    quantizer = tiny_quantizer(name).eval()
    output = quantizer(torch.randn(2, 4, *grid))
    assert output.quantized.shape == (2, 4, *grid)
    torch.testing.assert_close(quantizer.decode(output.codes), output.quantized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_are_int64_within_the_vocabulary_and_shaped_by_the_layout(name, grid):
    quantizer = tiny_quantizer(name)
    codes = quantizer(torch.randn(3, 4, *grid)).codes
    layout = quantizer.code_layout(grid)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, *layout.shape)
    for part, code_grid in zip(layout.split(codes), layout.grids, strict=True):
        assert part.min() >= 0
        assert part.max() < code_grid.vocab_size


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_autocast_to_bfloat16_changes_no_code_and_no_loss(name, training):
    # Uniform in [-1/K, 1/K]: codes so close together that bfloat16 mistakes most of them.
    quantizer = tiny_quantizer(name, vocab_size=512, codebook_start="uniform").train(training)
    latents = torch.empty(4, 4, 8, 8).uniform_(-1 / 512, 1 / 512)
    expected = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(latents)
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.quantized, expected.quantized)
    torch.testing.assert_close(output.losses, expected.losses, rtol=0, atol=0)


class Identity(Quantizer):
    """The latents themselves, by way of a matrix product, which autocast would round."""

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        product = torch.eye(self.dim) @ latents.flatten(2)
        return QuantizerOutput(product.view_as(latents), latents.new_zeros(len(latents), *latents.shape[2:]).long())

    def decode(self, codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), self.dim, *codes.shape[1:])


def test_the_base_class_turns_autocast_off_around_quantize():
    latents = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = Identity(4, 2)(latents).quantized
    torch.testing.assert_close(quantized, latents, rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bfloat16_latents_have_the_codes_of_the_same_values_in_float32(name):
    quantizer = tiny_quantizer(name).eval()
    latents = torch.randn(2, 4, 8, 8).bfloat16()
    output = quantizer(latents)
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.codes, quantizer(latents.float()).codes)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 4), (4,)], ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_latents_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, \*grid\), got \("):
        tiny_quantizer(name)(torch.randn(shape))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_gradient_passes_straight_through(name):
    quantizer = tiny_quantizer(name)
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    weights = torch.randn(2, 4, 3, 3)
    (quantizer(latents).quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_save_load_continue_equals_not_having_stopped(name, tmp_path: Path):
    # Revival falls into the second half and depends on codes used in the first.
    def build() -> tuple[Quantizer, torch.optim.Optimizer | None]:
        quantizer = tiny_quantizer(name, revive_after=4)
        parameters = list(quantizer.parameters())
        return quantizer, torch.optim.SGD(parameters, lr=0.5) if parameters else None

    def train(quantizer: Quantizer, optimizer: torch.optim.Optimizer | None, steps: range) -> None:
        for step in steps:
            latents = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
            output = quantizer(latents)
            (output.quantized.square().sum() + sum(output.losses.values())).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            quantizer.update(step)

    whole, optimizer = build()
    train(whole, optimizer, range(2))
    save_file(state_of(whole), tmp_path / "half.safetensors")
    train(whole, optimizer, range(2, 6))
    resumed, optimizer = build()
    resumed.load_state_dict(load_file(tmp_path / "half.safetensors"))
    train(resumed, optimizer, range(2, 6))
    assert_same_state(resumed, state_of(whole))


def test_an_unknown_quantizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown quantizer 'vqq'; did you mean 'vq'") as error:
        build_quantizer({"name": "vqq"}, 4)
    assert ", ".join(sorted(QUANTIZERS)) in str(error.value)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown option of {name} 'quantizer.nonsense'; .*choose one of") as error:
        build_quantizer({"name": name, "nonsense": 1}, 4)
    assert all(f"quantizer.{option}" in str(error.value) for option in options_of(QUANTIZERS[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size should be an integer of at least 2, got 1"),
        ({"commitment_weight": -1}, "commitment_weight should be from 0 to 100, got -1"),
        ({"codebook_start": "ones"}, "codebook_start should be one of .*kmeans.*, got 'ones'"),
        ({"revive_after": -1}, "revive_after should be a number of steps, or 0 for never, got -1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer({"name": name, **options}, 4)


# Blocks hold 2**20 scores, so these run over 1, 3 and 4 blocks, the last one not full.
@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), [(50, 8, 37), (2100, 5, 1000), (60, 4, 60_000)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_chosen_code_is_nearest_up_to_float32_rounding(num_vectors, dim, vocab_size, scale):
    vectors, codebook = scale * torch.randn(num_vectors, dim), scale * torch.randn(vocab_size, dim)
    codes = nearest_codes(vectors, codebook)
    x, e = vectors.double(), codebook.double()
    squared = x.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * x @ e.t()
    chosen = squared.gather(1, codes[:, None]).squeeze(1)
    bound = 1e-5 * (x.square().sum(1) + e[codes].square().sum(1))
    assert ((chosen - squared.amin(1)) <= bound).all()


@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), [(64, 3, 17), (300, 16, 131), (1200, 7, 1013)])
def test_exact_duplicates_go_to_the_lowest_index(num_vectors, dim, vocab_size):
    distinct = torch.randn(12, dim)
    codebook = distinct[torch.randint(0, 12, (vocab_size,))]
    codes = nearest_codes(torch.randn(num_vectors, dim), codebook)
    first = (codebook[codes][:, None] == codebook).all(2).int().argmax(1)
    assert torch.equal(codes, first)


def test_beta_weighs_the_commitment_term_and_not_the_codebook_term_of_vq():
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    for beta in (0.25, 2.0):
        quantizer = tiny_quantizer("vq", commitment_weight=beta)
        output = quantizer(latents)
        difference = (latents - quantizer.decode(output.codes)).detach()
        per_code = torch.zeros(16, 4).index_add_(0, output.codes.flatten(), difference.movedim(1, -1).reshape(-1, 4))
        inputs = [latents, quantizer.codebook]
        to_latents, to_codebook = torch.autograd.grad(output.losses["codebook"], inputs, allow_unused=True)
        assert to_latents is None
        torch.testing.assert_close(to_codebook, -2 * per_code / latents.numel(), rtol=1e-5, atol=1e-7)
        to_latents, to_codebook = torch.autograd.grad(output.losses["commitment"], inputs, allow_unused=True)
        assert to_codebook is None
        torch.testing.assert_close(to_latents, beta * 2 * difference / latents.numel(), rtol=1e-5, atol=1e-7)


def test_the_moving_average_codebook_follows_the_published_update():
    K, decay, epsilon = 16, 0.8, 1e-3
    quantizer = tiny_quantizer("ema", decay=decay, epsilon=epsilon)
    N, m = torch.ones(K, dtype=torch.float64), quantizer.codebook.double()
    for step in range(5):
        latents = torch.randn(2, 4, 5)
        codes = quantizer(latents).codes
        quantizer.update(step)
        for i in range(K):
            chosen_by = latents.movedim(1, -1)[codes == i].double()
            N[i] = N[i] * decay + len(chosen_by) * (1 - decay)
            m[i] = m[i] * decay + chosen_by.sum(0) * (1 - decay)
        n = N.sum()
        smoothed = (N + epsilon) / (n + K * epsilon) * n
        torch.testing.assert_close(quantizer.codebook.double(), m / smoothed[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_two_accumulated_forwards_and_one_update_equal_one_forward_of_the_joined_batch(name):
    accumulated, joined = tiny_quantizer(name), tiny_quantizer(name)
    joined.load_state_dict(accumulated.state_dict())
    before = state_of(accumulated)
    first, second = torch.randn(3, 4, 5).requires_grad_(), torch.randn(3, 4, 5).requires_grad_()
    for latents in (first, second):
        (sum(accumulated(latents).losses.values()) / 2).backward()
    assert_same_state(accumulated, before)
    sum(joined(torch.cat([first, second])).losses.values()).backward()
    for mine, theirs in zip(accumulated.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    accumulated.update(0)
    joined.update(0)
    torch.testing.assert_close(dict(accumulated.state_dict()), dict(joined.state_dict()), rtol=1e-5, atol=1e-6)
    after = state_of(accumulated)
    accumulated.update(1)
    assert_same_state(accumulated, after)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_code_that_nobody_chose_never_gives_nan(name):
    quantizer = tiny_quantizer(name, decay=0.5)
    quantizer.set_codes(torch.tensor([3]), torch.full((1, 4), 1e3))
    for step in range(200):
        output = quantizer(torch.randn(1, 4, 6))
        assert output.quantized.isfinite().all()
        quantizer.update(step)
    assert all(tensor.isfinite().all() for tensor in state_of(quantizer).values())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_revival_moves_exactly_the_unused_codes_onto_latents_of_the_batch(name):
    reviving, never = tiny_quantizer(name, revive_after=3), tiny_quantizer(name, revive_after=0)
    never.load_state_dict(reviving.state_dict())
    for step in range(3):
        assert torch.equal(reviving.codebook, never.codebook)
        latents = near_codes(reviving, [4 * step + i for i in (0, 1, 2)])
        for quantizer in (reviving, never):
            assert quantizer(latents).codes.tolist() == [[4 * step + i for i in (0, 1, 2)]]
            quantizer.update(step)
    moved = (reviving.codebook != never.codebook).any(1).nonzero().squeeze(1)
    assert moved.tolist() == [3, 7, 11, 12, 13, 14, 15]
    vectors = latents[0].t()  # (N, D)
    assert (reviving.codebook[moved][:, None] == vectors).all(2).any(1).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_revival_counts_anew_after_each_window(name):
    quantizer = tiny_quantizer(name, revive_after=2)
    quantizer(near_codes(quantizer, list(range(16))))
    quantizer.update(0)
    quantizer(near_codes(quantizer, [0]))
    quantizer.update(1)
    for step in (2, 3):
        latents = near_codes(quantizer, [0])
        quantizer(latents)
        quantizer.update(step)
    assert torch.equal(quantizer.codebook[1:], latents[0].t().expand(15, 4))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_revive_after_zero_never_moves_a_code_onto_a_latent(name):
    quantizer = tiny_quantizer(name, revive_after=0)
    for step in range(20):
        latents = near_codes(quantizer, [0, 1])
        quantizer(latents)
        quantizer.update(step)
        assert not (quantizer.codebook[:, None] == latents[0].t()).all(2).any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_evaluation_forward_leaves_all_state_unchanged(name):
    quantizer = tiny_quantizer(name, revive_after=1)
    before = state_of(quantizer)
    quantizer.eval()(torch.randn(2, 4, 6))
    quantizer.update(0)
    with torch.no_grad():
        quantizer.train()(torch.randn(2, 4, 6))
    quantizer.update(0)
    assert_same_state(quantizer, before)


def separated_clusters() -> Tensor:
    """Twenty vectors close to each of five points far apart, `(100, 3)`, ordered by point."""
    points = 20 * torch.arange(5.0)[:, None] + torch.randn(5, 3)
    return points.repeat_interleave(20, dim=0) + 0.1 * torch.randn(100, 3)


def test_kmeans_finds_the_centres_of_separated_clusters():
    vectors = separated_clusters()
    expected = vectors.view(5, 20, 3).mean(1)
    torch.testing.assert_close(kmeans(vectors, 5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_codebook_that_starts_from_kmeans_holds_the_centres(name):
    vectors = separated_clusters()
    quantizer = tiny_quantizer(name, dim=3, vocab_size=5, codebook_start="kmeans")
    quantizer.initialize(vectors)
    decoded = quantizer.decode(torch.arange(5)[None])[0].t()
    torch.testing.assert_close(decoded, vectors.view(5, 20, 3).mean(1), rtol=1e-5, atol=1e-5)
    other = tiny_quantizer(name, dim=3, vocab_size=5, codebook_start="normal")
    before = state_of(other)
    other.initialize(vectors)
    assert_same_state(other, before)


@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), [(3, 4, 16), (1, 4, 8), (1, 1, 4), (7, 2, 8)])
def test_kmeans_with_fewer_vectors_than_clusters_gives_finite_distinct_centres(num_vectors, dim, vocab_size):
    vectors = torch.randn(num_vectors, dim)
    centres = kmeans(vectors, vocab_size)
    assert centres.isfinite().all()
    assert len(centres.unique(dim=0)) == vocab_size
    assert torch.cdist(vectors, centres).amin(1).max() < 1e-2
