"""Stopping and going on: a resumed run equals one that was never stopped, and nothing half-written is trusted."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ADVERSARIAL, TINY_MODEL, TINY_PRIOR, TINY_QUANTIZER, TINY_RUN, TINY_VQGAN
from datasets import DatasetDict
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from configs.loading import load_config
from configs.schema import PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import load_codes, train_prior, train_tokenizer
from pipelines.code_data import load_code_info, make_split

STEPS = 7

SPECTRAL = ["objective.discriminator.spectral_norm=true", "objective.discriminator.norm=batch"]
OPTIONS = {
    "ema with revival": ("tokenizer", ["quantizer.revive_after=2"]),
    "vq with revival": ("tokenizer", ["quantizer.name=vq", "quantizer.revive_after=2"]),
    "ema with accumulation and weight EMA": ("tokenizer", ["accumulation_steps=2", "weight_ema=0.9"]),
    "batches over two epochs": ("tokenizer", ["batch_size=8"]),
    "random crop and flip": ("tokenizer", ["data.crop=random", "data.flip=true", "data.num_workers=0"]),
    "batch norm": ("tokenizer", ["model.norm=batch", "weight_ema=0.9"]),
    "vqgan with discriminator": ("tokenizer", [*TINY_VQGAN, *ADVERSARIAL]),
    "discriminator with spectral norm, R1 and accumulation": (
        "tokenizer",
        [*ADVERSARIAL, *SPECTRAL, "objective.r1_weight=1", "objective.r1_every=2", "accumulation_steps=2"],
    ),
    "encoder warm-up": ("tokenizer", ["quantize_after=3", "quantizer.codebook_start=kmeans"]),
    "gpt with dropout and weight EMA": ("prior", ["model.dropout=0.2", "weight_ema=0.9"]),
    "maskgit": ("prior", ["model.name=maskgit", "model.width=16", "model.num_layers=2", "model.num_heads=2"]),
    "gpt with accumulation": ("prior", ["model.dropout=0.2", "accumulation_steps=2", "sample_every=2"]),
}

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, image_folder: Path, code_folder: Path) -> Train:
    """Train a tiny model of a stage for 7 steps into `tmp_path / name`."""

    def run(stage: str, *overrides: str, name: str = "run") -> Path:
        common = [*TINY_RUN, f"steps={STEPS}", "mixed_precision=no", f"output_dir={tmp_path / name}"]
        if stage == "prior":
            given = [*TINY_PRIOR, *common, f"codes={code_folder}", *overrides]
            return train_prior(load_config(PriorTrainingConfig, None, given))
        given = [
            *([] if "model.name=vqgan" in overrides else TINY_MODEL),
            *TINY_QUANTIZER,
            *common,
            "data.image_size=16",
            f"data.dataset={image_folder}",
            *overrides,
        ]
        return train_tokenizer(load_config(TokenizerTrainingConfig, None, given))

    return run


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Act right after the first optimizer's step number `step`, counted from 1, from inside the running step."""
    count, first = itertools.count(1), []

    def look(optimizer: Optimizer, *_: Any) -> None:
        first.append(optimizer)
        if optimizer is first[0] and next(count) == step:
            act()

    handle = register_optimizer_step_post_hook(look)
    try:
        yield
    finally:
        handle.remove()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise OSError("the power is gone")


def stopped(train: Train, step: int, stage: str, *overrides: str, name: str = "run") -> str:
    """What a run says that is asked to stop during step number `step`."""
    with after_step(step, terminate), pytest.raises(KeyboardInterrupt) as stop:
        train(stage, *overrides, name=name)
    return str(stop.value)


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without clock times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in found]


def figures(run: Path) -> dict[str, Any]:
    result = json.loads((run / "result.json").read_text())
    return {k: v for k, v in result.items() if k not in ("seconds", "peak_memory_mib")}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def require_equal_tensors(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def require_equal_runs(mine: Path, theirs: Path) -> None:
    """Bit for bit: the final model, the last checkpoint with its optimizer, every logged number."""
    require_equal_tensors(load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors"))
    last = f"checkpoints/step-{STEPS:08d}"
    states = {path.name for path in (theirs / last).glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors"} <= states
    for name in states:
        require_equal_tensors(load_file(mine / last / name), load_file(theirs / last / name))
    assert lines(mine) == lines(theirs)
    assert figures(mine) == figures(theirs)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_stopped_and_resumed_run_equals_one_that_was_not_stopped(train: Train, options: str) -> None:
    stage, overrides = OPTIONS[options]
    whole = train(stage, *overrides, name="whole")
    # Twice: after 2 steps and after 5, both in the middle of an epoch of 3.
    stopped(train, 2, stage, *overrides)
    stopped(train, 3, stage, *overrides)
    assert checkpoints(whole.parent / "run")[-1] == "step-00000005"
    require_equal_runs(train(stage, *overrides), whole)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_run_that_lost_power_goes_on_from_its_newest_checkpoint(train: Train, stage: str) -> None:
    whole = train(stage, name="whole")
    with after_step(6, crash), pytest.raises(OSError, match="power"):
        train(stage)
    assert checkpoints(whole.parent / "run") == ["step-00000002", "step-00000004"]
    assert lines(whole.parent / "run")[-1]["step"] == 5
    require_equal_runs(train(stage), whole)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_run_that_lost_power_before_its_first_checkpoint_starts_over(train: Train, stage: str) -> None:
    whole = train(stage, name="whole")
    with after_step(4, crash), pytest.raises(OSError, match="power"):
        train(stage, "checkpoint_every=0")
    require_equal_runs(train(stage), whole)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_run_stopped_in_its_last_step_has_its_figures_after_the_next_call(train: Train, stage: str) -> None:
    whole = train(stage, name="whole")
    stopped(train, STEPS, stage)
    require_equal_runs(train(stage), whole)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_finished_run_returns_at_once_and_touches_no_file(
    train: Train, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(stage)
    before = contents(run)
    assert train(stage) == run
    assert contents(run) == before
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_more_steps_go_on_from_a_finished_run_and_fewer_are_refused(train: Train, stage: str) -> None:
    run = train(stage, "steps=3", "schedule=constant")
    with pytest.raises(ValueError, match=r"3 steps behind it, more than the 2 asked for"):
        train(stage, "steps=2", "schedule=constant")
    train(stage, "schedule=constant")
    require_equal_tensors(
        load_file(run / "model.safetensors"),
        load_file(train(stage, "schedule=constant", name="whole") / "model.safetensors"),
    )
    assert [line["step"] for line in lines(run) if line["split"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert figures(run)["steps"] == 7


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed: 0 there, 1 now"),
        ("learning_rate=0.25", r"learning_rate: 0\.\d+ there, 0.25 now"),
        ("weight_ema=0.5", r"weight_ema: 0\.0 there, 0\.5 now"),
    ],
)
def test_other_values_are_refused_by_key_with_both_values(
    train: Train, stage: str, override: str, message: str
) -> None:
    stopped(train, 2, stage)
    with pytest.raises(ValueError, match=message):
        train(stage, override)


def test_a_key_that_is_younger_than_the_run_counts_as_its_default_there(train: Train, tmp_path: Path) -> None:
    stopped(train, 2, "tokenizer")
    config = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(config.read_text())
    del recorded["quantize_after"], recorded["objective"]["reconstruction_weight"]
    config.write_text(yaml.safe_dump(recorded))
    with pytest.raises(ValueError, match=r"objective.reconstruction_weight: 1.0 there, 2.0 now"):
        train("tokenizer", "objective.reconstruction_weight=2")
    assert figures(train("tokenizer"))["steps"] == STEPS


def test_steps_checkpoints_and_tracker_may_change_on_resume(train: Train) -> None:
    whole = train("tokenizer", "checkpoint_every=3", "keep_checkpoints=1", "schedule=constant", name="whole")
    stopped(train, 2, "tokenizer", "steps=5", "schedule=constant")
    free = ["checkpoint_every=3", "keep_checkpoints=1", "tracker=tensorboard", "project=mine"]
    run = train("tokenizer", *free, "schedule=constant")
    require_equal_tensors(load_file(run / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert checkpoints(run) == [f"step-{STEPS:08d}"]
    assert list((run / "mine").glob("events*"))


def test_resume_never_refuses_a_folder_that_holds_a_run(train: Train) -> None:
    stopped(train, 2, "tokenizer")
    with pytest.raises(ValueError, match=r"holds a run already, and resume=never"):
        train("tokenizer", "resume=never")
    train("tokenizer")
    with pytest.raises(ValueError, match=r"holds a run already, and resume=never"):
        train("tokenizer", "resume=never")
    assert train("tokenizer", "resume=never", name="new").is_dir()


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda checkpoint: (checkpoint / "optimizer.safetensors").unlink(),
    "a missing manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "a truncated file": lambda checkpoint: os.truncate(checkpoint / "model.safetensors", 1000),
    "an empty file": lambda checkpoint: os.truncate(checkpoint / "state.json", 0),
    "a truncated manifest": lambda checkpoint: os.truncate(checkpoint / "manifest.json", 100),
    "a flipped byte": lambda checkpoint: _flip_a_byte(checkpoint / "model.safetensors"),
    "a flipped byte of the manifest": lambda checkpoint: _flip_a_byte(checkpoint / "manifest.json"),
    "a save that never ended": lambda checkpoint: checkpoint.rename(
        checkpoint.with_name(f".{checkpoint.name}.partial")
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_passed_over_for_the_newest_whole_one(
    train: Train, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("tokenizer", name="whole")
    stopped(train, 5, "tokenizer")
    run = whole.parent / "run"
    DAMAGE[damage](run / "checkpoints" / "step-00000005")
    capsys.readouterr()
    train("tokenizer")
    assert "from step 4" in capsys.readouterr().out
    require_equal_runs(run, whole)
    assert checkpoints(run) == ["step-00000006", "step-00000007"]


def test_a_broken_checkpoint_never_pushes_out_a_whole_one(train: Train) -> None:
    whole = train("tokenizer", name="whole")
    one = ["keep_checkpoints=1", "checkpoint_every=1"]
    stopped(train, 5, "tokenizer", *one)
    run = whole.parent / "run"
    _flip_a_byte(run / "checkpoints" / "step-00000005" / "model.safetensors")
    stopped(train, 3, "tokenizer", *one)
    assert "step-00000003" in checkpoints(run)
    with after_step(1, crash), pytest.raises(OSError, match="power"):
        train("tokenizer", *one)
    assert lines(run)[-1]["step"] == 3
    require_equal_runs(train("tokenizer"), whole)


def test_a_foreign_folder_is_refused_and_left_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for stage in ("tokenizer", "prior"):
        with pytest.raises(ValueError, match=r"no run folder, but holds thesis.tex"):
            train(stage)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_run_folder_of_another_stage_is_refused_and_left_alone(
    train: Train, tokenizer_run: Path, prior_run: Path, code_folder: Path, tmp_path: Path
) -> None:
    for other, stage in ((tokenizer_run, "prior"), (prior_run, "tokenizer")):
        folder = tmp_path / "run"
        shutil.copytree(other, folder)
        before = contents(folder)
        with pytest.raises(ValueError, match="another stage"):
            train(stage)
        assert contents(folder) == before
        shutil.rmtree(folder)
    shutil.copytree(code_folder, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no run folder, but holds"):
        train("prior")


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C as a terminal gives it, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_says_where(
    train: Train, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with after_step(3, lambda: os.kill(os.getpid(), number)), pytest.raises(KeyboardInterrupt) as stop:
        train(stage, "checkpoint_every=0")
    where = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert str(where) in str(stop.value)
    assert (where / "manifest.json").is_file()
    assert not (tmp_path / "run" / "result.json").exists()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.usefixtures("foreground")
def test_a_second_signal_stops_at_once(train: Train, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with after_step(1, twice), pytest.raises(KeyboardInterrupt):
        train("tokenizer", "checkpoint_every=0")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_metrics_hold_every_step_once_however_often_a_run_is_stopped(train: Train, tmp_path: Path) -> None:
    for act, step in ((crash, 2), (terminate, 1), (crash, 4), (terminate, 2)):
        with after_step(step, act), pytest.raises((KeyboardInterrupt, OSError)):
            train("tokenizer", "checkpoint_every=3")
    # A line that a crash cut short.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    found = lines(train("tokenizer"))
    assert [line["step"] for line in found if line["split"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in found if line["split"] == "validation"] == [2, 4, 6, 7]
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)


def test_a_prior_does_not_go_on_with_codes_of_another_tokenizer(
    train: Train, tmp_path: Path, code_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = tmp_path / "codes"
    shutil.copytree(code_folder, codes)
    train("prior", f"codes={codes}")
    info = json.loads((codes / "codes.json").read_text())
    (codes / "codes.json").write_text(json.dumps(info | {"fingerprint": "0" * 64, "tokenizer": None}))
    with pytest.raises(ValueError, match="digests are the codes' tokenizer "):
        train("prior", f"codes={codes}")


def test_two_processes_cannot_train_in_one_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    hold = "import sys; from pathlib import Path; from pipelines.run_folder import lock; f = lock(Path(sys.argv[1]))"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()", str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being trained by another process"):
            train("tokenizer")
        other.kill()
    train("tokenizer")


@pytest.mark.parametrize("changed", ["train", "test"])
def test_a_tokenizer_does_not_go_on_with_images_that_changed(
    train: Train, tmp_path: Path, image_folder: Path, changed: str
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    stopped(train, 2, "tokenizer", f"data.dataset={images}")
    first, second = (images / changed / "cat" / f"{i}.png" for i in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    what = "training" if changed == "train" else "validation"
    with pytest.raises(ValueError, match=rf"was trained on other data than there is now: digests are {what} images "):
        train("tokenizer", f"data.dataset={images}")
    first.write_bytes(kept)
    assert figures(train("tokenizer", f"data.dataset={images}"))["steps"] == STEPS


def test_a_prior_does_not_go_on_with_codes_that_changed(train: Train, tmp_path: Path, code_folder: Path) -> None:
    codes, info = load_codes(code_folder), load_code_info(code_folder)
    rows = codes["train"]
    changed = make_split(np.array(rows["codes"][:])[::-1], np.array(rows["label"][:]), info)
    shutil.copytree(code_folder, tmp_path / "codes")
    stopped(train, 2, "prior", f"codes={tmp_path / 'codes'}")
    shutil.rmtree(tmp_path / "codes")
    DatasetDict(train=changed, test=codes["test"]).save_to_disk(str(tmp_path / "codes"))
    info.write(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"digests are training codes \w+ there and \w+ now"):
        train("prior", f"codes={tmp_path / 'codes'}")


def test_a_resumed_run_continues_the_curves_of_tensorboard(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with after_step(6, crash), pytest.raises(OSError, match="power"):
        train("tokenizer", "tracker=tensorboard")
    events = EventAccumulator(str(train("tokenizer", "tracker=tensorboard") / "tessera"))
    events.Reload()
    # Step 5 was logged twice: the checkpoint is of step 4.
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_resumed_run_continues_its_run_of_wandb(train: Train, tmp_path: Path) -> None:
    stopped(train, 3, "tokenizer", "tracker=wandb")
    name = json.loads((tmp_path / "run" / "tracker.json").read_text())["wandb"]
    run = train("tokenizer", "tracker=wandb")
    assert json.loads((run / "tracker.json").read_text())["wandb"] == name
    sittings = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(sittings) == 2
    assert all(re.search(rf"-{name}(-\d+)?$", sitting) for sitting in sittings)  # -1: begun in the same second
