"""Several processes under torchrun draw the images of one, byte for byte; a failing one leaves nothing."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from process_cases import launch, processes

from configs.generation import GenerationConfig
from configs.loading import load_config
from pipelines import generate

pytestmark = pytest.mark.slow

FAILING = """
import os
import pipelines.generation
from configs.command_line import run
from configs.generation import GenerationConfig
from prior import Prior

sample = Prior.sample

def failing(prior, *arguments, **options):
    if os.environ["RANK"] == "1" and failing.calls == 1:
        raise RuntimeError("the device is gone")
    failing.calls += 1
    return sample(prior, *arguments, **options)

failing.calls = 0
Prior.sample = failing
run(pipelines.generation.generate, GenerationConfig)
"""

REFUSED = """
import sys
from accelerate import PartialState
from configs.generation import GenerationConfig
from configs.loading import load_config
from pipelines import generate
from pipelines.devices import leave_process_group

for mistake in ("labels=horse", "guidance_scale=2", "grid=[1,1]"):
    try:
        generate(load_config(GenerationConfig, None, [*sys.argv[1:], mistake]))
    except ValueError as error:
        print(error)
    # A process that was not refused would wait elsewhere, for ever.
    PartialState().wait_for_everyone()
leave_process_group()
"""


@pytest.fixture
def parts(tokenizer_run: Path, prior_run: Path) -> list[str]:
    return [f"tokenizer={tokenizer_run}", f"prior={prior_run}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SEVEN = ["num_images=7", "batch_size=2"]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ([*SEVEN, "labels=each"], (2, 3)),
        ([*SEVEN, "labels=each", "format=parquet"], (2, 3)),
        ([*SEVEN, "format=parquet"], (3,)),
        (["num_images=2", "labels=[cat,dog]", "format=parquet"], (2,)),
    ],
    ids=["png", "parquet", "without classes", "fewer batches than processes"],
)
def test_any_number_of_processes_writes_the_same_files(
    root: Path, parts: list[str], tmp_path: Path, options: list[str], counts: tuple[int, ...]
) -> None:
    common = [*parts, *options, "seed=4"]
    one = contents(generate(load_config(GenerationConfig, None, [*common, f"output_dir={tmp_path / '1'}"])))
    for count in counts:
        printed = processes(root, "generate.py", [*common, f"output_dir={tmp_path / str(count)}"], count)
        assert printed.count("images and grid.png") == 1
        found = contents(tmp_path / str(count))
        assert found.keys() == one.keys()
        assert [file for file in one if found[file] != one[file]] == []
    assert {path.name for path in tmp_path.iterdir()} == {"1", *map(str, counts)}
    if "images.parquet" in one:
        file = str(tmp_path / str(counts[-1]) / "images.parquet")
        rows = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["index"][:] == list(range(len(rows)))


def test_a_mistake_is_refused_by_every_process(root: Path, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "refused.py").write_text(REFUSED)
    # One batch: the second process has nothing to draw.
    done = processes(root, tmp_path / "refused.py", [*parts, "num_images=2", f"output_dir={tmp_path / 'samples'}"])
    for mistake in ("unknown class 'horse'", "guidance_scale=2.0 needs labels", "grid should be [rows, columns]"):
        assert done.count(mistake) == 2, mistake
    assert [path.name for path in tmp_path.iterdir()] == ["refused.py"]


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_an_error_of_one_process_leaves_nothing_behind(root: Path, parts: list[str], tmp_path: Path, form: str) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    given = [*parts, "num_images=400", "batch_size=2", f"format={form}", f"output_dir={tmp_path / 'samples'}"]
    done = launch(root, tmp_path / "failing.py", given)
    assert done.returncode != 0
    assert "the device is gone" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["failing.py"]
