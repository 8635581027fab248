"""Finite scalar quantization: each channel is rounded to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from configs.validation import Range, checked
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.gradients import straight_through

# The bound's margin of 1e-3 is half a level from 1,001 levels on; with 2, it puts the threshold at -3.8.
Levels = list[Annotated[int, Range(3, 1000)]]


class FSQ(Quantizer):
    """Rounds each channel to one of `levels[i]` values in [-1, 1]; all combinations are the codes.

    There is no codebook to learn and no loss. The gradient passes straight through the rounding, and through the tanh
    that bounds a channel.

    Args:
        levels: values of each channel; their product is the vocabulary. The paper's: [8, 6, 5] for 2^8, [8, 5, 5, 5]
            for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
    """

    levels: Tensor
    strides: Tensor

    @checked
    def __init__(self, dim: int, *, levels: Levels = [8, 5, 5, 5]) -> None:  # noqa: B006
        if not levels:
            raise ValueError("levels should be a list of integers, one a channel, got an empty one")
        super().__init__(dim, math.prod(levels), len(levels))
        self.register_buffer("levels", torch.tensor(levels))
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("strides", torch.tensor(strides))
        self.level_scale = 1 / (math.prod(levels) ** (1 / len(levels)) - 1)

    def bound(self, vectors: Tensor) -> Tensor:
        """Vectors `(..., len(levels))` squeezed so that rounding gives `levels[i]` integers a channel."""
        half_width = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / half_width).atanh()).tanh() * half_width - offset

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Round each channel to the nearest of its levels."""
        bounded = self.bound(latents.movedim(1, -1))
        rounded = bounded.detach().round()
        codes = ((rounded + self.levels // 2).long() * self.strides).sum(-1)
        quantized = straight_through(bounded, rounded) / (self.levels // 2)
        return QuantizerOutput(quantized.movedim(-1, 1), codes)

    def embed(self, codes: Tensor) -> Tensor:
        digits = codes.unsqueeze(-1) // self.strides % self.levels  # (B, *grid, len(levels))
        half = self.levels // 2
        return ((digits - half) / half).float().movedim(-1, 1)

    def collapse_advice(self) -> str:
        return "quantizer.levels= with fewer levels or channels"
