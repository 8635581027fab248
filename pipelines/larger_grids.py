"""Grids of codes larger than a prior was trained on, through a sliding window (Esser et al. 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from configs.layout import CodeGrid
from configs.random_streams import mix
from prior import Prior

_WINDOWS = -1
"""The stream of an image's random numbers that all windows but the first have theirs from."""


def check_grid(prior: Prior, grid: Sequence[int]) -> CodeGrid:
    """The grid of `grid` codes in the prior's layout.

    Raises:
        ValueError: where the prior has no single 2-D grid, or a smaller one is asked for.
    """
    layout = prior.code_layout
    trained = layout.grids[0]
    sizes = list(grid) if isinstance(grid, Sequence) else [grid]
    if len(layout.grids) != 1 or len(trained.shape) != 2:
        raise ValueError(f"grid={sizes} needs one 2-D grid of codes to slide over, but the prior has [{layout}]")
    integers = all(isinstance(size, Integral) for size in sizes)
    if len(sizes) != 2 or not integers or any(size < was for size, was in zip(sizes, trained.shape, strict=True)):
        raise ValueError(f"grid should be [rows, columns], at least {list(trained.shape)}, got {grid}")
    return CodeGrid((int(sizes[0]), int(sizes[1])), trained.vocab_size, trained.depth)


def sample_larger(
    prior: Prior, grid: CodeGrid, batch_size: int, labels: Tensor | None, *, seeds: Tensor, **options: Any
) -> Tensor:
    """Codes `(batch_size, *grid.code_shape)` int64 of a larger grid.

    The window is of the size that was trained, and moves by half of it in raster order; what it covers already is
    known, the rest is drawn.

    Args:
        prior: of one 2-D grid.
        grid: at least as large as the prior's.
        batch_size: number of images.
        labels: as `Prior.sample` takes them.
        seeds: `(batch_size,)` int64.
        **options: of `Prior.sample`.
    """
    window = prior.code_layout.grids[0]
    codes = torch.zeros(batch_size, *grid.code_shape, dtype=torch.int64, device=prior.device)
    filled = torch.zeros_like(codes, dtype=torch.bool)
    corners = [_starts(size, was) for size, was in zip(grid.shape, window.shape, strict=True)]
    for number, (top, left) in enumerate((top, left) for top in corners[0] for left in corners[1]):
        here = (slice(None), slice(top, top + window.shape[0]), slice(left, left + window.shape[1]))
        # The first window is what the prior draws by itself.
        own = mix(mix(seeds, _WINDOWS), number) if number else seeds
        codes[here] = prior.sample(batch_size, labels, seeds=own, known=codes[here], known_mask=filled[here], **options)
        filled[here] = True
    return codes


def _starts(size: int, window: int) -> list[int]:
    """Where windows start along an axis, half a window apart, the last at the edge."""
    return [*range(0, size - window, max(1, window // 2)), size - window]
