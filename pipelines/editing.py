"""Which codes an edit draws anew: those of masked pixels, or a random share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.layout import CodeLayout
from configs.random_streams import mix, uniform


def codes_of_pixels(mask: Tensor, layout: CodeLayout, margin: int = 0) -> Tensor:
    """The codes whose patches hold a masked pixel, `(B, *layout.shape)` bool, at every depth.

    They are widened by `margin` codes of the finest grid; a coarser code goes with any finer one that it covers.

    Args:
        mask: `(B, H, W)` bool, True where pixels are to change.
        layout: of the image's codes.
        margin: codes on every side.

    Raises:
        ValueError: for codes that stand for no patch of the image, and for a negative margin.
    """
    if any(len(grid.shape) != 2 for grid in layout.grids):
        raise ValueError(
            f"an edit needs codes that stand for patches of the image, but they are laid out as [{layout}]: a code of "
            "a grid that is not two-dimensional concerns the whole image"
        )
    if margin < 0:
        raise ValueError(f"margin should be 0 codes or more, got {margin}")
    finest = max((grid.shape for grid in layout.grids), key=math.prod)
    # Pooling windows overlap where pixels do not divide evenly: every code that touches a masked pixel is in.
    changed = F.adaptive_max_pool2d(mask[:, None].float(), finest)
    if margin:
        changed = F.max_pool2d(changed, 2 * margin + 1, stride=1, padding=margin)
    parts = []
    for grid in layout.grids:
        cells = F.adaptive_max_pool2d(changed, grid.shape).bool()[:, 0]
        parts.append(cells.unsqueeze(-1).expand(*cells.shape, grid.depth).flatten(1))
    return torch.cat(parts, dim=1).view(len(mask), *layout.shape)


def random_positions(layout: CodeLayout, share: float, seeds: Tensor) -> Tensor:
    """A share of each grid's positions, drawn by the images' seeds `(B,)`; `(B, *layout.shape)` bool, at every depth.

    Raises:
        ValueError: for a share outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"strength should be from 0 to 1, got {share}")
    parts = []
    for index, grid in enumerate(layout.grids):
        positions = math.prod(grid.shape)
        numbers = uniform(mix(seeds, index)[:, None], torch.arange(positions, device=seeds.device))
        drawn = numbers.argsort(dim=1).argsort(dim=1) < round(share * positions)
        parts.append(drawn.repeat_interleave(grid.depth, dim=1))
    return torch.cat(parts, dim=1).view(len(seeds), *layout.shape)
