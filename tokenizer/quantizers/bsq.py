"""Binary spherical quantization: signs of a vector on the unit sphere (Zhao et al. 2024, arXiv:2406.07548)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from configs.validation import checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.bits import BitQuantizer, Temperature
from tokenizer.quantizers.gradients import GRADIENTS, Gradient


class BSQ(BitQuantizer):
    """Latents on the unit sphere move to the corner of the cube inside it: signs over sqrt(n) (section 4.1).

    The paper bounds the entropy over the batch by that of each bit for itself (equation 9), `entropy_group_bits=1`. Two
    opposite corners reach that bound too, so that by default bits are measured together.

    Args:
        entropy_temperature: of the softmax over codes; what is compared is at most 1 / num_bits a channel here.
        gradient: straight_through, or the rotation trick (Fifty et al. 2024).
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        entropy_temperature: Temperature = 0.1,
        gradient: Gradient = "straight_through",
        **options: Any,
    ) -> None:
        super().__init__(dim, entropy_temperature=entropy_temperature, **options)
        self.gradient = gradient
        self.magnitude = 1 / math.sqrt(self.num_bits)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Normalise each vector and take its signs."""
        vectors = F.normalize(latents.movedim(1, -1), dim=-1)
        codes = self.pack(vectors)
        corners = self.unpack(codes) * self.magnitude
        losses = self.bit_losses(vectors.flatten(0, -2), corners.flatten(0, -2), self.magnitude)
        return QuantizerOutput(GRADIENTS[self.gradient](vectors, corners).movedim(-1, 1), codes, losses)

    def embed(self, codes: Tensor) -> Tensor:
        return (self.unpack(codes) * self.magnitude).movedim(-1, 1)
