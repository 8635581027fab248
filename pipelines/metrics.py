"""Metrics as pure functions; sums over processes are the caller's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, `(B,)` in dB, over [-1, 1] (peak 2), reconstructions clamped.

    At most 100 dB, which stands for equality.
    """
    error = (images.float() - reconstruction.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def count_codes(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, `(vocab_size,)` int64."""
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of codes that occur."""
    return (counts > 0).double().mean().item()


def entropy(counts: Tensor) -> float:
    """Entropy of a histogram in nats; its exponential is the perplexity."""
    share = counts.double() / counts.sum().clamp(min=1)
    return -torch.special.xlogy(share, share).sum().item()


def perplexity(counts: Tensor) -> float:
    """How many equally likely codes would have this entropy."""
    return math.exp(entropy(counts))


def to_bits(nats: float) -> float:
    return nats / math.log(2)


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """Root mean square pixel distance of each image to the nearest of others, `(B,)`; both `(N, C, H, W)`."""
    return torch.cdist(images.flatten(1).float(), others.flatten(1).float()).amin(1) / math.sqrt(images[0].numel())


def mean_pairwise_distance(images: Tensor) -> float:
    """Mean over pairs of different images of their root mean square pixel distance."""
    distances = torch.pdist(images.flatten(1).float())
    return distances.mean().item() / math.sqrt(images[0].numel())
