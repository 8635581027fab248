"""Benchmark cases of tokenizers: an optimizer step on a batch, as the training takes it."""

from __future__ import annotations

from functools import partial
from typing import Any

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks.harness import OURS, Case, Section
from pipelines.benchmarks.tokenizer_contestants import diffusers_model, published
from pipelines.benchmarks.training_speed import tokenizer_step
from pipelines.devices import default_device, resolve_mixed_precision

VQVAE = ["model.name=vqvae", "model.residual_channels=32", "quantizer.name=ema", "quantizer.vocab_size=512"]
VQGAN = [
    "model.name=vqgan",
    "model.channels=64",
    "data.image_size=128",
    "quantizer.name=vq",
    "quantizer.vocab_size=1024",
]
LLAMAGEN = ["model.name=vqgan", "model.latent_dim=8", "data.image_size=128"]
LLAMAGEN += ["quantizer.name=vq", "quantizer.vocab_size=16384", "quantizer.distance=cosine"]
CHECKPOINTING = "activation_checkpointing=true"
DISCRIMINATOR = ["objective.adversarial_weight=0.8", "objective.adversarial_start=0"]


def _case(name: str, batch_size: int, overrides: list[str], *, peer: bool = True, **setting: Any) -> Case:
    config = load_config(TokenizerTrainingConfig, None, [*overrides, f"batch_size={batch_size}"])
    precision = resolve_mixed_precision(config.mixed_precision, default_device())
    size: dict[str, Any] = {"batch_size": batch_size, "image_size": config.data.image_size}
    size |= {"model": config.model, "quantizer": config.quantizer, "mixed_precision": precision}
    contestants = {
        OURS: partial(tokenizer_step, config),
        "reference": partial(published, config),
        "diffusers": partial(diffusers_model, config) if peer else None,
    }
    return Case(name, size | setting, batch_size, "images", contestants)


def cases(num_images: int) -> list[Case]:
    """All cases, at batches of `num_images` small or a sixteenth as many large images."""
    few = max(1, num_images // 16)
    return [
        _case("vqvae-32", num_images, VQVAE, peer=False),
        _case("vqgan-128", few, VQGAN),
        _case("vqgan-128-compiled", few, [*VQGAN, "compile=true"], compile=True),
        _case("vqgan-128-checkpointing", few, [*VQGAN, CHECKPOINTING], peer=False, activation_checkpointing=True),
        _case("vqgan-128-discriminator", few, [*VQGAN, *DISCRIMINATOR], peer=False, discriminator="patchgan"),
        _case("llamagen-vq16-128", few, LLAMAGEN),
    ]


SECTION = Section(cases, num_images=64)
