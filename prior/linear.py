"""Linear layers whose products are oneDNN's on x86 CPUs, where torch takes those of its BLAS in float32.

Measured on AMD (Zen 4) with torch's builds, which bring MKL: an eighth to a third less time on thousands of rows, about
half on up to 32. In bfloat16, where torch takes oneDNN's too, a quarter to a third on few rows for fewer steps to it.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# What torch.compile puts in the place of a linear layer.
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


class Linear(nn.Linear):
    """x W^T + bias, as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        product, dtypes = _linear, [torch.float32, torch.bfloat16]
        if torch.is_grad_enabled():
            product, dtypes = _Linear.apply, [torch.float32]
        suits = HAS_ONEDNN and x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype in dtypes
        if not suits or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        return product(x, self.weight, self.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _linear(grad, weight.t()) if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,  # whose BLAS is the faster one here
            rows.sum(0) if needs_bias else None,
        )
