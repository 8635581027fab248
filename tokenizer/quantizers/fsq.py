"""Finite scalar quantization: each channel is rounded to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from configs.validation import Range, checked
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.entropy import joint_entropy
from tokenizer.quantizers.gradients import straight_through

_GROUP_CODES = 8192

# The bound's margin of 1e-3 is half a level from 1,001 levels on; with 2, it puts the threshold at -3.8.
Levels = list[Annotated[int, Range(3, 1000)]]


class FSQ(Quantizer):
    """Rounds each channel to one of `levels[i]` values in [-1, 1]; all combinations are the codes.

    There is no codebook to learn. The gradient passes straight through the rounding, and through the tanh that bounds a
    channel. The paper has no loss either; the entropy term here keeps the corners of a large vocabulary in use.

    Args:
        levels: values of each channel; their product is the vocabulary. The paper's: [8, 6, 5] for 2^8, [8, 5, 5, 5]
            for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
        entropy_weight: weight of log K - H(E[p]), which asks for even use; p is, in each channel, a softmax over levels
            of the squared distance, in units of a level. It is exact for groups of channels with up to 8,192
            combinations, which are taken as independent of each other; 0 is the paper's.
    """

    levels: Tensor
    strides: Tensor

    @checked
    def __init__(
        self,
        dim: int,
        *,
        levels: Levels = [8, 5, 5, 5],  # noqa: B006
        entropy_weight: Annotated[float, Range(0, 100)] = 0.003,
    ) -> None:
        if not levels:
            raise ValueError("levels should be a list of integers, one a channel, got an empty one")
        super().__init__(dim, math.prod(levels), len(levels))
        self.register_buffer("levels", torch.tensor(levels))
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("strides", torch.tensor(strides))
        self.entropy_weight = entropy_weight
        self._sizes = list(levels)  # as Python numbers, which no device has to be waited for
        self._refines = False

    @property
    def level_scale(self) -> Tensor:  # type: ignore[override]
        """`(code_dim,)` float32: a further level divides the cells of the one before."""
        return self.levels.float().reciprocal()

    def refine(self) -> None:
        """Take latents that `squeeze` has bounded; levels then go from -1 to 1, also where their number is even."""
        self._refines = True

    def squeeze(self, latents: Tensor) -> Tensor:
        """Latents `(B, code_dim, *grid)` bounded to the cells of all levels, where this is one of several to add up."""
        if not self._refines:
            return latents
        edge = self.levels / (self.levels.float() - 1)
        return ((latents.movedim(1, -1) / edge).tanh() * edge).movedim(-1, 1)

    @property
    def _integers(self) -> tuple[Tensor, Tensor]:
        """Shift and unit, `(code_dim,)` float32 each: a level is (integer + shift) / unit."""
        levels = self.levels.float()
        if self._refines:
            return (levels % 2 == 0).float() / 2, (levels - 1) / 2
        return torch.zeros_like(levels), (self.levels // 2).float()

    def bound(self, vectors: Tensor) -> Tensor:
        """Vectors `(..., len(levels))` squeezed so that rounding gives `levels[i]` integers a channel."""
        if self._refines:
            half, (shift, unit) = self.levels.float() / 2, self._integers
            return torch.minimum(torch.maximum(vectors * unit, -half), half) - shift
        half_width = (self.levels.float() - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0).float() / 2
        return (vectors + (offset / half_width).atanh()).tanh() * half_width - offset

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Round each channel to the nearest of its levels."""
        bounded = self.bound(latents.movedim(1, -1))
        rounded = torch.minimum(bounded.detach().round().maximum(-(self.levels // 2)), (self.levels - 1) // 2)
        codes = ((rounded + self.levels // 2).long() * self.strides).sum(-1)
        shift, unit = self._integers
        quantized = (straight_through(bounded, rounded) + shift) / unit
        losses = {}
        if self.entropy_weight and self.training:
            losses["entropy"] = self.entropy_weight * self._unevenness(bounded.flatten(0, -2))
        return QuantizerOutput(quantized.movedim(-1, 1), codes, losses)

    def _unevenness(self, bounded: Tensor) -> Tensor:
        """log K - H(E[p]) in nats of bounded vectors `(N, len(levels))`: how far the codes' use is from even."""
        groups: list[list[Tensor]] = [[]]
        for size, values in zip(self._sizes, bounded.unbind(1), strict=True):
            if groups[-1] and math.prod(len(p) for p in groups[-1]) * size > _GROUP_CODES:
                groups.append([])
            levels = torch.arange(size, device=bounded.device) - size // 2
            groups[-1].append((-(values - levels.unsqueeze(1)).square()).softmax(0))
        return math.log(self.vocab_size) - torch.stack([joint_entropy(group) for group in groups]).sum()

    def embed(self, codes: Tensor) -> Tensor:
        digits = codes.unsqueeze(-1) // self.strides % self.levels  # (B, *grid, len(levels))
        shift, unit = self._integers
        return (((digits - self.levels // 2).float() + shift) / unit).movedim(-1, 1)

    def collapse_advice(self) -> str:
        return (
            f"a larger quantizer.entropy_weight= (it is {self.entropy_weight}), or quantizer.levels= with fewer levels"
        )
