"""Vector quantization with a codebook learned by gradient (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.quantizers.codebook import CodebookQuantizer, CodebookStart


class VectorQuantizer(CodebookQuantizer):
    """A codebook that follows the latents by gradient (van den Oord et al. 2017, equation 3).

    Args:
        dim: channels of the latents.
        vocab_size: codes in the codebook.
        commitment_weight: beta, how strongly latents are pulled to their code.
        codebook_start: kmeans on the first batches' latents, normal, or the paper's uniform in [-1/K, 1/K].
        revive_after: steps after which an unused code moves onto a random latent; 0 is never.
    """

    codebook: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int = 512,
        commitment_weight: float = 0.25,
        codebook_start: CodebookStart = "kmeans",
        revive_after: int = 50,
    ) -> None:
        super().__init__(
            dim,
            vocab_size=vocab_size,
            commitment_weight=commitment_weight,
            codebook_start=codebook_start,
            revive_after=revive_after,
        )
        self.codebook = nn.Parameter(self._draw_codebook())

    def losses(self, latents: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        return {"codebook": F.mse_loss(chosen, latents.detach()), **super().losses(latents, chosen)}

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors.to(self.codebook.dtype)
