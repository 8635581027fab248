"""What quantizers with a codebook share: nearest-neighbour search, straight-through gradients, k-means, revival."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.random_streams import integer, mix
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.collectives import num_processes, sum_over_processes, take_rows
from tokenizer.quantizers.search import kmeans, nearest_codes

CodebookStart = Literal["kmeans", "normal", "uniform"]


class CodebookQuantizer(Quantizer):
    """Replaces each latent vector by its nearest codebook vector (van den Oord et al. 2017, equations 1 and 2).

    A subclass holds `codebook`, `(K, D)`, as a parameter or a buffer, and says how it learns.
    """

    codebook: Tensor
    used: Tensor
    bookkeeping: ClassVar[frozenset[str]] = frozenset({"used"})

    def __init__(
        self, dim: int, *, vocab_size: int, commitment_weight: float, codebook_start: CodebookStart, revive_after: int
    ) -> None:
        super().__init__(dim, vocab_size)
        if codebook_start not in get_args(CodebookStart):
            raise ValueError(f"codebook_start should be one of {get_args(CodebookStart)}, got {codebook_start!r}")
        if not 0 <= commitment_weight <= 100:
            raise ValueError(f"commitment_weight should be from 0 to 100, got {commitment_weight}")
        if type(revive_after) is not int or revive_after < 0:
            raise ValueError(f"revive_after should be a number of steps, or 0 for never, got {revive_after!r}")
        self.commitment_weight = commitment_weight
        self.codebook_start = codebook_start
        self.revive_after = revive_after
        self.register_buffer("used", torch.zeros(vocab_size, dtype=torch.bool))
        self._vectors: Tensor | None = None
        self._counts: Tensor | None = None

    def _draw_codebook(self) -> Tensor:
        codebook = torch.empty(self.vocab_size, self.dim)
        if self.codebook_start == "uniform":
            return torch.nn.init.uniform_(codebook, -1 / self.vocab_size, 1 / self.vocab_size)
        return torch.nn.init.normal_(codebook)

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Replace each latent vector by its nearest codebook vector, with the gradient copied straight through."""
        codebook = self.codebook.float()
        vectors = latents.movedim(1, -1).flatten(0, -2)  # (N, D)
        codes = nearest_codes(vectors.detach(), codebook)
        if self.training and torch.is_grad_enabled():
            self.observe(vectors.detach(), codes)
        codes = codes.view(len(latents), *latents.shape[2:])
        chosen = F.embedding(codes, codebook).movedim(-1, 1)  # (B, D, *grid)
        quantized = latents + (chosen - latents).detach()
        losses = self.losses(latents, chosen)
        error = F.mse_loss(chosen.detach(), latents.detach())
        return QuantizerOutput(quantized, codes, losses, {"quantization_error": error})

    def losses(self, latents: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """The commitment term, beta * |z - sg(e)|^2, as a mean over elements (equation 3)."""
        return {"commitment": self.commitment_weight * F.mse_loss(latents, chosen.detach())}

    def decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook.float()).movedim(-1, 1)

    def observe(self, vectors: Tensor, codes: Tensor) -> None:
        """Remember what a training forward pass quantized, for `update`."""
        # Not bincount, which makes a GPU wait to learn the largest code.
        counts = vectors.new_zeros(self.vocab_size).index_add_(0, codes, vectors.new_ones(len(codes)))
        self._counts = counts if self._counts is None else self._counts.add_(counts)
        self._vectors = vectors

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Cluster the latents with k-means where `codebook_start` asks for it."""
        if self.codebook_start == "kmeans":
            self.set_codes(torch.arange(self.vocab_size, device=latents.device), kmeans(latents, self.vocab_size))

    @abstractmethod
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        """Put codebook rows `index` `(M,)` onto `vectors` `(M, D)`, on every process the same."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self._counts is None or self._vectors is None:
            return
        counts = sum_over_processes(self._counts)
        self.learn(counts)
        self.used.logical_or_(counts > 0)
        # The check reads a number back from the device: once in revive_after steps, not in every one.
        if self.revive_after and (step + 1) % self.revive_after == 0:
            self._revive(self._vectors, step)
        self._vectors = self._counts = None

    def learn(self, counts: Tensor) -> None:
        """Move the codebook, given how many vectors chose each code over all processes, `(K,)` float32."""

    def _revive(self, vectors: Tensor, step: int) -> None:
        """Move codes that nobody chose since the last revival onto random latents of this batch.

        Which latents is decided by (step, code) and the index in the global batch, so that processes agree.
        """
        unused = (~self.used).nonzero().squeeze(1)
        if len(unused):
            index = integer(mix(unused, step), 0, len(vectors) * num_processes())
            self.set_codes(unused, take_rows(vectors, index))
        self.used.zero_()
