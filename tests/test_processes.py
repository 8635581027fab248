"""Two processes under torchrun do what one does: the same weights, figures and codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ADVERSARIAL, TINY_MODEL, TINY_PRIOR, TINY_QUANTIZER, TINY_RUN, TINY_VQGAN
from process_cases import processes
from safetensors.torch import load_file

from configs.loading import load_config
from configs.schema import EncodingConfig, PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import encode_dataset, load_code_tensor, train_prior, train_tokenizer
from prior import Prior
from tokenizer import ImageTokenizer

pytestmark = pytest.mark.slow


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without clock times and names."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "split"} for line in found]


def require_same_training(one: Path, two: Path) -> None:
    """Weights, and every number that was logged or reported, within 1e-4.

    A bias before a group norm of one channel a group has no gradient but rounding, which Adam makes a whole step.
    """
    runs = (load_file(run / "model.safetensors") for run in (two, one))
    mine, theirs = ({k: v for k, v in run.items() if not k.endswith("conv1.bias")} for run in runs)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert [line.keys() for line in lines(two)] == [line.keys() for line in lines(one)]
    for ours, other in zip(lines(two), lines(one), strict=True):
        assert ours == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["quantizer.name=ema", "quantizer.revive_after=2", "data.flip=true"],
        ["quantizer.name=vq", "quantizer.revive_after=2", "weight_ema=0.9"],
    ],
    ids=["ema", "vq"],
)
def test_a_tokenizer_trained_by_two_processes_equals_that_of_one(
    root: Path, image_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    common = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "steps=4", "data.image_size=16", "mixed_precision=no"]
    common += [f"data.dataset={image_folder}", "data.num_workers=0", *options]
    one = train_tokenizer(load_config(TokenizerTrainingConfig, None, [*common, f"output_dir={tmp_path / 'one'}"]))
    printed = processes(root, "train_tokenizer.py", [*common, f"output_dir={tmp_path / 'two'}"])
    assert "2 process" in printed
    require_same_training(one, tmp_path / "two")
    assert ImageTokenizer.from_pretrained(tmp_path / "two").fingerprint
    assert len(list((tmp_path / "two" / "checkpoints" / "step-00000004").glob("random-*"))) == 2


@pytest.mark.parametrize("options", [[], ["quantize_after=2"]], ids=["discriminator", "warm-up"])
def test_a_vqgan_trained_by_two_processes_equals_that_of_one(
    root: Path, image_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    common = [*TINY_VQGAN, *ADVERSARIAL, *TINY_QUANTIZER, *TINY_RUN, "steps=4", "data.image_size=16", *options]
    common += ["mixed_precision=no", f"data.dataset={image_folder}", "data.num_workers=0", "learning_rate=0.0001"]
    one = train_tokenizer(load_config(TokenizerTrainingConfig, None, [*common, f"output_dir={tmp_path / 'one'}"]))
    processes(root, "train_tokenizer.py", [*common, f"output_dir={tmp_path / 'two'}"])
    require_same_training(one, tmp_path / "two")
    last = "checkpoints/step-00000004/second.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "two" / last), load_file(one / last), rtol=0, atol=1e-4)


def test_a_prior_trained_by_two_processes_equals_that_of_one(root: Path, code_folder: Path, tmp_path: Path) -> None:
    common = [*TINY_PRIOR, *TINY_RUN, "model.dropout=0", "steps=4", "mixed_precision=no", f"codes={code_folder}"]
    one = train_prior(load_config(PriorTrainingConfig, None, [*common, f"output_dir={tmp_path / 'one'}"]))
    printed = processes(root, "train_prior.py", [*common, f"output_dir={tmp_path / 'two'}"])
    assert "2 process" in printed
    require_same_training(one, tmp_path / "two")
    assert Prior.from_pretrained(tmp_path / "two").config.fingerprint == Prior.from_pretrained(one).config.fingerprint


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_encode_every_image_once_and_in_order(
    root: Path, image_folder: Path, tokenizer_run: Path, tmp_path: Path, num_processes: int
) -> None:
    common = [f"tokenizer={tokenizer_run}", f"data.dataset={image_folder}", "batch_size=5", "data.num_workers=0"]
    one = encode_dataset(load_config(EncodingConfig, None, [*common, f"output_dir={tmp_path / 'one'}"]))
    processes(root, "encode_dataset.py", [*common, f"output_dir={tmp_path / 'several'}"], num_processes)
    for split, count in (("train", 12), ("test", 6)):
        codes, labels = load_code_tensor(tmp_path / "several", split)
        expected, expected_labels = load_code_tensor(one, split)
        assert len(codes) == count
        assert torch.equal(codes, expected)
        assert labels is not None
        assert expected_labels is not None
        assert torch.equal(labels, expected_labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several"]


def test_a_run_of_one_process_goes_on_with_two(root: Path, image_folder: Path, tmp_path: Path) -> None:
    common = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "data.image_size=16", "mixed_precision=no", "schedule=constant"]
    common += [f"data.dataset={image_folder}", "data.num_workers=0"]

    def config(name: str, steps: int) -> TokenizerTrainingConfig:
        given = [*common, f"steps={steps}", f"output_dir={tmp_path / name}"]
        return load_config(TokenizerTrainingConfig, None, given)

    one = train_tokenizer(config("one", 4))
    train_tokenizer(config("two", 2))
    printed = processes(root, "train_tokenizer.py", [*common, "steps=4", f"output_dir={tmp_path / 'two'}"])
    assert "from step 2" in printed
    mine, theirs = load_file(tmp_path / "two" / "model.safetensors"), load_file(one / "model.safetensors")
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_a_dry_run_of_two_processes_leaves_nothing(root: Path, image_folder: Path, tmp_path: Path) -> None:
    common = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "data.image_size=16", f"data.dataset={image_folder}"]
    printed = processes(root, "train_tokenizer.py", [*common, "dry_run=true", f"output_dir={tmp_path / 'run'}"])
    assert "all went well" in printed
    assert list(tmp_path.iterdir()) == []
