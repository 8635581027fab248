"""The linear layer against torch's, where its products are oneDNN's and where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prior import linear
from prior.linear import Linear


def pair(bias: bool, sizes: tuple[int, int] = (12, 20)) -> tuple[Linear, nn.Linear]:
    ours, theirs = Linear(*sizes, bias=bias), nn.Linear(*sizes, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (7, 12), (2, 3, 5, 12)])
def test_output_and_gradients_are_those_of_torch(shape, bias):
    inputs = [torch.randn(shape).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    layers = pair(bias)
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    grad = torch.randn(outputs[1].shape)
    for output in outputs:
        output.backward(grad)
    found = [outputs, [x.grad for x in inputs], *zip(*(layer.parameters() for layer in layers), strict=True)]
    found += [[parameter.grad for parameter in each] for each in found[2:]]
    for mine, theirs in found:
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layers[0](inputs[0]), outputs[1])


@torch.no_grad()
def test_bfloat16_without_gradients_is_rounded_once():
    layer, x = pair(True)[0].bfloat16(), torch.randn(2, 5, 12).bfloat16()
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("sizes", [(12, 1), (1, 12), (384, 1024)])
def test_other_widths_and_strided_inputs(sizes):
    ours, theirs = pair(True, sizes)
    wide = torch.randn(5, 2 * sizes[0], 3).transpose(1, 2)
    for x in (wide[..., : sizes[0]], wide[..., ::2], wide[:, :1, sizes[0] :].expand(5, 4, sizes[0])):
        torch.testing.assert_close(ours(x), theirs(x))
        ours(x).sum().backward()  # whose gradient has strides of 0
    assert ours.weight.grad is not None


def test_only_what_needs_a_gradient_has_one():
    layer, x = pair(True)[0].requires_grad_(False), torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    layer.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_where_products_are_those_of_onednn(monkeypatch):
    calls: list[torch.dtype] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.dtype)
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(linear, "_linear", spy)
    monkeypatch.setattr(linear, "HAS_ONEDNN", True)
    layer = pair(True)[0]
    layer(torch.randn(3, 12)).sum().backward()
    assert calls == [torch.float32]  # x needs no gradient
    with torch.no_grad():
        layer(torch.randn(3, 12))
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 12)).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
    layer(torch.randn(3, 12))
    monkeypatch.setattr(linear, "HAS_ONEDNN", True)
    layer.double()(torch.randn(3, 12).double())
    layer.bfloat16()(torch.randn(3, 12).bfloat16())
    assert len(calls) == 2
    with torch.no_grad():
        layer(torch.randn(3, 12).bfloat16())
    assert calls[2:] == [torch.bfloat16]
