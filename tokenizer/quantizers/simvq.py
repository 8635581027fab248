"""SimVQ: a frozen random codebook behind one linear layer (Zhu et al. 2024, arXiv:2411.02038)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.validation import checked
from tokenizer.collectives import from_first_process
from tokenizer.quantizers.codebook import CodebookQuantizer, LearningRateScale


class SimVQ(CodebookQuantizer):
    """Code vectors e = C W with C frozen: every gradient step moves the whole codebook, not only the chosen codes.

    The terms are those of the gradient codebook; |sg(z) - e|^2 moves W alone (Zhu et al. 2024, equation 8).

    Args:
        codebook_start: of C; kmeans takes the latents' clusters, with W as the identity.
        revive_after: steps after which little-used codes move onto random latents, by new rows of C; 0 is never.
        codebook_learning_rate: how many times the run's learning rate W learns with.
    """

    codebook: Tensor

    @checked
    def __init__(self, dim: int, *, codebook_learning_rate: LearningRateScale = 5.0, **options: Any) -> None:
        super().__init__(dim, **options)
        self.register_buffer("codebook", self.draw_codebook())
        self.projection = nn.Linear(self.code_dim, self.code_dim, bias=False, dtype=torch.float32)
        nn.init.eye_(self.projection.weight)
        self.codebook_learning_rate = codebook_learning_rate

    def learning_rate_scales(self) -> Iterator[tuple[nn.Parameter, float]]:
        for weight in self.projection.parameters():
            yield weight, self.codebook_learning_rate

    def lookup(self, codes: Tensor) -> Tensor:
        return self._normalised(self.projection(F.embedding(codes, self.codebook)))

    def active_codebook(self) -> Tensor:
        return self._normalised(self.projection(self.codebook[: self.active_size]))

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        """Choose rows of C so that C W are the vectors."""
        rows = torch.linalg.lstsq(self.projection.weight, vectors.t()).solution.t()
        self.codebook[index] = from_first_process(rows.contiguous())
