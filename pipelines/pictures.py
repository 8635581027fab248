"""Grids of pictures for people to look at."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid

from pipelines.preprocessing import to_uint8


def picture_grid(images: Tensor, columns: int) -> Image.Image:
    """Images `(B, C, H, W)` in [-1, 1] in rows of `columns`, two pixels apart, small ones enlarged."""
    pixels = to_uint8(images.detach().cpu())
    enlarge = max(1, min(8, 64 // pixels.shape[-2]))
    pixels = pixels.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return VF.to_pil_image(make_grid(pixels, nrow=columns, padding=2, pad_value=255))


def reconstruction_grid(images: Tensor, reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """Rows of originals, each above the row of their reconstructions."""
    rows = zip(images.cpu().float().split(columns), reconstructions.detach().cpu().float().split(columns), strict=True)
    # The last row is filled up with white, so that originals stay above their reconstructions.
    filled = [_fill(part, columns) for pair in rows for part in pair]
    return picture_grid(torch.cat(filled), columns)


def _fill(images: Tensor, columns: int) -> Tensor:
    missing = images.new_ones(columns - len(images), *images.shape[1:])
    return torch.cat([images, missing])
