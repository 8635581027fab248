"""Self-attention with rotary positions, and the key/value caches that sampling keeps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.attention_products import attention_by_products, products_are_faster
from prior.linear import Linear
from prior.rms_norm import RMSNorm
from prior.rotary import rotated_heads


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


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """A norm in the type of its weights, which is not that of its input under autocast."""
    return norm(x.type_as(norm.weight)).type_as(x)


class Attention(nn.Module):
    """Self-attention with rotary positions, and as many heads of keys and values as heads or fewer.

    Grouped queries: Ainslie et al. 2023, arXiv:2305.13245. Norms of queries and keys: Henry et al. 2020,
    arXiv:2010.04245, as RMSNorm.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.queries_keys_values = Linear(width, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.out = Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, rotary: Tensor, *, causal: bool = False, cache: LayerCache | StaticCache | None = None
    ) -> Tensor:
        B, L, _ = x.shape
        heads = self.queries_keys_values(x).view(B, L, -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
            heads = torch.cat([_normed(self.query_norm, q), _normed(self.key_norm, k), v], dim=2)
        q, k, v = rotated_heads(heads, rotary, self.num_heads, self.num_kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        if cache is not None and L == 1:
            attended = self._attend_one(q, k, v, cache)
        else:
            attended = self._attend(q, k, v, causal=causal and L > 1)
        return self.out(attended.transpose(1, 2).reshape(B, L, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        if self.num_kv_heads < self.num_heads:
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if products_are_faster(q):
            return attention_by_products(q, k, v, causal=causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | StaticCache) -> Tensor:
        """Attention of one position: heads that share keys become the rows of one product."""
        B, heads, _, head_dim = q.shape
        q = q.view(B, self.num_kv_heads, -1, head_dim)
        mask = cache.mask if isinstance(cache, StaticCache) else None
        if q.device.type != "cpu" or q.dtype != torch.bfloat16:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, heads, 1, head_dim)
        # On a CPU the fused kernel is slow for one position in bfloat16. For a few rows that of float32 is the fastest,
        # for many two products of the whole cache, which needs no copy.
        if B <= 4 and mask is None:
            attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
            return attended.type_as(q).view(B, heads, 1, head_dim)
        layer = cache.layer if isinstance(cache, StaticCache) else cache
        scores = (q @ layer.keys.transpose(-1, -2)).float() / math.sqrt(head_dim)
        scores = scores[..., : k.shape[2]] if mask is None else scores.masked_fill(~mask, float("-inf"))
        shares = F.pad(scores.softmax(-1).type_as(v), (0, layer.keys.shape[2] - scores.shape[-1]))
        return (shares @ layer.values).view(B, heads, 1, head_dim)
