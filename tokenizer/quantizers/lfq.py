"""Lookup-free quantization: the sign of each channel (Yu et al. 2023, MAGVIT-v2, arXiv:2310.05737)."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from configs.validation import Range, checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.bits import BitQuantizer
from tokenizer.quantizers.gradients import GRADIENTS, Gradient


class LFQ(BitQuantizer):
    """A code is the sign of each of n channels; entropy terms keep the 2^n codes in use (Yu et al. 2023, section 3.1).

    Args:
        entropy_group_bits: bits whose joint use is measured exactly; groups are taken as independent.
        gradient: straight_through, or the rotation trick (Fifty et al. 2024).
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        entropy_group_bits: Annotated[int, Range(1, 16)] = 14,
        gradient: Gradient = "straight_through",
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.entropy_group_bits = entropy_group_bits
        self.gradient = gradient
        if self.code_dim == dim:
            self.estimator = GRADIENTS[gradient]

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Replace each channel by its sign."""
        vectors = latents.movedim(1, -1)
        codes = self.pack(vectors)
        signs = self.unpack(codes)
        losses = self.bit_losses(vectors.flatten(0, -2), signs.flatten(0, -2), 1.0, self.entropy_group_bits)
        return QuantizerOutput(GRADIENTS[self.gradient](vectors, signs).movedim(-1, 1), codes, losses)

    def embed(self, codes: Tensor) -> Tensor:
        return self.unpack(codes).movedim(-1, 1)
