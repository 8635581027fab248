"""Training runs of both stages: what they leave on disk, and what their options do."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_MODEL, TINY_PRIOR, TINY_QUANTIZER, TINY_RUN, metrics, watching_optimizer_steps, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.loading import load_config, read_yaml
from configs.schema import PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import load_code_tensor, train_prior, train_tokenizer
from pipelines.optimization import make_optimizer
from prior import PRIORS, Prior
from tokenizer import ImageTokenizer
from tokenizer.discriminator import PatchGAN
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.ema import EMAQuantizer

Train = Callable[..., Path]

PRESETS = ROOT / "configs" / "prior"


@pytest.fixture
def tokenizer_training(tmp_path: Path, image_folder: Path) -> Train:
    """Train a tiny tokenizer for 4 steps into `tmp_path / name`."""

    def train(*overrides: str, name: str = "run") -> Path:
        given = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "steps=4", "data.image_size=16", "mixed_precision=no"]
        given += [f"data.dataset={image_folder}", f"output_dir={tmp_path / name}", *overrides]
        if any(override.startswith("epochs=") for override in overrides):
            given.remove("steps=4")
        return train_tokenizer(load_config(TokenizerTrainingConfig, None, given))

    return train


@pytest.fixture
def prior_training(tmp_path: Path, code_folder: Path) -> Train:
    """Train a tiny prior for 4 steps into `tmp_path / name`."""

    def train(*overrides: str, name: str = "run") -> Path:
        given = [*TINY_PRIOR, *TINY_RUN, "steps=4", "mixed_precision=no", f"codes={code_folder}"]
        given += [f"output_dir={tmp_path / name}", *overrides]
        if any(override.startswith("epochs=") for override in overrides):
            given.remove("steps=4")
        return train_prior(load_config(PriorTrainingConfig, None, given))

    return train


@pytest.fixture(params=["tokenizer_training", "prior_training"])
def training(request: pytest.FixtureRequest) -> Train:
    """Each of the two stages."""
    return request.getfixturevalue(request.param)


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.stack(gradients).norm().item()


def test_a_run_folder_holds_what_the_design_promises(training: Train) -> None:
    run = training("steps=6", "sample_every=3", "mixed_precision=auto", "keep_checkpoints=2")
    assert read_yaml(run / "config.yaml")["mixed_precision"] in ("no", "bf16")
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics(run, "validation")] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) and line["images_per_second"] > 0 for line in metrics(run, "train"))
    pictures = sorted((run / "images").iterdir())
    assert [picture.stem.rpartition("-")[2] for picture in pictures] == ["00000003", "00000006"]
    for picture in pictures:
        with Image.open(picture) as opened:
            assert min(opened.size) >= 16
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert json.loads((run / "config.json").read_text())["model_type"].startswith("tessera-")
    assert weights(run)
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 6
    last = metrics(run, "validation")[-1]
    assert {key: result[key] for key in last if key not in ("step", "split", "seconds")} == {
        key: value for key, value in last.items() if key not in ("step", "split", "seconds")
    }
    assert not [p for p in run.rglob("*") if "partial" in p.name]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_follows_its_closed_form(training: Train, schedule: str, warmup: int) -> None:
    with watching_optimizer_steps(lambda optimizer: optimizer.param_groups[0]["lr"]) as used:
        run = training("steps=6", f"schedule={schedule}", f"warmup_steps={warmup}", "learning_rate=0.01")
    expected = []
    for step in range(6):
        rate = 0.01 * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        if schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (6 - warmup)))
        expected.append(rate)
    assert used == pytest.approx(expected, abs=1e-12)
    assert [line["learning_rate"] for line in metrics(run, "train")] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("quantizer", "learned", "scale"),
    [("vq", "quantizer.codebook", 10), ("simvq", "quantizer.projection.weight", 5)],
)
def test_a_codebook_learns_by_a_multiple_of_the_learning_rate(tokenizer_training, quantizer, learned, scale):
    """Adam's first step moves each entry by the learning rate, whatever its gradient."""
    common = [f"quantizer.name={quantizer}", "quantizer.codebook_start=normal", "quantizer.revive_after=0"]
    common += ["steps=1", "warmup_steps=0", "schedule=constant", "learning_rate=0.0001"]
    start = weights(tokenizer_training(*common, "learning_rate=1e-9", name="start"))
    for factor, more in ((scale, []), (3, ["quantizer.codebook_learning_rate=3"])):
        after = weights(tokenizer_training(*common, *more, name=f"by{factor}"))
        moved = {
            name: (after[name] - start[name]).abs().max().item() for name in start if start[name].is_floating_point()
        }
        assert moved[learned] == pytest.approx(factor * 1e-4, rel=0.02)
        assert moved["encoder.0.weight"] == pytest.approx(1e-4, rel=0.02)


def test_weight_decay_shrinks_matrices_of_linear_and_convolution_layers_only(training: Train) -> None:
    vq = ["quantizer.name=vq"] if "tokenizer" in training.__qualname__ else []
    common = [*vq, "steps=1", "warmup_steps=0", "schedule=constant", "learning_rate=0.01"]
    start = training(*common, name="start")
    without = weights(training(*common, f"init_from={start}", "weight_decay=0", name="without"))
    decayed = weights(training(*common, f"init_from={start}", "weight_decay=0.5", name="decayed"))
    kind: Any = ImageTokenizer if vq else Prior
    matrices = {
        f"{name}.weight"
        for name, module in kind.from_pretrained(start).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    assert 0 < len(matrices) < len(without)
    for name, before in weights(start).items():
        shrunk = -0.01 * 0.5 * before if name in matrices else torch.zeros_like(before)
        torch.testing.assert_close(decayed[name].float() - without[name].float(), shrunk.float(), rtol=1e-4, atol=1e-7)


def test_weight_decay_reaches_what_stands_behind_a_spectral_norm() -> None:
    plain, normed = (PatchGAN(3, (16, 16), channels=4, num_layers=1, spectral_norm=wanted) for wanted in (False, True))
    config = load_config(TokenizerTrainingConfig, None, ["weight_decay=0.1"])
    for model in (plain, normed):
        groups = make_optimizer(config, model).param_groups
        assert {(g["weight_decay"], len(g["params"])) for g in groups} == {(0.1, 3), (0.0, 3)}


def test_the_saved_model_is_the_moving_average_of_the_weights(training: Train) -> None:
    run = training("weight_ema=0.6", "checkpoint_every=1", "keep_checkpoints=4", "learning_rate=0.01")
    states = [checkpoint(run, step) for step in (1, 2, 3, 4)]
    kind: Any = ImageTokenizer if "quantizer.codebook" in states[0] else Prior
    parameters = {name for name, _ in kind.from_pretrained(run).named_parameters()}
    saved = weights(run)
    for name in states[0]:
        average = states[0][name]
        for update, state in enumerate(states[1:], start=1):
            decay = update / (9 + update)
            # Buffers, such as an EMA codebook, are those of the last step.
            average = decay * average + (1 - decay) * state[name] if name in parameters else state[name]
        torch.testing.assert_close(saved[name], average, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(saved[name], states[-1][name]) for name in parameters)


def test_two_accumulation_steps_give_the_weights_of_one(training: Train) -> None:
    options = ["quantizer.name=vq"] if "tokenizer" in training.__qualname__ else ["model.dropout=0"]
    with watching_optimizer_steps(gradient_norm) as once:
        one = training(*options, "accumulation_steps=1", name="one")
    with watching_optimizer_steps(gradient_norm) as twice:
        two = training(*options, "accumulation_steps=2", name="two")
    assert len(once) == len(twice) == 4
    assert twice == pytest.approx(once, rel=1e-2)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)
    for mine, theirs in zip(metrics(one, "train"), metrics(two, "train"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_the_quantizer_is_annealed_before_and_updated_after_all_micro_batches_of_each_optimizer_step(
    tokenizer_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(EMAQuantizer):
        def anneal(self, progress: float) -> None:
            calls.append(("anneal", progress))
            super().anneal(progress)

        def observe(self, vectors: Tensor, codes: Tensor) -> None:
            calls.append("micro-batch")
            super().observe(vectors, codes)

        def update(self, step: int, seed: int = 0) -> None:
            calls.append(("update", step))
            super().update(step, seed)

    calls: list[Any] = []
    monkeypatch.setitem(QUANTIZERS, "ema", Watched)
    with watching_optimizer_steps(lambda _: calls.append("optimizer step")):
        tokenizer_training("accumulation_steps=2", "validate_every=0")
    expected: list[Any] = []
    for step in range(4):
        expected += [("anneal", (step + 1) / 4), "micro-batch", "micro-batch", "optimizer step", ("update", step)]
    assert calls == expected


def test_a_start_by_kmeans_takes_batches_until_it_has_64_vectors_a_code(
    tokenizer_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(EMAQuantizer):
        def start(self, latents: Tensor) -> None:
            started.append(latents.numel() // latents.shape[1])
            super().start(latents)

    started: list[int] = []
    monkeypatch.setitem(QUANTIZERS, "ema", Watched)
    tokenizer_training("steps=1")  # 16 codes, and 64 vectors a batch
    assert started == [16 * 64]


def test_gradients_are_clipped_to_the_global_norm_and_zero_is_off(training: Train) -> None:
    with watching_optimizer_steps(gradient_norm) as clipped:
        training("max_grad_norm=0.001", "accumulation_steps=2", name="clipped")
    with watching_optimizer_steps(gradient_norm) as free:
        training("max_grad_norm=0", "accumulation_steps=2", name="free")
    assert clipped == pytest.approx([0.001] * 4, rel=1e-2)
    assert min(free) > 0.002


def test_tuning_the_decoder_keeps_every_code(tokenizer_training: Train, tokenizer_run: Path) -> None:
    run = tokenizer_training(f"init_from={tokenizer_run}", "train_only=decoder", "learning_rate=0.01", "steps=3")
    before, after = weights(tokenizer_run), weights(run)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("decoder."), name
    assert ImageTokenizer.from_pretrained(run).fingerprint == ImageTokenizer.from_pretrained(tokenizer_run).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "model.channels=16",
        "model.num_residual_blocks=1",
        "quantizer.vocab_size=32",
        "quantizer.name=vq",
        "data.image_size=32",
        "data.interpolation=nearest",
        "data.background=black",
    ],
)
def test_tuning_the_decoder_refuses_options_that_contradict_the_saved_tokenizer(
    tokenizer_training: Train, tokenizer_run: Path, override: str
) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"{key}.*{value}"):
        tokenizer_training(f"init_from={tokenizer_run}", "train_only=decoder", override)


def test_init_from_copies_the_weights(training: Train) -> None:
    start = training("learning_rate=0.1", name="start")
    copy = training(f"init_from={start}", "seed=5", "steps=1", "learning_rate=1e-9", "weight_decay=0", name="copy")
    fresh = training("seed=5", "steps=1", "learning_rate=1e-9", "weight_decay=0", name="fresh")
    before, after, other = weights(start), weights(copy), weights(fresh)
    learned = [name for name in before if not name.startswith("quantizer.")]
    for name in learned:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    assert any(not torch.allclose(other[name], before[name], atol=1e-3) for name in learned)


@pytest.mark.parametrize(
    ("stage", "override", "name"),
    [
        ("tokenizer_training", "model.channels=16", "decoder.0.bias"),
        ("tokenizer_training", "quantizer.vocab_size=32", "quantizer.cluster_size"),
        ("prior_training", "model.width=32", "class_embedding.weight"),
    ],
)
def test_init_from_names_the_tensors_that_do_not_fit(
    request: pytest.FixtureRequest, stage: str, override: str, name: str
) -> None:
    training: Train = request.getfixturevalue(stage)
    start = training("steps=1", name="start")
    with pytest.raises(ValueError, match=rf"init_from=.*{name}"):
        training(f"init_from={start}", override, name="copy")


@pytest.mark.parametrize(("epochs", "steps"), [(2, 6), (0.5, 2), (0.01, 1), (1.25, 4)])
def test_epochs_are_passes_over_the_training_split(training: Train, epochs: float, steps: int) -> None:
    run = training(f"epochs={epochs}", "validate_every=0")
    assert json.loads((run / "result.json").read_text())["steps"] == steps
    assert metrics(run, "train")[-1]["step"] == steps


def test_a_dry_run_does_a_checkpoint_and_a_picture_and_leaves_nothing(
    training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: set[str] = set()
    remove = shutil.rmtree

    def remember_and_remove(folder: Any, *args: Any, **kwargs: Any) -> None:
        removed.update(path.name for path in Path(folder).rglob("*"))
        remove(folder, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", remember_and_remove)
    training("dry_run=true", "steps=1000", "sample_every=0", "checkpoint_every=0")
    assert {"step-00000002", "result.json", "config.json", "model.safetensors", "metrics.jsonl"} <= removed
    assert any(name.endswith("-00000002.png") for name in removed)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_and_a_picture(training: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = training("tracker=tensorboard", "project=mine")
    events = EventAccumulator(str(run / "mine"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [
        event.step
        for event in events.Scalars("validation/loss" if "prior" in training.__qualname__ else "validation/l2")
    ]
    assert len(events.Tags()["images"]) == 1


@pytest.mark.slow
def test_wandb_offline_writes_under_its_own_folder_only(
    tokenizer_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tracked").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tokenizer_training("tracker=wandb")
    assert list((tmp_path / "tracked" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not list(run.rglob("*wandb*"))


def test_without_a_tracker_nothing_of_wandb_is_imported(training: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    training("steps=1")
    assert "wandb" not in sys.modules


def test_fp16_on_a_cpu_is_refused(training: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixed_precision=fp16 needs a GPU"):
        training("mixed_precision=fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "tensor"), [("tokenizer_training", "decoder.0.bias"), ("prior_training", "head.weight")]
)
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_learning_rate(
    request: pytest.FixtureRequest, stage: str, tensor: str
) -> None:
    training: Train = request.getfixturevalue(stage)
    start = training("steps=1", name="start")
    broken = weights(start)
    broken[tensor].fill_(float("nan"))
    save_file(broken, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"loss is nan.*learning_rate"):
        training(f"init_from={start}", name="broken")


def test_a_prior_draws_samples_with_the_tokenizer_recorded_beside_the_codes(prior_training: Train) -> None:
    run = prior_training("num_samples=4", "sample_every=2")
    assert sorted(p.name for p in (run / "images").iterdir()) == ["samples-00000002.png", "samples-00000004.png"]


def test_a_prior_whose_tokenizer_is_gone_says_that_it_draws_no_pictures(
    prior_training: Train, code_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = tmp_path / "codes"
    shutil.copytree(code_folder, codes)
    info = json.loads((codes / "codes.json").read_text()) | {"tokenizer": str(tmp_path / "gone")}
    (codes / "codes.json").write_text(json.dumps(info))
    run = prior_training(f"codes={codes}", "sample_every=2")
    assert "none: the tokenizer recorded beside the codes" in capsys.readouterr().out
    assert not (run / "images").exists()
    with pytest.raises(ValueError, match="gone"):
        prior_training(f"codes={codes}", f"tokenizer={tmp_path / 'gone'}", name="other")


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_preset_of_a_prior_trains_validates_and_draws(
    preset: Path, code_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"codes={code_folder}", f"output_dir={tmp_path / 'run'}", "steps=2", "batch_size=4", "num_samples=2"]
    given += ["sample_every=0", "validate_every=1", "mixed_precision=no", "model.width=16", "model.num_layers=2"]
    given += [] if "pixelcnn" in preset.name else ["model.num_heads=2"]
    run = train_prior(load_config(PriorTrainingConfig, preset, given))
    assert type(Prior.from_pretrained(run)) is PRIORS[read_yaml(preset)["model"]["name"]]
    assert [picture.name for picture in (run / "images").iterdir()] == ["samples-00000002.png"]
    figures = metrics(run, "validation")[-1]
    ending = "_bound" if "maskgit" in preset.name else ""
    known = {"loss", "bits_per_code", "bits_per_pixel", "perplexity"}
    assert {name.removesuffix("_bound") for name in figures} >= known
    assert {name for name in figures if name.removesuffix("_bound") in known} == {name + ending for name in known}
    assert figures[f"bits_per_pixel{ending}"] == pytest.approx(figures[f"bits_per_code{ending}"] * 16 / (16 * 16))
    assert figures[f"perplexity{ending}"] == pytest.approx(2 ** figures[f"bits_per_code{ending}"])
    printed = capsys.readouterr().out
    assert ("bits per code at most (a bound)" in printed) == bool(ending)


def test_a_prior_draws_its_samples_by_its_sampling_options_of_each_class_in_turn(
    prior_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, sample = [], Prior.sample

    def watched(prior: Prior, batch_size: int, labels: Tensor, **options: Any) -> Tensor:
        seen.append((batch_size, labels.tolist(), options["temperature"], options["guidance_scale"]))
        return sample(prior, batch_size, labels, **options)

    monkeypatch.setattr(Prior, "sample", watched)
    prior_training("num_samples=5", "sampling.temperature=[1.5,0.5]", "sampling.guidance_scale=2")
    assert seen == [(5, [0, 1, 0, 1, 0], [1.5, 0.5], 2)]


def test_the_saved_prior_is_measured_on_the_validation_split(prior_training: Train, code_folder: Path) -> None:
    run = prior_training("weight_ema=0.6", "learning_rate=0.01")
    codes, labels = load_code_tensor(code_folder, "test")
    with torch.no_grad():
        expected = Prior.from_pretrained(run).eval()(codes.long(), labels).loss
    assert metrics(run, "validation")[-1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_prior_is_not_measured_on_the_split_that_it_is_trained_on(prior_training: Train) -> None:
    assert metrics(prior_training("split=test"), "validation") == []


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_split_that_is_called_validation_is_found(
    prior_training: Train, code_folder: Path, tmp_path: Path, name: str
) -> None:
    codes = tmp_path / "codes"
    shutil.copytree(code_folder, codes)
    (codes / "test").rename(codes / name)
    (codes / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    run = prior_training(f"codes={codes}", "steps=1")
    assert len(metrics(run, "validation")) == 1


def test_a_prior_refuses_a_tokenizer_with_another_fingerprint(
    prior_training: Train, tiny_tokenizer: ImageTokenizer, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"stranger is not the one that made .*fingerprints differ"):
        prior_training(f"tokenizer={tmp_path / 'stranger'}")


def test_a_prior_refuses_sampling_options_that_its_sample_does_not_have(prior_training: Train) -> None:
    with pytest.raises(ValueError, match=r"sampling.temprature.*did you mean 'sampling.temperature'"):
        prior_training("sampling.temprature=0.5")
    with pytest.raises(ValueError, match="label_dropout"):
        prior_training("sampling.guidance_scale=2", "model.label_dropout=0")
