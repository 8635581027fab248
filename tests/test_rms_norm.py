"""The norm's own gradient is that of torch's norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prior.rms_norm import RMSNorm


def pair(dtype: torch.dtype) -> tuple[RMSNorm, nn.RMSNorm]:
    ours, theirs = RMSNorm(12).to(dtype), nn.RMSNorm(12, eps=1e-6).to(dtype)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_output_and_gradients_are_those_of_torch(dtype, tolerance, shape):
    ours, theirs = pair(dtype)
    inputs = [torch.randn(shape).to(dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    grad = torch.randn(shape).to(dtype)
    outputs = [norm(x) for norm, x in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        output.backward(grad)
    assert outputs[0].dtype == dtype
    for mine, other in (outputs, (inputs[0].grad, inputs[1].grad), (ours.weight.grad, theirs.weight.grad)):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_the_derivative():
    norm = RMSNorm(6).double()
    torch.autograd.gradcheck(norm, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


def test_zeros_stay_zeros_and_have_a_finite_gradient():
    x = torch.zeros(2, 12, requires_grad=True)
    norm = RMSNorm(12)
    output = norm(x)
    output.sum().backward()
    assert not output.any()
    assert x.grad.isfinite().all()


def test_without_gradients_it_is_torch_s_norm(monkeypatch):
    ours, theirs = pair(torch.float32)
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
