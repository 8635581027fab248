"""Open a training run and close it again, whatever happens in between."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.schema import RunConfig
from pipelines.devices import explain_out_of_memory, peak_memory_mib
from pipelines.training_run import TrainingRun


@contextmanager
def open_run(config: RunConfig) -> Iterator[TrainingRun]:
    """A run for `config`; out of memory is explained, trackers are closed, and a dry run leaves nothing behind."""
    advice = f"lower batch_size={config.batch_size}, or raise accumulation_steps={config.accumulation_steps}"
    if getattr(config, "activation_checkpointing", None) is False:
        advice += ", or set activation_checkpointing=true where the model has blocks for it"
    scratch = Path(config.output_dir).with_name(f".{Path(config.output_dir).name}.dry-run")  # all processes know it
    if config.dry_run:
        shutil.rmtree(scratch, ignore_errors=True)
        config = dataclasses.replace(
            config, steps=2, epochs=None, output_dir=str(scratch), tracker="none", resume="auto"
        )
        config = dataclasses.replace(config, log_every=1, validate_every=1, sample_every=1, checkpoint_every=1)
    try:
        with explain_out_of_memory(advice):
            run = TrainingRun(config)
            try:
                yield run
            finally:
                if config.tracker != "none":
                    run.accelerator.end_training()
                if run.locked is not None:
                    run.locked.close()
        if config.dry_run:
            memory = f"peak memory {peak_memory_mib(run.device):,} MiB"
            run.log.print(f"dry run: two steps, a checkpoint, a picture and a saved model all went well; {memory}")
    finally:
        if config.dry_run:
            shutil.rmtree(scratch, ignore_errors=True)
