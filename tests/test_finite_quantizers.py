"""fsq, lfq and bsq, whose codes are all combinations of a few values, against transcripts and enumerations."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.quantizers import Quantizer, build_quantizer
from tokenizer.quantizers.bits import bit_entropies

LEVELS = [[5, 3], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [3, 3, 3], [3, 4, 6, 7], [300]]
BITS = ["lfq", "bsq"]


def rows(latents: Tensor) -> Tensor:
    """`(B, D, *grid)` as `(N, D)` float64."""
    return latents.detach().movedim(1, -1).flatten(0, -2).double()


def assert_near(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


def gradient(loss: Tensor, latents: Tensor) -> Tensor:
    return torch.autograd.grad(loss, latents, retain_graph=True)[0]


def fsq(levels: list[int], entropy_weight: float = 0.0) -> Quantizer:
    """The paper's, without the entropy term unless it is asked for."""
    return build_quantizer({"name": "fsq", "levels": levels, "entropy_weight": entropy_weight}, len(levels))


def published_fsq(z: np.ndarray, levels: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values in [-1, 1], codes and d bound / dz by the code of Mentzer et al. 2023, appendix A.1."""
    L = np.array(levels)
    half_l = (L - 1) * (1 + 1e-3) / 2
    offset = np.where(L % 2 == 1, 0.0, 0.5)
    shift = np.arctanh(offset / half_l)
    tanh = np.tanh(z + shift)
    half_width = L // 2
    rounded = np.round(tanh * half_l - offset)
    basis = np.concatenate([[1], np.cumprod(L[:-1])])
    codes = ((rounded + half_width) * basis).sum(-1).astype(np.int64)
    return rounded / half_width, codes, half_l * (1 - tanh**2) / half_width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_type_of_torch_changes_nothing_of_fsq(dtype):
    latents = torch.randn(4, 2, 100)
    expected = fsq([8, 5])(latents)
    torch.set_default_dtype(dtype)
    try:
        output = fsq([8, 5])(latents)
        decoded = fsq([8, 5]).decode(output.codes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.quantized.dtype == decoded.dtype == torch.float32
    assert torch.equal(output.quantized, expected.quantized)
    assert torch.equal(decoded, expected.quantized)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_values_codes_and_gradients_are_those_of_the_published_code(levels):
    latents = (1.5 * torch.randn(2, len(levels), 300)).requires_grad_()
    output = fsq(levels)(latents)
    values, codes, slope = published_fsq(rows(latents).numpy(), levels)
    grad = torch.randn(2, len(levels), 300)
    assert output.codes.flatten().tolist() == codes.tolist()
    assert output.losses == {}
    assert_near(rows(output.quantized), torch.from_numpy(values))
    expected = torch.from_numpy(slope) * rows(grad)
    assert_near(rows(gradient((output.quantized * grad).sum(), latents)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_codes_are_in_bijection_with_the_combinations_of_levels(levels):
    quantizer = fsq(levels)
    K = math.prod(levels)
    assert quantizer.vocab_size == K
    vectors = rows(quantizer.decode(torch.arange(K)[None]))
    # The first channel is the lowest digit.
    values = [[(i - L // 2) / (L // 2) for i in range(L)] for L in levels]
    expected = torch.tensor([combination[::-1] for combination in product(*values[::-1])], dtype=torch.float64)
    assert_near(vectors, expected)
    assert len(vectors.unique(dim=0)) == K


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_gives_the_code_of_latents_that_the_bound_maps_onto_its_values(levels):
    quantizer = fsq(levels)
    codes = torch.arange(math.prod(levels))[None]
    values = rows(quantizer.decode(codes))
    L = torch.tensor(levels, dtype=torch.float64)
    half_l, offset = (L - 1) * 1.001 / 2, (L % 2 == 0) * 0.5
    preimages = torch.atanh((values * (L // 2) + offset) / half_l) - torch.atanh(offset / half_l)
    output = quantizer(preimages.float().t()[None])
    assert torch.equal(output.codes, codes)
    assert_near(rows(output.quantized), values)


@pytest.mark.parametrize("num_levels", [3, 4, 5, 8, 16, 255, 999, 1000])
def test_every_level_of_fsq_is_reached_and_no_other_value(num_levels):
    output = fsq([num_levels])(torch.linspace(-20, 20, 200_001)[None, None])
    assert output.codes.unique().tolist() == list(range(num_levels))
    half = num_levels // 2
    values = (torch.arange(num_levels) - half) / half
    assert_near(output.quantized.unique(), values)
    assert output.quantized.abs().max() == 1


@pytest.mark.parametrize("num_levels", [2, 1001])
def test_levels_that_the_bound_of_fsq_cannot_give_are_refused(num_levels):
    with pytest.raises(ValueError, match=rf"levels\[1\] should be integer from 3 to 1000, got {num_levels}"):
        fsq([5, num_levels])


def fsq_assignments(bounded: Tensor, levels: list[int]) -> list[Tensor]:
    """Each channel's softmax over its levels of the squared distance, `(N, L_i)` float64."""
    grids = [torch.arange(L, dtype=torch.float64) - L // 2 for L in levels]
    return [(-(z[:, None] - grid).square()).softmax(1) for z, grid in zip(bounded.unbind(1), grids, strict=True)]


@pytest.mark.parametrize("levels", [[5, 3], [8, 6, 5], [4, 4, 4, 4]], ids=str)
def test_the_entropy_term_of_fsq_equals_enumeration_of_all_codes(levels):
    quantizer = fsq(levels, entropy_weight=0.3)
    latents = torch.randn(2, len(levels), 11, requires_grad=True)
    loss = quantizer(latents).losses["entropy"]
    z = rows(latents).requires_grad_()
    joint = torch.ones(len(z), 1, dtype=torch.float64)
    for p in fsq_assignments(quantizer.bound(z), levels):
        joint = (joint[:, :, None] * p[:, None]).flatten(1)  # (N, K)
    expected = 0.3 * (math.log(math.prod(levels)) - entropy(joint.mean(0)))
    assert_near(loss, expected, rtol=1e-5, atol=1e-5)
    assert_near(rows(gradient(loss, latents)), gradient(expected, z), rtol=1e-4, atol=1e-6)


def test_the_entropy_term_of_a_large_fsq_takes_groups_of_channels_as_independent():
    levels = [20, 20, 20, 8, 8]
    quantizer = fsq(levels, entropy_weight=1.0)
    latents = torch.randn(1, 5, 40)
    first, second = [20, 20, 20], [8, 8]
    parts = [fsq(first, entropy_weight=1.0)(latents[:, :3]), fsq(second, entropy_weight=1.0)(latents[:, 3:])]
    expected = sum(part.losses["entropy"] for part in parts)
    assert_near(quantizer(latents).losses["entropy"], expected, rtol=1e-5, atol=1e-5)


def test_the_projection_of_bits_starts_as_principal_components_of_variance_one():
    for num_bits in (3, 6, 9):
        quantizer = build_quantizer({"name": "lfq", "num_bits": num_bits}, 6 if num_bits != 6 else 7)
        mixing = torch.randn(quantizer.dim, quantizer.dim)
        latents = (torch.randn(50, 40, quantizer.dim) @ mixing + 3).movedim(-1, 1)  # (B, D, length)
        quantizer.initialize(latents)
        projected = quantizer.project_in(latents.movedim(1, -1)).flatten(0, 1)
        assert_near(projected.mean(0), torch.zeros(num_bits), rtol=0, atol=1e-4)
        assert_near(projected.var(0, correction=0), torch.ones(num_bits), rtol=0, atol=0.5 if num_bits == 9 else 1e-3)
        if num_bits <= quantizer.dim:
            covariance = projected.t() @ projected / len(projected)
            assert_near(covariance, torch.eye(num_bits), rtol=0, atol=1e-3)
        else:
            back = quantizer.project_out(quantizer.project_in(latents.movedim(1, -1)))
            assert_near(back, latents.movedim(1, -1), rtol=1e-3, atol=1e-3)


def bit_quantizer(name: str, num_bits: int, **options: Any) -> Quantizer:
    return build_quantizer({"name": name, "num_bits": num_bits, **options}, num_bits)


def corners(num_bits: int) -> Tensor:
    """All signs `(2^n, n)` float64 in the order of the codes: the first channel is the highest bit."""
    return torch.tensor(list(product([-1.0, 1.0], repeat=num_bits)), dtype=torch.float64)


def on_the_sphere(z: Tensor, name: str) -> Tensor:
    """The vectors that `name` compares with its codes."""
    return z / z.norm(dim=1, keepdim=True) if name == "bsq" else z


def magnitude(name: str, num_bits: int) -> float:
    return 1 / math.sqrt(num_bits) if name == "bsq" else 1.0


def assignment(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """softmax(-|z - c|^2 / T) over all codes, `(N, K)`."""
    return (-(vectors[:, None] - codebook).square().sum(2) / temperature).softmax(1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def log_odds(num_vectors: int, num_bits: int) -> Tensor:
    return torch.randn(num_vectors, num_bits, dtype=torch.float64)


def joint_probabilities(logits: Tensor) -> Tensor:
    """Probabilities `(N, 2^n)` of the combinations of independent bits with these log odds."""
    p = logits.sigmoid()[:, None]
    return torch.where(corners(logits.shape[1]) > 0, p, 1 - p).prod(2)


@pytest.mark.parametrize("num_bits", [1, 2, 5, 10])
@pytest.mark.parametrize("name", BITS)
def test_a_code_is_the_signs_with_the_first_channel_as_the_highest_bit(name, num_bits):
    quantizer = bit_quantizer(name, num_bits)
    latents = torch.randn(2, num_bits, 50)
    output = quantizer(latents)
    bits = (rows(latents) > 0).int().tolist()
    assert output.codes.flatten().tolist() == [int("".join(map(str, row)), 2) for row in bits]
    assert_near(rows(output.quantized), rows(latents).sign() * magnitude(name, num_bits))
    every = rows(quantizer.decode(torch.arange(2**num_bits)[None]))
    assert_near(every, corners(num_bits) * magnitude(name, num_bits))
    assert_near(every.norm(dim=1), torch.full((2**num_bits,), 1.0 if name == "bsq" else math.sqrt(num_bits)))


@pytest.mark.parametrize("name", BITS)
def test_the_code_is_the_nearest_of_all_corners(name):
    latents = torch.randn(3, 6, 40)
    vectors, codebook = on_the_sphere(rows(latents), name), corners(6) * magnitude(name, 6)
    expected = (vectors[:, None] - codebook).square().sum(2).argmin(1)
    assert torch.equal(bit_quantizer(name, 6)(latents).codes.flatten(), expected)


def test_bsq_does_not_depend_on_the_length_of_a_latent():
    quantizer = bit_quantizer("bsq", 6)
    latents = torch.randn(2, 6, 20)
    output, scaled = quantizer(latents), quantizer(latents * 37)
    assert torch.equal(output.codes, scaled.codes)
    torch.testing.assert_close(output.losses, scaled.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("num_bits", [1, 4, 7])
@pytest.mark.parametrize("name", BITS)
def test_the_per_sample_entropy_and_its_gradient_equal_the_enumeration_of_all_codes(name, num_bits, temperature):
    quantizer = bit_quantizer(
        name, num_bits, commitment_weight=0.0, entropy_weight=0.7, diversity_weight=0.0, entropy_temperature=temperature
    )
    latents = torch.randn(2, num_bits, 20, requires_grad=True)
    loss = quantizer(latents).losses["entropy"]
    z = rows(latents).requires_grad_()
    p = assignment(on_the_sphere(z, name), corners(num_bits) * magnitude(name, num_bits), temperature)
    expected = 0.7 * entropy(p).mean()
    assert_near(loss, expected, rtol=0, atol=1e-5)
    assert_near(rows(gradient(loss, latents)), gradient(expected, z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_bits", [1, 4, 7])
@pytest.mark.parametrize("name", BITS)
def test_the_whole_entropy_term_and_its_gradient_equal_the_enumeration_where_one_group_holds_all_bits(name, num_bits):
    quantizer = bit_quantizer(name, num_bits, entropy_weight=0.7, diversity_weight=1.5, entropy_temperature=2.0)
    latents = torch.randn(2, num_bits, 20, requires_grad=True)
    loss = quantizer(latents).losses["entropy"]
    z = rows(latents).requires_grad_()
    p = assignment(on_the_sphere(z, name), corners(num_bits) * magnitude(name, num_bits), 2.0)
    expected = 0.7 * (entropy(p).mean() - 1.5 * entropy(p.mean(0)))
    assert_near(loss, expected, rtol=0, atol=1e-5)
    assert_near(rows(gradient(loss, latents)), gradient(expected, z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_bits", [1, 4, 7])
def test_the_factorised_entropy_of_bsq_and_its_gradient_are_the_sum_over_bits(num_bits):
    options = {"entropy_weight": 0.7, "diversity_weight": 1.5, "entropy_temperature": 0.5, "entropy_group_bits": 1}
    quantizer = bit_quantizer("bsq", num_bits, **options)
    latents = torch.randn(2, num_bits, 20, requires_grad=True)
    loss = quantizer(latents).losses["entropy"]
    z = rows(latents).requires_grad_()
    signs = corners(num_bits)
    p = assignment(on_the_sphere(z, "bsq"), signs / math.sqrt(num_bits), 0.5)
    ones = p.mean(0) @ (signs > 0).double()  # the marginal of each bit, from the joint distribution
    bound = entropy(torch.stack([ones, 1 - ones], 1)).sum()
    assert bound >= entropy(p.mean(0)) - 1e-9
    expected = 0.7 * (entropy(p).mean() - 1.5 * bound)
    assert_near(loss, expected, rtol=0, atol=1e-5)
    assert_near(rows(gradient(loss, latents)), gradient(expected, z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BITS)
def test_the_commitment_of_bits_is_the_mean_square_to_the_constant_code(name):
    latents = torch.randn(2, 5, 20, requires_grad=True)
    loss = bit_quantizer(name, 5, commitment_weight=0.3).forward(latents).losses["commitment"]
    z = rows(latents).requires_grad_()
    expected = 0.3 * (on_the_sphere(z, name) - z.detach().sign() * magnitude(name, 5)).square().mean()
    assert_near(loss, expected)
    assert_near(rows(gradient(loss, latents)), gradient(expected, z))


@pytest.mark.parametrize(("num_bits", "group_bits"), [(1, 1), (6, 6), (6, 2), (6, 4), (7, 3), (8, 1), (5, 12)])
def test_the_batch_entropy_of_bits_is_exact_inside_groups_and_never_below_the_joint_one(num_bits, group_bits):
    logits = 2 * log_odds(9, num_bits)
    sample, batch = bit_entropies(logits, group_bits)
    joint = joint_probabilities(logits)
    num_groups = math.ceil(num_bits / group_bits)
    groups = [joint_probabilities(group) for group in logits.tensor_split(num_groups, dim=1)]
    assert max(group.shape[1] for group in groups) <= 2**group_bits
    assert_near(sample, entropy(joint).mean())
    assert_near(batch, sum(entropy(group.mean(0)) for group in groups))
    if num_groups == 1:
        assert_near(batch, entropy(joint.mean(0)))
    else:
        assert batch > entropy(joint.mean(0)) + 1e-3


@pytest.mark.parametrize("group_bits", [1, 2, 3])
def test_the_batch_entropy_of_bits_equals_the_joint_one_where_bits_are_independent_over_the_data(group_bits):
    # Each bit takes each of three log odds together with all of those of the other bits.
    values = 2 * torch.randn(6, 3, dtype=torch.float64)
    logits = torch.cartesian_prod(*values)
    _, batch = bit_entropies(logits, group_bits)
    assert_near(batch, entropy(joint_probabilities(logits).mean(0)))


@pytest.mark.parametrize("group_bits", [1, 3, 12])
def test_the_gradient_of_the_entropies_of_bits_equals_autograd_of_the_enumeration(group_bits):
    logits = log_odds(9, 6).requires_grad_()
    sample, batch = bit_entropies(logits, group_bits)
    joint = joint_probabilities(logits)
    groups = [joint_probabilities(group) for group in logits.tensor_split(math.ceil(6 / group_bits), dim=1)]
    assert_near(gradient(sample, logits), gradient(entropy(joint).mean(), logits))
    expected = gradient(sum(entropy(group.mean(0)) for group in groups), logits)
    assert_near(gradient(batch, logits), expected)


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("name", BITS)
def test_latents_that_are_sure_of_their_bits_have_finite_gradients(name, size):
    # Nobody is near the other codes: their probabilities are 0 in float32.
    latents = torch.full((1, 4, 6), size, requires_grad=True)
    output = bit_quantizer(name, 4, entropy_temperature=0.01)(latents)
    sum(output.losses.values()).backward()
    assert output.losses["entropy"].isfinite()
    assert latents.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", BITS)
def test_24_bits_need_no_table_of_their_16_million_codes(name):
    quantizer = bit_quantizer(name, 24)
    latents = torch.randn(1, 24, 64, requires_grad=True)
    with LargestTensor() as largest:
        output = quantizer(latents)
        (output.quantized.sum() + sum(output.losses.values())).backward()
    assert output.codes.max() > 1 << 20
    assert latents.grad.isfinite().all()
    # The most are 64 x 2^6 probabilities of half a group of 12 bits and the 2^12 of the group.
    assert 24 * 64 <= largest.elements <= 1 << 14
