"""Sums and gathers over processes; they do nothing where there is one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over processes of a tensor with a gradient, for a loss that every process computes from it.

    The gradient stays that of this process's own part: the mean that data parallel training takes over processes then
    makes it the gradient of the loss of the joined batch.
    """
    if num_processes() == 1:
        return tensor
    mean = sum_over_processes(tensor.detach().clone()) / num_processes()
    return mean + (tensor - tensor.detach())


def from_first_process(tensor: Tensor) -> Tensor:
    """The tensor of process 0, in place, where processes could differ by rounding."""
    if num_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows `(N, ...)` of all processes in order of rank, `(num_processes * N, ...)`; N must be equal on all."""
    if num_processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(num_processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def take_rows(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows `index` of the rows of all processes, on every process; only the chosen rows travel.

    Args:
        parts: tensors `(N, ...)`, of equal sizes on all processes. Rows are numbered part by part, and within a part
            process by process: micro-batches are parts of the global batch in this order.
        index: `(M,)` int64.
    """
    rows, start = parts[0].new_zeros(len(index), *parts[0].shape[1:]), 0
    for part in parts:
        local = index - start - process_index() * len(part)
        mine = (local >= 0) & (local < len(part))
        rows = torch.where(mine.view(-1, *[1] * (rows.ndim - 1)), part[local.clamp(0, len(part) - 1)], rows)
        start += len(part) * num_processes()
    return sum_over_processes(rows)
