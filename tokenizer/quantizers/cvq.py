"""Clustered vector quantization: codes in little use move towards latents (Zheng & Vedaldi 2023, arXiv:2307.15139)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from configs.random_streams import integer, mix, uniform
from configs.validation import CountOrZero, Range, checked
from tokenizer.collectives import (
    from_first_process,
    gather_rows,
    num_processes,
    take_rows,
)
from tokenizer.quantizers.search import block_rows, nearest_codes, squared_distances
from tokenizer.quantizers.vq import VectorQuantizer

SAMPLE_SIZE = 4096
"""Vectors of the global batch among which `probabilistic` anchors are drawn."""


class CVQ(VectorQuantizer):
    """A gradient codebook whose little-used codes are moved onto anchors among the latents, each optimizer step.

    With N_k the running share of vectors at code k (equation 4), alpha_k = exp(-N_k K 10 / (1 - decay) - 0.001)
    (equation 5) and e_k <- (1 - alpha_k) e_k + alpha_k anchor_k (equation 6). The anchor is the closest latent, or a
    random one of a pool of K latents, or drawn with probability softmax(-|x - e_k|^2) over 4,096 latents of the batch.

    Args:
        anchor: closest, random or probabilistic.
        decay: share of the running use that a step keeps.
        revive_after: steps after which little-used codes move onto random latents besides; 0 is never.
    """

    usage: Tensor
    pool: Tensor
    bookkeeping: ClassVar[frozenset[str]] = VectorQuantizer.bookkeeping | {"usage", "pool"}

    @checked
    def __init__(
        self,
        dim: int,
        *,
        anchor: Literal["closest", "random", "probabilistic"] = "closest",
        decay: Annotated[float, Range(0, 0.999999)] = 0.99,
        revive_after: CountOrZero = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, revive_after=revive_after, **options)
        self.anchor = anchor
        self.decay = decay
        self.register_buffer("usage", torch.zeros(self.vocab_size, dtype=torch.float32))
        if anchor == "random":
            # Before the pool has filled up, a code's anchor is where the code started.
            self.register_buffer("pool", self.codebook.detach().clone())

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        super().set_codes(index, vectors)
        if self.anchor == "random":
            self.pool[index] = vectors

    def learn(self, counts: Tensor, key: int) -> None:
        """Move each code towards its anchor, by how little it is used."""
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        alpha = torch.exp(-self.usage * (self.vocab_size * 10 / (1 - self.decay)) - 1e-3)
        # Codes in use have an alpha that changes nothing, so no anchor is looked for. All processes agree on which.
        moving = (alpha[: self.active_size] > 1e-9).nonzero().squeeze(1)
        if self.anchor == "random":
            self._fill_pool(key)
        if len(moving):
            codes = self.codebook[moving].detach()
            anchors = from_first_process(self._anchors(moving, codes, key))
            self.codebook[moving] = torch.lerp(codes, anchors, alpha[moving].unsqueeze(1))

    def _anchors(self, index: Tensor, codes: Tensor, key: int) -> Tensor:
        if self.anchor == "random":
            return self.pool[index]
        if self.anchor == "closest":
            return _closest(self._normalised(codes), torch.cat(self._vectors))
        sample = self._random_latents(min(SAMPLE_SIZE, self._num_latents()), key)
        return _draw_near(self._normalised(codes), sample, uniform(mix(index, key), 1))

    def _fill_pool(self, key: int) -> None:
        """Put latents of the global batch into all slots of the pool, or into random ones where there are fewer."""
        total = self._num_latents()
        slots = torch.arange(self.vocab_size, device=self.pool.device)
        if total >= self.vocab_size:
            self.pool.copy_(take_rows(self._vectors, integer(mix(slots, key), 2, total)))
        else:
            self.pool[mix(slots, key).argsort()[:total]] = take_rows(self._vectors, slots[:total])


def _closest(codes: Tensor, vectors: Tensor) -> Tensor:
    """The vector `(M, D)` nearest to each code `(M, D)` among those of all processes."""
    nearest = nearest_codes(codes, vectors)
    if num_processes() == 1:
        return vectors[nearest]
    distances = gather_rows(squared_distances(codes, vectors[nearest]).unsqueeze(0))  # (processes, M)
    winner = distances.argmin(0)  # the first process of those that are equally near, as in one process
    nearest = gather_rows(nearest.unsqueeze(0)).gather(0, winner.unsqueeze(0)).squeeze(0)
    return take_rows([vectors], winner * len(vectors) + nearest)


def _draw_near(codes: Tensor, vectors: Tensor, draws: Tensor) -> Tensor:
    """One of vectors `(S, D)` for each code `(M, D)`, drawn from softmax(-|x - e|^2) by uniforms `(M,)` in [0, 1)."""
    chosen = []
    half_norms = vectors.square().sum(1) / 2
    rows = block_rows(codes, len(vectors))
    for block, draw in zip(codes.split(rows), draws.split(rows), strict=True):
        logits = torch.addmm(half_norms, block, vectors.t(), beta=-2, alpha=2)
        cumulative = logits.softmax(1).cumsum(1)
        target = draw.unsqueeze(1) * cumulative[:, -1:]
        chosen.append(torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=len(vectors) - 1))
    return vectors[torch.cat(chosen)]
