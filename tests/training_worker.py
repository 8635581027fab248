"""What one of several processes under torchrun does for test_process_training: trainings, one after another."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from configs.loading import load_config
from configs.schema import PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import train_prior, train_tokenizer
from pipelines.devices import leave_process_group
from pipelines.stop_signals import StopAgreement

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def train(job: dict[str, Any]) -> None:
    """One job: `stage`, `overrides`, and perhaps `sharded`, or `stop_after` a number of optimizer steps."""
    for name, value in SHARDED.items():
        os.environ.pop(name, None)
        if job.get("sharded"):
            os.environ[name] = value
    count = itertools.count(1)

    def stop(*_: object) -> None:
        # One process alone is asked to stop.
        if next(count) == job["stop_after"] and int(os.environ.get("RANK", "0")) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(stop) if "stop_after" in job else None
    try:
        if job["stage"] == "tokenizer":
            train_tokenizer(load_config(TokenizerTrainingConfig, None, job["overrides"]))
        else:
            train_prior(load_config(PriorTrainingConfig, None, job["overrides"]))
    except KeyboardInterrupt:
        assert handle is not None, "nobody asked to stop"
    finally:
        if handle is not None:
            handle.remove()


if __name__ == "__main__":
    torch.set_num_threads(1)
    StopAgreement.seconds = 0  # ask after every step
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print("job", job["name"], flush=True)
        train(job)
    leave_process_group()
