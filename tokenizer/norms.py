"""Normalization layers by name."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from tokenizer.collectives import num_processes

Norm = Literal["none", "group", "batch"]


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: the usual 32, or fewer where the channels do not divide."""
    return math.gcd(32, channels)


def normalization(norm: Norm, channels: int) -> nn.Module:
    """The layer of this name for `(B, channels, H, W)`; none is the identity."""
    if norm == "batch":
        return BatchNorm(channels)
    if norm == "group":
        return nn.GroupNorm(num_groups(channels), channels)
    return nn.Identity()


class BatchNorm(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes, which hold as many images each.

    torch's SyncBatchNorm does the same on GPUs, and refuses CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalized `(B, C, H, W)`; training moves the running statistics."""
        if not self.training or num_processes() == 1:
            return super().forward(x)
        wide = x.float()
        mean = all_reduce(wide.mean((0, 2, 3))) / num_processes()
        centred = wide - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().mean((0, 2, 3))) / num_processes()
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            size = x.numel() // x.shape[1] * num_processes()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * (size / (size - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)
