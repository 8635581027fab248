"""Training with a discriminator, a warm-up of the encoder, checkpointing and compilation: what the options do."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    ADVERSARIAL,
    TINY_MODEL,
    TINY_QUANTIZER,
    TINY_RUN,
    TINY_VQGAN,
    metrics,
    watching_optimizer_steps,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from pipelines import train_tokenizer
from pipelines.compilation import require_compiler
from tokenizer import ImageTokenizer
from tokenizer.norm_swish import NormSwish
from tokenizer.quantizers import Quantizer

Train = Callable[..., Path]
FEW_STEPS = ["objective.adversarial_start=0", "warmup_steps=0", "schedule=constant"]


@pytest.fixture
def train(tmp_path: Path, image_folder: Path) -> Train:
    """Train a tiny VQGAN for 4 steps into `tmp_path / name`."""

    def run(*overrides: str, name: str = "run") -> Path:
        model = TINY_MODEL if "model.name=vqvae" in overrides else TINY_VQGAN
        quantizer = [] if "quantizer.name=fsq" in overrides else TINY_QUANTIZER
        given = [*model, *quantizer, *TINY_RUN, "steps=4", "data.image_size=16", "mixed_precision=no"]
        given += ["data.num_workers=0", f"data.dataset={image_folder}", f"output_dir={tmp_path / name}", *overrides]
        return train_tokenizer(load_config(TokenizerTrainingConfig, None, given))

    return run


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_each_term_is_logged_by_name_from_the_step_on_that_has_it(train):
    run = train(*ADVERSARIAL, "objective.r1_weight=0.1", "objective.r1_every=2")
    always = {"loss", "reconstruction", "commitment"}
    of_discriminator = {"adversarial", "adaptive_weight", "discriminator", "lecam", "logits_real", "logits_fake"}
    names = [set(line) & (always | of_discriminator | {"r1"}) for line in metrics(run)]
    assert names == [always, always, always | of_discriminator | {"r1"}, always | of_discriminator]


def test_a_logged_mean_is_over_the_steps_that_had_the_value(train):
    run = train(*ADVERSARIAL, "objective.adversarial_start=3", "objective.adaptive_weight_max=0.25", "log_every=4")
    (line,) = metrics(run)
    assert line["adaptive_weight"] == pytest.approx(0.25)


def test_a_start_after_the_last_step_is_refused(train):
    with pytest.raises(ValueError, match=r"objective.adversarial_start=4.0 leaves none of 4 steps to the"):
        train(*ADVERSARIAL, "objective.adversarial_start=4")


def test_a_start_of_a_share_stays_where_it_was_when_the_training_is_continued(train):
    train(*ADVERSARIAL, "objective.adversarial_start=0.5")
    run = train(*ADVERSARIAL, "objective.adversarial_start=0.5", "steps=12")
    assert [line["step"] for line in metrics(run) if "adversarial" in line] == list(range(3, 13))


def test_bfloat16_gives_about_the_losses_of_float32(train):
    options = [*ADVERSARIAL, *FEW_STEPS, "objective.reconstruction=logit_laplace", "learning_rate=1e-6", "steps=3"]
    lines = [metrics(train(*options, f"mixed_precision={p}", name=p)) for p in ("no", "bf16")]
    for exact, half in zip(*lines, strict=True):
        for name in ("reconstruction", "adversarial", "adaptive_weight", "discriminator", "logits_real"):
            assert half[name] == pytest.approx(exact[name], rel=0.05, abs=0.01), (exact["step"], name)


def test_the_logged_loss_is_the_sum_of_the_tokenizers_terms(train):
    for line in metrics(train(*ADVERSARIAL, *FEW_STEPS)):
        total = line["reconstruction"] + line["adversarial"] + line["commitment"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_discriminator_waits_in_the_checkpoint_and_not_in_the_saved_model(train):
    run = train(*ADVERSARIAL)
    assert not [name for name in weights(run) if "discriminator" in name]
    saved = load_file(run / "checkpoints" / "step-00000004" / "second.safetensors")
    assert {name.split(".")[0] for name in saved} == {"discriminator", "lecam", "first_step"}


def test_the_discriminator_has_a_learning_rate_of_its_own(train):
    """Adam's first step moves each entry by the learning rate, whatever its gradient."""
    common = [*ADVERSARIAL, *FEW_STEPS, "objective.lecam_weight=0", "steps=1", "checkpoint_every=1"]

    def discriminator(*overrides: str, name: str) -> Tensor:
        folder = train(*common, *overrides, name=name) / "checkpoints" / "step-00000001"
        return load_file(folder / "second.safetensors")["discriminator.0.weight"]

    start = discriminator("learning_rate=0.001", "objective.discriminator_learning_rate=1e-9", name="start")
    same = discriminator("learning_rate=0.001", name="same")
    other = discriminator("learning_rate=0.001", "objective.discriminator_learning_rate=0.0002", name="other")
    assert (same - start).abs().max().item() == pytest.approx(1e-3, rel=0.02)
    assert (other - start).abs().max().item() == pytest.approx(2e-4, rel=0.02)


def test_the_gradients_of_tokenizer_and_discriminator_are_each_clipped_to_the_global_norm(train):
    def norm(optimizer: Optimizer) -> float:
        return torch.stack([gradient.norm() for gradient in gradients(optimizer)]).norm().item()

    with watching_optimizer_steps(norm) as norms:
        train(*ADVERSARIAL, *FEW_STEPS, "max_grad_norm=0.001", "steps=2")
    assert norms == pytest.approx([0.001] * 4, rel=1e-2)


def test_grey_images_that_are_not_square_are_trained_on_with_a_discriminator(train):
    grey = ["model.in_channels=1", "data.image_size=[16,24]", "objective.discriminator.name=stylegan"]
    run = train(*grey, "objective.discriminator.channels=4", "objective.adversarial_weight=0.5", *FEW_STEPS, "steps=1")
    (line,) = metrics(run)
    assert all(math.isfinite(line[name]) for name in ("adversarial", "discriminator"))
    saved = load_file(run / "checkpoints" / "step-00000001" / "second.safetensors")
    assert saved["discriminator.layers.0.weight"].shape[1] == 1


def test_the_networks_are_trained_in_the_memory_order_of_channels_last(train):
    def orders(optimizer: Optimizer) -> list[bool]:
        kernels = [p for group in optimizer.param_groups for p in group["params"] if p.ndim == 4]
        return [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels]

    with watching_optimizer_steps(orders) as seen:
        train(*ADVERSARIAL, *FEW_STEPS, "steps=1")
    assert len(seen) == 2  # tokenizer and discriminator
    assert all(len(of_one) > 2 and all(of_one) for of_one in seen)


def test_tuning_the_decoder_with_a_discriminator_keeps_codes_and_fingerprint(train):
    start = train("steps=2", name="start")
    tuned = train(*ADVERSARIAL, *FEW_STEPS, f"init_from={start}", "train_only=decoder", name="tuned")
    assert moved(weights(start), weights(tuned)) == {"decoder"}
    first, second = ImageTokenizer.from_pretrained(start), ImageTokenizer.from_pretrained(tuned)
    assert first.fingerprint == second.fingerprint
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(first.encode(images), second.encode(images))


def test_a_decoder_of_another_kind_of_output_cannot_be_tuned(train):
    start = train("steps=2", name="start")
    with pytest.raises(ValueError, match=r"gives values, which does not go with objective.reconstruction=categorical"):
        train(f"init_from={start}", "train_only=decoder", "objective.reconstruction=categorical", name="tuned")


@pytest.mark.parametrize("kind", ["l1", "logit_laplace", "categorical"])
@pytest.mark.parametrize("model", ["vqvae", "vqgan"])
def test_every_reconstruction_trains_saves_and_decodes(train, kind, model):
    run = train(f"model.name={model}", f"objective.reconstruction={kind}", "steps=20", "learning_rate=0.003")
    lines = [line["reconstruction"] for line in metrics(run)]
    assert sum(lines[-3:]) < sum(lines[:3])
    tokenizer = ImageTokenizer.from_pretrained(run)
    images = tokenizer.decode(torch.zeros(1, *tokenizer.code_layout.shape, dtype=torch.int64))
    assert images.shape == (1, 3, 16, 16)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("options", [[], ["objective.adversarial=non_saturating", "objective.r1_weight=0.1"]], ids=str)
def test_accumulation_equals_the_large_batch_where_terms_are_linear_in_the_samples(train, options):
    linear = [*ADVERSARIAL, *FEW_STEPS, "objective.adaptive_weight=false", "objective.lecam_weight=0"]
    linear += [*options, "quantizer.name=fsq", "quantizer.levels=[4,4]", "quantizer.entropy_weight=0", "steps=2"]
    with watching_optimizer_steps(gradients) as one:
        train(*linear, name="one")
    with watching_optimizer_steps(gradients) as two:
        train(*linear, "accumulation_steps=2", name="two")
    assert len(one) == len(two) == 4  # of tokenizer and discriminator, in both steps
    for mine, theirs in zip(two[:2], one[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        assert max(gradient.abs().max() for gradient in theirs) > 1e-3


def test_before_it_quantizes_the_encoder_learns_without_codes(train, monkeypatch):
    started = []
    start = Quantizer.initialize
    monkeypatch.setattr(Quantizer, "initialize", lambda self, latents: started.append(1) or start(self, latents))
    run = train("quantize_after=2", "quantizer.codebook_start=kmeans", "sample_every=1")
    assert len(started) == 1
    assert ["codebook_usage" in line for line in metrics(run)] == [False, False, True, True]
    assert ["commitment" in line for line in metrics(run)] == [False, False, True, True]
    assert ["codebook_usage" in line for line in metrics(run, "validation")] == [False, True]
    assert len(list((run / "images").iterdir())) == 4


def test_the_codebook_starts_from_the_latents_of_the_encoder_that_has_warmed_up(train, monkeypatch):
    seen: list[Tensor] = []
    start = Quantizer.initialize
    monkeypatch.setattr(Quantizer, "initialize", lambda self, latents: seen.append(latents) or start(self, latents))
    options = ["quantizer.codebook_start=kmeans", "learning_rate=0.01", "warmup_steps=0"]
    train(*options, name="at once")
    train(*options, "quantize_after=2", name="later")
    assert seen[0].shape == seen[1].shape
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


def test_after_a_warm_up_the_moving_average_starts_anew_from_the_weights(train):
    options = ["weight_ema=0.6", "quantize_after=2", "checkpoint_every=1", "keep_checkpoints=4", "learning_rate=0.01"]
    run = train(*options)
    states = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (2, 3, 4)]
    saved = weights(run)
    for name in [name for name in saved if not name.startswith("quantizer.")]:
        average = 0.1 * states[1][name] + 0.9 * states[2][name]
        torch.testing.assert_close(saved[name], average, rtol=1e-5, atol=1e-6)


def test_a_warm_up_as_long_as_the_training_is_refused(train):
    with pytest.raises(ValueError, match="quantize_after=4 leaves none of 4 steps to quantize"):
        train("quantize_after=4")


def test_a_warm_up_of_a_frozen_encoder_is_refused(train):
    with pytest.raises(ValueError, match="train_only=decoder keeps the codes; leave out quantize_after=1"):
        train("quantize_after=1", "train_only=decoder", "init_from=x")


def test_a_dry_run_tries_discriminator_and_quantizer_whenever_they_begin(train, tmp_path, capsys):
    train(*ADVERSARIAL, "objective.adversarial_start=1000", "quantize_after=100", "steps=2000", "dry_run=true")
    assert "all went well" in capsys.readouterr().out
    assert list(tmp_path.glob("run*")) == []


def test_activation_checkpointing_changes_nothing_that_is_trained(train):
    common = [*ADVERSARIAL, *FEW_STEPS]
    plain, checkpointed = train(*common, name="plain"), train(*common, "activation_checkpointing=true", name="again")
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(checkpointed)[name], tensor), name


def test_activation_checkpointing_computes_the_norms_of_every_block_a_second_time(train):
    passes: dict[str, int] = {}

    def count(module: nn.Module, _: object) -> None:
        if isinstance(module, NormSwish) and module.training and torch.is_grad_enabled():
            passes[asked] = passes.get(asked, 0) + 1

    handle = register_module_forward_pre_hook(count)
    try:
        for asked in ("false", "true"):
            train(f"activation_checkpointing={asked}", "steps=1", name=asked)
    finally:
        handle.remove()
    # Encoder and decoder each have one that is in no block.
    assert passes["true"] == 2 * passes["false"] - 2 > passes["false"]


def test_activation_checkpointing_of_a_network_without_blocks_is_refused(train):
    refusal = r"activation_checkpointing=true needs a tokenizer with blocks to checkpoint \(vqgan\); vqvae has none"
    with pytest.raises(ValueError, match=refusal):
        train("model.name=vqvae", "activation_checkpointing=true")


def test_compiling_without_a_compiler_is_refused_before_training(train, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler, and there is no .*: install it"):
        train("compile=true")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_compiling_for_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_compiler(torch.device("cpu"))
    with pytest.raises(ValueError, match="compile=true on a GPU needs the package triton: pip install triton"):
        require_compiler(torch.device("cuda"))


@pytest.mark.parametrize(("r1_weight", "is_compiled"), [(0, True), (1, False)])
def test_the_discriminator_is_compiled_where_it_has_no_r1(train, monkeypatch, r1_weight, is_compiled):
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append("body of the decoder") or module)
    train(*ADVERSARIAL, *FEW_STEPS, f"objective.r1_weight={r1_weight}", "compile=true", "steps=1")
    assert compiled == ["Encoder", "body of the decoder", *(["PatchGAN"] if is_compiled else [])]


@pytest.mark.slow
def test_a_compiled_training_learns_the_same_and_keeps_its_names(train):
    common = [*ADVERSARIAL, *FEW_STEPS, "learning_rate=0.0001", "weight_ema=0.5"]
    eager, compiled = train(*common, name="eager"), train(*common, "compile=true", name="compiled")
    assert weights(compiled).keys() == weights(eager).keys()
    for name in ("loss", "reconstruction", "discriminator"):
        mine, theirs = ([line[name] for line in metrics(run)] for run in (compiled, eager))
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_perceptual_weights_that_cannot_be_had_stop_the_run_before_training(train, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file objective.perceptual_file=nowhere.pth; download https://"):
        train("objective.perceptual_weight=1", "objective.perceptual_file=nowhere.pth")
    assert not (tmp_path / "run").exists()
