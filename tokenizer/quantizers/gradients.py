"""Gradient estimators: how a gradient passes from a code vector to the latent vector that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradient = Literal["straight_through", "rotation"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, chosen: Tensor) -> Tensor:
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RotationTrick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, chosen)
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, chosen = ctx.saved_tensors
        scale = chosen.norm(dim=-1, keepdim=True) / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        e, q = F.normalize(vectors, dim=-1), F.normalize(chosen, dim=-1)
        r = F.normalize(e + q, dim=-1)
        along_r = (grad * r).sum(-1, keepdim=True)
        along_q = (grad * q).sum(-1, keepdim=True)
        # The transpose of lambda R with R = I - 2 r r^T + 2 q e^T (section 4.2).
        return scale * (grad - 2 * along_r * r + 2 * along_q * e), None


def straight_through(vectors: Tensor, chosen: Tensor) -> Tensor:
    """`chosen` `(..., D)`, whose gradient goes to `vectors` `(..., D)` unchanged (Bengio et al. 2013)."""
    return _StraightThrough.apply(vectors, chosen)


def rotation_trick(vectors: Tensor, chosen: Tensor) -> Tensor:
    """`chosen` `(..., D)` as the rotation and scaling of `vectors` onto it, held constant (Fifty et al. 2024).

    Gradients keep their angle to the code: arXiv:2410.06424, equation 4, by Householder reflections.
    """
    return _RotationTrick.apply(vectors, chosen)


GRADIENTS: dict[Gradient, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotation_trick,
}
