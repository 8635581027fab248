"""Vector quantization with a moving-average codebook (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from configs.validation import Range, checked
from tokenizer.collectives import sum_over_processes
from tokenizer.quantizers.codebook import CodebookQuantizer


class EMAQuantizer(CodebookQuantizer):
    """A codebook of moving averages of the latents that chose each code (van den Oord et al. 2017, appendix A.1).

    Each optimizer step, with n_i vectors at code i over all processes and accumulation steps:
    N_i <- decay * N_i + (1 - decay) * n_i;  m_i <- decay * m_i + (1 - decay) * sum of z;  e_i = m_i / N_i.

    Args:
        decay: share of the old average that a step keeps.
        epsilon: Laplace smoothing of the counts, so that a code that nobody chose does not divide by zero.
    """

    learns_by_gradient = False
    cluster_size: Tensor
    embedding_sum: Tensor
    bookkeeping: ClassVar[frozenset[str]] = CodebookQuantizer.bookkeeping | {"cluster_size", "embedding_sum"}

    @checked
    def __init__(
        self,
        dim: int,
        *,
        decay: Annotated[float, Range(0, 0.999999)] = 0.99,
        epsilon: Annotated[float, Range(1e-12, 0.1)] = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.decay = decay
        self.epsilon = epsilon
        self.register_buffer("codebook", self.draw_codebook())
        self.register_buffer("cluster_size", torch.ones(self.vocab_size, dtype=torch.float32))
        self.register_buffer("embedding_sum", self.codebook.clone())
        self._sums: Tensor | None = None

    def observe(self, vectors: Tensor, codes: Tensor) -> None:
        super().observe(vectors, codes)
        if self._sums is None:
            self._sums = vectors.new_zeros(self.vocab_size, self.code_dim)
        self._sums.index_add_(0, codes, vectors)

    def learn(self, counts: Tensor, key: int) -> None:
        """Fold the batch into the averages."""
        assert self._sums is not None
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embedding_sum.lerp_(sum_over_processes(self._sums), 1 - self.decay)
        total = self.cluster_size.sum()
        # Laplace smoothing keeps a code that nobody chose from dividing by zero.
        smoothed = (self.cluster_size + self.epsilon) / (total + self.vocab_size * self.epsilon) * total
        torch.div(self.embedding_sum, smoothed.unsqueeze(1), out=self.codebook)
        self._sums = None

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors
        self.cluster_size[index] = 1.0
        self.embedding_sum[index] = vectors
