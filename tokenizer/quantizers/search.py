"""Nearest codes without an N x K matrix: scores exist in blocks, in one reused buffer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Scores held at once on a CPU: 4 MiB of float32, which stays in cache."""
_MOST_ELEMENTS = 1 << 23
"""Scores held at most, 32 MiB of float32: from 2^19 codes on, fewer than 16 rows, but always one."""


def block_rows(vectors: Tensor, vocab_size: int) -> int:
    """How many rows of scores `(rows, K)` are held at once: more on a GPU, where small products waste time."""
    least = max(1, min(16, _MOST_ELEMENTS // vocab_size))
    return max(least, BLOCK_ELEMENTS * (8 if vectors.is_cuda else 1) // vocab_size)


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest codebook vector by Euclidean distance; exact duplicates go to the lowest index.

    Minimises |e|^2 / 2 - x e, which has the same order as |x - e|^2.

    Args:
        vectors: `(N, D)` float32.
        codebook: `(K, D)` float32.

    Returns:
        `(N,)` int64 in [0, K).
    """
    return _search(vectors, codebook, codebook.square().sum(1).mul_(0.5))


def largest_products(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index `(N,)` int64 of the codebook vector `(K, D)` with the largest dot product with each vector `(N, D)`."""
    return _search(vectors, codebook, codebook.new_zeros(len(codebook)))


@torch.no_grad()
def _search(vectors: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """The lowest index of the smallest `bias - x e`, `(N,)`."""
    K = len(codebook)
    if len(vectors) == 1:  # a product of one row may round equal columns differently
        return _search(vectors.expand(2, -1), codebook, bias)[:1]
    # Two levels, because a minimum is ten times as fast as an argmin on a CPU: the smallest score of each group, then
    # the argmin over groups, then the one inside the group. The last group is filled up with infinite scores. In
    # multiples of 16, because at other widths several threads round equal columns differently.
    group = min(512, max(16, 1 << math.ceil(math.log2(K) / 2)))
    padding = -K % group
    if padding:
        codebook, bias = F.pad(codebook, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=math.inf)
    rows = min(max(1, len(vectors)), block_rows(vectors, len(codebook)))
    scores = vectors.new_empty(rows, len(codebook))
    smallest = vectors.new_empty(rows, len(codebook) // group)
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows]
        n = len(block)
        torch.addmm(bias, block, codebook.t(), alpha=-1, out=scores[:n])
        groups = scores[:n].view(n, -1, group)
        best = torch.amin(groups, 2, out=smallest[:n]).argmin(1, keepdim=True)
        inside = groups.take_along_dim(best.unsqueeze(2), 1).squeeze(1).argmin(1)
        torch.add(inside, best.squeeze(1), alpha=group, out=codes[start : start + n])
    # Scores of latents that are not finite may point into the padding.
    return codes.clamp_(max=K - 1)


def squared_distances(vectors: Tensor, others: Tensor) -> Tensor:
    """|x - y|^2 row by row, `(N,)`, of two `(N, D)`."""
    return (vectors - others).square().sum(1)
