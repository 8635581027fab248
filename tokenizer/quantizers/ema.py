"""Vector quantization with a moving-average codebook (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tokenizer.quantizers.codebook import CodebookQuantizer, CodebookStart
from tokenizer.quantizers.collectives import sum_over_processes


class EMAQuantizer(CodebookQuantizer):
    """A codebook of moving averages of the latents that chose each code (van den Oord et al. 2017, appendix A.1).

    Each optimizer step, with n_i vectors at code i over all processes and accumulation steps:
    N_i <- decay * N_i + (1 - decay) * n_i;  m_i <- decay * m_i + (1 - decay) * sum of z;  e_i = m_i / N_i.

    Args:
        dim: channels of the latents.
        vocab_size: codes in the codebook.
        commitment_weight: beta, how strongly latents are pulled to their code.
        decay: share of the old average that a step keeps.
        epsilon: Laplace smoothing of the counts, so that a code that nobody chose does not divide by zero.
        codebook_start: kmeans on the first batches' latents, normal, or uniform in [-1/K, 1/K].
        revive_after: steps after which an unused code moves onto a random latent; 0 is never.
    """

    cluster_size: Tensor
    embedding_sum: Tensor
    bookkeeping: ClassVar[frozenset[str]] = CodebookQuantizer.bookkeeping | {"cluster_size", "embedding_sum"}

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int = 512,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
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
        if not 0 <= decay < 1:
            raise ValueError(f"decay should be from 0 to below 1, got {decay}")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon should be a small positive number, got {epsilon}")
        self.decay = decay
        self.epsilon = epsilon
        self.register_buffer("codebook", self._draw_codebook())
        self.register_buffer("cluster_size", torch.ones(vocab_size))
        self.register_buffer("embedding_sum", self.codebook.clone())
        self._sums: Tensor | None = None

    def observe(self, vectors: Tensor, codes: Tensor) -> None:
        super().observe(vectors, codes)
        sums = vectors.new_zeros(self.vocab_size, self.dim).index_add_(0, codes, vectors)
        self._sums = sums if self._sums is None else self._sums.add_(sums)

    def learn(self, counts: Tensor) -> None:
        """Fold the batch into the averages."""
        assert self._sums is not None
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embedding_sum.lerp_(sum_over_processes(self._sums), 1 - self.decay)
        total = self.cluster_size.sum()
        # Laplace smoothing keeps a code that nobody chose from dividing by zero.
        smoothed = (self.cluster_size + self.epsilon) / (total + self.vocab_size * self.epsilon) * total
        self.codebook.copy_(self.embedding_sum / smoothed.unsqueeze(1))
        self._sums = None

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors
        self.cluster_size[index] = 1.0
        self.embedding_sum[index] = vectors
