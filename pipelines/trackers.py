"""Accelerate's object for a training, with the tracker that was asked for; a resumed run continues its curves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, is_tensorboard_available

from configs.schema import RunConfig
from pipelines.devices import make_accelerator
from pipelines.run_folder import flatten, read_json, write_json

TRACKER_FILE = "tracker.json"
"""In the run folder: the name that wandb knows the run by."""


def make_run_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's object with the run's precision, accumulation and tracker.

    Raises:
        ValueError: for a precision that the device does not have, or a tracker that is not installed.
    """
    if config.tracker == "tensorboard" and not is_tensorboard_available():
        raise ValueError("tracker=tensorboard needs the package tensorboard: pip install 'tessera-images[tensorboard]'")
    return make_accelerator(
        config.mixed_precision,
        # As a plugin, because a launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win over the number itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.accumulation_steps),
        log_with=config.tracker if config.tracker != "none" else None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )


def start_tracker(
    accelerator: Accelerator, folder: Path, config: RunConfig, recorded: dict[str, Any], step: int
) -> None:
    """Tell the tracker, where there is one, of a run that starts or goes on after `step` steps."""
    options: dict[str, dict[str, Any]] = {}
    if config.tracker == "tensorboard":
        # What an interrupted sitting logged after its checkpoint comes once more.
        options["tensorboard"] = {"purge_step": step + 1} if step else {}
    elif config.tracker == "wandb":
        options["wandb"] = {"dir": os.environ.get("WANDB_DIR", str(folder)), "id": None, "resume": "allow"}
        if accelerator.is_main_process:
            known = read_json(folder / TRACKER_FILE) or {"wandb": uuid4().hex[:12]}
            write_json(folder / TRACKER_FILE, known)
            options["wandb"]["id"] = known["wandb"]
    if config.tracker != "none":
        settings = {k: v for k, v in flatten(recorded).items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers(config.project, settings, init_kwargs=options)
