"""Attention as matrix products, for training in bfloat16 on a CPU: twice as fast there as the fused kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 128
"""Positions whose attention is computed at once: later keys than theirs are left out where it is causal."""


def products_are_faster(q: Tensor) -> bool:
    """Whether `attention_by_products` is the faster one for queries `(B, heads, L, head_dim)`.

    It keeps the attention weights for the gradient, which the fused kernel does not: above 512 positions that would be
    most of the memory.
    """
    return torch.is_grad_enabled() and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of three `(B, heads, L, head_dim)`, and as many heads of keys as of queries.

    Scores are float32, as the fused kernel's are: rounded to bfloat16 they would cost more precision than the rounding
    of queries and keys does.
    """
    if torch.compiler.is_compiling():  # it takes the same products out of this one
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return _Products.apply(q, k, v, causal)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        shape, L = q.shape, q.shape[2]
        ctx.blocks = _blocks(L, causal)
        q, k, v = (x.reshape(-1, L, shape[-1]) for x in (q, k, v))
        output, kept = torch.empty_like(q), []
        scaled, keys = q.float().mul_(1 / math.sqrt(shape[-1])), k.float()
        with torch.autocast("cpu", enabled=False):
            for start, stop, end in ctx.blocks:
                scores = scaled[:, start:stop] @ keys[:, :end].transpose(1, 2)
                if causal:
                    later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu_(1)
                    scores[:, :, start:].masked_fill_(later, float("-inf"))
                shares = scores.softmax(-1).type_as(v)
                torch.bmm(shares, v[:, :end], out=output[:, start:stop])
                kept.append(shares)
        ctx.save_for_backward(q, k, v, *kept)
        return output.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        shape, scale = grad.shape, 1 / math.sqrt(grad.shape[-1])
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop, end), shares in zip(ctx.blocks, kept, strict=True):
            here = grad[:, start:stop]
            grad_shares = here @ v[:, :end].transpose(1, 2)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            torch.bmm(grad_scores, k[:, :end], out=grad_q[:, start:stop])
            grad_k[:, :end] += grad_scores.transpose(1, 2) @ q[:, start:stop]
            grad_v[:, :end] += shares.transpose(1, 2) @ here
        return grad_q.mul_(scale).view(shape), grad_k.mul_(scale).view(shape), grad_v.view(shape), None


def _blocks(length: int, causal: bool) -> list[tuple[int, int, int]]:
    """First query, end of the queries, and end of the keys that they see."""
    starts = range(0, length, BLOCK)
    return [(at, min(at + BLOCK, length), min(at + BLOCK, length) if causal else length) for at in starts]
