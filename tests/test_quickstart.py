"""The quickstart writes all that it promises, and picks up what is there; two steps of each training stand for all."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipelines.quickstart
from pipelines import ImageGenerationPipeline
from pipelines.features import train_classifier

FIGURES = {
    "psnr_db",
    "codebook_usage",
    "codebook_perplexity",
    "prior_bits_per_code",
    "first_order_bits_per_code",
    "class_accuracy",
    "classifier_test_accuracy",
    "nearest_train_distance",
    "nearest_train_distance_of_test",
    "sample_diversity",
    "test_diversity",
}


def quickstart(folder: Path) -> dict[str, Any]:
    return pipelines.quickstart.quickstart(folder, fresh=False, started_at=time.time(), overrides=("steps=2",))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module", autouse=True)
def _short_classifier() -> Iterator[None]:
    """The real classifier, trained for 10 steps instead of 400."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.quickstart, "train_classifier", functools.partial(train_classifier, num_steps=10))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A quickstart folder, and what the call that made it returned."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart(folder)


def test_the_quickstart_writes_every_file_and_figure(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = finished
    assert {"tokenizer", "codes", "prior", "pipeline", "metrics.json"} <= {path.name for path in folder.iterdir()}
    for name in ("tokenizer", "prior"):
        for file in ("config.yaml", "metrics.jsonl", "config.json", "model.safetensors", "result.json", "checkpoints"):
            assert (folder / name / file).exists(), f"{name}/{file}"
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 32
    assert figures.keys() >= FIGURES | {"layout", "hardware", "seconds"}
    assert all(math.isfinite(figures[name]) for name in FIGURES)
    assert figures["layout"] == "8x8 of 128"
    assert figures["seconds"].keys() >= {"tokenizer", "encoding", "prior", "sampling", "total"}
    assert ImageGenerationPipeline.from_pretrained(folder / "pipeline")(1, labels=7, seed=0).labels == [7]


def test_a_second_quickstart_returns_the_same_figures_and_changes_no_file(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, figures = finished
    before = contents(folder)
    assert quickstart(folder) == figures
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("deleted", "kept"), [("pipeline", ("tokenizer", "codes", "prior")), ("prior", ("tokenizer", "codes"))]
)
def test_a_deleted_stage_alone_is_done_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, deleted: str, kept: tuple[str, ...]
) -> None:
    folder, figures = finished
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved)
    try:
        shutil.rmtree(folder / deleted)
        before = {name: contents(folder / name) for name in kept}
        again = quickstart(folder)
        assert {name: contents(folder / name) for name in kept} == before
        assert (folder / deleted).is_dir()
        # All is seeded, so that the same work gives the same figures.
        assert {name: again[name] for name in FIGURES} == {name: figures[name] for name in FIGURES}
    finally:
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)


def test_the_table_prints_every_figure_beside_its_bar(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, figures = finished
    pipelines.quickstart.print_table(figures, folder)
    printed = capsys.readouterr().out
    assert f"{figures['psnr_db']:.1f} dB" in printed
    assert f"{folder}/samples.png" in printed
