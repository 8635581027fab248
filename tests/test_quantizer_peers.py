"""Equality with vector-quantize-pytorch, an implementation by others, on the same weights and latents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peers
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from tokenizer.quantizers import Quantizer, build_quantizer
from tokenizer.quantizers.gradients import rotation_trick

DIM, K = 6, 32


def quantizer_of(name: str, dim: int = DIM, **options: object) -> Quantizer:
    return build_quantizer({"name": name, **options}, dim)


def with_codebook(name: str, **options: object) -> Quantizer:
    """A quantizer with a random codebook of 32 that is never revived."""
    return quantizer_of(name, vocab_size=K, codebook_start="normal", revive_after=0, **options)


def channels_last(latents: Tensor) -> Tensor:
    """`(B, D, *grid)` as `(B, N, D)`."""
    return latents.movedim(1, -1).flatten(1, -2)


def copy_codebook(peer: torch.nn.Module, codebook: Tensor) -> None:
    """Give a `VectorQuantize` this codebook and moving averages that have not moved."""
    peer._codebook.embed.data.copy_(codebook[None])
    peer._codebook.embed_avg.data.copy_(codebook[None])


def assert_same(mine: Tensor, theirs: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(mine.detach(), theirs.detach().to(mine.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("levels", [[3, 4], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [16, 3, 9]], ids=str)
def test_fsq_has_the_codes_values_and_gradients_of_the_peer(levels):
    mine, theirs = quantizer_of("fsq", len(levels), levels=levels), peers.FSQ(levels)
    latents, grad = 2 * torch.randn(3, len(levels), 8, 9), torch.randn(3, len(levels), 8, 9)
    x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    output = mine(x)
    quantized, codes = theirs(y)
    assert torch.equal(output.codes, codes.long())
    assert_same(output.quantized, quantized)
    output.quantized.backward(grad)
    quantized.backward(grad)
    assert_same(x.grad, y.grad)
    every = torch.arange(mine.vocab_size)
    assert_same(channels_last(mine.decode(every[None]))[0], theirs.indices_to_codes(every[None])[0])


@pytest.mark.parametrize("dim", [5, 12])
def test_fsq_behind_projections_has_the_codes_and_values_of_the_peer(dim):
    mine, theirs = quantizer_of("fsq", dim, levels=[8, 5, 5, 5]), peers.FSQ([8, 5, 5, 5], dim=dim)
    theirs.project_in.load_state_dict(mine.project_in.state_dict())
    theirs.project_out.load_state_dict(mine.project_out.state_dict())
    latents = 3 * torch.randn(3, dim, 8, 9)
    output = mine(latents)
    quantized, codes = theirs(latents)
    assert torch.equal(output.codes, codes.long())
    assert_same(output.quantized, quantized)


@pytest.mark.parametrize(("name", "spherical"), [("lfq", False), ("bsq", True)])
@pytest.mark.parametrize("dim", [10, 16])
def test_lookup_free_quantizers_have_the_codes_values_and_gradients_of_the_peer(dim, name, spherical):
    mine = quantizer_of(name, dim, num_bits=10)
    theirs = peers.LFQ(dim=dim, codebook_size=2**10, spherical=spherical)
    if dim != 10:
        theirs.project_in.load_state_dict(mine.project_in.state_dict())
        theirs.project_out.load_state_dict(mine.project_out.state_dict())
    latents, grad = torch.randn(3, dim, 8, 9), torch.randn(3, dim, 8, 9)
    x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    output = mine(x)
    quantized, codes, _ = theirs(y)
    assert torch.equal(output.codes, codes.long())
    assert_same(output.quantized, quantized)
    output.quantized.backward(grad)
    quantized.backward(grad)
    assert_same(x.grad, y.grad)
    every = torch.arange(2**10)[None]
    assert_same(channels_last(mine.decode(every)), theirs.indices_to_codes(every))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("inverse_temperature", [0.25, 1.0])
@pytest.mark.parametrize(("name", "spherical"), [("lfq", False), ("bsq", True)])
def test_lookup_free_quantizers_have_the_losses_of_the_peer(name, spherical, inverse_temperature, gamma):
    mine = quantizer_of(
        name,
        num_bits=DIM,
        commitment_weight=0.5,
        entropy_weight=0.2,
        diversity_weight=gamma,
        entropy_temperature=1 / inverse_temperature,
    )
    weights = {"entropy_loss_weight": 0.2, "commitment_loss_weight": 0.5, "diversity_gamma": gamma}
    theirs = peers.LFQ(dim=DIM, spherical=spherical, **weights)
    latents = torch.randn(3, DIM, 8, 9)
    x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    loss = sum(mine(x).losses.values())
    expected = theirs(y, inv_temperature=inverse_temperature)[2]
    loss.backward()
    expected.backward()
    # The peer clamps probabilities inside the logarithm to 1e-5.
    assert_same(loss, expected, rtol=0, atol=1e-4)
    assert_same(x.grad, y.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["vq", "ema"])
def test_nearest_codes_are_those_of_the_peer(name, training):
    mine, theirs = with_codebook(name).train(training), peers.VectorQuantize(DIM, K).train(training)
    copy_codebook(theirs, mine.codebook.detach())
    latents = torch.randn(3, DIM, 40)
    output = mine(latents)
    quantized, codes, _ = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)


@pytest.mark.parametrize("code_dim", [3, 9])
def test_codes_behind_projections_are_those_of_the_peer(code_dim):
    mine, theirs = with_codebook("ema", code_dim=code_dim).eval(), peers.VectorQuantize(DIM, K, codebook_dim=code_dim)
    theirs.eval()
    copy_codebook(theirs, mine.codebook)
    theirs.project_in.load_state_dict(mine.project_in.state_dict())
    theirs.project_out.load_state_dict(mine.project_out.state_dict())
    latents = torch.randn(3, DIM, 40)
    output = mine(latents)
    quantized, codes, _ = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)


def test_the_moving_average_codebook_and_commitment_are_those_of_the_peer_over_many_steps():
    mine = with_codebook("ema", decay=0.8, epsilon=1e-5, commitment_weight=0.7)
    theirs = peers.VectorQuantize(DIM, K, decay=0.8, eps=1e-5, commitment_weight=0.7)
    copy_codebook(theirs, mine.codebook)
    for step in range(10):
        latents = torch.randn(3, DIM, 40)
        x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        output = mine(x)
        _, codes, loss = theirs(channels_last(y))
        assert torch.equal(output.codes, codes)
        assert_same(output.losses["commitment"], loss.squeeze())
        output.losses["commitment"].backward()
        loss.sum().backward()
        assert_same(x.grad, y.grad)
        mine.update(step)
        assert_same(mine.codebook, theirs._codebook.embed[0])
        assert_same(mine.cluster_size, theirs._codebook.cluster_size[0])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_gradient_of_the_latents_is_that_of_the_peer(gradient):
    mine = with_codebook("ema", gradient=gradient)
    theirs = peers.VectorQuantize(DIM, K, rotation_trick=gradient == "rotation")
    copy_codebook(theirs, mine.codebook)
    latents, grad = torch.randn(3, DIM, 40), torch.randn(3, DIM, 40)
    x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    mine(x).quantized.backward(grad)
    theirs(channels_last(y))[0].backward(channels_last(grad))
    assert_same(x.grad, y.grad)


def test_the_rotation_trick_is_that_of_the_peer():
    vectors, chosen, grad = torch.randn(50, DIM), torch.randn(50, DIM), torch.randn(50, DIM)
    x, y = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    mine, theirs = rotation_trick(x, chosen), rotate_to(y, chosen)
    assert_same(mine, theirs)
    mine.backward(grad)
    theirs.backward(grad)
    assert_same(x.grad, y.grad)


@pytest.mark.parametrize("name", ["vq", "ema"])
def test_cosine_codes_and_values_are_those_of_the_peer(name):
    mine, theirs = with_codebook(name, distance="cosine").eval(), peers.VectorQuantize(DIM, K, use_cosine_sim=True)
    theirs.eval()
    copy_codebook(theirs, F.normalize(mine.codebook.detach(), dim=-1))
    latents = 3 * torch.randn(3, DIM, 40)
    output = mine(latents)
    quantized, codes, _ = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)


def test_a_cosine_moving_average_points_where_that_of_the_peer_does_over_many_steps():
    mine = with_codebook("ema", distance="cosine", decay=0.8)
    mine.set_codes(torch.arange(K), F.normalize(mine.codebook, dim=-1))
    theirs = peers.VectorQuantize(DIM, K, use_cosine_sim=True, decay=0.8)
    copy_codebook(theirs, mine.codebook)
    for step in range(10):
        latents = torch.randn(3, DIM, 40)
        output = mine(latents)
        mine.update(step)
        _, codes, _ = theirs(channels_last(latents))
        assert torch.equal(output.codes, codes)
        assert_same(F.normalize(mine.codebook, dim=-1), theirs._codebook.embed[0])


def test_simvq_has_the_codes_values_losses_and_gradients_of_the_peer():
    mine = with_codebook("simvq", commitment_weight=0.25)
    torch.nn.init.normal_(mine.projection.weight)
    theirs = peers.SimVQ(DIM, K, rotation_trick=False, input_to_quantize_commit_loss_weight=0.25)
    theirs.frozen_codebook.copy_(mine.codebook)
    theirs.code_transform.load_state_dict(mine.projection.state_dict())
    latents, grad = torch.randn(3, DIM, 40), torch.randn(3, DIM, 40)
    x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    output = mine(x)
    quantized, codes, loss = theirs(channels_last(y))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)
    assert_same(sum(output.losses.values()), loss)
    ((output.quantized * grad).sum() + sum(output.losses.values())).backward()
    ((quantized * channels_last(grad)).sum() + loss).backward()
    assert_same(x.grad, y.grad)
    assert_same(mine.projection.weight.grad, theirs.code_transform.weight.grad)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shared", [False, True], ids=["own codebooks", "shared codebook"])
def test_residual_has_the_codes_values_and_losses_of_the_peer(shared, training):
    inner = {"name": "ema", "vocab_size": K, "codebook_start": "normal", "revive_after": 0, "commitment_weight": 0.7}
    mine = quantizer_of("residual", quantizer=inner, depth=3, shared=shared).train(training)
    theirs = peers.ResidualVQ(
        dim=DIM, num_quantizers=3, codebook_size=K, shared_codebook=shared, rotation_trick=False, commitment_weight=0.7
    ).train(training)
    for level, layer in enumerate(theirs.layers):
        copy_codebook(layer, mine.level(level).codebook)
    latents = torch.randn(3, DIM, 40)
    output = mine(latents)
    quantized, codes, losses = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)
    if training:
        assert_same(output.losses["commitment"], losses.mean())
    else:
        assert_same(channels_last(mine.decode(codes)), theirs.get_output_from_indices(codes))


def test_the_codebooks_of_a_residual_learn_as_those_of_the_peer_over_many_steps():
    inner = {"name": "ema", "vocab_size": K, "codebook_start": "normal", "revive_after": 0, "decay": 0.8}
    mine = quantizer_of("residual", quantizer=inner, depth=3)
    theirs = peers.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=K, decay=0.8)
    for level, layer in enumerate(theirs.layers):
        copy_codebook(layer, mine.level(level).codebook)
    for step in range(6):
        latents = torch.randn(3, DIM, 40)
        output = mine(latents)
        mine.update(step)
        _, codes, _ = theirs(channels_last(latents))
        assert torch.equal(output.codes, codes)
        for level, layer in enumerate(theirs.layers):
            assert_same(mine.level(level).codebook, layer._codebook.embed[0])


def test_a_residual_of_lfq_has_the_codes_and_values_of_the_peer():
    mine = quantizer_of("residual", quantizer={"name": "lfq", "num_bits": DIM}, depth=4)
    theirs = peers.ResidualLFQ(dim=DIM, codebook_size=2**DIM, num_quantizers=4)
    latents = torch.randn(3, DIM, 40)
    output = mine(latents)
    quantized, codes, _ = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes.long())
    assert_same(channels_last(output.quantized), quantized)


@pytest.mark.parametrize("depth", [2, 4])
def test_a_residual_of_fsq_has_the_codes_and_values_of_the_peer(depth):
    levels = [5, 8, 3, 6]
    mine = quantizer_of("residual", len(levels), quantizer={"name": "fsq", "levels": levels}, depth=depth).eval()
    theirs = peers.ResidualFSQ(dim=len(levels), levels=levels, num_quantizers=depth).eval()
    latents = 2 * torch.randn(3, len(levels), 40)
    output = mine(latents)
    quantized, codes = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes.long())
    assert_same(channels_last(output.quantized), quantized)


def test_a_product_has_the_codes_and_values_of_a_peer_with_several_heads():
    inner = {"name": "ema", "vocab_size": K, "codebook_start": "normal", "revive_after": 0}
    mine = quantizer_of("product", 2 * DIM, quantizer=inner, depth=2).eval()
    theirs = peers.VectorQuantize(2 * DIM, K, codebook_dim=DIM, heads=2, separate_codebook_per_head=True).eval()
    theirs._codebook.embed.data.copy_(torch.stack([mine.level(i).codebook for i in range(2)]))
    latents = torch.randn(3, 2 * DIM, 40)
    output = mine(latents)
    quantized, codes, _ = theirs(channels_last(latents))
    assert torch.equal(output.codes, codes)
    assert_same(channels_last(output.quantized), quantized)
