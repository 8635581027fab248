"""Multi-scale residual quantization: next-scale token maps (Tian et al. 2024, VAR, arXiv:2404.02905, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.layout import CodeGrid, CodeLayout
from configs.validation import Count, Range, Share, checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.composite import (
    CompositeQuantizer,
    as_one_image,
    build_inner,
    level_seeds,
    mean_of,
    nearest_vectors,
)

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UPSAMPLING = {1: "linear", 2: "bicubic", 3: "trilinear"}


class MultiscaleQuantizer(CompositeQuantizer):
    """Quantizes a pyramid of grids, coarse to fine, each what the coarser ones left over, with one shared codebook.

    At each scale the rest is shrunk by area, quantized, enlarged (bicubic on a 2-D grid), and passed through
    phi(h) = (1 - r) h + r conv(h), before it is added. The convolutions are partially shared: scales that are near
    each other use the same one. fsq, lfq and bsq work on a scale that falls to their level_scale at the finest grid.

    Where the inner quantizer is a code vector behind a gradient estimator, the commitment and codebook terms are those
    of the sum up to each scale, as means over scales, with the inner commitment weight; other terms, and those of other
    inner quantizers, stay their own. Little-used codes are revived onto what the finest grid quantizes.

    Args:
        quantizer: the inner quantizer: name, then its options; one code a position.
        scales: sides of the grids, the last being the latents' own longer side, such as the paper's [1, 2, 3, 4, 5, 6,
            8, 10, 13, 16]; the shorter side shrinks along. By default these numbers up to the longer side.
        num_convolutions: different convolutions.
        residual_ratio: r, the convolution's share.
        grid_dims: axes of the grid: 1 for sequences, 2 for images, 3 for video.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        quantizer: dict[str, Any] = {"name": "vq", "vocab_size": 4096},  # noqa: B006
        scales: list[Count] | None = None,
        num_convolutions: Annotated[int, Range(1, 64)] = 4,
        residual_ratio: Share = 0.5,
        grid_dims: Literal[1, 2, 3] = 2,
    ) -> None:
        if scales is not None and scales != sorted(set(scales)):
            raise ValueError(f"scales should be rising sides of grids, got {scales}")
        code_dim = build_inner(quantizer, dim).code_dim
        super().__init__(dim, [build_inner(quantizer, code_dim)], code_dim)
        self.first.refine()
        self.scales = scales
        self.residual_ratio = residual_ratio
        self.grid_dims = grid_dims
        conv = _CONV[grid_dims]
        self.convolutions = nn.ModuleList(
            conv(code_dim, code_dim, 3, padding=1, dtype=torch.float32) for _ in range(num_convolutions)
        )

    def grids(self, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The grids of latents `(B, D, *grid)`, coarse to fine."""
        longest = max(grid)
        if len(grid) != self.grid_dims:
            raise ValueError(
                f"expected latents on a grid of {self.grid_dims} axes, got {grid}; give quantizer.grid_dims="
            )
        if self.scales is not None and self.scales[-1] != longest:
            raise ValueError(
                f"quantizer.scales end at {self.scales[-1]}, but the latents' grid is {grid}; end at {longest}"
            )
        known = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 101, 128)
        scales = self.scales or [*(side for side in known if side < longest), longest]
        if len(scales) < len(self.convolutions):
            raise ValueError(
                f"{len(self.convolutions)} convolutions for {len(scales)} scales, {scales}: some would never be "
                f"trained; give quantizer.num_convolutions={len(scales)}"
            )
        return [tuple(max(1, math.ceil(side * scale / longest)) for side in grid) for scale in scales]

    def code_layout(self, grid: tuple[int, ...]) -> CodeLayout:
        return CodeLayout(tuple(CodeGrid(g, self.vocab_size) for g in self.grids(grid)))

    def _scale(self, k: int, num_scales: int, ndim: int) -> float | Tensor:
        return self.scale(k / max(1, num_scales - 1), ndim)

    def _contribution(self, quantized: Tensor, k: int, grids: list[tuple[int, ...]]) -> Tensor:
        """What code vectors `(B, D, *grids[k])` add to the latents `(B, D, *grids[-1])`."""
        share = k / max(1, len(grids) - 1)
        num = len(self.convolutions)
        # The convolution whose centre is nearest to this scale's place in the pyramid; the paper's code has 1 / (3 n)
        # ... 1 - 1 / (3 n) for its four, and 1 / (2 n) ... 1 - 1 / (2 n) otherwise.
        first = 1 / (3 if num == 4 else 2) / num
        last = 1 - first
        centres = [*(i * ((last - first) / max(1, num - 1)) + first for i in range(num - 1)), last]
        conv = self.convolutions[min(range(num), key=lambda i: abs(centres[i] - share))]
        if quantized.shape[2:] != grids[-1]:
            mode = _UPSAMPLING[self.grid_dims]
            quantized = F.interpolate(quantized, size=grids[-1], mode=mode, align_corners=False)
        return torch.lerp(quantized, conv(quantized), self.residual_ratio)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize scale by scale; codes are `(B, L)`, the grids flattened and joined."""
        inner = self.first
        grids = self.grids(tuple(latents.shape[2:]))
        latents = inner.squeeze(latents)
        rest, total, outputs, terms = latents, torch.zeros_like(latents), [], []
        for k, grid in enumerate(grids):
            scale = self._scale(k, len(grids), latents.ndim)
            small = F.interpolate(rest, size=grid, mode="area")
            output = inner.quantize(small / scale, level_seeds(seeds, k))
            # With an estimator, gradients reach the codebook and phi through the sum's own terms below.
            vectors = inner.embed(output.codes) if inner.estimator else output.quantized
            total = total + self._contribution(vectors * scale, k, grids)
            rest = latents - total.detach() if inner.estimator else latents - total
            terms.append((F.mse_loss(latents, total.detach()), F.mse_loss(total, latents.detach())))
            outputs.append(output)
        losses, metrics = mean_of(outputs)
        metrics["quantization_error"] = terms[-1][0].detach()
        if inner.estimator:
            commitment, codebook = (torch.stack(term).mean() for term in zip(*terms, strict=True))
            losses["commitment"] = commitment * getattr(inner, "commitment_weight", 0.0)
            losses["codebook"] = codebook
            total = inner.estimator(latents.movedim(1, -1), total.movedim(1, -1)).movedim(-1, 1)
        parts = [output.codes for output in outputs]
        codes = parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)
        return QuantizerOutput(total, codes, losses, metrics)

    def embed(self, codes: Tensor) -> Tensor:
        if codes.ndim == 1 + self.grid_dims:
            return self.embed_grids([codes])
        raise ValueError(
            f"expected the codes of each grid, got one tensor {tuple(codes.shape)}; split them by the layout"
        )

    def embed_grids(self, grids: Sequence[Tensor]) -> Tensor:
        shapes = [tuple(codes.shape[1:]) for codes in grids]
        added = []
        for k, codes in enumerate(grids):
            vectors = self.first.embed(codes)
            scale = self._scale(k, len(grids), vectors.ndim)
            added.append(self._contribution(vectors * scale, k, shapes))
        return torch.stack(added).sum(0)

    def start(self, latents: Tensor) -> None:
        """Start the codebook from the rests at all scales that its own first start leaves."""
        if not self.num_start_vectors:
            return
        self.first.start(latents)
        grids = self.grids(tuple(latents.shape[2:]))
        rest, rests = latents, []
        for k, grid in enumerate(grids):
            scale = self._scale(k, len(grids), latents.ndim)
            rests.append(F.interpolate(rest, size=grid, mode="area") / scale)
            rest = rest - self._contribution(nearest_vectors(self.first, rests[-1]) * scale, k, grids)
        self.first.start(as_one_image(rests))
