"""Gated PixelCNN: one 2-D grid of codes by masked convolutions (van den Oord et al. 2016, arXiv:1606.05328).

With attention after some of the layers it is the PixelSNAIL of Chen et al. 2018 (arXiv:1712.09763) in outline.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.layout import CodeGrid, CodeLayout
from configs.validation import Count, CountOrZero, Range
from prior.attention import Attention, LayerCache
from prior.autoregressive import AutoregressivePrior, CodeByCode
from prior.base import PriorConfig
from prior.coarser_codes import CoarserCodes
from prior.linear import Linear
from prior.rms_norm import RMSNorm
from prior.rotary import as_argument, code_positions, rotary_table


class PixelCNNConfig(PriorConfig):
    """Options of the PixelCNN prior; see `PriorConfig` for what the training adds."""

    model_type = "tessera-pixelcnn"

    width: Count = 128
    """Channels of each of the two stacks."""
    num_layers: Count = 12
    """Gated layers."""
    first_kernel_size: Annotated[int, Range(3)] = 7
    """Side of the first layer's convolutions in codes, odd: it sees half as many rows up and columns left."""
    kernel_size: Annotated[int, Range(3)] = 3
    """Side of the other layers' convolutions in codes, odd."""
    attention_every: CountOrZero = 0
    """A causal attention block after every so many layers (PixelSNAIL); 0 is none."""
    num_heads: Count = 4
    """Heads of the attention blocks; width / num_heads must be a multiple of 4."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    """Dropout of the residual branches in training."""
    grid: CountOrZero | None = None
    """Of a layout of several grids the one to model, counted from 0, the coarsest; it is given the coarser ones."""

    def validate(self) -> None:
        super().validate()
        for name, size in (("first_kernel_size", self.first_kernel_size), ("kernel_size", self.kernel_size)):
            if size % 2 == 0:
                raise ValueError(f"{name} should be odd, got {size}")
        if self.attention_every and self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} does not divide into num_heads={self.num_heads} heads of a multiple of 4 channels "
                "(rotary positions take four at a time)"
            )


class PixelCNN(AutoregressivePrior):
    """log p(codes) = sum over j of log p(code j | codes above and left of it, class, coarser codes).

    The vertical stack sees all rows above a code, the horizontal stack the earlier codes of its row and, through a
    link in every layer, what the vertical stack has seen: together all earlier codes, without a blind spot.
    """

    config_class = PixelCNNConfig
    config: PixelCNNConfig
    _no_split_modules = ["GatedLayer"]

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config)
        self.grid = modelled_grid(config.code_layout, config.grid)
        self.coarser_grids = config.code_layout.grids[: config.grid or 0]
        width = config.width
        self.code_embedding = nn.Embedding(self.grid.vocab_size, width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.coarser_codes = nn.ModuleList(CoarserCodes(grid, self.grid.shape, width) for grid in self.coarser_grids)
        every = config.attention_every
        attentive = range(every - 1, config.num_layers, every) if every else ()
        self.layers = nn.ModuleList(
            GatedLayer(
                width,
                config.kernel_size if index else config.first_kernel_size,
                first=index == 0,
                num_heads=config.num_heads if index in attentive else 0,
                dropout=config.dropout,
            )
            for index in range(config.num_layers)
        )
        last = Linear(2 * width, self.grid.vocab_size)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.ReLU(), Linear(width, 2 * width), nn.ReLU(), last)
        # By device: not buffers, which would stand in every checkpoint, or come back uninitialized from a meta device.
        self._rotary: dict[torch.device, Tensor] = {}
        self.post_init()

    @property
    def code_layout(self) -> CodeLayout:
        return CodeLayout((self.grid,))

    def split_condition(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        index = self.config.grid or 0
        grids = self.config.code_layout.split(codes)
        return grids[index], torch.cat([part.flatten(1) for part in grids[:index]], dim=1) if index else None

    def check_condition(self, condition: Tensor | None, batch_size: int) -> Tensor | None:
        """The codes of the coarser grids `(B, n)` int64, flattened and joined as in the whole layout.

        Raises:
            ValueError: where they are missing, have another shape, or a code is outside its own grid's [0, K); and
                where there are some, but no coarser grid.
        """
        if not self.coarser_grids:
            return super().check_condition(condition, batch_size)
        coarser = CodeLayout(self.coarser_grids)
        if condition is None:
            raise ValueError(
                f"this pixelcnn models [{self.grid}] given the codes of [{coarser}]; "
                f"give them as condition ({batch_size}, {coarser.num_codes})"
            )
        if condition.shape != (batch_size, coarser.num_codes):
            raise ValueError(
                f"the condition, codes of [{coarser}], has shape ({batch_size}, {coarser.num_codes}), "
                f"got {tuple(condition.shape)}"
            )
        for grid, part in zip(self.coarser_grids, self.split_coarser(condition), strict=True):
            checked = part.numel() > 0 and not (self.training and part.is_cuda)
            if checked and not 0 <= int(part.min()) <= int(part.max()) < grid.vocab_size:
                raise ValueError(
                    f"the condition's codes of [{grid}] are in [0, {grid.vocab_size}), "
                    f"got {int(part.min())} to {int(part.max())}"
                )
        return condition.to(self.device).long()

    def logits(self, codes: Tensor, labels: Tensor | None = None, *, condition: Tensor | None = None) -> Tensor:
        flat = self.check_codes(codes)
        B = len(flat)
        context = self.context(self.check_labels(labels, B), self.check_condition(condition, B))
        above = left = self.code_embedding(flat.view(B, *self.grid.shape))  # (B, h, w, width)
        rotary = self.rotary()
        for layer in self.layers:
            above, left = layer(above, left, context, rotary)
        return self.hide_foreign_codes(self.head(left.flatten(1, 2)), slice(None))

    def context(self, labels: Tensor, condition: Tensor | None) -> Tensor:
        """What every gate may see: class and coarser codes, `(B, h, w, width)`, or `(B, 1, 1, width)` without codes."""
        context = self.class_embedding(labels)[:, None, None]
        if condition is None:
            return context
        for coarser, part in zip(self.coarser_codes, self.split_coarser(condition), strict=True):
            context = context + coarser(part)
        return context

    def split_coarser(self, condition: Tensor) -> tuple[Tensor, ...]:
        """The codes of each coarser grid, `(B, num_codes)`."""
        return condition.split([grid.num_codes for grid in self.coarser_grids], dim=1)

    def rotary(self) -> Tensor | None:
        """The angles of all codes, for blocks with attention; None without."""
        if self.config.attention_every == 0:
            return None
        if self.device not in self._rotary:
            head_dim = self.config.width // self.config.num_heads
            self._rotary[self.device] = rotary_table(code_positions(self.code_layout), head_dim).to(self.device)
        return as_argument(self._rotary[self.device])

    def compile_sampling(self, compiled: bool = True) -> Self:
        if compiled:
            raise ValueError("pixelcnn has no steps to compile in sampling; leave compile out")
        return self

    def code_by_code(self, labels: Tensor, condition: Tensor | None, compiled: bool) -> CodeByCode:
        from prior.pixelcnn_sampling import CachedRows  # which imports this file

        return CachedRows(self, self.context(labels, condition))


def modelled_grid(layout: CodeLayout, index: int | None) -> CodeGrid:
    """The grid of a layout that a PixelCNN with `grid=index` models.

    Raises:
        ValueError: where there is no such grid, it is not a 2-D one of depth 1, or a coarser one is not 2-D.
    """
    last = len(layout.grids) - 1
    refusal = "pixelcnn models one 2-D grid of codes"
    laid_out = f"but the codes are laid out as [{layout}]"
    others = "use the gpt or maskgit prior"
    if index is None and last > 0:
        raise ValueError(f"{refusal}, {laid_out}; give model.grid=, from 0 (the coarsest) to {last}, or {others}")
    if index is not None and index > last:
        raise ValueError(f"{refusal}, {laid_out}; model.grid={index} should be from 0 (the coarsest) to {last}")
    grid = layout.grids[index or 0]
    if len(grid.shape) != 2 or grid.depth > 1:
        raise ValueError(f"{refusal}, {laid_out if last == 0 else f'but grid {index} of them is [{grid}]'}; {others}")
    for place, coarser in enumerate(layout.grids[: index or 0]):
        if len(coarser.shape) != 2:
            raise ValueError(f"{refusal} given coarser 2-D grids, but grid {place} of them is [{coarser}]; {others}")
    return grid


def gate(x: Tensor) -> Tensor:
    """tanh(first half of the channels) * sigmoid(second half): equation 2 of the paper."""
    signal, opening = x.chunk(2, dim=-1)
    return signal.tanh() * opening.sigmoid()


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of `(B, h, w, channels)`."""
    return convolution(x.movedim(-1, 1)).movedim(1, -1)


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2 of the paper), and the attention after it.

    A masked convolution is an ordinary one of what the mask leaves of the kernel, padded above and on the left only.
    Where the paper shifts the vertical stack down by a row, here its first layer leaves the own row out, as the
    horizontal stack's leaves out the code itself.

    Args:
        width: channels of each stack.
        kernel_size: side of the kernels before masking, odd.
        first: what comes in are codes, and not what earlier layers made of earlier codes.
        num_heads: heads of the attention; 0 is no attention.
        dropout: of the residual branches in training.
    """

    def __init__(self, width: int, kernel_size: int, *, first: bool, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.first = first
        self.margin = kernel_size // 2
        self.reach = self.margin if first else self.margin + 1  # rows, and codes of the own row, that the kernels cover
        # Both halves of a gate come out of one convolution; their biases come from the context.
        self.biases = Linear(width, 4 * width)
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach, kernel_size), padding=(0, self.margin), bias=False)
        self.link = Linear(2 * width, 2 * width, bias=False)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach), bias=False)
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(width, width, bias=False)
        self.attention = AttentionBlock(width, num_heads, dropout) if num_heads else None

    def forward(
        self, above: Tensor, left: Tensor, context: Tensor, rotary: Tensor | None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both stacks after this layer.

        Args:
            above: the vertical stack `(B, h, w, width)`.
            left: the horizontal stack, of the same shape.
            context: what every gate sees, `(B, h, w, width)` or `(B, 1, 1, width)`.
            rotary: of the h x w positions, where there is attention.
            cache: takes up the attention's keys and values.
        """
        to_vertical, to_horizontal = self.biases(context).chunk(2, dim=-1)
        strictly = -1 if self.first else 0
        from_rows = convolve(self.vertical, F.pad(above, (0, 0, 0, 0, self.margin, strictly)))  # (B, h, w, 2 * width)
        from_row = convolve(self.horizontal, F.pad(left, (0, 0, self.margin, strictly)))
        gated = self.out(self.dropout(gate(from_row + self.link(from_rows) + to_horizontal)))
        left = gated if self.first else left + gated
        if self.attention is not None:
            left = self.attention(left.flatten(1, 2), rotary, cache).view_as(left)
        return gate(from_rows + to_vertical), left


class AttentionBlock(nn.Module):
    """Causal attention over the horizontal stack `(B, n, width)`, with a residual connection."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.attention = Attention(width, num_heads, num_heads, qk_norm=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, cache: LayerCache | None = None) -> Tensor:
        # Under autocast x is in bfloat16, and a norm with float32 weights takes float32.
        normed = self.norm(x.type_as(self.norm.weight))
        return x + self.dropout(self.attention(normed, rotary, causal=True, cache=cache))
