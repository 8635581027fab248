"""The order of training items: one endless stream of epoch permutations, cut into full batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from configs.random_streams import mix


class IndexStream:
    """Endless micro-batches of (item, position) for one process, from any step on.

    Position p of the stream is item p mod N of the permutation keyed (seed, p // N), so every item comes once an
    epoch, every batch is full and may span two epochs, and the state is one integer. All processes and accumulation
    steps together read the same positions as one process would: micro-batch a of process r is slice
    `a * num_processes + r` of the global batch.

    Args:
        num_items: N.
        batch_size: items per optimizer step, over all processes and accumulation steps.
        start_step: optimizer steps to skip.

    Raises:
        ValueError: where the batch does not divide into equal slices.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        num_slices = accumulation_steps * num_processes
        if batch_size % num_slices:
            raise ValueError(
                f"batch_size={batch_size} does not divide into {num_processes} processes times "
                f"accumulation_steps={accumulation_steps}; choose a multiple of {num_slices}"
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.accumulation_steps = accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index

    def permutation(self, epoch: int) -> list[int]:
        """The items of one epoch in order."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) & (2**63 - 1))
        return torch.randperm(self.num_items, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.accumulation_steps * self.num_processes)
        step, epoch, order = self.start_step, -1, []
        while True:
            for micro_batch in range(self.accumulation_steps):
                first = step * self.batch_size + (micro_batch * self.num_processes + self.process_index) * size
                batch = []
                for position in range(first, first + size):
                    if position // self.num_items != epoch:
                        epoch = position // self.num_items
                        order = self.permutation(epoch)
                    batch.append((order[position % self.num_items], position))
                yield batch
            step += 1


def hold_out(num_items: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items kept and items held out, each in order: a share drawn by seed, at least one item on either side.

    Raises:
        ValueError: where there are too few items to hold one out.
    """
    if num_items < 2:
        raise ValueError(f"cannot hold out a share of {num_items} image; give validation=0")
    order = np.random.default_rng(seed).permutation(num_items)
    count = min(max(1, round(share * num_items)), num_items - 1)
    return np.sort(order[count:]), np.sort(order[:count])
