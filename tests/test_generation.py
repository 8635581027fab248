"""The verbs around finished models: sampling into a folder, and measuring what training measured."""

from __future__ import annotations

import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from prior_cases import IMAGE, random_codes, tiny_prior
from torch import Tensor

import pipelines.generation
from configs.evaluation import EvaluationConfig
from configs.generation import GenerationConfig
from configs.loading import load_config, read_yaml
from configs.schema import SourceConfig
from pipelines import ImageGenerationPipeline, evaluate, generate
from pipelines.evaluation import evaluate_prior
from pipelines.image_files import NumberedFiles
from pipelines.image_sources import load_source
from pipelines.pipeline_base import DrawnBatch
from prior import Prior
from prior.autoregressive import AutoregressiveOptions


def run(output: Path, *overrides: str) -> Path:
    return generate(load_config(GenerationConfig, None, [f"output_dir={output}", *overrides]))


def pixels(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as picture:
            found[file.name] = np.array(picture)
    return found


@pytest.fixture
def parts(tokenizer_run: Path, prior_run: Path) -> list[str]:
    return [f"tokenizer={tokenizer_run}", f"prior={prior_run}"]


def test_generating_writes_numbered_pictures_and_a_grid(
    parts: list[str], tokenizer_run: Path, prior_run: Path, tmp_path: Path
) -> None:
    folder = run(tmp_path / "samples", *parts, "num_images=5", "labels=dog", "seed=3", "batch_size=2")
    found = pixels(folder)
    assert list(found) == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "grid.png"]
    images = ImageGenerationPipeline.from_parts(tokenizer_run, prior_run)(5, labels="dog", seed=3).images
    for name, picture in zip(found, images, strict=False):
        np.testing.assert_array_equal(found[name], np.array(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_labels_each_gives_so_many_images_of_every_class(parts: list[str], tmp_path: Path) -> None:
    each = pixels(run(tmp_path / "each", *parts, "num_images=3", "labels=each"))
    listed = pixels(run(tmp_path / "listed", *parts, "num_images=6", "labels=[cat,cat,cat,dog,dog,dog]"))
    assert list(each) == list(listed)
    for name in list(each)[:6]:
        np.testing.assert_array_equal(each[name], listed[name])
    # A row for each class, of num_images pictures.
    height, width = each["grid.png"].shape[:2]
    assert (height, width) == (2 * 64 + 3 * 2, 3 * 64 + 4 * 2)  # pictures of 16 pixels are enlarged


def test_a_saved_pipeline_generates_what_its_parts_do(
    parts: list[str], tokenizer_run: Path, prior_run: Path, tmp_path: Path
) -> None:
    ImageGenerationPipeline.from_parts(tokenizer_run, prior_run).save_pretrained(tmp_path / "pipeline")
    options = ["num_images=3", "labels=1", "guidance_scale=2", "top_k=8", "temperature=0.9"]
    mine = pixels(run(tmp_path / "mine", f"pipeline={tmp_path / 'pipeline'}", *options))
    theirs = pixels(run(tmp_path / "theirs", *parts, *options))
    assert list(mine) == list(theirs)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])


OPTIONS = {
    "temperature": [1.5, 0.5],
    "top_k": 9,
    "top_p": 0.9,
    "guidance_scale": 3.0,
    "guidance_schedule": "power_cosine",
    "guidance_power": 2.0,
    "guidance_interval": [0.2, 0.9],
    "num_candidates": 2,
}
"""All options of sampling a gpt, each with a value that is not its default."""


def test_generating_takes_every_option_that_a_call_takes(
    parts: list[str], tokenizer_run: Path, prior_run: Path, tmp_path: Path
) -> None:
    defaults = AutoregressiveOptions().to_dict()
    assert OPTIONS.keys() == defaults.keys()
    assert not [name for name, value in OPTIONS.items() if value == defaults[name]]
    given = [f"{'sampling.' if name == 'num_candidates' else ''}{name}={value}" for name, value in OPTIONS.items()]
    found = pixels(run(tmp_path / "samples", *parts, "num_images=3", "labels=dog", "seed=2", *given))
    pipeline = ImageGenerationPipeline.from_parts(tokenizer_run, prior_run)
    for name, picture in zip(found, pipeline(3, labels="dog", seed=2, **OPTIONS).images, strict=False):
        np.testing.assert_array_equal(found[name], np.array(picture))


def test_generating_refuses_the_options_of_another_prior(parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'sampling.steps'"):
        run(tmp_path / "samples", *parts, "sampling.steps=3")


@pytest.mark.parametrize("compiled", [True, False])
def test_generating_compiles_the_steps_of_sampling_where_asked(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    seen, sample = [], Prior.sample

    def watched(prior: Prior, *arguments: Any, **options: Any) -> Any:
        seen.append(prior.compiled_sampling)
        return sample(prior, *arguments, **options)

    monkeypatch.setattr(Prior, "sample", watched)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled, so any program will do
    run(tmp_path / "samples", *parts, "num_images=3", "batch_size=2", f"compile={compiled}")
    assert seen == [compiled] * 2


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("no", False)])
def test_generating_samples_in_the_precision_asked_for(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, expected: bool
) -> None:
    seen, sample = [], Prior.sample

    def watched(prior: Prior, *arguments: Any, **options: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return sample(prior, *arguments, **options)

    monkeypatch.setattr(Prior, "sample", watched)
    run(tmp_path / "samples", *parts, "num_images=1", f"mixed_precision={precision}")
    assert seen == [expected]


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_is_used(parts: list[str], tmp_path: Path) -> None:
    output = tmp_path / "samples"
    output.mkdir()
    run(output, *parts, "num_images=1")
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(ValueError, match=r"samples is not empty"):
        run(output, *parts, "num_images=2")
    assert sorted(path.name for path in output.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is not empty"):
        run(tmp_path / "file", *parts)


def test_a_failed_call_leaves_no_folder(parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown class 'horse'"):
        run(tmp_path / "samples", *parts, "labels=horse")
    assert list(tmp_path.iterdir()) == []


def rows_of(folder: Path, cache: Path) -> datasets.Dataset:
    """images.parquet as anyone reads it."""
    return datasets.load_dataset(
        "parquet", data_files=str(folder / "images.parquet"), split="train", cache_dir=str(cache)
    )


def test_a_parquet_file_is_an_image_dataset_of_the_pictures_that_files_would_be(
    parts: list[str], tmp_path: Path
) -> None:
    options = [*parts, "num_images=3", "labels=each", "batch_size=4", "seed=5"]
    files = run(tmp_path / "files", *options)
    table = run(tmp_path / "table", *options, "format=parquet")
    assert sorted(path.name for path in table.iterdir()) == ["grid.png", "images.parquet"]
    assert (table / "grid.png").read_bytes() == (files / "grid.png").read_bytes()
    rows = rows_of(table, tmp_path / "cache")
    assert rows.features == datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), index=datasets.Value("int64")
    )
    assert rows["index"][:] == list(range(6))
    assert rows["label"][:] == [0, 0, 0, 1, 1, 1]
    found = pixels(files)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(np.array(row["image"]), found[f"{index:05d}.png"])
    raw = rows.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in raw] == [(files / f"{i:05d}.png").read_bytes() for i in range(6)]
    with pq.ParquetFile(table / "images.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "files", "table"]


def test_without_classes_there_is_no_label_column(parts: list[str], tmp_path: Path) -> None:
    rows = rows_of(run(tmp_path / "table", *parts, "num_images=2", "format=parquet"), tmp_path / "cache")
    assert rows.column_names == ["image", "index"]


def test_a_parquet_file_is_a_source_of_images(parts: list[str], tmp_path: Path) -> None:
    table = run(tmp_path / "table", *parts, "num_images=3", "labels=dog", "format=parquet")
    source = load_source(SourceConfig(dataset=str(table / "images.parquet")))
    assert source.class_names == ["cat", "dog"]
    assert {name: len(rows) for name, rows in source.splits.items()} == {"train": 3}


@pytest.mark.parametrize(
    ("num_images", "name"), [(16, "00007.png"), (100_000, "00007.png"), (100_001, "000007.png"), (10**7, "0000007.png")]
)
def test_numbers_have_as_many_digits_as_the_last(tmp_path: Path, num_images: int, name: str) -> None:
    image, index = torch.zeros(1, 1, 4, 4), torch.tensor([7])
    batch = DrawnBatch(index=index, labels=None, codes=index, images=image, seed=0)
    NumberedFiles(tmp_path, num_images, None).write([batch], 0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_each_batch_is_written_and_let_go_before_the_next_but_one_is_drawn(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    held, written = [], []
    batches = ImageGenerationPipeline.batches

    def watched(pipeline: ImageGenerationPipeline, *arguments: Any, **options: Any) -> Iterator[DrawnBatch]:
        for batch in batches(pipeline, *arguments, **options):
            alive.append(weakref.ref(batch.images))
            held.append(sum(images() is not None for images in alive))
            written.append(len(list(tmp_path.glob(".samples.partial-*/*.png"))))
            yield batch

    monkeypatch.setattr(ImageGenerationPipeline, "batches", watched)
    run(tmp_path / "samples", *parts, "num_images=9", "batch_size=2", f"format={form}")
    assert len(alive) == 5
    assert max(held) <= 2
    assert written == ([0, 2, 4, 6, 8] if form == "png" else [0] * 5)


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_an_error_in_the_second_batch_leaves_nothing_behind(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    calls, sample = [], Prior.sample

    def failing(prior: Prior, *arguments: Any, **options: Any) -> Any:
        calls.append(len(list(tmp_path.iterdir())))
        if len(calls) == 2:
            raise RuntimeError("CUDA error: out of memory")
        return sample(prior, *arguments, **options)

    monkeypatch.setattr(Prior, "sample", failing)
    with pytest.raises(ValueError, match="lower batch_size=2"):
        run(tmp_path / "samples", *parts, "num_images=5", "batch_size=2", f"format={form}")
    assert calls == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_the_grid_shows_no_more_images_than_one_can_look_at(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.generation, "_SHOWN", 4)
    each = pixels(run(tmp_path / "each", *parts, "num_images=3", "labels=each"))
    assert each["grid.png"].shape[:2] == (2 * 64 + 3 * 2, 2 * 64 + 3 * 2)
    # The second row shows the first images of the second class.
    shown = each["grid.png"][68:132:4, 2:66:4], each["grid.png"][68:132:4, 68:132:4]
    np.testing.assert_array_equal(shown[0], each["00003.png"])
    np.testing.assert_array_equal(shown[1], each["00004.png"])
    some = run(tmp_path / "some", *parts, "num_images=6", "format=parquet", "batch_size=3")
    assert pixels(some)["grid.png"].shape[:2] == (2 * 64 + 3 * 2, 2 * 64 + 3 * 2)


def test_parts_of_a_call_together_are_the_call(tokenizer_run: Path, prior_run: Path) -> None:
    pipeline = ImageGenerationPipeline.from_parts(tokenizer_run, prior_run)
    whole = pipeline(7, labels=[0, 1, 1, 0, 1, 0, 0], seed=3, output_type="tensor")
    for count in (1, 2, 3, 5):
        drawn = [
            batch
            for i in range(count)
            for batch in pipeline.batches(7, labels=whole.labels, seed=3, batch_size=2, part=(i, count))
        ]
        assert [batch.index.tolist() for batch in drawn] == [[0, 1], [2, 3], [4, 5], [6]]
        assert torch.equal(torch.cat([batch.codes for batch in drawn]), whole.codes)
        torch.testing.assert_close(torch.cat([batch.images for batch in drawn]), whole.images, rtol=0, atol=1e-5)
        assert [label for batch in drawn for label in batch.labels.tolist()] == whole.labels


def test_a_call_has_no_part(tokenizer_run: Path, prior_run: Path) -> None:
    with pytest.raises(TypeError, match="part"):
        ImageGenerationPipeline.from_parts(tokenizer_run, prior_run)(4, part=(0, 2))


def test_evaluating_a_tokenizer_gives_the_figures_of_its_own_run(
    tokenizer_run: Path, image_folder: Path, tmp_path: Path
) -> None:
    precision = read_yaml(tokenizer_run / "config.yaml")["mixed_precision"]
    overrides = [f"tokenizer={tokenizer_run}", f"data.dataset={image_folder}", "data.num_workers=0"]
    overrides += ["batch_size=4", f"mixed_precision={precision}", f"output_file={tmp_path / 'deep' / 'figures.json'}"]
    figures = evaluate(load_config(EvaluationConfig, None, overrides))
    result = json.loads((tokenizer_run / "result.json").read_text())
    for name in ("psnr_db", "l1", "l2", "codebook_usage", "codebook_perplexity"):
        assert figures[name] == pytest.approx(result[name], rel=1e-6), name
    assert figures["num_images"] == 6
    assert json.loads((tmp_path / "deep" / "figures.json").read_text())["psnr_db"] == figures["psnr_db"]


def test_evaluating_a_prior_gives_the_figures_of_its_own_run(prior_run: Path, code_folder: Path) -> None:
    precision = read_yaml(prior_run / "config.yaml")["mixed_precision"]
    overrides = [f"prior={prior_run}", f"codes={code_folder}", "batch_size=4", f"mixed_precision={precision}"]
    figures = evaluate(load_config(EvaluationConfig, None, overrides))
    result = json.loads((prior_run / "result.json").read_text())
    for name in ("loss", "bits_per_code", "bits_per_pixel", "perplexity", "first_order_bits_per_code"):
        assert figures[name] == pytest.approx(result[name], rel=1e-6), name


def test_figures_do_not_depend_on_the_batch_size(
    tokenizer_run: Path, prior_run: Path, image_folder: Path, code_folder: Path
) -> None:
    both = [f"tokenizer={tokenizer_run}", f"prior={prior_run}", f"codes={code_folder}", f"data.dataset={image_folder}"]
    one, five = (evaluate(load_config(EvaluationConfig, None, [*both, f"batch_size={size}"])) for size in (1, 5))
    for name in ("psnr_db", "codebook_perplexity", "bits_per_code"):
        assert one[name] == pytest.approx(five[name], rel=1e-5), name


def test_figures_of_a_prior_are_what_they_are_defined_as() -> None:
    prior, codes = tiny_prior("gpt", IMAGE), random_codes(IMAGE, 9).square() % 16
    figures = evaluate_prior(prior, codes, None, Accelerator(cpu=True), batch_size=4, image_shape=(3, 8, 48))
    with torch.no_grad():
        bits = -prior.log_prob(codes).sum().item() / (9 * 16) / math.log(2)

    def entropy_bits(codes: Tensor) -> float:
        shares = [(codes == k).double().mean().item() for k in range(16)]
        return -sum(p * math.log2(p) for p in shares if p)

    expected = {
        "loss": bits * math.log(2),
        "bits_per_code": bits,
        "bits_per_pixel": bits * 16 / (8 * 48),
        "perplexity": 2**bits,
        "first_order_bits_per_code": entropy_bits(codes),
        "per_position_bits_per_code": sum(entropy_bits(place) for place in codes.flatten(1).T) / 16,
    }
    assert figures == pytest.approx(expected, rel=1e-4)


def test_evaluating_a_prior_on_codes_of_another_tokenizer_is_refused(
    prior_run: Path, code_folder: Path, tmp_path: Path
) -> None:
    info = json.loads((code_folder / "codes.json").read_text()) | {"fingerprint": "0" * 64}
    (tmp_path / "codes.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        evaluate(load_config(EvaluationConfig, None, [f"prior={prior_run}", f"codes={tmp_path}"]))
