"""Sharded trainings by DeepSpeed's ZeRO: what is refused before training, and that they equal a plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import TINY_MODEL, TINY_PRIOR, TINY_QUANTIZER, TINY_RUN, metrics, weights
from safetensors.torch import load_file

import pipelines.trackers
from configs.loading import load_config
from configs.schema import PriorTrainingConfig, RunConfig, TokenizerTrainingConfig
from pipelines import train_prior, train_tokenizer
from pipelines.devices import make_accelerator
from pipelines.run_folder import is_whole, seal
from pipelines.sharding import require_fsdp2
from pipelines.trackers import make_run_accelerator
from pipelines.zero import FOLDER, configure_zero, use_on_cpus


def zero_accelerator(monkeypatch: pytest.MonkeyPatch, stage: int, config: RunConfig) -> Accelerator:
    """Accelerate's object of one process as a launcher with DeepSpeed has it; the package itself is not needed."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    accelerator = make_run_accelerator(config)
    use_on_cpus(accelerator, "no")
    return accelerator


def saved_checkpoint(folder: Path, processes: int, zero: bool) -> Path:
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"processes": processes}))
    if zero:
        (folder / FOLDER).mkdir()
    return folder


# What is refused


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_tokenizer_training_that_would_be_sharded_is_refused_before_it_starts(
    kind: DistributedType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*arguments, **options) -> Accelerator:
        accelerator = make_accelerator(*arguments, **options)
        accelerator.state.distributed_type = kind
        if kind is DistributedType.DEEPSPEED:
            use_on_cpus(accelerator, "no")
        return accelerator

    monkeypatch.setattr(pipelines.trackers, "make_accelerator", launched)
    given = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "data.dataset=digits", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"tokenizer cannot be trained under .*accelerate launch --multi_gpu"):
        train_tokenizer(load_config(TokenizerTrainingConfig, None, given))
    assert not (tmp_path / "run").exists()


def test_stage_3_is_refused_in_favour_of_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stage 3 .*configs/accelerate/fsdp2\.yaml"):
        configure_zero(zero_accelerator(monkeypatch, 3, RunConfig()), RunConfig(), None)


def test_the_first_version_of_fsdp_is_refused() -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    launched: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(ValueError, match="fsdp_version=1 of the launcher should be 2: accelerate launch --config_file"):
        require_fsdp2(launched)
    state.fsdp_plugin.fsdp_version = 2
    require_fsdp2(launched)


def test_a_weight_average_is_refused_under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(weight_ema=0.9)
    with pytest.raises(ValueError, match=r"weight_ema=0\.9 .*give weight_ema=0"):
        configure_zero(zero_accelerator(monkeypatch, 2, config), config, None)


def test_a_launcher_with_deepspeed_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.zero.is_deepspeed_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"pip install 'tessera-images\[deepspeed\]'"):
        make_accelerator()


@pytest.mark.parametrize(
    ("processes", "zero", "said"),
    [
        (1, False, "is of a run without DeepSpeed, and cannot go on as 1 processes under DeepSpeed"),
        (2, True, "is of 2 processes under DeepSpeed, and cannot go on as 1 processes under DeepSpeed"),
    ],
)
def test_deepspeed_goes_on_only_with_its_own_checkpoints_of_as_many_processes(
    processes: int, zero: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = zero_accelerator(monkeypatch, 2, RunConfig())
    with pytest.raises(ValueError, match=said):
        configure_zero(accelerator, RunConfig(), saved_checkpoint(tmp_path / "step", processes, zero))
    configure_zero(accelerator, RunConfig(), saved_checkpoint(tmp_path / "fitting", 1, zero=True))


def test_a_plain_run_does_not_go_on_with_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    accelerator = make_run_accelerator(RunConfig())
    with pytest.raises(ValueError, match="cannot go on as a run without DeepSpeed"):
        configure_zero(accelerator, RunConfig(), saved_checkpoint(tmp_path / "step", 1, zero=True))
    configure_zero(accelerator, RunConfig(), saved_checkpoint(tmp_path / "fitting", 2, zero=False))


# What is passed on


def test_deepspeed_has_the_batch_and_the_clipping_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(batch_size=12, accumulation_steps=3, max_grad_norm=0.5)
    accelerator = zero_accelerator(monkeypatch, 1, config)
    configure_zero(accelerator, config, None)
    settings = accelerator.deepspeed_plugin.deepspeed_config
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 1


def test_the_accumulation_of_a_run_wins_over_that_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert make_run_accelerator(RunConfig(accumulation_steps=2)).gradient_accumulation_steps == 2


def test_the_manifest_of_a_checkpoint_covers_the_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "partial" / "zero" / "state").mkdir(parents=True)
    (tmp_path / "partial" / "state.json").write_text("{}")
    (tmp_path / "partial" / "zero" / "state" / "part.pt").write_bytes(b"moments")
    seal(tmp_path / "partial", tmp_path / "step")
    assert set(json.loads((tmp_path / "step" / "manifest.json").read_text())) == {"state.json", "zero/state/part.pt"}
    assert is_whole(tmp_path / "step")
    (tmp_path / "step" / "zero" / "state" / "part.pt").write_bytes(b"moment!")
    assert not is_whole(tmp_path / "step")
    (tmp_path / "step" / "zero" / "state" / "part.pt").unlink()
    assert not is_whole(tmp_path / "step")


# That it trains

Launch = Callable[..., Path]


@pytest.fixture
def launch(root: Path, code_folder: Path, tmp_path: Path) -> Launch:
    """Train a tiny prior into `tmp_path / name`: at stage 0 here, at others in two processes under DeepSpeed."""

    def run(name: str, stage: int, *overrides: str) -> Path:
        given = [*TINY_PRIOR, *TINY_RUN, "model.dropout=0", "schedule=constant", f"codes={code_folder}", *overrides]
        given += ["weight_decay=0.1", "max_grad_norm=0.1", f"output_dir={tmp_path / name}"]
        if stage == 0:
            return train_prior(load_config(PriorTrainingConfig, None, given))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        on_cpus = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, str(root / "scripts" / "train_prior.py"), *given],
            cwd=root,
            env=os.environ | zero | on_cpus,
            capture_output=True,
            text=True,
            timeout=600,  # the first run of all compiles an extension
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    return run


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_under_deepspeed_train_as_one_does_without(stage: int, accumulation: int, launch: Launch) -> None:
    plain = launch("plain", 0, "steps=6", "mixed_precision=no")
    zero = launch("zero", stage, "steps=6", "mixed_precision=no", f"accumulation_steps={accumulation}")
    torch.testing.assert_close(weights(zero), weights(plain), rtol=0, atol=1e-5)
    for split in ("train", "validation"):
        for ours, other in zip(metrics(zero, split), metrics(plain, split), strict=True):
            kept = [key for key in ours if key.startswith(("loss", "bits", "learning_rate"))]
            assert {key: ours[key] for key in kept} == pytest.approx({key: other[key] for key in kept}, abs=1e-4)


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_deepspeed_run_goes_on_to_the_bit_and_saves_float32(stage: int, precision: str, launch: Launch) -> None:
    whole = launch("whole", stage, "steps=4", f"mixed_precision={precision}")
    launch("stopped", stage, "steps=2", f"mixed_precision={precision}")
    stopped = launch("stopped", stage, "steps=4", f"mixed_precision={precision}")
    torch.testing.assert_close(weights(stopped), weights(whole), rtol=0, atol=0)
    checkpoint = whole / "checkpoints" / "step-00000004"
    assert is_whole(checkpoint)
    assert len(list((checkpoint / FOLDER).rglob("*optim_states.pt"))) == 2
    torch.testing.assert_close(load_file(checkpoint / "model.safetensors"), weights(whole), rtol=0, atol=0)
    assert {tensor.dtype for tensor in weights(whole).values()} == {torch.float32}
    assert "bfloat16" not in (whole / "config.json").read_text()
