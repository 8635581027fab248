"""A training run: device, optimizer, steps, signals and checkpoints around the loops of both stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.random_streams import mix
from configs.schema import RunConfig
from pipelines.checkpoints import TrainedState, load_optimizers, load_random_state, load_weights, save_checkpoint
from pipelines.devices import describe_hardware, peak_memory_mib
from pipelines.index_stream import IndexStream
from pipelines.optimization import learning_rate, make_optimizer, step_optimizers
from pipelines.run_folder import (
    RESULT,
    SOURCE,
    checkpoint_folder,
    discard_checkpoints_after,
    lock,
    newest_whole_checkpoint,
    read_json,
    require_same_run,
    require_same_source,
    save_model,
    write_config,
    write_json,
)
from pipelines.run_log import RunLog, duration
from pipelines.sharding import gathered, is_sharded, whole_state
from pipelines.stop_signals import StopAgreement, StopSignals
from pipelines.trackers import make_run_accelerator, start_tracker
from pipelines.weight_average import WeightAverage, averaged
from pipelines.weights import count_parameters
from pipelines.zero import restore_masters

DEFAULT_STEPS = 1000


class TrainingRun:
    """Everything of a training that is not its loop; build it with `open_run`.

    Attributes:
        accelerator: Accelerate's, with the resolved precision.
        folder: the run folder.
        log: where lines, metrics and pictures go.
        started: whether earlier sittings left anything worth keeping.
        start_step: optimizer steps done by earlier sittings.
        total_steps: optimizer steps in all; set by `plan`.
        model: what the loop calls, after `prepare`; `unwrapped` is the model itself.
        second: a second module that is trained beside it, wrapped as `model` is.
    """

    model: nn.Module
    unwrapped: PreTrainedModel
    trained: TrainedState
    total_steps = 0
    second: nn.Module | None = None
    locked: IO[str] | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.checkpoint = newest_whole_checkpoint(self.folder)
        self.result = read_json(self.folder / RESULT)
        self.started = self.checkpoint is not None or self.result is not None
        if self.started and config.resume == "never":
            raise ValueError(f"{self.folder} holds a run already, and resume=never; choose another output_dir")
        self.accelerator = make_run_accelerator(config)
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.log = RunLog(self.accelerator, self.folder)
        # The resolved precision is what a resumed run must repeat, so it is what config.yaml records.
        self.recorded = config.to_dict() | {"mixed_precision": self.accelerator.mixed_precision}
        require_same_run(self.folder, type(config), self.recorded, trained=self.started)
        self.start_step = int(self.checkpoint.name.removeprefix("step-")) if self.checkpoint else 0
        # Launchers send a signal of their own after Ctrl-C: only a run of one process may take a second one literally.
        launched = self.accelerator.num_processes > 1
        advice = "soon, when all processes know" if launched else "after this step; once more to stop at once"
        self.stop = StopSignals(lambda: self.log.print(f"stopping {advice}"), patient=launched)
        self.agreement = StopAgreement(self.stop, self.accelerator)
        self.started_at = time.perf_counter()
        self.earlier_seconds = 0.0
        self.source: dict[str, str] = {}
        set_seed(config.seed)

    def plan(self, num_items: int) -> bool:
        """Settle the number of steps for a training split of `num_items`; True where all of them are done.

        Raises:
            ValueError: where more steps are done than are asked for.
        """
        config = self.config
        if config.epochs is not None:
            self.total_steps = max(1, math.ceil(config.epochs * num_items / config.batch_size))
        else:
            self.total_steps = config.steps or DEFAULT_STEPS
        done = max(self.start_step, 0 if self.result is None else self.result["steps"])
        if done > self.total_steps:
            raise ValueError(
                f"{self.folder} has {done} steps behind it, more than the {self.total_steps} asked for; "
                "ask for more steps or choose another output_dir"
            )
        if self.result is not None and self.result["steps"] == self.total_steps:
            self.log.print(f"{self.folder} is complete: {self.total_steps} steps")
            return True
        return False

    def require_same_data(self, found: dict[str, str]) -> None:
        """Record digests of the data, each under what it is of; refuse those that changed since an earlier sitting.

        Raises:
            ValueError: with what has changed.
        """
        require_same_source(self.folder, found, trained=self.started)
        self.source = found

    def announce(self, model: PreTrainedModel, lines: dict[str, str], num_items: int) -> None:
        """Print what is about to be trained."""
        rows = {
            "parameters": count_parameters(model),
            **lines,
            "steps": f"{self.total_steps:,} of {self.config.batch_size} images, "
            f"{num_items / self.config.batch_size:,.1f} an epoch",
            "hardware": f"{describe_hardware(self.device)}, mixed_precision={self.accelerator.mixed_precision}, "
            f"{self.accelerator.num_processes} process(es)",
        }
        if self.start_step:
            rows["resuming"] = f"from step {self.start_step:,}"
        self.log.print_rows(rows)

    def prepare(self, model: PreTrainedModel, second: nn.Module | None = None, second_rate: float = 1.0) -> None:
        """Put model and optimizer on the device, with the state of the newest checkpoint where there is one.

        Args:
            model: what is trained, saved and evaluated.
            second: a module that is trained beside it by an optimizer of its own, such as a discriminator.
            second_rate: its learning rate, in units of the model's.
        """
        if self.is_main:
            self.locked = lock(self.folder)
            write_config(self.folder, self.recorded)
            write_json(self.folder / SOURCE, self.source)
            discard_checkpoints_after(self.folder, self.start_step)
        self.log.cut_after(self.start_step)
        modules = {"model": model.to(self.device)} | ({} if second is None else {"second": second.to(self.device)})
        state = {} if self.checkpoint is None else load_weights(self.checkpoint, modules)
        optimizers: dict[str, Optimizer] = {"optimizer": make_optimizer(self.config, model)}
        if second is not None:
            optimizers["second_optimizer"] = make_optimizer(self.config, second, second_rate)
        self.unwrapped = model
        # Together, because sharding gives the optimizer other parameters.
        self.model, _ = self.accelerator.prepare(model, optimizers["optimizer"])
        if second is not None:
            self.second, _ = self.accelerator.prepare(second, optimizers["second_optimizer"])
        average = WeightAverage(model, self.config.weight_ema) if self.config.weight_ema else None
        engine = self.model if self.accelerator.deepspeed_plugin else None
        self.trained = TrainedState(modules, optimizers, average, engine)
        if self.accelerator.process_index:  # network dropout: other noise for other images
            torch.manual_seed(mix(self.config.seed, self.accelerator.process_index))
        if self.checkpoint is not None:
            self.earlier_seconds = state["seconds"]
            load_optimizers(self.checkpoint, self.trained)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if state["processes"] == self.accelerator.num_processes:
                load_random_state(self.checkpoint, self.accelerator)
            else:
                self.log.print(
                    f"this checkpoint is of {state['processes']} process(es), here are "
                    f"{self.accelerator.num_processes}: sums over images are rounded in another order, and network "
                    "dropout is drawn anew; all else goes on as it would have",
                    "not exact",
                )
        start_tracker(self.accelerator, self.folder, self.config, self.recorded, self.start_step)

    def stream(self, num_items: int, start_step: int | None = None) -> IndexStream:
        """The training items of this process, from a step on, by default the first that is left."""
        return IndexStream(
            num_items,
            self.config.batch_size,
            seed=self.config.seed,
            start_step=self.start_step if start_step is None else start_step,
            accumulation_steps=self.config.accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        """The model as it is evaluated and drawn from: with averaged weights where they are on, whole on each process.

        Every process enters and leaves it at the same time.
        """
        with averaged(self.trained.average), gathered(self.unwrapped):
            yield self.unwrapped

    @property
    def seconds(self) -> float:
        """Wall-clock of this run, earlier sittings included."""
        return self.earlier_seconds + time.perf_counter() - self.started_at

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar; a requested stop saves a checkpoint and raises.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint stands.
        """
        hidden = None if self.is_main else True  # None hides the bar where nobody watches a terminal
        self.bar = tqdm(
            total=self.total_steps, initial=self.start_step, unit="step", disable=hidden, dynamic_ncols=True
        )
        self.loop_started_at = time.perf_counter()
        with self.bar, self.stop:
            for step in range(self.start_step, self.total_steps):
                # The schedule is written out: accelerate would step a prepared one once per process.
                for group in chain(*(optimizer.param_groups for optimizer in self.trained.optimizers.values())):
                    group["lr"] = group["scale"] * learning_rate(self.config, step, self.total_steps)
                yield step
                self.bar.update()
                if step + 1 == self.start_step + 20 and self.total_steps - step > 20:
                    left = (time.perf_counter() - self.loop_started_at) / 20 * (self.total_steps - step - 1)
                    self.log.print(f"about {duration(left)}", "time to the end")
                if self.agreement.reached(step, step + 1 == self.total_steps):
                    self.save_checkpoint(step)
                    raise KeyboardInterrupt(
                        f"stopped after step {step + 1}; the checkpoint is "
                        f"{checkpoint_folder(self.folder, step + 1)}. The same command goes on from there"
                    )

    def optimizer_step(self) -> None:
        """Clip, step and clear the gradients at the end of the accumulation; nothing before it."""
        if self.accelerator.sync_gradients and self.trained.engine is None:  # an engine has done it in backward
            step_optimizers(self.accelerator, self.models, self.trained.optimizers, self.config.max_grad_norm)

    @property
    def models(self) -> list[nn.Module]:
        """What is trained, as the loop calls it."""
        return [self.model] if self.second is None else [self.model, self.second]

    def update_average(self) -> None:
        """Move the weight EMA, where it is on; after the optimizer and the codebooks have moved."""
        if self.trained.average is not None:
            self.trained.average.update()

    def due(self, every: int, step: int) -> bool:
        """Whether what happens `every` n steps, and at the last one, happens after this step."""
        return step + 1 == self.total_steps or (every > 0 and (step + 1) % every == 0)

    def log_means(self, step: int, **figures: float) -> None:
        """Log the means since the last call, with learning rate, speed and other figures."""
        values = self.log.take_means(step) | figures
        rate = (step + 1 - self.start_step) * self.config.batch_size / (time.perf_counter() - self.loop_started_at)
        self.bar.set_postfix_str(f"loss {values['loss']:.4g}, {rate:.0f} images/s", refresh=False)
        values |= {"learning_rate": learning_rate(self.config, step, self.total_steps), "images_per_second": rate}
        self.log.write(step, "train", self.seconds, values)

    def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint after this step, counted from 0."""
        keep = self.config.keep_checkpoints
        save_checkpoint(self.accelerator, self.folder, step + 1, self.seconds, self.trained, keep=keep)

    def finish(self, figures: dict[str, float]) -> None:
        """Save the final model, and the result that marks the run as complete."""
        restore_masters(self.trained.engine)
        save: Callable[..., Any] = self.unwrapped.save_pretrained
        with averaged(self.trained.average):
            if is_sharded(self.unwrapped):
                save = partial(save, state_dict=whole_state(self.unwrapped.state_dict(), keep=self.is_main))
            if self.is_main:
                save_model(save, self.folder)
        if self.is_main:
            result = {
                "steps": self.total_steps,
                "seconds": round(self.seconds, 2),
                **figures,
                "seed": self.config.seed,
                "mixed_precision": self.accelerator.mixed_precision,
                "hardware": describe_hardware(self.device),
                "peak_memory_mib": peak_memory_mib(self.device),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            write_json(self.folder / RESULT, result)
        self.accelerator.wait_for_everyone()
        self.log.print(str(self.folder), "saved")
