"""A transformer with RMSNorm, SwiGLU and two-dimensional rotary positions, and its key/value cache.

Pre-norm residual blocks (Touvron et al. 2023, arXiv:2302.13971); rotary positions (Su et al. 2021, arXiv:2104.09864) by
row in one half of a head's channels and by column in the other.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.layout import CodeLayout


def code_positions(layout: CodeLayout) -> Tensor:
    """Row and column of every code, `(num_codes, 2)` float32, in the units of the layout's finest grid.

    Codes of a coarse grid sit at the centre of the finer cells they cover; a 1-D grid is one row; leading axes of a 3-D
    grid are stacked into rows.
    """
    finest = [max(grid.shape[-1] for grid in layout.grids), max(math.prod(grid.shape[:-1]) for grid in layout.grids)]
    positions = []
    for grid in layout.grids:
        width, height = grid.shape[-1], math.prod(grid.shape[:-1])
        rows = (torch.arange(height) + 0.5) * (finest[1] / height) - 0.5
        columns = (torch.arange(width) + 0.5) * (finest[0] / width) - 0.5
        cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        positions.append(cells.repeat_interleave(grid.depth, dim=0))
    return torch.cat(positions)


def rotary_tables(positions: Tensor, head_dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(L, head_dim / 2)` float32 of the angles at positions `(L, 2)`.

    Args:
        positions: row and column.
        head_dim: a multiple of 4.
        base: wavelengths go from 2 pi to 2 pi * base positions; grids are far shorter than texts.
    """
    frequencies = base ** -torch.linspace(0, 1, head_dim // 4, device=positions.device)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (L, head_dim / 2): rows, then columns
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of `(..., L, head_dim)` by the angles of `rotary_tables`."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


class LayerCache:
    """Keys and values of one layer, `(B, num_heads, L, head_dim)`, allocated once for all L codes."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of the next positions; all positions so far come back, as views."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, causal: bool, cache: LayerCache | None) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        # On a CPU in bfloat16, plain products beat the fused kernel's backward pass on short sequences (2.3x at 64).
        plain = self.training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and L <= 128
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal and L > 1)
        return self.out(attended.transpose(1, 2).reshape(B, L, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): out(silu(gate(x)) * up(x)), as wide as keeps the parameters of a 4x layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = math.ceil(width * 8 / 3 / 32) * 32
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual connection."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, causal: bool, cache: LayerCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin, causal=causal, cache=cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks and a final norm: `(B, L, width)` to `(B, L, width)`.

    Raises:
        ValueError: where width does not divide into heads of a multiple of 4 channels.
    """

    def __init__(self, width: int, num_layers: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if width % (4 * num_heads):
            raise ValueError(
                f"width={width} does not divide into num_heads={num_heads} heads of a multiple of 4 channels (rotary "
                "positions take four at a time)"
            )
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                # GPT-2: residual branches are scaled down so that their sum keeps its variance over depth.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def new_cache(self, batch_size: int, length: int, dtype: torch.dtype, device: torch.device) -> list[LayerCache]:
        """An empty cache for `length` positions."""
        shape = (batch_size, self.num_heads, length, self.head_dim)
        return [LayerCache(shape, dtype, device) for _ in self.blocks]

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, causal: bool, cache: list[LayerCache] | None = None
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: `(B, L, width)`; with a cache, the positions after those it holds.
            cos: `(L, head_dim / 2)`, see `rotary_tables`.
            sin: as cos.
            causal: each position sees itself and earlier ones only.
            cache: keys and values of earlier positions; takes up those of x.
        """
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, causal=causal, cache=None if cache is None else cache[index])
        return self.norm(x)
