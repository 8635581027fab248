"""What the transformer priors share: the embedding of codes, places and classes, the blocks, and the head."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from configs.validation import Count, Range
from prior.base import Prior, PriorConfig
from prior.linear import Linear
from prior.rotary import code_positions, rotary_table
from prior.transformer import Transformer


class TransformerPriorConfig(PriorConfig):
    """Options of the transformer; see `PriorConfig` for what the training adds."""

    width: Count = 384
    """Channels of the transformer."""
    num_layers: Count = 6
    """Transformer blocks."""
    num_heads: Count = 6
    """Attention heads; width / num_heads must be a multiple of 4."""
    num_kv_heads: Count | None = None
    """Heads of keys and values (grouped-query attention); fewer make the cache of sampling smaller. None: num_heads."""
    qk_norm: bool = False
    """Normalize queries and keys, against attention logits that grow in large models."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    """Dropout of embeddings and residual branches in training; not of attention weights, which fused kernels lack."""


class TransformerPrior(Prior):
    """Codes of any layout as one sequence, coarse to fine, raster order within a grid, one slot a code.

    Args:
        config: its options.
        special_codes: rows of the code embedding that are no codes, such as a mask.
    """

    config_class = TransformerPriorConfig
    config: TransformerPriorConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config: TransformerPriorConfig, special_codes: int = 0) -> None:
        super().__init__(config)
        layout = config.code_layout
        self.transformer = Transformer(
            config.width,
            config.num_layers,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            qk_norm=config.qk_norm,
            dropout=config.dropout,
        )
        # Codes at different grids and depths mean different things: each has rows of its own in the embedding.
        self.num_tables = sum(grid.depth for grid in layout.grids)
        self.code_embedding = nn.Embedding(self.num_tables * layout.vocab_size + special_codes, config.width)
        self.position_embedding = nn.Embedding(layout.num_codes, config.width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = Linear(config.width, layout.vocab_size, bias=False)
        for parameter in (self.code_embedding.weight, self.position_embedding.weight, self.class_embedding.weight):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        # By device: not buffers, which would stand in every checkpoint, or come back uninitialized from a meta device.
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self) -> tuple[Tensor, Tensor]:
        """For each code the first row of its embedding table `(num_codes,)`, and the `rotary_table` of all codes."""
        if self.device not in self._tables:
            offsets, table = [], 0
            for grid in self.code_layout.grids:
                rows = (torch.arange(grid.depth) + table) * self.code_layout.vocab_size
                offsets.append(rows.repeat(math.prod(grid.shape)))
                table += grid.depth
            rotary = rotary_table(code_positions(self.code_layout), self.transformer.head_dim)
            self._tables[self.device] = torch.cat(offsets).to(self.device), rotary.to(self.device)
        return self._tables[self.device]

    def places(self, labels: Tensor) -> Tensor:
        """What is added to each slot, `(B, num_codes, width)`: the embeddings of its place and of the class."""
        return self.position_embedding.weight + self.class_embedding(labels)[:, None]
