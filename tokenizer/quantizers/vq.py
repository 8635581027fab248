"""Vector quantization with a codebook learned by gradient (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from configs.validation import checked
from tokenizer.quantizers.codebook import CodebookQuantizer, LearningRateScale


class VectorQuantizer(CodebookQuantizer):
    """A codebook that follows the latents by gradient (van den Oord et al. 2017, equation 3).

    With `distance: cosine` and a small `code_dim` it is the codebook of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627).

    Args:
        codebook_learning_rate: how many times the run's learning rate the codebook learns with. Adam moves every entry
            by about the learning rate, which is too little to follow the latents while their scale grows from that of
            an untrained encoder.
    """

    codebook: nn.Parameter

    @checked
    def __init__(self, dim: int, *, codebook_learning_rate: LearningRateScale = 10.0, **options: Any) -> None:
        super().__init__(dim, **options)
        self.codebook = nn.Parameter(self.draw_codebook())
        self.codebook_learning_rate = codebook_learning_rate

    def learning_rate_scales(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield self.codebook, self.codebook_learning_rate

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors
