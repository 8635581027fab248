"""A training's whole state in a folder: written by all processes, sealed by one, read back bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.run_folder import checkpoint_folder, flatten, prune_checkpoints, seal, write_json


@dataclass
class TrainedState:
    """What changes while a run trains, each by the name of its file."""

    modules: dict[str, nn.Module]
    """Unwrapped: quantizer state is in their buffers."""
    optimizers: dict[str, Optimizer]


def save_checkpoint(
    accelerator: Accelerator, run: Path, step: int, seconds: float, trained: TrainedState, *, keep: int
) -> None:
    """Write a checkpoint after `step` steps: every process its part, then the manifest and the name."""
    folder = checkpoint_folder(run, step)
    partial = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    random_state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    save_file(random_state, partial / f"random-{accelerator.process_index}.safetensors")
    if accelerator.is_main_process:
        for name, module in trained.modules.items():
            save_file(_plain_state(module), partial / f"{name}.safetensors")
        for name, optimizer in trained.optimizers.items():
            _save_optimizer(optimizer, partial / name)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        state = {"step": step, "seconds": seconds, "processes": accelerator.num_processes, "scaler": scaler}
        write_json(partial / "state.json", state)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seal(partial, folder)
        prune_checkpoints(run, keep)
    accelerator.wait_for_everyone()


def load_trained_state(checkpoint: Path, trained: TrainedState) -> dict[str, Any]:
    """Read a checkpoint into modules and optimizers; returns its step, seconds, processes and scaler."""
    for name, module in trained.modules.items():
        module.load_state_dict(load_file(checkpoint / f"{name}.safetensors"))
    for name, optimizer in trained.optimizers.items():
        _load_optimizer(optimizer, checkpoint / name)
    return json.loads((checkpoint / "state.json").read_text())


def load_random_state(checkpoint: Path, accelerator: Accelerator) -> bool:
    """Restore this process's generators; False where the checkpoint has none for it."""
    mine = checkpoint / f"random-{accelerator.process_index}.safetensors"
    if not mine.is_file():
        return False
    random_state = load_file(mine)
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], accelerator.device)
    return True


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _save_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Tensors into `path`.safetensors with keys `state.<parameter>.<name>`, the rest into `path`.json."""
    state = optimizer.state_dict()
    flat = flatten({"state": {str(index): values for index, values in state["state"].items()}})
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), {"param_groups": state["param_groups"]})


def _load_optimizer(optimizer: Optimizer, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path.with_suffix(".safetensors")).items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = json.loads(path.with_suffix(".json").read_text())["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Fused kernels walk through memory: moments need the strides of their parameter, which may be channels last.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
