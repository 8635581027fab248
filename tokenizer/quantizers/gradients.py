"""How gradients pass between latent vectors and the code vectors that replace them."""

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


class _Attraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, codes: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(vectors, codes, chosen)
        ctx.num_codes = len(codebook)
        error = F.mse_loss(vectors, chosen)
        return error, error.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_vectors: Tensor, to_codebook: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        vectors, codes, chosen = ctx.saved_tensors
        difference = (vectors - chosen).mul_(2 / vectors.numel())
        grad_codebook = None
        if ctx.needs_input_grad[1]:
            grad_codebook = vectors.new_zeros(ctx.num_codes, vectors.shape[1])
            grad_codebook.index_add_(0, codes, difference, alpha=-1).mul_(to_codebook)
        return difference.mul_(to_vectors), grad_codebook, None, None


def attraction(vectors: Tensor, codebook: Tensor, codes: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared difference of vectors and chosen codes, twice: for the vectors, and for the codebook.

    The same as `mse(vectors, sg(chosen))` and `mse(sg(vectors), chosen)`, with one tensor in the backward pass where
    autograd would hold five.

    Args:
        vectors: `(N, D)`.
        codebook: `(K, D)`.
        codes: `(N,)` int64.
        chosen: `codebook[codes]`, `(N, D)`, without a gradient.
    """
    return _Attraction.apply(vectors, codebook, codes, chosen)


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
