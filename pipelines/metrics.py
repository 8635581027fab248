"""Metrics as pure functions; sums over processes are the caller's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, `(B,)` in dB, over [-1, 1] (peak 2), reconstructions clamped.

    At most 100 dB, which stands for equality.
    """
    error = (images.float() - reconstruction.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def laplacian_energy(images: Tensor) -> Tensor:
    """The mean squared Laplacian of each image `(B, C, H, W)`, `(B,)`: how much fine detail it has."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    laplacian = F.conv2d(images.flatten(0, 1).unsqueeze(1), kernel.view(1, 1, 3, 3))
    return laplacian.square().flatten(1).mean(1).view(images.shape[:2]).mean(1)


def count_codes(codes: Tensor, vocab_size: int, num_codebooks: int = 1) -> Tensor:
    """How often each code of each codebook occurs, `(num_codebooks, vocab_size)` int64.

    Args:
        codes: of any shape; with several codebooks, the last axis has one code of each.
        vocab_size: K.
        num_codebooks: codebooks whose codes are told apart.
    """
    first_of_codebook = torch.arange(num_codebooks, device=codes.device) * vocab_size
    places = codes.reshape(-1, num_codebooks) + first_of_codebook
    ones = torch.ones_like(places.flatten())
    # Not bincount, which makes a GPU wait to learn the largest code.
    return ones.new_zeros(num_codebooks * vocab_size).index_add_(0, places.flatten(), ones).view(num_codebooks, -1)


def usage(counts: Tensor) -> float:
    """Share of codes `(..., K)` that occur."""
    return (counts > 0).double().mean().item()


def entropy(counts: Tensor) -> float:
    """Entropy of histograms `(..., K)` in nats, their mean where there are several."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(share, share).sum(-1).mean().item()


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
