"""The benchmark of tokenizers: every contestant trains the same network on the same work."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import ADVERSARIAL, TINY_VQGAN

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks import tokenizers
from pipelines.benchmarks.tokenizer_contestants import (
    MovingAverages,
    NearestCodes,
    PublishedAttention,
    PublishedNormSwish,
    diffusers_model,
    published,
)
from pipelines.benchmarks.training_speed import tokenizer_step
from pipelines.devices import default_device, resolve_mixed_precision
from tokenizer.norm_swish import NormSwish
from tokenizer.quantizers import build_quantizer
from tokenizer.vqgan import Attention

CASES = {case.name: case for case in tokenizers.cases(16)}


def tiny(*overrides: str) -> TokenizerTrainingConfig:
    given = [*TINY_VQGAN, "quantizer.name=vq", "quantizer.vocab_size=16", "data.image_size=16", "batch_size=2"]
    return load_config(TokenizerTrainingConfig, None, [*given, "mixed_precision=no", "learning_rate=0.003", *overrides])


@pytest.mark.parametrize("name", CASES)
def test_every_case_says_what_it_takes_to_repeat_it(name):
    case = CASES[name]
    assert {"tessera", "reference"} <= {who for who, make in case.contestants.items() if make}
    assert case.amount == case.setting["batch_size"] == (16 if name == "vqvae-32" else 1)
    assert json.loads(json.dumps(case.setting)) == case.setting


@pytest.mark.parametrize("name", CASES)
def test_every_case_trains_by_the_options_that_it_names_and_prints(name):
    case = CASES[name]
    (config, *others) = [make.args[0] for make in case.contestants.values() if make]
    assert all(other is config for other in others)
    objective = config.objective
    options = {
        "batch_size": config.batch_size,
        "image_size": config.data.image_size,
        "model": config.model,
        "quantizer": config.quantizer,
        "mixed_precision": resolve_mixed_precision(config.mixed_precision, default_device()),
        "compile": config.compile,
        "activation_checkpointing": config.activation_checkpointing,
        "discriminator": objective.discriminator["name"] if objective.adversarial_weight else None,
    }
    plain = {"compile": False, "activation_checkpointing": False, "discriminator": None}
    assert plain | case.setting == options
    assert config.compile == name.endswith("-compiled")
    assert config.activation_checkpointing == name.endswith("-checkpointing")
    assert bool(objective.adversarial_weight) == name.endswith("-discriminator")


def test_the_large_cases_are_also_measured_on_diffusers():
    assert [name for name, case in CASES.items() if case.contestants["diffusers"]] == [
        "vqgan-128",
        "vqgan-128-compiled",
        "llamagen-vq16-128",
    ]


@pytest.mark.parametrize("make", [tokenizer_step, published, diffusers_model])
def test_every_contestant_trains(make):
    step = make(tiny("warmup_steps=1", "model.channels=32"))
    losses = [float(step()) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", [tokenizer_step, published])
def test_both_train_against_a_discriminator_from_the_first_step(make):
    step = make(tiny(*ADVERSARIAL, "objective.adversarial_start=0", "warmup_steps=1"))
    losses = torch.tensor([float(step()) for _ in range(3)])
    assert losses.isfinite().all()
    assert losses.unique().numel() == 3


@pytest.mark.parametrize(("ours", "theirs"), [(Attention, PublishedAttention), (NormSwish, PublishedNormSwish)])
def test_the_published_layers_are_the_same_functions(ours, theirs):
    layer = ours(8) if ours is Attention else ours(4, 8, eps=1e-6)
    other = copy.deepcopy(layer)
    other.__class__ = theirs
    x = torch.randn(2, 8, 5, 3, requires_grad=True)
    upstream = torch.randn(2, 8, 5, 3)
    expected = torch.autograd.grad(other(x), [x, *other.parameters()], upstream)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ema", "vq"])
def test_the_published_quantizers_choose_our_codes_and_have_our_loss(name):
    quantizer = build_quantizer({"name": name, "vocab_size": 16, "codebook_start": "normal", "revive_after": 0}, 4)
    other = (MovingAverages if name == "ema" else NearestCodes)(4, 16)
    with torch.no_grad():
        if name == "ema":
            other.codebook.copy_(quantizer.codebook.t())
        else:
            other.embedding.weight.copy_(quantizer.codebook)
    latents = torch.randn(2, 4, 5, 3)
    output = quantizer(latents)
    quantized, loss = other(latents)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(torch.stack(list(output.losses.values())).sum(), loss)
