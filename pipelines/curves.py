"""Curves of runs: what metrics.jsonl says over the steps, as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.validation import Schema, did_you_mean


@dataclass
class CurvesConfig(Schema):
    """Draw the metrics of one or several runs over their steps."""

    runs: list[str]
    """Run folders; their curves share a panel a metric."""
    output_file: str = "runs/curves.png"
    """The picture."""
    metrics: list[str] = field(default_factory=lambda: ["psnr_db", "codebook_perplexity"])
    """Keys of metrics.jsonl, a panel each."""
    split: str = "validation"
    """validation or train."""


def plot_runs(config: CurvesConfig) -> Path:
    """Draw the curves and return the picture's path.

    Raises:
        ValueError: where a folder holds no run, or a run has no such metric.
    """
    figure = Figure(figsize=(4.5 * len(config.metrics), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, metric in zip(figure.subplots(1, len(config.metrics), squeeze=False)[0], config.metrics, strict=True):
        for run in config.runs:
            steps, values = _curve(Path(run), config.split, metric)
            panel.plot(steps, values, marker=".", label=Path(run).name)
        panel.set(title=metric, xlabel="optimizer steps")
        panel.grid(alpha=0.3)
    panel.legend()
    path = Path(config.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _curve(folder: Path, split: str, metric: str) -> tuple[list[int], list[float]]:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} holds no run: there is no {file.name} in it")
    lines = [line for line in map(json.loads, file.read_text().splitlines()) if line["split"] == split]
    known = sorted({key for line in lines for key in line} - {"step", "split", "seconds"})
    if metric not in known:
        raise ValueError(did_you_mean(metric, known, f"metric of {folder} on {split}"))
    chosen = [line for line in lines if metric in line]
    return [line["step"] for line in chosen], [line[metric] for line in chosen]
