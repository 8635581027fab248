"""From logits to codes: guidance, temperature, top-k, top-p, and a draw by inverting the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

_COLDEST = 1e-20
"""Dividing by less could overflow."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits `(..., K)` after temperature, top-k and top-p, in this order; what is left out becomes -inf.

    Args:
        temperature: divides the logits; 0, or next to it, keeps the likeliest code alone (the lowest of equals).
        top_k: keep the k likeliest codes; equals of the k-th stay.
        top_p: keep the fewest likeliest codes whose probability reaches this.
    """
    logits = logits.float()
    if temperature < _COLDEST:
        best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), True)
        return logits.masked_fill(~best, float("-inf"))
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        # A code is left out where the likelier ones reach top_p without it; the likeliest always stays.
        left_out = shares.cumsum(-1) - shares >= top_p
        left_out[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(left_out).scatter_(-1, order, left_out), float("-inf"))
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Codes `(...)` int64 from logits `(..., K)` and uniforms `(...)` in [0, 1), by inverting the cumulative sum.

    A uniform past the last sum (a float32 sum over many codes can end at 0.9999995) takes the last code of nonzero
    probability.
    """
    probabilities = logits.softmax(-1)
    # A GPU sums in parallel, and rounding could let the sum fall from one code to the next.
    cumulative = probabilities.cumsum(-1).cummax(-1).values if logits.is_cuda else probabilities.cumsum(-1)
    codes = (cumulative <= uniforms.unsqueeze(-1)).sum(-1)
    index = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(probabilities > 0, index, 0).amax(-1)
    return torch.minimum(codes, last)
