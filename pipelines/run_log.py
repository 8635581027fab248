"""What a run says while it trains: lines, metrics.jsonl, pictures, and a tracker where one was asked for."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class RunLog:
    """Lines and pictures of one run; only the main process writes.

    Args:
        accelerator: whose trackers are told too, where it has any.
        folder: the run folder.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._warned = False

    def print(self, text: str, name: str = "") -> None:
        """A line above the progress bar, behind its name."""
        if self.accelerator.is_main_process:
            tqdm.write(f"{name:>14}  {text}" if name else text)
            sys.stdout.flush()  # a log file is read while the run goes on

    def print_rows(self, rows: dict[str, str]) -> None:
        """Several lines, each behind its name."""
        for name, text in rows.items():
            self.print(text, name)

    def warn_once(self, text: str | None) -> None:
        """Print a warning when it first applies, and again only after it stopped applying; None says that it does."""
        if text is not None and not self._warned:
            self.print(text, "warning")
        self._warned = text is not None

    def add(self, values: dict[str, Tensor]) -> None:
        """Remember values of one micro-batch; they stay on the device until `take_means`."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take_means(self, step: int) -> dict[str, float]:
        """The means since the last call, over processes and the micro-batches that had the value.

        Raises:
            ValueError: where the loss is not finite.
        """
        means = [total / self._counts[name] for name, total in self._sums.items()]
        values = dict(zip(self._sums, self.accelerator.reduce(torch.stack(means), "mean").tolist(), strict=True))
        self._sums, self._counts = {}, {}
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss is {values['loss']} near step {step + 1}; try a lower learning_rate, a longer warmup_steps "
                "or mixed_precision=no"
            )
        return values

    def write(self, step: int, split: str, seconds: float, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the tracker; `step` counts from 0, the file from 1."""
        if self.accelerator.is_main_process:
            line = {"step": step + 1, "split": split, "seconds": round(seconds, 2), **values}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step + 1)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Save a picture under images/, and show it to the tracker."""
        if not self.accelerator.is_main_process:
            return
        (self.folder / "images").mkdir(exist_ok=True)
        picture.save(self.folder / "images" / f"{name}-{step + 1:08d}.png")
        pixels = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step=step + 1, **options)

    def cut_after(self, step: int, split: str | None = None) -> None:
        """Drop lines of metrics.jsonl after `step`, of one split or all, which an interrupted sitting left."""
        file = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and file.is_file():
            lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
            written = [(line, json.loads(line)) for line in lines]
            kept = [line for line, v in written if v["step"] <= step or split not in (None, v["split"])]
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, file)


def duration(seconds: float) -> str:
    """A time span as a person says it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"
