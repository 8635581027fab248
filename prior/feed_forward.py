"""SwiGLU (Shazeer 2020, arXiv:2002.05202), with a gradient of its own that makes fewer passes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prior.linear import Linear


class FeedForward(nn.Module):
    """out(silu(gate(x)) * up(x)), as wide as keeps the parameters of a layer of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = math.ceil(width * 8 / 3 / 32) * 32
        self.gate_and_up = Linear(width, 2 * hidden, bias=False)
        self.out = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape."""
        return self.out(gated(self.gate_and_up(x)))


def gated(x: Tensor) -> Tensor:
    """silu(first half of the channels) * second half: `(..., 2 hidden)` to `(..., hidden)`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gated.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Gated(torch.autograd.Function):
    """Its gradient is written into one tensor, where autograd's would put the two halves together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(x, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, opened = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        into_gate, into_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, up, out=into_gate)
        torch.ops.aten.silu_backward.grad_input(into_gate, gate, grad_input=into_gate)
        torch.mul(grad, opened, out=into_up)
        return grad_x
