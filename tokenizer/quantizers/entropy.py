"""Entropies of soft assignments to codes, without a table of N vectors times K codes.

For a codebook, in blocks that the backward pass computes again; for codes made of independent channels, by factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer.collectives import mean_over_processes
from tokenizer.quantizers.base import float32_only
from tokenizer.quantizers.search import block_rows


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last axis, in nats."""
    # The gradient of p log p at 0 is infinite: its logarithm stops at the smallest normal number.
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def joint_entropy(channels: Sequence[Tensor]) -> Tensor:
    """H(E[p]) in nats for p the product of independent channels' distributions, `(L_i, N)` each.

    Exact, by one matrix product: the mean over vectors of all combinations of the first half of the channels with all
    of the second. It is over all vectors of all processes in this micro-batch.
    """
    middle = len(channels) // 2
    left, right = _combinations(channels[:middle], channels[0]), _combinations(channels[middle:], channels[0])
    return entropy(mean_over_processes(left @ right.t() / left.shape[1]).flatten())


def _combinations(channels: Sequence[Tensor], like: Tensor) -> Tensor:
    """Probabilities `(product of L_i, N)` of all combinations; `(1, N)` ones for no channel."""
    if not channels:
        return like.new_ones(1, like.shape[1])
    joint = channels[0]
    for channel in channels[1:]:
        joint = (joint.unsqueeze(1) * channel).flatten(0, 1)
    return joint


def assignment_entropies(vectors: Tensor, codebook: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """E[H(p)] and H(E[p]) in nats for p = softmax over codes of -|x - e|^2 / temperature.

    The second is over all vectors of all processes in this micro-batch.

    Args:
        vectors: `(N, D)` float32.
        codebook: `(K, D)` float32.
        temperature: a number, or a scalar tensor without a gradient.
    """
    # |x|^2 is the same for all codes and cancels: -|x - e|^2 / t has the differences of (x e - |e|^2 / 2) / (t / 2).
    _, sample, total = _SoftAssignment.apply(vectors, codebook, codebook.square().sum(1) / 2, temperature / 2, None)
    return sample / len(vectors), entropy(mean_over_processes(total / len(vectors)))


def index_backpropagation(
    vectors: Tensor, codebook: Tensor, offsets: Tensor, codes: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(h + p - sg(p)) C `(N, D)`, and E[H(q)] and H(E[q]).

    With logits x C^T - offsets, h is the one-hot of `codes`, p their softmax, q that of logits / temperature. The
    value is that of `C[codes]`; p has a gradient, but not the C that it is multiplied with.

    Args:
        vectors: x, `(N, D)` float32.
        codebook: C, `(K, D)` float32.
        offsets: `(K,)` float32.
        codes: `(N,)` int64.
        temperature: of the entropies.
    """
    chosen, sample, total = _SoftAssignment.apply(vectors, codebook, offsets, temperature, codes)
    return chosen, sample / len(vectors), entropy(mean_over_processes(total / len(vectors)))


class _SoftAssignment(torch.autograd.Function):
    """With logits L = x C^T - offsets: the chosen codes, the sum of entropies of softmax(L / t), and its sum over rows.

    Where codes are given, the gradient of the first also passes through softmax(L).
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, codebook: Tensor, offsets: Tensor, temperature: Tensor | float, codes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature = torch.as_tensor(temperature, device=vectors.device)
        ctx.save_for_backward(vectors, codebook, offsets, temperature, codes)
        chosen = vectors.new_empty(0) if codes is None else F.embedding(codes, codebook)
        sample, total = vectors.new_zeros(()), vectors.new_zeros(len(codebook))
        for block, (logits, p, log_p) in _blocks(vectors, len(codebook), 3):
            torch.addmm(offsets, vectors[block], codebook.t(), beta=-1, out=logits)
            torch.log_softmax(logits.div_(temperature), 1, out=log_p)
            torch.exp(log_p, out=p)
            total += p.sum(0)
            sample -= torch.linalg.vecdot(p, log_p).sum()
        return chosen, sample, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_chosen: Tensor, grad_sample: Tensor, grad_total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        vectors, codebook, offsets, temperature, codes = ctx.saved_tensors
        grad_vectors, grad_codebook = torch.empty_like(vectors), torch.zeros_like(codebook)
        grad_offsets = torch.zeros_like(offsets)
        if codes is not None:
            grad_codebook.index_add_(0, codes, grad_chosen)
        with float32_only(vectors.device.type):
            for block, (logits, p, grad, through_p) in _blocks(vectors, len(codebook), 4):
                torch.addmm(offsets, vectors[block], codebook.t(), beta=-1, out=logits)
                if codes is not None:
                    torch.mm(grad_chosen[block], codebook.t(), out=through_p)
                    _softmax_backward_(through_p, torch.softmax(logits, 1, out=p))
                # The gradient of q = softmax(L / t), from its entropies and its sum, is g_total - g_sample log q.
                torch.log_softmax(logits.div_(temperature), 1, out=grad)
                torch.exp(grad, out=p)
                _softmax_backward_(grad.mul_(-grad_sample).add_(grad_total), p)
                grad.div_(temperature)
                if codes is not None:
                    grad.add_(through_p)
                torch.mm(grad, codebook, out=grad_vectors[block])
                grad_codebook.addmm_(grad.t(), vectors[block])
                grad_offsets -= grad.sum(0)
        return grad_vectors, grad_codebook, grad_offsets, None, None


def _softmax_backward_(grad: Tensor, p: Tensor) -> None:
    """Turn the gradient of p = softmax(L) `(rows, K)` into that of L, in place: p (g - sum p g)."""
    grad.sub_(torch.linalg.vecdot(grad, p).unsqueeze(1)).mul_(p)


def _blocks(vectors: Tensor, vocab_size: int, num_buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the rows of vectors, and buffers `(rows, K)` for each, the same memory every time."""
    rows = min(len(vectors), block_rows(vectors, vocab_size))
    buffers = [vectors.new_empty(rows, vocab_size) for _ in range(num_buffers)]
    for start in range(0, len(vectors), rows):
        size = min(rows, len(vectors) - start)
        yield slice(start, start + size), [buffer[:size] for buffer in buffers]
