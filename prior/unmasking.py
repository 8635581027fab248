"""Which codes a masked prior reveals when: schedules of the masked share, and the Halton order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from configs.layout import CodeLayout

Schedule = Literal["cosine", "linear", "square", "arccos", "root"]

_PRIMES = (2, 3, 5, 7)


def masked_share(schedule: Schedule, progress: Tensor) -> Tensor:
    """Share of the codes that is masked at a progress in [0, 1]: from 1 down to 0 (Chang et al. 2022, section 3.3)."""
    progress = progress.clamp(0, 1)
    if schedule == "cosine":
        return torch.cos(progress * (math.pi / 2)).clamp(min=0)
    if schedule == "linear":
        return 1 - progress
    if schedule == "square":
        return 1 - progress**2
    if schedule == "root":
        return 1 - progress.sqrt()
    return torch.arccos(progress) * (2 / math.pi)


def expected_masked_count(schedule: Schedule, length: int) -> float:
    """The mean of ceil(length * masked_share(u)), at least 1, over uniform numbers u in [0, 1).

    More than i codes are masked where u is below the progress at which the share falls to i / length.
    """
    share = torch.arange(1, length, dtype=torch.float64, device="cpu") / length
    progress = {
        "cosine": torch.arccos(share) * (2 / math.pi),
        "linear": 1 - share,
        "square": (1 - share).sqrt(),
        "arccos": torch.cos(share * (math.pi / 2)),
        "root": (1 - share) ** 2,
    }[schedule]
    return 1 + float(progress.sum())


def masked_counts(schedule: Schedule, num_steps: int, num_unknown: Tensor) -> Tensor:
    """How many codes of each image are still masked after each step, `(num_steps, B)` int64.

    At least one is revealed at every step while there are any, and all are after the last.

    Args:
        schedule: of the share that is masked.
        num_steps: steps of sampling.
        num_unknown: `(B,)` int64, codes that are masked at the start.
    """
    progress = torch.arange(1, num_steps + 1, dtype=torch.float64, device=num_unknown.device) / num_steps
    # What rounding leaves of the last share is no code.
    wanted = (masked_share(schedule, progress)[:, None] * num_unknown - 1e-6).ceil().long()
    wanted[-1] = 0
    counts, left = [], num_unknown
    for row in wanted:
        left = torch.minimum(row, left - 1).clamp(min=0)
        counts.append(left)
    return torch.stack(counts)


def halton_order(layout: CodeLayout) -> Tensor:
    """All codes, spread evenly over the grid from the first to the last, `(num_codes,)` int64 (Besnier et al. 2025).

    Grids come coarse to fine, and the depths of a grid one after the other. Cells are visited along the Halton sequence
    with one prime an axis: on one axis that is van der Corput's.
    """
    order, start = [], 0
    for grid in layout.grids:
        cells = torch.tensor(_visited_cells(grid.shape))
        order += [start + cells * grid.depth + level for level in range(grid.depth)]
        start += grid.num_codes
    return torch.cat(order)


def _visited_cells(shape: Sequence[int]) -> list[int]:
    """Cells of a grid in the order of their first visit, as raster indices."""
    total = math.prod(shape)
    seen: dict[int, None] = {}
    for index in itertools.count():
        cell = 0
        for size, prime in zip(shape, _PRIMES[: len(shape)], strict=True):
            mirrored, power = _radical_inverse(index, prime)
            cell = cell * size + mirrored * size // power
        seen.setdefault(cell, None)
        if len(seen) == total:
            return list(seen)
    raise AssertionError


def _radical_inverse(index: int, base: int) -> tuple[int, int]:
    """The digits of an integer mirrored at the point, as a fraction: 6 = 110 in base 2 becomes 0.011 = 3 / 8."""
    mirrored, power = 0, 1
    while index:
        index, digit = divmod(index, base)
        mirrored, power = mirrored * base + digit, power * base
    return mirrored, power
