"""Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467) with a gradient of its own on a CPU.

torch has one kernel for it on a GPU; on a CPU it is made of many passes, and its gradient of more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2 over channels + eps) * weight.

    Args:
        channels: size of the last axis.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` to the same shape and type."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Half precision would round the sum of squares.
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide, grad, wide_weight = (value.to(scale.dtype) for value in (x, grad, weight))
        # LayerNorm's kernel, told that the mean is 0, gives this gradient but for the mean of grad * weight that it
        # takes off every channel.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, wide, weight.shape, torch.zeros_like(scale), scale, wide_weight, None, [True, True, False]
        )
        taken_off = (grad @ wide_weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1])
        return grad_x.add_(taken_off).type_as(x), grad_weight.type_as(weight), None
