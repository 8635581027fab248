"""Grids of codes larger than a prior was trained on, through a sliding window (Esser et al. 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.layout import CodeGrid
from configs.random_streams import mix
from prior import Prior


def check_grid(prior: Prior, grid: Sequence[int]) -> CodeGrid:
    """The grid of `grid` codes in the prior's layout.

    Raises:
        ValueError: where the prior has no single 2-D grid, or a smaller one is asked for.
    """
    layout = prior.code_layout
    trained = layout.grids[0]
    if len(layout.grids) != 1 or len(trained.shape) != 2:
        raise ValueError(f"grid={list(grid)} needs one 2-D grid of codes to slide over, but the prior has [{layout}]")
    smaller = any(type(size) is not int or size < was for size, was in zip(grid, trained.shape, strict=False))
    if len(grid) != 2 or smaller:
        raise ValueError(f"grid should be [rows, columns], at least {list(trained.shape)}, got {list(grid)}")
    return CodeGrid(tuple(grid), trained.vocab_size, trained.depth)


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
        own = mix(seeds, number) if number else seeds
        codes[here] = prior.sample(batch_size, labels, seeds=own, known=codes[here], known_mask=filled[here], **options)
        filled[here] = True
    return codes


def _starts(size: int, window: int) -> list[int]:
    """Where windows start along an axis, half a window apart, the last at the edge."""
    return [*range(0, size - window, max(1, window // 2)), size - window]
