"""k-means for starting a codebook: k-means++ in rounds (Arthur & Vassilvitskii 2007), then Lloyd's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.random_streams import integer, mix, uniform
from tokenizer.quantizers.search import nearest_codes, squared_distances

_ROUNDS = 64
_MOST_SCORES = 1 << 34


def start_vectors(num_clusters: int) -> int:
    """How many vectors a k-means of this size should see: 64 a cluster, fewer but at least 2 for large codebooks."""
    return max(2 * num_clusters, min(64 * num_clusters, 1 << 17))


@torch.no_grad()
def kmeans(vectors: Tensor, num_clusters: int, num_iterations: int = 10) -> Tensor:
    """Cluster centres `(num_clusters, D)`; the same for the same vectors, with no generator involved.

    Args:
        vectors: `(N, D)` float32. With N below num_clusters, rows repeat with a little noise so that none coincide.
        num_clusters: K.
        num_iterations: of Lloyd's algorithm; fewer where N x K is very large.
    """
    N = len(vectors)
    order = torch.arange(num_clusters, device=vectors.device)
    centres = _spread_rows(vectors, min(num_clusters, N))[order % N]
    for iteration in range(max(1, min(num_iterations, _MOST_SCORES // (N * num_clusters)))):
        codes = nearest_codes(vectors, centres)
        counts, sums = count_and_sum(vectors, codes, num_clusters)
        replacement = vectors[integer(order, iteration, N)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), replacement)
    # Last, because empty clusters move to exact rows.
    return apart(centres) if num_clusters > N else centres


def apart(vectors: Tensor) -> Tensor:
    """Vectors `(M, D)` with noise, so that none coincide; in units of their size, so that rounding keeps it."""
    rows, columns = (torch.arange(size, device=vectors.device) for size in vectors.shape)
    noise = integer(rows[:, None], columns, 1 << 20) * 2.0**-20 - 0.5
    return vectors + noise * 1e-3 * vectors.square().mean().sqrt().clamp(min=1e-6)


def distinct(vectors: Tensor) -> Tensor:
    """Vectors `(M, D)` with noise on those that an earlier one equals: as codes they would never be chosen."""
    order = torch.arange(len(vectors), device=vectors.device)
    _, group = torch.unique(vectors, dim=0, return_inverse=True)
    first = torch.full_like(order, len(vectors)).scatter_reduce_(0, group, order, "amin")
    return torch.where((first[group] < order)[:, None], apart(vectors), vectors)


@torch.no_grad()
def count(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs in codes `(N,)`, `(K,)` float32."""
    # Not bincount, which makes a GPU wait to learn the largest code.
    ones = torch.ones(len(codes), dtype=torch.float32, device=codes.device)
    return ones.new_zeros(vocab_size).index_add_(0, codes, ones)


@torch.no_grad()
def count_and_sum(vectors: Tensor, codes: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, `(K,)`, and their sum, `(K, D)`, both float32."""
    return count(codes, vocab_size), vectors.new_zeros(vocab_size, vectors.shape[1]).index_add_(0, codes, vectors)


def _spread_rows(vectors: Tensor, count: int) -> Tensor:
    """Rows `(count, D)`, drawn with probability proportional to the squared distance to those drawn before.

    In at most 64 rounds, so that time is that of one search: exactly k-means++ up to 64 clusters, beyond that several
    rows a round, without replacement.
    """
    index = torch.arange(len(vectors), device=vectors.device)
    distances = vectors.new_ones(len(vectors))
    drawn: list[Tensor] = []
    rounds = min(count, _ROUNDS)
    for i in range(rounds):
        # The smallest of exponential variables with these rates are draws without replacement (an exponential race).
        arrival = -torch.log(uniform(mix(index, i), 0) + 2.0**-25) / distances
        size = count * (i + 1) // rounds - count * i // rounds
        rows = vectors[arrival.topk(size, largest=False).indices]
        nearest = squared_distances(vectors, rows[nearest_codes(vectors, rows)])
        distances = nearest if i == 0 else torch.minimum(distances, nearest)
        drawn.append(rows)
    return torch.cat(drawn)
