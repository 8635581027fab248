"""Sums and gathers over processes; they do nothing where there is one process."""

from __future__ import annotations

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


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of the rows of all processes in order of rank, on every process; only the chosen rows travel."""
    if num_processes() == 1:
        return tensor[index]
    local = index - process_index() * len(tensor)
    mine = (local >= 0) & (local < len(tensor))
    rows = tensor[local.clamp(0, len(tensor) - 1)]
    return sum_over_processes(torch.where(mine.unsqueeze(1), rows, 0))
