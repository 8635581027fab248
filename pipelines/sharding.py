"""Models whose parameters are spread over processes (FSDP2): whole for a while, and to and from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def require_whole_models(accelerator: Accelerator) -> None:
    """Refuse a launcher that would spread what is trained over processes, for a training where that cannot be done.

    Raises:
        ValueError: under FSDP or DeepSpeed.
    """
    names = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    if (name := names.get(accelerator.distributed_type)) is not None:
        raise ValueError(
            f"a tokenizer cannot be trained under {name}: its two models and the buffers of its codebook stay whole on "
            "every process; use plain data parallelism, such as accelerate launch --multi_gpu, "
            "or --config_file configs/accelerate/multi_gpu.yaml"
        )


def require_fsdp2(accelerator: Accelerator) -> None:
    """Raise a ValueError under the first version of FSDP, whose parameters have other names and shapes."""
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type is DistributedType.FSDP else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} of the launcher should be 2: "
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml"
        )


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it; memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(state: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors in CPU memory of their own; where some are sharded, every process must ask at once.

    Args:
        state: tensors by name.
        keep: whether this process wants them; one that does not only helps.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if keep:
            found[name] = whole.cpu().contiguous().clone()
    return found


def as_kept(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, with its strides, which may be channels last, or sharded as it is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a model, so that any of its methods works.

    All processes call the same ones, because sharded modules keep count of their calls. A model that is not sharded
    stays as it is.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.reshard()  # what was gathered before may be older than the weights
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)
