"""Two processes train as one does, sharded or not, and stopping them is not seen in what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ADVERSARIAL, TINY_MODEL, TINY_QUANTIZER, TINY_VQGAN, metrics, weights
from process_cases import processes
from safetensors.torch import load_file

from configs.loading import load_config
from configs.schema import PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import train_prior, train_tokenizer

pytestmark = pytest.mark.slow

STEPS = 20
RUN = ["batch_size=8", "log_every=1", "validate_every=10", "sample_every=0", "checkpoint_every=0", "warmup_steps=5"]
RUN += ["mixed_precision=no", f"steps={STEPS}", "num_samples=2"]
PRIOR = ["model.width=16", "model.num_layers=2", "model.dropout=0"]
GPT = ["model.name=gpt", "model.num_heads=2", *PRIOR]
MASKGIT = ["model.name=maskgit", "model.num_heads=2", *PRIOR, "sampling.steps=3"]
PIXELCNN = ["model.name=pixelcnn", "model.num_heads=2", "model.attention_every=1", *PRIOR]
# A low rate: what Adam makes of rounding can flip which of two codes is nearer.
VQVAE = [*TINY_MODEL, *TINY_QUANTIZER, "data.crop=random", "data.flip=true", "learning_rate=0.0003"]
REVIVAL = ["quantizer.revive_after=2", "weight_ema=0.9"]
VQGAN = [*TINY_VQGAN, *TINY_QUANTIZER, *ADVERSARIAL, "data.flip=true", "learning_rate=0.0003"]

EQUAL: dict[str, tuple[str, list[str]]] = {
    "vqvae": ("tokenizer", [*VQVAE, *REVIVAL]),
    "vqvae with gumbel noise": ("tokenizer", [*VQVAE, "quantizer.name=gumbel", "quantizer.vocab_size=16"]),
    "vqvae with batch norm": ("tokenizer", [*VQVAE, "model.norm=batch"]),
    "vqgan with discriminator": ("tokenizer", VQGAN),
    "gpt": ("prior", [*GPT, "weight_ema=0.9"]),
    "maskgit": ("prior", MASKGIT),
    "pixelcnn": ("prior", PIXELCNN),
}
"""Trainings that two processes do as one does."""
LINEAR = [name for name in EQUAL if name not in ("vqvae with batch norm", "vqgan with discriminator")]
"""Those whose terms are linear in the samples: accumulation steps do not matter either."""
SHARDED = ["gpt", "maskgit", "pixelcnn"]
RESUMED: dict[str, tuple[str, list[str]]] = {
    "vqvae": ("tokenizer", [*VQVAE, *REVIVAL, "accumulation_steps=2"]),
    "vqgan": ("tokenizer", VQGAN),
    "gpt": ("prior", [*GPT, "model.dropout=0.2", "weight_ema=0.9", "accumulation_steps=2"]),
    "gpt sharded": ("prior", [*GPT, "model.dropout=0.2", "weight_ema=0.9"]),
    "maskgit": ("prior", [*MASKGIT, "model.dropout=0.2"]),
}
FIVE = ["steps=5", "schedule=constant"]


class Trainings:
    """All trainings of two processes, done in one start of them."""

    def __init__(self, root: Path, folder: Path, image_folder: Path, code_folder: Path) -> None:
        self.root, self.folder = root, folder
        self.sources = {"tokenizer": [f"data.dataset={image_folder}", "data.image_size=16", "data.num_workers=0"]}
        self.sources["prior"] = [f"codes={code_folder}"]
        self.jobs: list[dict[str, Any]] = []

    def overrides(self, stage: str, given: list[str], name: str) -> list[str]:
        run = RUN if stage == "prior" else [option for option in RUN if not option.startswith("num_samples")]
        return [*run, *self.sources[stage], f"output_dir={self.folder / name}", *given]

    def alone(self, stage: str, given: list[str], name: str) -> Path:
        """Train here, in one process, where that has not been done yet."""
        if stage == "tokenizer":
            return train_tokenizer(load_config(TokenizerTrainingConfig, None, self.overrides(stage, given, name)))
        return train_prior(load_config(PriorTrainingConfig, None, self.overrides(stage, given, name)))

    def add(self, stage: str, given: list[str], name: str, **options: Any) -> None:
        self.jobs.append({"stage": stage, "overrides": self.overrides(stage, given, name), "name": name, **options})

    def start(self, num_processes: int = 2) -> str:
        """Do the jobs; what they printed."""
        (self.folder / "jobs.json").write_text(json.dumps(self.jobs))
        jobs, self.jobs = [str(self.folder / "jobs.json")], []
        return processes(self.root, self.root / "tests" / "training_worker.py", jobs, num_processes, timeout=900)


@pytest.fixture(scope="module")
def trainings(root: Path, tmp_path_factory: pytest.TempPathFactory, image_folder: Path, code_folder: Path) -> Trainings:
    found = Trainings(root, tmp_path_factory.mktemp("trainings"), image_folder, code_folder)
    for name, (stage, given) in EQUAL.items():
        found.add(stage, given, f"{name} by two")
    for name in LINEAR:
        stage, given = EQUAL[name]
        found.add(stage, [*given, "accumulation_steps=2"], f"{name} by two, accumulated")
    for name in SHARDED:
        found.add(*EQUAL[name], f"{name} sharded", sharded=True)
        found.add("prior", [*EQUAL[name][1], "mixed_precision=bf16"], f"{name} sharded in bfloat16", sharded=True)
    for name, (stage, given) in RESUMED.items():
        sharded = {"sharded": "sharded" in name}
        found.add(stage, [*given, *FIVE], f"{name} whole", **sharded)
        found.add(stage, [*given, *FIVE], f"{name} stopped", stop_after=2, **sharded)
        found.add(stage, [*given, *FIVE], f"{name} stopped", **sharded)
    output = found.start()
    (found.folder / "output.txt").write_text(output)
    return found


def lines(run: Path, split: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without clock times."""
    return [{k: v for k, v in line.items() if "second" not in k and k != "split"} for line in metrics(run, split)]


def require_same_losses(mine: Path, theirs: Path) -> None:
    """Every number that was logged, within 1e-4 relative, over all steps; and the validation of the final weights."""
    assert len(lines(mine, "train")) == STEPS
    for split in ("train", "validation"):
        assert [line.keys() for line in lines(mine, split)] == [line.keys() for line in lines(theirs, split)]
        for one, other in zip(lines(mine, split), lines(theirs, split), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(trainings: Trainings, name: str) -> None:
    one = trainings.alone(*EQUAL[name], f"{name} alone")
    require_same_losses(trainings.folder / f"{name} by two", one)


@pytest.mark.parametrize("name", LINEAR)
def test_two_processes_and_two_accumulation_steps_train_as_one(trainings: Trainings, name: str) -> None:
    one = trainings.alone(*EQUAL[name], f"{name} alone")
    require_same_losses(trainings.folder / f"{name} by two, accumulated", one)


@pytest.mark.parametrize("name", LINEAR)
def test_two_accumulation_steps_train_as_one(trainings: Trainings, name: str) -> None:
    stage, given = EQUAL[name]
    one = trainings.alone(stage, given, f"{name} alone")
    two = trainings.alone(stage, [*given, "accumulation_steps=2"], f"{name} accumulated alone")
    require_same_losses(two, one)


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_with_sharded_weights_train_as_one(trainings: Trainings, name: str) -> None:
    one = trainings.alone(*EQUAL[name], f"{name} alone")
    sharded = trainings.folder / f"{name} sharded"
    require_same_losses(sharded, one)
    mine, theirs = weights(sharded), weights(one)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    for part in ("model", "optimizer"):
        states = [load_file(run / last / f"{part}.safetensors") for run in (sharded, one)]
        torch.testing.assert_close(*states, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_with_sharded_weights_train_in_bfloat16_too(trainings: Trainings, name: str) -> None:
    one = trainings.alone("prior", [*EQUAL[name][1], "mixed_precision=bf16"], f"{name} alone in bfloat16")
    sharded = trainings.folder / f"{name} sharded in bfloat16"
    losses = [[line["loss"] for line in lines(run, "train")] for run in (sharded, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_that_were_stopped_equal_two_that_were_not(trainings: Trainings, name: str) -> None:
    whole, stopped = trainings.folder / f"{name} whole", trainings.folder / f"{name} stopped"
    last = Path("checkpoints") / "step-00000005"
    names = {file.name for file in (whole / last).glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors", "random-0.safetensors", "random-1.safetensors"} <= names
    for file in [last / name for name in names] + [Path("model.safetensors")]:
        mine, theirs = load_file(stopped / file), load_file(whole / file)
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert lines(stopped, "train") == lines(whole, "train")
    assert lines(stopped, "validation") == lines(whole, "validation")


def test_a_signal_to_one_process_stops_all_after_the_same_step(trainings: Trainings) -> None:
    output = (trainings.folder / "output.txt").read_text()
    assert output.count("from step 2") == len(RESUMED)
    assert output.count("stopping soon, when all processes know") == 0  # which the main process was not told


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(
    root: Path, tmp_path: Path, image_folder: Path, code_folder: Path, sharded: bool
) -> None:
    """One, then two, then one again: what one process alone would have trained, and a word on what is not exact."""
    found = Trainings(root, tmp_path, image_folder, code_folder)
    stage, given = EQUAL["gpt"]
    given = [*given, "schedule=constant"]
    found.alone(stage, [*given, "steps=6"], "run")
    found.add(stage, [*given, "steps=12"], "run", sharded=sharded)
    printed = found.start()
    assert "from step 6" in printed
    assert "this checkpoint is of 1 process(es), here are 2" in printed
    found.alone(stage, given, "run")
    mine, theirs = tmp_path / "run", found.alone(stage, given, "alone")
    assert [line["step"] for line in lines(mine, "train")] == list(range(1, STEPS + 1))
    for one, other in zip(lines(mine, "train"), lines(theirs, "train"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=1e-4)
