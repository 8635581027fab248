"""Nearest codes and k-means without an N x K matrix: both work in blocks of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.random_streams import integer

_BLOCK_ELEMENTS = 1 << 20
"""Scores held at once: 4 MiB of float32, which stays in cache on a CPU and fills a GPU."""


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest codebook vector by Euclidean distance; exact duplicates go to the lowest index.

    Minimises |e|^2 / 2 - x e, which has the same order as |x - e|^2, in blocks of vectors with one reused buffer.

    Args:
        vectors: `(N, D)` float32.
        codebook: `(K, D)` float32.

    Returns:
        `(N,)` int64 in [0, K).
    """
    half_norms = codebook.square().sum(1).mul_(0.5)  # (K,)
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    rows = max(16, _BLOCK_ELEMENTS // len(codebook)) * (16 if vectors.is_cuda else 1)
    buffer = vectors.new_empty(min(rows, len(vectors)), len(codebook))
    transposed = codebook.t()
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows]
        scores = torch.addmm(half_norms, block, transposed, alpha=-1, out=buffer[: len(block)])
        torch.argmin(scores, dim=1, out=codes[start : start + rows])
    return codes


@torch.no_grad()
def count_and_sum(vectors: Tensor, codes: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, `(K,)`, and their sum, `(K, D)`, both float32."""
    counts = torch.bincount(codes, minlength=vocab_size).to(vectors.dtype)
    sums = vectors.new_zeros(vocab_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums


@torch.no_grad()
def kmeans(vectors: Tensor, num_clusters: int, num_iterations: int = 10) -> Tensor:
    """Cluster centres `(num_clusters, D)` by Lloyd's algorithm from evenly spread rows; empty clusters move to a row.

    Args:
        vectors: `(N, D)` float32. With N below num_clusters, rows repeat with a little noise so that none coincide.
    """
    N = len(vectors)
    order = torch.arange(max(num_clusters, 1), device=vectors.device)
    centres = vectors[order * N // num_clusters].clone()
    for iteration in range(num_iterations):
        codes = nearest_codes(vectors, centres)
        counts, sums = count_and_sum(vectors, codes, num_clusters)
        replacement = vectors[integer(order, iteration, N)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), replacement)
    if num_clusters > N:
        noise = integer(order[:, None], torch.arange(vectors.shape[1], device=vectors.device), 1 << 20)
        # Last, because empty clusters move to exact rows; in units of the rows' size, so that rounding keeps it.
        centres += (noise * 2.0**-20 - 0.5) * 1e-3 * vectors.square().mean().sqrt().clamp(min=1e-6)
    return centres
