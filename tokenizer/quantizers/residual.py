"""Residual quantization: each level quantizes what the levels before left over (Lee et al. 2022, arXiv:2203.01941)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from configs.layout import CodeLayout
from configs.random_streams import integer, uniform
from configs.validation import Range, Share, checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.composite import (
    CompositeQuantizer,
    as_one_image,
    build_inner,
    level_seeds,
    mean_of,
    nearest_vectors,
)


class ResidualQuantizer(CompositeQuantizer):
    """A sum of `depth` code vectors a position, coarse to fine: r_0 = z, r_d = r_{d-1} - e_d (Lee et al. 2022, eq. 4).

    Level d of lfq and bsq works on half the scale of the one before. Levels of fsq divide the cells of the one before:
    latents are bounded once, levels are even numbers apart, and each is smaller by its channel's number of values.
    Losses are means over levels. Codes of fewer levels, `(B, *grid, n)`, decode to the coarse part.

    Where an inner quantizer is a code vector behind a gradient estimator, each level's commitment acts on the latents
    and the estimator acts once, on the sum; other inner quantizers pass their own gradients from level to level.

    Args:
        quantizer: the inner quantizer: name, then its options; one code a position.
        depth: levels.
        shared: one codebook for all levels, as in the paper, instead of one each. Its little-used codes are revived
            onto what the last level quantizes.
        quantizer_dropout: share of training images that are decoded from a random number of levels only (Zeghidour et
            al. 2021); their other levels learn all the same.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        quantizer: dict[str, Any] = {"name": "ema"},  # noqa: B006
        depth: Annotated[int, Range(1, 64)] = 4,
        shared: bool = False,
        quantizer_dropout: Share = 0.0,
    ) -> None:
        code_dim = build_inner(quantizer, dim).code_dim
        inner = [build_inner(quantizer, code_dim) for _ in range(1 if shared else depth)]
        super().__init__(dim, inner, code_dim)
        if depth > 1:
            for quantizer_of_level in inner:
                if getattr(quantizer_of_level, "distance", None) == "cosine":
                    raise ValueError(
                        "codes of length 1 cannot add up to a finer and finer sum: residual needs "
                        "quantizer.quantizer.distance=euclidean; product takes cosine codes"
                    )
                quantizer_of_level.refine()
        self.depth = depth
        self.num_codebooks = len(inner)
        self.quantizer_dropout = quantizer_dropout
        self.stochastic = self.stochastic or quantizer_dropout > 0
        self.estimator = self.first.estimator if code_dim == dim else None

    def code_layout(self, grid: tuple[int, ...]) -> CodeLayout:
        return CodeLayout.single(grid, self.vocab_size, self.depth)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize level by level; codes are `(B, *grid, depth)`, without the last axis for a depth of 1."""
        estimator = self.first.estimator
        latents = self.first.squeeze(latents)
        kept = self._kept_levels(latents, seeds)
        residual, total, outputs = latents, torch.zeros_like(latents), []
        for level in range(self.depth):
            scale = self.scale(level, latents.ndim)
            output = self.level(level).quantize(residual / scale, level_seeds(seeds, level))
            quantized = output.quantized.detach() * scale if estimator else output.quantized * scale
            residual = residual - quantized
            total = total + (quantized if kept is None else quantized * (kept > level))
            outputs.append(output)
        if estimator:
            total = estimator(latents.movedim(1, -1), total.movedim(1, -1)).movedim(-1, 1)
        codes = torch.stack([output.codes for output in outputs], -1)
        return QuantizerOutput(total, codes.squeeze(-1) if self.depth == 1 else codes, *mean_of(outputs))

    def _kept_levels(self, latents: Tensor, seeds: Tensor | None) -> Tensor | None:
        """How many levels each image is decoded from, `(B, 1, ...)`; None where all are."""
        if not (self.quantizer_dropout and self.training):
            return None
        assert seeds is not None
        drops = uniform(seeds, 0) < self.quantizer_dropout
        kept = torch.where(drops, 1 + integer(seeds, 1, self.depth), self.depth)
        return kept.view(-1, *[1] * (latents.ndim - 1))

    def embed(self, codes: Tensor) -> Tensor:
        levels = [self.level(i).embed(level) for i, level in enumerate(self._split(codes))]
        return torch.stack([vectors * self.scale(i, vectors.ndim) for i, vectors in enumerate(levels)]).sum(0)

    def _split(self, codes: Tensor) -> Sequence[Tensor]:
        return [codes] if self.depth == 1 else codes.unbind(-1)

    def start(self, latents: Tensor) -> None:
        """Start level by level; a shared codebook, from the residuals that its own first start leaves."""
        if not self.num_start_vectors:
            return
        residual, residuals = latents, []
        for i in range(self.depth):
            scale = self.scale(i, latents.ndim)
            if i < len(self.inner):
                self.level(i).start(residual / scale)
            residuals.append(residual / scale)
            residual = residual - nearest_vectors(self.level(i), residual / scale) * scale
        if len(self.inner) < self.depth:
            self.first.start(as_one_image(residuals))
