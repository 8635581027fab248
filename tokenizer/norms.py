"""Normalization layers by name."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

Norm = Literal["none", "group", "batch"]


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: the usual 32, or fewer where the channels do not divide."""
    return math.gcd(32, channels)


def normalization(norm: Norm, channels: int) -> nn.Module:
    """The layer of this name for `(B, channels, H, W)`; none is the identity."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(num_groups(channels), channels)
    return nn.Identity()
