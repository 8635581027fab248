"""Entropies of soft assignments to a codebook, in blocks that the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenizer.quantizers.collectives import mean_over_processes

BLOCK_ELEMENTS = 1 << 19
"""Probabilities in a block; a backward pass holds a handful of tensors of this size."""


def blocks(vectors: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Slices `(rows, D)` of vectors `(N, D)` whose N x K tensors are small."""
    yield from vectors.split(max(16, BLOCK_ELEMENTS // vocab_size) * (16 if vectors.is_cuda else 1))


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last axis, in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def entropies_of_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows of the entropies, a scalar, and of the probabilities, `(K,)`, of logits `(rows, K)`."""
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def assignment_entropies(vectors: Tensor, codebook: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """E[H(p)] and H(E[p]) in nats for p = softmax over codes of -|x - e|^2 / temperature.

    The second is over all vectors of all processes in this micro-batch.

    Args:
        vectors: `(N, D)` float32.
        codebook: `(K, D)` float32.
        temperature: a scalar.
    """

    def block(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        # |x|^2 is the same for all codes and cancels.
        return entropies_of_logits(
            torch.addmm(codebook.square().sum(1).neg(), rows, codebook.t(), alpha=2) / temperature
        )

    sample, total = vectors.new_zeros(()), vectors.new_zeros(len(codebook))
    for rows in blocks(vectors, len(codebook)):
        entropies, probabilities = checkpoint(block, rows, codebook, use_reentrant=False, preserve_rng_state=False)
        sample, total = sample + entropies, total + probabilities
    return sample / len(vectors), entropy(mean_over_processes(total / len(vectors)))
