"""What a decoder's outputs say of pixels: their values, or a distribution of each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS_PER_CHANNEL = {"values": 1, "logit_laplace": 2, "categorical": 256}
"""By name, how many outputs a decoder has for each channel of an image."""

EPSILON = 0.1
"""Of logit-Laplace: pixels in [0, 1] are moved into [0.1, 0.9], as in DALL-E (Ramesh et al. 2021, appendix A.3)."""


def images_of(outputs: Tensor, kind: str, *, differentiable: bool = False) -> Tensor:
    """Images `(B, C, H, W)` in about [-1, 1], not clamped, of a decoder's outputs `(B, C * n, H, W)`.

    Those of logit_laplace are medians. Those of categorical are the likeliest values, or where `differentiable` the
    means, which have a gradient.
    """
    if kind == "values":
        return outputs
    parts = _by_channel(outputs, kind)
    if kind == "logit_laplace":
        return (parts[:, :, 0].float().sigmoid() - EPSILON) / (1 - 2 * EPSILON) * 2 - 1
    values = torch.linspace(-1, 1, 256, device=outputs.device)
    if differentiable:
        return torch.einsum("bcvhw,v->bchw", parts.float().softmax(2), values)
    return values[parts.argmax(2)]


def negative_log_likelihood(outputs: Tensor, images: Tensor, kind: str) -> Tensor:
    """Mean over pixels and channels, in nats, of images `(B, C, H, W)` in [-1, 1] under outputs `(B, C * n, H, W)`.

    logit_laplace is the density of the moved pixel x in (0, 1), 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b), from
    outputs mu and log b, at least -7 (Ramesh et al. 2021, equation 2). categorical is the probability of one of 256
    values.
    """
    parts = _by_channel(outputs, kind).float()
    if kind == "categorical":
        return F.cross_entropy(parts.transpose(1, 2), ((images.float() + 1) * 127.5).round().long().clamp(0, 255))
    moved = (images.float().clamp(-1, 1) + 1) / 2 * (1 - 2 * EPSILON) + EPSILON
    location, log_scale = parts.unbind(2)
    log_scale = log_scale.clamp(min=-7)  # the density has no upper bound where an area is all black or white
    distance = (moved.logit() - location).abs() * (-log_scale).exp()
    return (math.log(2) + log_scale + (moved * (1 - moved)).log() + distance).mean()


def _by_channel(outputs: Tensor, kind: str) -> Tensor:
    """Outputs as `(B, C, n, H, W)`."""
    return outputs.unflatten(1, (-1, OUTPUTS_PER_CHANNEL[kind]))
