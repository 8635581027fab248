"""DeepSpeed's ZeRO, stages 1 and 2: the optimizer's state, and at 2 the gradients, spread over processes.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models". Every process has all
weights; in bfloat16 or float16 they are rounded copies of float32 masters, which are trained, and spread as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available, parse_flag_from_env
from torch import Tensor, nn

from configs.schema import RunConfig
from pipelines.sharding import whole_state

FOLDER = "zero"
"""In a checkpoint: what DeepSpeed saves, among it a file of each process for its part of the optimizer."""


def require_deepspeed() -> None:
    """Raise a ValueError where the launcher asks for DeepSpeed and it is not installed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not is_deepspeed_available():
        raise ValueError("training with DeepSpeed needs its package: pip install 'tessera-images[deepspeed]'")


def use_on_cpus(accelerator: Accelerator, precision: str) -> None:
    """Make Accelerate use DeepSpeed on CPUs as it does on GPUs, which it would not by itself."""
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(precision)
    accelerator.state.deepspeed_plugins = plugin
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    accelerator.native_amp = False  # the engine's weights have the precision, and no autocast is needed


def configure_zero(accelerator: Accelerator, config: RunConfig, checkpoint: Path | None) -> None:
    """Give DeepSpeed, where the launcher chose it, the batch and the clipping of a run; before `prepare`.

    Raises:
        ValueError: for a stage or an option that cannot be had, or a checkpoint to go on from that does not fit.
    """
    plugin: DeepSpeedPlugin | None = accelerator.deepspeed_plugin
    if checkpoint is not None:
        zero = (checkpoint / FOLDER).is_dir()
        saved_by = json.loads((checkpoint / "state.json").read_text())["processes"] if zero else 0
        here = 0 if plugin is None else accelerator.num_processes
        if saved_by != here:
            then, now = (f"{n} processes under DeepSpeed" if n else "a run without DeepSpeed" for n in (saved_by, here))
            raise ValueError(
                f"{checkpoint} is of {then}, and cannot go on as {now}; launch as before, or choose another output_dir"
            )
    if plugin is None:
        return
    if plugin.zero_stage not in (1, 2):
        raise ValueError(
            f"DeepSpeed's stage {plugin.zero_stage} is not one of 1 and 2; to spread the weights as well use FSDP2, "
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml"
        )
    if config.weight_ema:
        raise ValueError(
            f"weight_ema={config.weight_ema} needs the weights that are trained, which DeepSpeed keeps to itself; "
            "give weight_ema=0, or use FSDP2, accelerate launch --config_file configs/accelerate/fsdp2.yaml"
        )
    slices = accelerator.num_processes * config.accumulation_steps
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // slices),  # `stream` says where it is not whole
        "train_batch_size": "auto",  # Accelerate multiplies
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }


def masters(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """An engine's model as whole float32 tensors in CPU memory, where `keep`; every process must ask at once."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = whole_state(model.state_dict(), keep)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        master = safe_get_full_fp32_param(parameter)
        if keep and master is not None:  # a frozen parameter has none
            found[name] = master.cpu()
    return found


def restore_masters(engine: Any) -> None:
    """Give the model its masters as weights, at the end of its training under an engine; None is a training without."""
    if engine is not None:
        state = masters(engine.module, keep=True)
        engine.module.float().load_state_dict(state)


def save_engine(engine: Any, checkpoint: Path) -> None:
    engine.save_checkpoint(str(checkpoint / FOLDER), tag="state", save_latest=False)


def load_engine(engine: Any, checkpoint: Path) -> None:
    engine.load_checkpoint(str(checkpoint / FOLDER), tag="state")  # it unpickles: a checkpoint is trusted as code is
