"""A transformer with RMSNorm, SwiGLU and two-dimensional rotary positions.

Pre-norm residual blocks (Touvron et al. 2023, arXiv:2302.13971).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from prior.attention import Attention, LayerCache, StaticCache
from prior.feed_forward import FeedForward
from prior.rms_norm import RMSNorm
from prior.rotary import as_argument


class Block(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and with a residual connection."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, num_heads, num_kv_heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: Tensor, causal: bool = False, cache: LayerCache | StaticCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), rotary, causal=causal, cache=cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks and a final norm: `(B, L, width)` to `(B, L, width)`.

    Args:
        width: channels.
        num_layers: blocks.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, by default as many; fewer make the cache smaller.
        qk_norm: normalize queries and keys, which keeps the logits of large models in bounds.
        dropout: of residual branches in training.

    Raises:
        ValueError: where width does not divide into heads of a multiple of 4 channels, or the heads into groups.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % (4 * num_heads):
            raise ValueError(
                f"width={width} does not divide into num_heads={num_heads} heads of a multiple of 4 channels (rotary "
                "positions take four at a time)"
            )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={num_heads} does not divide into num_kv_heads={num_kv_heads} groups")
        self.head_dim = width // num_heads
        self.blocks = nn.ModuleList(
            Block(width, num_heads, self.num_kv_heads, qk_norm, dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                # GPT-2: residual branches are scaled down so that their sum keeps its variance over depth.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def new_cache(self, batch_size: int, length: int, dtype: torch.dtype, device: torch.device) -> list[LayerCache]:
        """An empty cache for `length` positions."""
        shape = (batch_size, self.num_kv_heads, length, self.head_dim)
        return [LayerCache(shape, dtype, device) for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        *,
        causal: bool = False,
        cache: list[LayerCache] | list[StaticCache] | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: `(B, L, width)`; with a cache, the positions after those it holds.
            rotary: `(L, head_dim / 2, 2)`, see `rotary_table`.
            causal: each position sees itself and earlier ones only; several positions at once need an empty cache.
            cache: keys and values of earlier positions; takes up those of x.
        """
        rotary = as_argument(rotary)
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, causal, None if cache is None else cache[index])
        return self.norm(x)
