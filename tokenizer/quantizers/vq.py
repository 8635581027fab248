"""Vector quantization with a codebook learned by gradient (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.quantizers.codebook import CodebookQuantizer


class VectorQuantizer(CodebookQuantizer):
    """A codebook that follows the latents by gradient (van den Oord et al. 2017, equation 3).

    With `distance: cosine` and a small `code_dim` it is the codebook of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627).
    """

    codebook: nn.Parameter

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.codebook = nn.Parameter(self.draw_codebook())

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors
