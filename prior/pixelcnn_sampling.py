"""Sampling a PixelCNN code by code, every position computed once (Ramachandran et al. 2017, arXiv:1704.06001).

The vertical stack sees whole rows: its next row is computed at once when the row above is complete. What is left for a
single code is the horizontal stack, in each layer two small products of what the earlier codes of the row computed.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.attention import LayerCache
from prior.pixelcnn import GatedLayer, PixelCNN, convolve, gate


class CachedRows:
    """The logits of one code after another, in raster order.

    Args:
        prior: in eval mode.
        context: what every gate sees, `(B, h, w, width)` or `(B, 1, 1, width)`.
    """

    def __init__(self, prior: PixelCNN, context: Tensor) -> None:
        B, (height, columns) = len(context), prior.grid.shape
        device = context.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else prior.dtype
        self.prior, self.num_columns = prior, columns
        self.context = context.expand(-1, height, -1, -1)
        self.rotary = prior.rotary()
        self.embedding = prior.code_embedding.weight.detach().to(dtype)
        self.num_done = 0  # positions whose logits are computed
        width = prior.config.width
        self.hidden = torch.zeros(B, width, dtype=dtype, device=device)
        self.halves = self.hidden.new_zeros(B, 2 * width)  # of a gate
        self.gated = torch.zeros_like(self.hidden)
        self.nothing = torch.zeros_like(self.hidden)  # codes have no residual connection
        self.layers = [_LayerState(cast(GatedLayer, layer), self.hidden, prior) for layer in prior.layers]
        self._make_views()

    def next(self, codes: Tensor) -> Tensor:
        if self.num_done == 0:
            codes = self._read_whole_rows(codes)
            self._compute()
        for column in codes.unbind(1):
            self._read(column)
            self._compute()
        return self.prior.head(self.hidden).float()

    def keep(self, rows: int) -> None:
        self.context, self.hidden, self.halves = self.context[:rows], self.hidden[:rows], self.halves[:rows]
        self.gated, self.nothing = self.gated[:rows], self.nothing[:rows]
        for state in self.layers:
            state.keep(rows)
        self._make_views()

    def _make_views(self) -> None:
        """Slice the buffers once for every column: at each code it would take as long as computing."""
        self.signal, self.opening = self.halves.chunk(2, dim=-1)
        self.columns = []
        for column in range(self.num_columns):
            after = [state.at(column) for state in self.layers[1:]]
            inputs = [self.nothing, *after]
            self.columns.append(
                [
                    _Step(state, state.window(column), state.bias[:, column], residual, following)
                    for state, residual, following in zip(self.layers, inputs, [*after, self.hidden], strict=True)
                ]
            )

    def _read_whole_rows(self, codes: Tensor) -> Tensor:
        """Take up the complete rows of a known beginning at once; the rest of the codes comes back."""
        num_rows = codes.shape[1] // self.num_columns
        if num_rows == 0:
            return codes
        self.num_done = num_rows * self.num_columns
        known = codes[:, : self.num_done].unflatten(1, (num_rows, self.num_columns))
        rotary = None if self.rotary is None else self.rotary[: self.num_done]
        above = left = self.prior.code_embedding(known)  # (B, num_rows, w, width)
        for state in self.layers:
            state.push(above)
            above, left = state.layer(above, left, self.context[:, :num_rows], rotary, state.cache)
        return codes[:, self.num_done :]

    def _read(self, codes: Tensor) -> None:
        """Take up the codes `(B,)` at the last position that was computed."""
        first, column = self.layers[0], (self.num_done - 1) % self.num_columns
        first.at(column).copy_(F.embedding(codes, self.embedding))
        if column == self.num_columns - 1:
            first.push(first.row[:, None, first.layer.margin :])

    def _compute(self) -> None:
        """Compute `hidden` at the next position."""
        row, column = divmod(self.num_done, self.num_columns)
        if column == 0:
            self._start_row(row)
        for state, window, bias, residual, following in self.columns[column]:
            torch.addmm(bias, window, state.horizontal, out=self.halves)
            torch.mul(self.signal.tanh_(), self.opening.sigmoid_(), out=self.gated)
            torch.addmm(residual, self.gated, state.out, out=following)
            if state.layer.attention is not None and self.rotary is not None:
                here = self.rotary[self.num_done : self.num_done + 1]
                following.copy_(state.layer.attention(following[:, None], here, state.cache)[:, 0])
        self.num_done += 1

    def _start_row(self, row: int) -> None:
        """Compute the vertical stack's row, and what the horizontal stack takes from it."""
        context = self.context[:, row]  # (B, w or 1, width)
        for index, state in enumerate(self.layers):
            to_vertical, to_horizontal = state.layer.biases(context).chunk(2, dim=-1)
            rows = convolve(state.layer.vertical, state.rows)[:, 0]  # (B, w, 2 * width)
            state.bias.copy_(state.layer.link(rows) + to_horizontal)
            if index + 1 < len(self.layers):
                self.layers[index + 1].push(gate(rows + to_vertical)[:, None])


class _LayerState:
    """What a gated layer keeps: its inputs in the last rows and in this row, and its gates' biases in this row."""

    def __init__(self, layer: GatedLayer, like: Tensor, prior: PixelCNN) -> None:
        (B, width), columns = like.shape, prior.grid.shape[1]
        self.layer = layer
        # Zeros are the padding above the grid and on its left.
        self.rows = like.new_zeros(B, layer.reach, columns, width)
        self.row = like.new_zeros(B, layer.margin + columns, width)
        self.bias = like.new_zeros(B, columns, 2 * width)
        kernel = layer.horizontal.weight.detach().squeeze(2)  # (2 * width, width, reach)
        self.horizontal = kernel.permute(2, 1, 0).flatten(0, 1).type_as(like)  # (reach * width, 2 * width)
        self.out = layer.out.weight.detach().t().type_as(like)
        self.cache: LayerCache | None = None
        if layer.attention is not None:
            heads = prior.config.num_heads
            shape = (B, heads, prior.grid.num_codes, width // heads)
            self.cache = LayerCache(shape, like.dtype, like.device)

    def push(self, rows: Tensor) -> None:
        """Take up the next rows `(B, n, w, width)` of the vertical stack's input; the oldest go."""
        new = min(rows.shape[1], self.layer.reach)
        self.rows[:, :-new] = self.rows[:, new:].clone()
        self.rows[:, -new:] = rows[:, -new:]

    def at(self, column: int) -> Tensor:
        """The horizontal stack's input at a column `(B, width)`."""
        return self.row[:, self.layer.margin + column]

    def window(self, column: int) -> Tensor:
        """The inputs that the horizontal kernel covers, `(B, reach * width)`."""
        return self.row[:, column : column + self.layer.reach].flatten(1)

    def keep(self, rows: int) -> None:
        self.rows, self.row, self.bias = self.rows[:rows], self.row[:rows], self.bias[:rows]
        if self.cache is not None:
            self.cache.keep(rows)


class _Step(NamedTuple):
    """A layer's part in computing one column."""

    state: _LayerState
    window: Tensor
    bias: Tensor
    residual: Tensor
    following: Tensor
    """Where the result goes: the next layer's input."""
