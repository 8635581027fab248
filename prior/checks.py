"""Checks of tensors that every prior is given."""

from __future__ import annotations

import torch
from torch import Tensor


def require_integers(tensor: Tensor, name: str) -> None:
    """Raise a ValueError for anything but integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} are integers, got {str(tensor.dtype).removeprefix('torch.')}")


def check_seeds(seeds: Tensor | None, batch_size: int) -> None:
    """Raise a ValueError where there are seeds, but not one integer an image."""
    if seeds is None:
        return
    if seeds.shape != (batch_size,):
        raise ValueError(f"expected one seed an image, ({batch_size},), got {tuple(seeds.shape)}")
    require_integers(seeds, "seeds")
