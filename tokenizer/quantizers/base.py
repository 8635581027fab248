"""The interface of every quantizer: latents to integer codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from configs.layout import CodeLayout


@dataclass
class QuantizerOutput:
    """What quantizing gives."""

    quantized: Tensor
    """`(B, D, *grid)` float32, with a gradient estimator back to the latents."""
    codes: Tensor
    """`(B, *code_layout(grid).shape)` int64."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Weighted scalars; their sum is the quantizer's loss."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars to log."""


class Quantizer(nn.Module, ABC):
    """Latents `(B, D, *grid)` to codes and back, in float32 under any autocast.

    A training loop calls `initialize` once before the first step, `anneal` before and `update` after each optimizer
    step; the codebooks that gradients move need neither.

    Attributes:
        dim: D, channels of the latents.
        vocab_size: K, codes are integers in [0, K).
        bookkeeping: names of buffers that do not decide codes (counters, sums); the fingerprint leaves them out.
    """

    bookkeeping: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("vocab_size", vocab_size, 2)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} should be an integer of at least {least}, got {value!r}")
        self.dim = dim
        self.vocab_size = vocab_size

    def code_layout(self, grid: tuple[int, ...]) -> CodeLayout:
        """What the codes of latents `(B, D, *grid)` mean."""
        return CodeLayout.single(grid, self.vocab_size)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `(B, D, *grid)` of any floating type.

        Raises:
            ValueError: where the channels are not D.
        """
        if latents.ndim < 3 or latents.shape[1] != self.dim:
            raise ValueError(f"expected latents (B, {self.dim}, *grid), got {tuple(latents.shape)}")
        with torch.autocast(latents.device.type, enabled=False):
            return self.quantize(latents.float())

    @abstractmethod
    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `(B, D, *grid)` float32."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The latents `(B, D, *grid)` float32 that codes `(B, *code_layout(grid).shape)` stand for."""

    def initialize(self, latents: Tensor) -> None:
        """Start the codebook from latents `(N, D)` float32, gathered over batches and processes."""

    def anneal(self, progress: float) -> None:
        """Set scheduled values for the share of training that is done, in [0, 1]."""

    def update(self, step: int) -> None:
        """Move the codebook with what was quantized since the last call; `step` counts optimizer steps from 0."""
