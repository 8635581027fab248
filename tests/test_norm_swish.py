"""NormSwish against torch's GroupNorm and silu, whose composition it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.norm_swish import NormSwish

SHAPES = [(2, 8, 5, 3), (1, 32, 1, 1), (3, 64, 4, 6)]


def layer(channels: int, num_groups: int = 4) -> NormSwish:
    norm = NormSwish(num_groups, channels, eps=1e-6)
    nn.init.uniform_(norm.weight, -1, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def plain(norm: NormSwish, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps))


def value_and_gradients(function, norm: NormSwish, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = function(x)
    return [output, *torch.autograd.grad(output, [x, norm.weight, norm.bias], upstream)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_the_composition(shape, memory_format):
    norm = layer(shape[1])
    x, upstream = (2 * torch.randn(shape) + 1).to(memory_format=memory_format), torch.randn(shape)
    found = value_and_gradients(norm, norm, x, upstream)
    expected = value_and_gradients(lambda x: plain(norm, x), norm, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_gradients_are_those_of_finite_differences():
    norm = layer(8).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.double, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(function, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("offset", [0, 3, 30])
def test_in_bfloat16_the_errors_are_not_above_those_of_torch_with_float32_parameters(offset):
    norm = layer(64, 32)
    x, upstream = (torch.randn(4, 64, 16, 16) + offset).bfloat16(), torch.randn(4, 64, 16, 16).bfloat16()
    exact = value_and_gradients(norm, norm, x.float(), upstream.float())
    mine = value_and_gradients(norm, norm, x, upstream)
    theirs = value_and_gradients(
        lambda x: F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)), norm, x, upstream
    )
    for ours, other, truth in zip(mine, theirs, exact, strict=True):
        assert (ours.float() - truth).norm() < 1.1 * (other.float() - truth).norm() + 1e-5 * truth.norm()


def test_under_autocast_the_output_has_the_type_of_the_input():
    norm = layer(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(1, 8, 2, 2).bfloat16()).dtype == torch.bfloat16
        assert norm(torch.randn(1, 8, 2, 2)).dtype == torch.float32


def test_only_its_input_is_kept_for_the_backward_pass():
    norm, x = layer(64), torch.randn(2, 64, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert [tensor.shape for tensor in kept if tensor.numel() > 1000] == [x.shape]


def test_a_second_derivative_is_refused():
    norm, x = layer(8), torch.randn(1, 8, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
