"""Two-dimensional rotary positions (Su et al. 2021, arXiv:2104.09864): by row in one half of a head's channels and by
column in the other. Neighbouring channels are the parts of a complex number, which its place turns by an angle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def rotary_table(positions: Tensor, head_dim: int, base: float = 100.0) -> Tensor:
    """Cosine and sine `(L, head_dim / 2, 2)` float32 of the angles at positions `(L, 2)`.

    Args:
        positions: row and column.
        head_dim: a multiple of 4.
        base: wavelengths go from 2 pi to 2 pi * base positions; grids are far shorter than texts.
    """
    frequencies = base ** -torch.linspace(0, 1, head_dim // 4, device=positions.device)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (L, head_dim / 2): rows, then columns
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def as_argument(rotary: Tensor) -> Tensor:
    """The bits of a table, or of a part of one, as int32: real arguments of a block would be rounded by FSDP."""
    return rotary.view(torch.int32)


def rotated_heads(heads: Tensor, rotary: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated in float32 or finer, and values, each `(B, its heads, L, head_dim)`.

    Args:
        heads: `(B, L, num_heads + 2 num_kv_heads, head_dim)`: queries, keys, values. What comes back are views of it,
            rotated in place, unless a compiler makes other ones.
        rotary: see `as_argument`.
        num_heads: of queries.
        num_kv_heads: of keys, and of values.
    """
    sizes = [num_heads, num_kv_heads, num_kv_heads]
    rotary = rotary.view(torch.float32)
    if torch.compiler.is_compiling():  # it makes one pass of this, and of its gradient
        queries_and_keys, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=2)
        even, odd = _wide(queries_and_keys).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotary[:, None].unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        q, k = turned.type_as(v).split(sizes[:2], dim=2)
    elif torch.is_grad_enabled():
        q, k, v = _RotatedHeads.apply(heads, rotary, sizes)
    else:
        q, k, v = _rotate_and_split(heads, rotary, sizes)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _RotatedHeads(torch.autograd.Function):
    """In place, for what the projection before it gives is in no gradient; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotary: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rotary)
        return _rotate_and_split(heads.detach(), rotary, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back = torch.view_as_complex(ctx.saved_tensors[0]).conj().resolve_conj()
        sizes = [grad.shape[2] for grad in grads]
        grad_heads = grads[0].new_empty(*grads[0].shape[:2], sum(sizes), grads[0].shape[3])
        q, k, v = grad_heads.split(sizes, dim=2)
        _rotate(grads[0].contiguous(), back, into=q)
        _rotate(grads[1].contiguous(), back, into=k)
        v.copy_(grads[2])
        return grad_heads, None, None


def _rotate_and_split(heads: Tensor, rotary: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    rotated = heads[:, :, : sizes[0] + sizes[1]]
    _rotate(rotated, torch.view_as_complex(rotary), into=rotated)
    return heads.split(sizes, dim=2)


def _rotate(x: Tensor, rotary: Tensor, into: Tensor) -> None:
    """Rotate `(B, L, heads, head_dim)` by complex `(L, head_dim / 2)`."""
    wide = _wide(x)
    numbers, rotary = torch.view_as_complex(wide.unflatten(-1, (-1, 2))), rotary[:, None]
    if wide.dtype == into.dtype:
        torch.mul(numbers, rotary, out=torch.view_as_complex(into.unflatten(-1, (-1, 2))))
    else:
        numbers.mul_(rotary)
        into.copy_(wide)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
