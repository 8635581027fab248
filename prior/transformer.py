"""A transformer with RMSNorm, SwiGLU and two-dimensional rotary positions, and its key/value cache.

Pre-norm residual blocks (Touvron et al. 2023, arXiv:2302.13971); rotary positions (Su et al. 2021, arXiv:2104.09864) by
row in one half of a head's channels and by column in the other.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.layout import CodeLayout
from prior.rms_norm import RMSNorm


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


def rotary_table(positions: Tensor, head_dim: int, base: float = 100.0) -> Tensor:
    """Cosine and sine `(2, L, head_dim / 2)` float32 of the angles at positions `(L, 2)`.

    Args:
        positions: row and column.
        head_dim: a multiple of 4.
        base: wavelengths go from 2 pi to 2 pi * base positions; grids are far shorter than texts.
    """
    frequencies = base ** -torch.linspace(0, 1, head_dim // 4, device=positions.device)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (L, head_dim / 2): rows, then columns
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs of channels of `(..., L, head_dim)` by the angles of `rotary_table`, in float32."""
    if not torch.is_grad_enabled():
        return _rotated(x, *rotary)
    if torch.compiler.is_compiling():  # a compiler makes one pass of it, and of its gradient
        (first, second), (cos, sin) = x.float().chunk(2, dim=-1), rotary
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)
    return _Rotation.apply(x, rotary)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = wide * torch.cat([cos, cos], dim=-1)
    into_first, into_second = rotated.chunk(2, dim=-1)
    into_first.addcmul_(second, sin, value=-1)
    into_second.addcmul_(first, sin)
    return rotated.type_as(x)


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, and needs no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return _rotated(x, *rotary)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.saved_tensors[0]
        return _rotated(grad, cos, -sin), None


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """A norm in the type of its weights, which is not that of its input under autocast."""
    return norm(x.type_as(norm.weight)).type_as(x)


class LayerCache:
    """Keys and values of one layer, `(B, num_heads, L, head_dim)`, allocated once for all L positions."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros: a compiled step reads positions that it masks, and what they hold must be finite.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of the next positions; all positions so far come back, as views."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: int) -> None:
        """Forget all but the first rows of the batch."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]


class StaticCache:
    """Writes one position, given as a tensor, and reads all of them behind a mask: shapes never change.

    Args:
        layer: where keys and values are.
        position: `(1,)` int64.
        mask: `(1, 1, 1, L)` bool, true at the positions up to this one.
    """

    def __init__(self, layer: LayerCache, position: Tensor, mask: Tensor) -> None:
        self.layer, self.position, self.mask = layer, position, mask

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values at the position; those of all positions come back."""
        self.layer.keys.index_copy_(2, self.position, keys)
        self.layer.values.index_copy_(2, self.position, values)
        return self.layer.keys, self.layer.values


class Attention(nn.Module):
    """Self-attention with rotary positions, and as many heads of keys and values as heads or fewer.

    Grouped queries: Ainslie et al. 2023, arXiv:2305.13245. Norms of queries and keys: Henry et al. 2020,
    arXiv:2010.04245, as RMSNorm.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, rotary: Tensor, *, causal: bool = False, cache: LayerCache | StaticCache | None = None
    ) -> Tensor:
        B, L, _ = x.shape
        heads = self.qkv(x).view(B, L, -1, self.head_dim).transpose(1, 2)  # (B, heads, L, head_dim)
        queries_and_keys, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = queries_and_keys.split([self.num_heads, self.num_kv_heads], dim=1)
            queries_and_keys = torch.cat([_normed(self.query_norm, q), _normed(self.key_norm, k)], dim=1)
        q, k = rotate(queries_and_keys, rotary).split([self.num_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        if cache is not None and L == 1:
            attended = self._attend_one(q, k, v, cache)
        else:
            attended = self._attend(q, k, v, causal=causal and L > 1)
        return self.out(attended.transpose(1, 2).reshape(B, L, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        L = q.shape[2]
        if self.num_kv_heads < self.num_heads:
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # On a CPU in bfloat16, plain products beat the fused kernel's backward pass on short sequences (2.3x at 64).
        plain = self.training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and L <= 128
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | StaticCache) -> Tensor:
        """Attention of one position: heads that share keys become the rows of one product."""
        B, heads, _, head_dim = q.shape
        q = q.view(B, self.num_kv_heads, -1, head_dim)
        mask = cache.mask if isinstance(cache, StaticCache) else None
        if q.device.type != "cpu" or q.dtype != torch.bfloat16:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, heads, 1, head_dim)
        # Two products of the whole cache, which needs no copy, are five times as fast as the fused kernel here.
        layer = cache.layer if isinstance(cache, StaticCache) else cache
        scores = (q @ layer.keys.transpose(-1, -2)).float() / math.sqrt(head_dim)
        scores = scores[..., : k.shape[2]] if mask is None else scores.masked_fill(~mask, float("-inf"))
        shares = F.pad(scores.softmax(-1).type_as(v), (0, layer.keys.shape[2] - scores.shape[-1]))
        return (shares @ layer.values).view(B, heads, 1, head_dim)


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
            rotary: `(2, L, head_dim / 2)`, see `rotary_table`.
            causal: each position sees itself and earlier ones only; several positions at once need an empty cache.
            cache: keys and values of earlier positions; takes up those of x.
        """
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, causal, None if cache is None else cache[index])
        return self.norm(x)
