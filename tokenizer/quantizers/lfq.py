"""Lookup-free quantization: the sign of each channel (Yu et al. 2023, MAGVIT-v2, arXiv:2310.05737)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from configs.validation import checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.bits import BitQuantizer
from tokenizer.quantizers.gradients import GRADIENTS, Gradient


class LFQ(BitQuantizer):
    """A code is the sign of each of n channels; entropy terms keep the 2^n codes in use (Yu et al. 2023, section 3.1).

    Args:
        gradient: straight_through, or the rotation trick (Fifty et al. 2024).
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        gradient: Gradient = "straight_through",
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.gradient = gradient
        if self.code_dim == dim:
            self.estimator = GRADIENTS[gradient]

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Replace each channel by its sign."""
        vectors = latents.movedim(1, -1)
        codes = self.pack(vectors)
        signs = self.unpack(codes)
        losses = self.bit_losses(vectors.flatten(0, -2), signs.flatten(0, -2), 1.0)
        return QuantizerOutput(GRADIENTS[self.gradient](vectors, signs).movedim(-1, 1), codes, losses)

    def embed(self, codes: Tensor) -> Tensor:
        return self.unpack(codes).movedim(-1, 1)
