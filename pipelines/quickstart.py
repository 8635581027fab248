"""The main job from one command: handwritten digits through all four verbs, and figures that say how good it is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.loading import load_config
from configs.schema import EncodingConfig, PriorTrainingConfig, SourceConfig, TokenizerTrainingConfig
from pipelines import metrics
from pipelines.code_data import load_code_info
from pipelines.encoding import encode_dataset
from pipelines.features import classify, train_classifier
from pipelines.image_data import ImageDataset, prepare_dataset
from pipelines.image_generation import ImageGenerationPipeline
from pipelines.image_sources import load_source
from pipelines.pictures import picture_grid, reconstruction_grid
from pipelines.preprocessing import to_unit_range
from pipelines.prior_training import train_prior
from pipelines.run_folder import read_json, write_json
from pipelines.tokenizer_training import train_tokenizer

SAMPLES_PER_CLASS = 10
GUIDANCE_SCALE = 2.0


def quickstart(folder: Path, *, fresh: bool, started_at: float, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train, encode, train, sample and measure; stages that are finished are picked up.

    Args:
        folder: holds tokenizer/, codes/, prior/, pipeline/, the pictures and metrics.json afterwards.
        fresh: start over.
        started_at: `time.time()` of the start that `seconds.total` counts from.
        overrides: `key=value` for both trainings, such as steps=2.

    Returns:
        what metrics.json holds.
    """
    presets = files("configs")
    tokenizer_config = load_config(
        TokenizerTrainingConfig,
        Path(str(presets / "tokenizer" / "digits_vqvae.yaml")),
        [f"output_dir={folder}/tokenizer", *overrides],
    )
    prior_config = load_config(
        PriorTrainingConfig,
        Path(str(presets / "prior" / "digits_gpt.yaml")),
        [f"output_dir={folder}/prior", f"codes={folder}/codes", *overrides],
    )
    encoding_config = EncodingConfig(tokenizer=f"{folder}/tokenizer", output_dir=f"{folder}/codes")

    if fresh and folder.exists():
        if any(folder.iterdir()) and not (folder / "seconds.json").is_file() and not (folder / "tokenizer").is_dir():
            raise ValueError(f"{folder} is not empty and holds no quickstart; --fresh will not delete it")
        shutil.rmtree(folder)
    wanted = ["tokenizer/result.json", "codes/codes.json", "prior/result.json", "pipeline/pipeline.json"]
    wanted += ["samples.png", "reconstructions.png"]
    finished = read_json(folder / "metrics.json")
    if finished and finished["overrides"] == list(overrides) and all((folder / name).is_file() for name in wanted):
        print(f"{folder} is complete; --fresh starts over")
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    stages = _Stages(folder / "seconds.json")
    stages.run("tokenizer", lambda: train_tokenizer(tokenizer_config), mark=folder / "tokenizer" / "result.json")
    stages.run("encoding", lambda: encode_dataset(encoding_config), mark=folder / "codes" / "codes.json")
    stages.run("prior", lambda: train_prior(prior_config), mark=folder / "prior" / "result.json")
    samples, labels = stages.run("sampling", lambda: _sample(folder))

    figures = _measure(folder, samples, labels) | {"overrides": list(overrides)}
    total = time.time() - started_at + stages.earlier_seconds
    figures["seconds"] = {name: round(value, 1) for name, value in (stages.seconds | {"total": total}).items()}
    write_json(folder / "metrics.json", figures)
    return figures


class _Stages:
    """Runs stages and keeps how long each took in the run that did its work."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        self.earlier_seconds = 0.0

    def run(self, name: str, work: Callable[[], Any], *, mark: Path | None = None) -> Any:
        """Do a stage; where the file `mark` stands already, its work was done by an earlier run."""
        print(f"\n== {name}", flush=True)
        picked_up = mark is not None and mark.is_file() and name in self.seconds
        start = time.perf_counter()
        result = work()
        took = time.perf_counter() - start
        if picked_up:
            self.earlier_seconds += self.seconds[name]
        else:
            self.seconds[name] = took
            write_json(self.file, self.seconds)
        return result


def _sample(folder: Path) -> tuple[Tensor, Tensor]:
    """Put the pipeline together, and draw every class."""
    pipeline = ImageGenerationPipeline.from_parts(folder / "tokenizer", folder / "prior")
    pipeline.save_pretrained(folder / "pipeline")
    labels = torch.arange(len(pipeline.class_names or [])).repeat_interleave(SAMPLES_PER_CLASS)
    output = pipeline(len(labels), labels, seed=0, output_type="tensor", guidance_scale=GUIDANCE_SCALE)
    assert isinstance(output.images, Tensor)
    picture_grid(output.images, SAMPLES_PER_CLASS).save(folder / "samples.png")
    return output.images, labels


def _images(pipeline: ImageGenerationPipeline, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split of the digits, `(N, C, H, W)` in [-1, 1], and their labels."""
    source = load_source(SourceConfig())
    dataset = ImageDataset(source.split(split), pipeline.tokenizer.config.preprocessing, num_classes=10)
    prepare_dataset(dataset, SourceConfig(), cache_mib=1024)
    assert dataset.pixels is not None
    return to_unit_range(dataset.pixels), dataset.labels


def _measure(folder: Path, samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """The figures of metrics.json; distances are root mean squares over pixels in [-1, 1]."""
    print("\n== measuring", flush=True)
    pipeline = ImageGenerationPipeline.from_pretrained(folder / "pipeline")
    (train, train_labels), (test, test_labels) = _images(pipeline, "train"), _images(pipeline, "test")
    shown = test[:32]
    reconstructions = pipeline.tokenizer.decode(pipeline.tokenizer.encode(shown))
    reconstruction_grid(shown, reconstructions).save(folder / "reconstructions.png")
    tokenizer_result = json.loads((folder / "tokenizer" / "result.json").read_text())
    prior_result = json.loads((folder / "prior" / "result.json").read_text())
    classifier = train_classifier(train, train_labels, num_classes=10)

    def share_right(images: Tensor, wanted: Tensor) -> float:
        return (classify(classifier, images) == wanted).double().mean().item()

    def diversity(images: Tensor, classes: Tensor) -> float:
        each = [metrics.mean_pairwise_distance(images[classes == c]) for c in classes.unique()]
        return sum(each) / len(each)

    return {
        "psnr_db": tokenizer_result["psnr_db"],
        "codebook_usage": tokenizer_result["codebook_usage"],
        "codebook_perplexity": tokenizer_result["codebook_perplexity"],
        "prior_bits_per_code": prior_result["bits_per_code"],
        "first_order_bits_per_code": prior_result["first_order_bits_per_code"],
        "class_accuracy": share_right(samples, labels),
        "classifier_test_accuracy": share_right(test, test_labels),
        "nearest_train_distance": metrics.nearest_distances(samples, train).mean().item(),
        "nearest_train_distance_of_test": metrics.nearest_distances(test, train).mean().item(),
        "sample_diversity": diversity(samples, labels),
        "test_diversity": diversity(test, test_labels),
        "layout": str(load_code_info(folder / "codes").layout),
        "hardware": tokenizer_result["hardware"],
    }


@dataclass(frozen=True)
class Bar:
    """What one figure of a run with the default settings should reach."""

    name: str
    value: Callable[[dict[str, Any]], float]
    least: float
    text: str
    """How the value is shown."""


BARS = [
    Bar("reconstruction", lambda f: f["psnr_db"], 30, "{:.1f} dB"),
    Bar("codes in use", lambda f: f["codebook_usage"], 0.8, "{:.0%}"),
    Bar(
        "bits per code that the prior saves over the codes' histogram",
        lambda f: f["first_order_bits_per_code"] - f["prior_bits_per_code"],
        0,
        "{:.2f}",
    ),
    Bar("samples in the class asked for", lambda f: f["class_accuracy"], 0.95, "{:.0%}"),
    Bar("test images in their class", lambda f: f["classifier_test_accuracy"], 0.97, "{:.1%}"),
    Bar(
        "distance to training images, relative to test images'",
        lambda f: f["nearest_train_distance"] / f["nearest_train_distance_of_test"],
        0.8,
        "{:.2f}",
    ),
    Bar(
        "diversity within a class, relative to test images'",
        lambda f: f["sample_diversity"] / f["test_diversity"],
        0.75,
        "{:.2f}",
    ),
]


def missed_bars(figures: dict[str, Any]) -> list[str]:
    """A line for each bar of quality that the figures miss."""
    return [
        f"missed: {bar.name} is {bar.text.format(bar.value(figures))}, should be at least {bar.text.format(bar.least)}"
        for bar in BARS
        if not bar.value(figures) >= bar.least
    ]


def print_table(figures: dict[str, Any], folder: Path) -> None:
    """The figures, a line each, beside the least that a run with the default settings should reach."""
    rows = [(bar.name, bar.text.format(bar.value(figures)), bar.text.format(bar.least)) for bar in BARS]
    rows.append(("seconds", f"{figures['seconds']['total']:.0f}", "at most 240 on 2 cores"))
    print(f"\n{'':<62}{'here':>9}  should be at least")
    for name, value, bar in rows:
        print(f"{name:<62}{value:>9}  {bar}")
    print(f"\nlook at {folder}/samples.png and {folder}/reconstructions.png")
