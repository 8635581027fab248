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
from pipelines.sharding import as_kept, whole_state
from pipelines.weight_average import WeightAverage
from pipelines.zero import load_engine, masters, save_engine


@dataclass
class TrainedState:
    """What changes while a run trains, each by the name of its file."""

    modules: dict[str, nn.Module]
    """Unwrapped: quantizer state is in their buffers."""
    optimizers: dict[str, Optimizer]
    average: WeightAverage | None = None
    engine: Any = None
    """DeepSpeed's, which keeps the optimizer's state and saves it itself."""


def save_checkpoint(
    accelerator: Accelerator, run: Path, step: int, seconds: float, trained: TrainedState, *, keep: int
) -> None:
    """Write a checkpoint after `step` steps: every process its part, then the manifest and the name."""
    folder = checkpoint_folder(run, step)
    partial = folder.with_name(f".{folder.name}.partial")
    is_main = accelerator.is_main_process
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    random_state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    save_file(random_state, partial / f"random-{accelerator.process_index}.safetensors")
    # All processes take part, because what is sharded is gathered; the main process writes.
    if trained.engine is not None:
        save_engine(trained.engine, partial)
        weights = {name: masters(module, keep=is_main) for name, module in trained.modules.items()}
        moments = {}
    else:
        weights = {name: whole_state(module.state_dict(), keep=is_main) for name, module in trained.modules.items()}
        moments = {name: _optimizer_state(optimizer, keep=is_main) for name, optimizer in trained.optimizers.items()}
    if trained.average is not None:
        weights["average"] = whole_state(trained.average.state(), keep=is_main)
    if is_main:
        for name, tensors in weights.items():
            save_file(tensors, partial / f"{name}.safetensors")
        for name, (tensors, groups) in moments.items():
            save_file(tensors, partial / f"{name}.safetensors")
            write_json(partial / f"{name}.json", {"param_groups": groups})
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        state = {"step": step, "seconds": seconds, "processes": accelerator.num_processes, "scaler": scaler}
        write_json(partial / "state.json", state)
    accelerator.wait_for_everyone()
    if is_main:
        seal(partial, folder)
        prune_checkpoints(run, keep)
    accelerator.wait_for_everyone()


def load_weights(checkpoint: Path, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Read a checkpoint's weights into modules; returns its step, seconds, processes and scaler."""
    for name, module in modules.items():
        module.load_state_dict(load_file(checkpoint / f"{name}.safetensors"))
    return json.loads((checkpoint / "state.json").read_text())


def load_optimizers(checkpoint: Path, trained: TrainedState) -> None:
    """Read what belongs to the parameters as they are kept, sharded or not: moments, and the weight average."""
    if trained.engine is not None:
        load_engine(trained.engine, checkpoint)
        return
    for name, optimizer in trained.optimizers.items():
        _load_optimizer(optimizer, checkpoint / name)
    if trained.average is not None:
        trained.average.load(load_file(checkpoint / "average.safetensors"))


def load_random_state(checkpoint: Path, accelerator: Accelerator) -> None:
    """Restore this process's generators."""
    random_state = load_file(checkpoint / f"random-{accelerator.process_index}.safetensors")
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], accelerator.device)


def _optimizer_state(optimizer: Optimizer, keep: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors with keys `state.<parameter>.<name>`, and the groups of parameters."""
    state = optimizer.state_dict()
    flat = flatten({"state": {str(index): values for index, values in state["state"].items()}})
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    return whole_state(tensors, keep), state["param_groups"]


def _load_optimizer(optimizer: Optimizer, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path.with_suffix(".safetensors")).items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = json.loads(path.with_suffix(".json").read_text())["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Fused kernels walk through memory: moments need the strides of their parameter, and its shards.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = as_kept(value, parameter)
