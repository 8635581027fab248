"""The terms of the loss that quantizers with a codebook share, and their distances, projections and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantizer_cases import CODEBOOKS, rows, state_of, tiny_quantizer, train_step
from torch import Tensor

from tokenizer.quantizers import search
from tokenizer.quantizers.gradients import rotation_trick

every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
# Index back-propagation has an entropy term and a gradient of its own.
every_codebook_but_ibq = pytest.mark.parametrize("name", [name for name in CODEBOOKS if name != "ibq"])


@every_codebook
def test_the_commitment_weight_goes_to_its_final_value_in_a_straight_line(name):
    quantizer = tiny_quantizer(name, commitment_weight=0.5, final_commitment_weight=0.1)
    still = tiny_quantizer(name, commitment_weight=0.5)
    still.load_state_dict(quantizer.state_dict())
    latents = torch.randn(2, 4, 6)
    for progress in (0.0, 0.25, 1.0):
        quantizer.anneal(progress)
        still.anneal(progress)
        ratio = quantizer(latents).losses["commitment"] / still(latents).losses["commitment"]
        assert ratio.item() == pytest.approx(1 - 0.8 * progress, rel=1e-5)


def entropy_by_enumeration(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """E[H(p)] - H(E[p]) of p = softmax(-|x - e|^2 / (temperature D MSE)), in float64."""
    x, e = vectors.double(), codebook.double()
    distances = (x[:, None] - e).square().sum(2)
    mean_square = distances.detach().amin(1).mean() / x.shape[1]
    p = torch.softmax(-distances / (temperature * x.shape[1] * mean_square), 1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


@pytest.mark.parametrize("block_elements", [1 << 20, 64])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@every_codebook_but_ibq
def test_the_entropy_term_and_its_gradients_are_those_of_enumeration(name, distance, block_elements, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ELEMENTS", block_elements)  # 64: blocks of 16 rows, the last one not full
    options = {"entropy_weight": 0.7, "entropy_temperature": 0.4, "commitment_weight": 0.0, "distance": distance}
    quantizer = tiny_quantizer(name, **options)
    latents = torch.randn(2, 4, 5, 5, requires_grad=True)
    found = quantizer(latents).losses["entropy"]
    vectors, codebook = rows(latents), quantizer.codebook
    if name == "simvq":
        codebook = quantizer.projection(codebook)
    if distance == "cosine":
        vectors, codebook = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1)
    expected = 0.7 * entropy_by_enumeration(vectors, codebook, 0.4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [latents, *quantizer.parameters()]
    gradients = torch.autograd.grad(found, inputs)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_entropy_term_is_over_codes_that_can_be_chosen():
    quantizer = tiny_quantizer("vq", entropy_weight=1.0, initial_vocab_size=5)
    latents = torch.randn(2, 4, 5, 5)
    expected = entropy_by_enumeration(rows(latents), quantizer.codebook[:5], 1.0)
    assert quantizer(latents).losses["entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


@every_codebook_but_ibq
def test_the_entropy_term_is_off_by_default_and_in_evaluation(name):
    latents = torch.randn(2, 4, 6)
    assert "entropy" not in tiny_quantizer(name)(latents).losses
    assert "entropy" not in tiny_quantizer(name, entropy_weight=0.1).eval()(latents).losses


@every_codebook
def test_losses_have_the_same_names_with_and_without_gradients(name):
    for distance in ("euclidean", "cosine"):
        quantizer = tiny_quantizer(name, distance=distance)
        latents = torch.randn(2, 4, 6)
        expected = quantizer(latents.clone().requires_grad_()).losses
        with torch.no_grad():
            torch.testing.assert_close(quantizer(latents).losses, {k: v.detach() for k, v in expected.items()})


# Distance, projection and gradient


@every_codebook
def test_cosine_distance_chooses_the_largest_cosine_whatever_the_lengths(name):
    quantizer = tiny_quantizer(name, distance="cosine").eval()
    latents = torch.randn(2, 4, 30)
    output = quantizer(latents)
    codebook = quantizer.codebook @ quantizer.projection.weight.t() if name == "simvq" else quantizer.codebook
    cosines = F.cosine_similarity(rows(latents)[:, None], codebook, dim=2)
    assert torch.equal(output.codes.flatten(), cosines.argmax(1))
    torch.testing.assert_close(rows(output.quantized).norm(dim=1), torch.ones(60), rtol=1e-5, atol=1e-5)
    assert torch.equal(quantizer(latents * torch.rand(2, 1, 30).add(0.5)).codes, output.codes)


@every_codebook
def test_codes_are_looked_up_in_code_dim_channels_between_two_linear_layers(name):
    quantizer = tiny_quantizer(name, code_dim=2, distance="euclidean").eval()
    latents = torch.randn(2, 4, 30)
    assert quantizer.codebook.shape == (16, 2)
    output = quantizer(latents)
    small = rows(latents) @ quantizer.project_in.weight.t() + quantizer.project_in.bias
    codes = torch.cdist(small, quantizer.codebook).argmin(1)
    assert torch.equal(output.codes.flatten(), codes)
    expected = quantizer.codebook[codes] @ quantizer.project_out.weight.t() + quantizer.project_out.bias
    torch.testing.assert_close(rows(output.quantized), expected, rtol=1e-5, atol=1e-6)


@every_codebook
def test_both_projections_learn(name):
    quantizer = tiny_quantizer(name, code_dim=2)
    before = state_of(quantizer)
    train_step(quantizer, torch.randn(2, 4, 30), 0)
    for layer in ("project_in", "project_out"):
        assert not torch.equal(quantizer.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@every_codebook_but_ibq
def test_the_gradient_is_straight_through_or_that_of_the_rotation_trick(name, distance):
    latents, weights = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    for gradient in ("straight_through", "rotation"):
        quantizer = tiny_quantizer(name, distance=distance, gradient=gradient)
        output = quantizer(latents)
        vectors = F.normalize(rows(latents), dim=1) if distance == "cosine" else rows(latents)
        chosen = rows(output.quantized).detach()
        replaced = rotation_trick(vectors, chosen) if gradient == "rotation" else vectors
        (expected,) = torch.autograd.grad((replaced * rows(weights)).sum(), latents)
        (found,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
