"""SwiGLU's own gradient is autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prior.feed_forward import FeedForward, gated


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_output_and_gradient_are_those_of_autograd(dtype, tolerance):
    values, grad = torch.randn(2, 5, 12).to(dtype), torch.randn(2, 5, 6).to(dtype)
    mine, plain = (values.clone().requires_grad_() for _ in range(2))
    gate, up = plain.chunk(2, dim=-1)
    outputs = [gated(mine), F.silu(gate) * up]
    for output in outputs:
        output.backward(grad)
    assert outputs[0].dtype == dtype
    for x, y in (outputs, (mine.grad, plain.grad)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(gated(mine), outputs[0])


def test_a_layer_is_the_definition_and_has_the_parameters_of_one_of_four_times_the_width():
    layer, x = FeedForward(96), torch.randn(3, 96)
    gate, up = layer.gate_and_up.weight.chunk(2)
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ layer.out.weight.T)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 96**2
