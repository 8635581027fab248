"""What a prior of one grid sees of the coarser ones, as the top-down prior of VQ-VAE-2 (Razavi et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.layout import CodeGrid


class CoarserCodes(nn.Module):
    """The codes of a coarser grid as a map over the modelled one: residual 3x3 convolutions, then nearest neighbours.

    Args:
        grid: the coarser grid; each depth has embeddings of its own, which are summed.
        shape: height and width of the modelled grid.
        width: channels.
    """

    def __init__(self, grid: CodeGrid, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.grid, self.shape = grid, shape
        self.embedding = nn.Embedding(grid.depth * grid.vocab_size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(3)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """A map `(B, h, w, width)` of codes `(B, num_codes)` int64."""
        tables = torch.arange(self.grid.depth, device=codes.device) * self.grid.vocab_size
        x = self.embedding(codes.unflatten(1, (*self.grid.shape, self.grid.depth)) + tables).sum(-2).movedim(-1, 1)
        for block in self.blocks:
            x = x + block(x)
        return F.interpolate(x, size=self.shape, mode="nearest").movedim(1, -1)
