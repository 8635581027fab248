"""Product quantization: groups of channels with codebooks of their own (Jegou et al. 2011)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from configs.layout import CodeLayout
from configs.validation import Range, checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.composite import CompositeQuantizer, build_inner, level_seeds, mean_of


class ProductQuantizer(CompositeQuantizer):
    """Splits the channels into `depth` groups and quantizes each by itself ("Product Quantization for Nearest Neighbor
    Search", TPAMI 2011). Losses are means over groups.

    Args:
        quantizer: the inner quantizer: name, then its options; one code a position.
        depth: groups of channels.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        quantizer: dict[str, Any] = {"name": "ema"},  # noqa: B006
        depth: Annotated[int, Range(1, 64)] = 2,
    ) -> None:
        group_dim = max(1, dim // depth)
        code_dim = build_inner(quantizer, group_dim).code_dim
        takes_any_dim = build_inner(quantizer, group_dim + 1).code_dim != code_dim
        if takes_any_dim and dim % depth:
            raise ValueError(f"the latents' {dim} channels do not divide into depth={depth} groups; choose a divisor")
        inner = [build_inner(quantizer, code_dim) for _ in range(depth)]
        super().__init__(dim, inner, depth * code_dim)
        self.depth = self.num_codebooks = depth

    def code_layout(self, grid: tuple[int, ...]) -> CodeLayout:
        return CodeLayout.single(grid, self.vocab_size, self.depth)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize each group; codes are `(B, *grid, depth)`, without the last axis for a depth of 1."""
        groups = enumerate(latents.chunk(self.depth, dim=1))
        outputs = [self.level(i).quantize(group, level_seeds(seeds, i)) for i, group in groups]
        codes = torch.stack([output.codes for output in outputs], -1)
        quantized = torch.cat([output.quantized for output in outputs], dim=1)
        return QuantizerOutput(quantized, codes.squeeze(-1) if self.depth == 1 else codes, *mean_of(outputs))

    def embed(self, codes: Tensor) -> Tensor:
        groups = [codes] if self.depth == 1 else codes.unbind(-1)
        return torch.cat([self.level(i).embed(group) for i, group in enumerate(groups)], dim=1)

    def start(self, latents: Tensor) -> None:
        for i, group in enumerate(latents.chunk(self.depth, dim=1)):
            self.level(i).start(group)
