"""The moving average of a model's weights that a training evaluates, draws from and saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pipelines.sharding import as_kept, local_part


class WeightAverage:
    """Moving averages of the parameters, sharded as those are; buffers are not averaged.

    Update n, counted from 0, has the decay min(decay, n / (9 + n)): the first takes the weights as they are, and a
    short run is not averaged with its random start (as TensorFlow's ExponentialMovingAverage has it, an update later).

    Args:
        model: what is averaged, as it is trained; sharded before, where it is to be sharded.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.parameters: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Take the model's weights as they are, and count from here."""
        self.parameters = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's weights, after they have moved."""
        decay = min(self.decay, self.num_updates / (9 + self.num_updates))
        averages = [local_part(tensor) for tensor in self.parameters.values()]
        weights = [local_part(parameter.detach()) for parameter in self.model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.num_updates += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the averages, sharded or not, and how many updates they have had."""
        return self.parameters | {"num_updates": torch.tensor(self.num_updates)}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from a whole `state`."""
        self.parameters = {name: as_kept(saved[name], like) for name, like in self.parameters.items()}
        self.num_updates = int(saved["num_updates"])

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; after it, its own again, to the bit."""
        weights = [local_part(parameter.detach()) for parameter in self.model.parameters()]
        own = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, [local_part(tensor) for tensor in self.parameters.values()])
        try:
            yield
        finally:
            torch._foreach_copy_(weights, own)


def averaged(average: WeightAverage | None) -> AbstractContextManager[None]:
    """Inside, the averaged model has its averaged weights; without an average, nothing changes."""
    return nullcontext() if average is None else average.applied()
