"""What the hardware can do: the precision that `auto` means here, and a line that names the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import distributed

from pipelines.zero import require_deepspeed, use_on_cpus


def default_device() -> torch.device:
    """The accelerator where there is one and Accelerate is not told to leave it, otherwise the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def resolve_mixed_precision(choice: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the hardware multiplies it natively, otherwise no.

    Raises:
        ValueError: for fp16 without a GPU.
    """
    if choice == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU; use bf16, no or auto on a CPU")
    if choice != "auto":
        return choice
    if device.type == "cuda":
        # is_bf16_supported() also counts emulation; native multiplication came with compute capability 8.
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "no"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "no"
    return "no"


def make_accelerator(mixed_precision: str = "no", **options: Any) -> Accelerator:
    """Accelerate's object for this process, with `auto` precision resolved for the device it chooses.

    Raises:
        ValueError: for a precision that the device does not have, or where DeepSpeed is missing and asked for.
    """
    require_deepspeed()
    # Accelerate keeps the first precision for all later objects of a process; one process may train and then encode.
    AcceleratorState._reset_state(reset_partial_state=False)
    device = default_device()
    precision = resolve_mixed_precision(mixed_precision, device)
    if device.type == "cpu" and PartialState._shared_state and PartialState().num_processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU  # whatever it was told below
    # Said outright, because several CPU processes under torchrun are one to Accelerate otherwise.
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", **options)
    if accelerator.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs only; several CPU processes, for tests and small machines, can be told to.
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            use_on_cpus(accelerator, precision)
        # Accelerate copies this over the other one whenever it looks at its state.
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type
    return accelerator


def describe_hardware(device: torch.device) -> str:
    """The machine in a few words, for the record beside a number."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores of {model}" if device.type == "cpu" else device.type


def peak_memory_mib(device: torch.device) -> int:
    """The most memory used so far: of the GPU's allocations, or of the whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn the several kinds of running out of memory into a ValueError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is the CPU's
        text = str(error)
        of_memory = "can't allocate memory" in text or "out of memory" in text.lower()
        if isinstance(error, RuntimeError) and not of_memory:
            raise
        raise ValueError(f"out of memory ({text.splitlines()[0] if text else 'no details'}); {advice}") from error


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def leave_process_group() -> None:
    """Close what the processes of a launcher share, without which gloo's threads now and then abort one that ends.

    For the end of a script that went well; where one fails, others may still wait for it.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
