"""A training run: devices, optimizer, schedule, logging, signals and checkpoints around the loops of both stages."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.schema import RunConfig
from pipelines.devices import describe_hardware, explain_out_of_memory, make_accelerator
from pipelines.run_folder import (
    RESULT,
    checkpoint_folder,
    flatten,
    load_state,
    newest_whole_checkpoint,
    prune_checkpoints,
    require_same_run,
    save_model,
    save_state,
    seal,
    write_config,
    write_json,
)

DEFAULT_STEPS = 1000


class TrainingRun:
    """Everything of a training that is not its loop; build it with `open_run`.

    Attributes:
        accelerator: Accelerate's, with the resolved precision.
        folder: the run folder.
        finished: the run is complete on disk already.
        start_step: optimizer steps done by earlier sittings.
        total_steps: optimizer steps in all; set by `plan`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.checkpoint = newest_whole_checkpoint(self.folder)
        self.result = _read_json(self.folder / RESULT)
        started = self.checkpoint is not None or self.result is not None
        if started and config.resume == "never":
            raise ValueError(f"{self.folder} holds a run already, and resume=never; choose another output_dir")
        self.accelerator = _make_accelerator(config)
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        # The resolved precision is what a resumed run must repeat, so it is what config.yaml records.
        self.recorded = config.to_dict() | {"mixed_precision": self.accelerator.mixed_precision}
        require_same_run(self.folder, self.recorded, trained=started)
        self.start_step = int(self.checkpoint.name.removeprefix("step-")) if self.checkpoint else 0
        self.total_steps = 0
        self.stop_signal: int | None = None
        self.started_at = time.perf_counter()
        self.earlier_seconds = 0.0
        self._sums: dict[str, Tensor] = {}
        self._num_added = 0
        set_seed(config.seed)

    def print(self, text: str) -> None:
        """A line on the main process, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def plan(self, num_items: int) -> bool:
        """Settle the number of steps for a training split of `num_items`; True where all of them are done."""
        config = self.config
        if config.epochs is not None:
            self.total_steps = max(1, math.ceil(config.epochs * num_items / config.batch_size))
        else:
            self.total_steps = config.steps or DEFAULT_STEPS
        if self.start_step > self.total_steps:
            raise ValueError(
                f"{self.folder} has {self.start_step} steps behind it, more than the {self.total_steps} asked for; "
                "ask for more steps or choose another output_dir"
            )
        return self.result is not None and self.result["steps"] >= self.total_steps

    def announce(self, model: PreTrainedModel, lines: dict[str, str], num_items: int) -> None:
        """Print what is about to be trained."""
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        steps_per_epoch = num_items / self.config.batch_size
        rows = {
            "parameters": f"{parameters:,}" + (f" ({trainable:,} trained)" if trainable != parameters else ""),
            **lines,
            "steps": f"{self.total_steps:,} of {self.config.batch_size} images, {steps_per_epoch:,.1f} an epoch",
            "hardware": f"{describe_hardware(self.device)}, mixed_precision={self.accelerator.mixed_precision}, "
            f"{self.accelerator.num_processes} process(es)",
        }
        for name, value in rows.items():
            self.print(f"{name:>14}  {value}")
        if self.start_step:
            self.print(f"{'resuming':>14}  from step {self.start_step:,}")

    def prepare(self, model: PreTrainedModel) -> None:
        """Put model and optimizer on the device, with the state of the newest checkpoint where there is one."""
        if self.is_main:
            write_config(self.folder, self.recorded)
        model.to(self.device)
        optimizer = _make_optimizer(self.config, model)
        if self.checkpoint is not None:
            model.load_state_dict(load_file(self.checkpoint / "model.safetensors"))
            _load_optimizer(optimizer, load_state(self.checkpoint, "optimizer"))
            self._cut_metrics_after(self.start_step)
        self.averaged: AveragedModel | None = None
        if self.config.weight_ema:
            # AveragedModel counts updates in a buffer; buffers of the model itself (EMA codebooks) are copied.
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.config.weight_ema))
            self.averaged.requires_grad_(False)
            if self.checkpoint is not None:
                self.averaged.load_state_dict(load_file(self.checkpoint / "average.safetensors"))
        self.unwrapped = model
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.checkpoint is not None:
            self._load_random_state(self.checkpoint)
        if self.config.tracker != "none":
            settings = {k: v for k, v in flatten(self.recorded).items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers(self.config.project, settings)

    @property
    def evaluated_model(self) -> Any:
        """The model that is evaluated, drawn from and saved: the averaged weights where they are on."""
        return self.unwrapped if self.averaged is None else self.averaged.module

    def learning_rate(self, step: int) -> float:
        """Of one step: a linear warm-up, then constant, or a cosine to zero at the last step."""
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return config.learning_rate * warm
        past = max(0, step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
        return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))

    def steps(self, unit: str) -> Iterator[int]:
        """The steps that are left, with a progress bar; a requested stop saves a checkpoint and raises.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint stands.
        """
        self.bar = tqdm(
            total=self.total_steps, initial=self.start_step, unit="step", disable=None if self.is_main else True, dynamic_ncols=True
        )
        self.unit = unit
        self.loop_started_at = time.perf_counter()
        with self.bar, _signals(self):
            for step in range(self.start_step, self.total_steps):
                # The scheduler is written out: a prepared one would step once per process.
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(step)
                yield step
                self.bar.update()
                if step + 1 == self.start_step + 20 and self.total_steps - step > 20:
                    left = (time.perf_counter() - self.loop_started_at) / 20 * (self.total_steps - step - 1)
                    self.print(f"{'time to the end':>14}  about {_duration(left)}")
                if self._should_stop(step):
                    self.save_checkpoint(step + 1)
                    raise KeyboardInterrupt(
                        f"stopped after step {step + 1}; the checkpoint is "
                        f"{checkpoint_folder(self.folder, step + 1)}. The same command goes on from there"
                    )

    def optimizer_step(self) -> None:
        """Clip, step and clear the gradients at the end of the accumulation; nothing before it."""
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients and self.averaged is not None:
            self.averaged.update_parameters(self.unwrapped)

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens `every` n steps, and at the last one, happens after this step."""
        return step + 1 == self.total_steps or (every > 0 and (step + 1) % every == 0)

    def add(self, values: dict[str, Tensor]) -> None:
        """Remember values of one micro-batch; they stay on the device until `log_means`."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._num_added += 1

    def log_means(self, step: int) -> None:
        """Log the means since the last call, over micro-batches and processes.

        Raises:
            ValueError: where the loss is not finite.
        """
        names = list(self._sums)
        means = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]) / self._num_added, "mean")
        values = dict(zip(names, means.tolist(), strict=True))
        self._sums, self._num_added = {}, 0
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss is {values['loss']} near step {step + 1}; try a lower learning_rate, a longer warmup_steps "
                "or mixed_precision=no"
            )
        seconds = time.perf_counter() - self.loop_started_at
        rate = (step + 1 - self.start_step) * self.config.batch_size / seconds
        self.bar.set_postfix_str(f"loss {values['loss']:.4g}, {rate:.0f} {self.unit}/s", refresh=False)
        self.log(step, "train", values | {"learning_rate": self.learning_rate(step), f"{self.unit}_per_second": rate})

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the tracker; `step` counts from 0, the file from 1."""
        if self.is_main:
            line = {"step": step + 1, "split": split, "seconds": round(self.seconds, 2), **values}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.config.tracker != "none":
            self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step + 1)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Save a picture under images/, and show it to the tracker."""
        if not self.is_main:
            return
        (self.folder / "images").mkdir(exist_ok=True)
        picture.save(self.folder / "images" / f"{name}-{step + 1:08d}.png")
        pixels = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step=step + 1, **options)

    @property
    def seconds(self) -> float:
        """Wall-clock of this run, earlier sittings included."""
        return self.earlier_seconds + time.perf_counter() - self.started_at

    def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint after `step` steps: every process its part, then the manifest and the name."""
        folder = checkpoint_folder(self.folder, step)
        partial = folder.with_name(f".{folder.name}.partial")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        save_file(random_state, partial / f"random-{self.accelerator.process_index}.safetensors")
        if self.is_main:
            save_file(_plain_state(self.unwrapped), partial / "model.safetensors")
            if self.averaged is not None:
                save_file(_plain_state(self.averaged), partial / "average.safetensors")
            save_state(self.optimizer.state_dict(), partial, "optimizer")
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            state = {"step": step, "seconds": self.seconds, "processes": self.accelerator.num_processes}
            write_json(partial / "state.json", state | {"scaler": scaler})
        self.accelerator.wait_for_everyone()
        if self.is_main:
            seal(partial, folder)
            prune_checkpoints(self.folder, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def finish(self, figures: dict[str, float]) -> None:
        """Save the final model, and the result that marks the run as complete."""
        if self.is_main:
            save_model(self.evaluated_model.save_pretrained, self.folder)
            result = {
                "steps": self.total_steps,
                "seconds": round(self.seconds, 2),
                **figures,
                "seed": self.config.seed,
                "mixed_precision": self.accelerator.mixed_precision,
                "hardware": describe_hardware(self.device),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            write_json(self.folder / RESULT, result)
        self.accelerator.wait_for_everyone()
        self.print(f"{'saved':>14}  {self.folder}")

    def _load_random_state(self, checkpoint: Path) -> None:
        state = _read_json(checkpoint / "state.json") or {}
        self.earlier_seconds = state["seconds"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        mine = checkpoint / f"random-{self.accelerator.process_index}.safetensors"
        if not mine.is_file():
            self.print(f"this checkpoint is of {state['processes']} process(es): network dropout is drawn anew")
            return
        random_state = load_file(mine)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and self.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], self.device)

    def _cut_metrics_after(self, step: int) -> None:
        """Drop lines of metrics.jsonl that an interrupted sitting wrote after its last checkpoint."""
        file = self.folder / "metrics.jsonl"
        if self.is_main and file.is_file():
            lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            file.write_text("".join(f"{line}\n" for line in kept))

    def _should_stop(self, step: int) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        # A signal that one process handles alone would leave the others waiting: they agree at logging steps.
        if not self.due(self.config.log_every, step):
            return False
        flag = torch.tensor(float(self.stop_signal is not None), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


@contextmanager
def open_run(config: RunConfig) -> Iterator[TrainingRun]:
    """A run for `config`; out of memory is explained, trackers are closed, and a dry run leaves nothing behind."""
    advice = (
        f"lower batch_size={config.batch_size}, or keep it and raise accumulation_steps={config.accumulation_steps}"
    )
    scratch = tempfile.mkdtemp(prefix="dry-run-") if config.dry_run else None
    if scratch is not None:
        every_step = {"log_every": 1, "validate_every": 1, "sample_every": 1, "checkpoint_every": 1}
        config = dataclasses.replace(
            config, **every_step, steps=2, epochs=None, output_dir=f"{scratch}/run", tracker="none", resume="auto"
        )
    try:
        with explain_out_of_memory(advice):
            run = TrainingRun(config)
            yield run
        if config.tracker != "none":
            run.accelerator.end_training()
        if scratch is not None:
            run.print("dry run: two steps, a checkpoint, a picture and a saved model all went well")
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _make_accelerator(config: RunConfig) -> Accelerator:
    logging = None
    if config.tracker == "tensorboard":
        from accelerate.utils import is_tensorboard_available

        if not is_tensorboard_available():
            raise ValueError("tracker=tensorboard needs the package tensorboard: pip install 'tessera-images[tensorboard]'")
    if config.tracker != "none":
        logging = config.tracker
    return make_accelerator(
        config.mixed_precision,
        gradient_accumulation_steps=config.accumulation_steps,
        log_with=logging,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
        # Codebooks are equal on all processes because their statistics are reduced.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW, with weight decay on the matrices of linear and convolution layers only."""
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.weight.requires_grad
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), fused=fused)


def _load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith("state."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": flat["param_groups"]})


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


@contextmanager
def _signals(run: TrainingRun) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to stop; a second one acts at once."""
    previous: dict[int, Any] = {}

    def request_stop(number: int, frame: Any) -> None:
        run.stop_signal = number
        run.print("stopping after this step; once more to stop at once")
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request_stop)
    except ValueError:
        pass  # not in the main thread, where Python allows no handlers
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

