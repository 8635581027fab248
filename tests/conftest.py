"""Tiny real objects that the tests share: seeded, on the CPU, built in milliseconds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before any import of the libraries: a test never asks a server for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="tessera-tests-"))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from configs.loading import load_config
from configs.schema import EncodingConfig, PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import encode_dataset, train_prior, train_tokenizer
from tokenizer import ImageTokenizer, build_tokenizer

# Tiny tensors gain nothing from a second thread, and two suites at once lose a lot.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent

TINY_MODEL = ["model.name=vqvae", "model.channels=8", "model.residual_channels=4", "model.latent_dim=4"]
TINY_VQGAN = ["model.name=vqgan", "model.channels=8", "model.channel_multipliers=[1,2]", "model.num_residual_blocks=1"]
TINY_VQGAN += ["model.z_channels=8", "model.latent_dim=4"]
ADVERSARIAL = ["objective.adversarial_weight=0.5", "objective.adversarial_start=2", "objective.lecam_weight=0.1"]
ADVERSARIAL += ["objective.discriminator.channels=4", "objective.discriminator.num_layers=1"]
TINY_QUANTIZER = ["quantizer.name=ema", "quantizer.vocab_size=16"]
TINY_RUN = ["batch_size=4", "log_every=1", "validate_every=2", "sample_every=0", "checkpoint_every=2", "warmup_steps=2"]
TINY_PRIOR = ["model.name=gpt", "model.width=16", "model.num_layers=2", "model.num_heads=2"]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def metrics(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about a split."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@contextmanager
def watching_optimizer_steps(look: Callable[[torch.optim.Optimizer], Any]) -> Iterator[list[Any]]:
    """What `look` says of the optimizer right before each of its steps."""
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(look(optimizer)))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def tiny_tokenizer() -> ImageTokenizer:
    """A VQ-VAE of 16x16 colour images with 4x4 codes of 16, in eval mode."""
    model = {"name": "vqvae", "channels": 8, "residual_channels": 4, "latent_dim": 4, "downsampling_factor": 4}
    return build_tokenizer(model, {"name": "ema", "vocab_size": 16}, image_size=16).eval()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `train/` and `test/`, each with the classes cat and dog: 12 and 6 RGB PNGs of 20x24 pixels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """The run folder of a tiny tokenizer trained for 4 steps on `image_folder` at 16x16 pixels."""
    output = tmp_path_factory.mktemp("runs") / "tokenizer"
    overrides = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "steps=4", "data.image_size=16"]
    return train_tokenizer(
        load_config(TokenizerTrainingConfig, None, [*overrides, f"data.dataset={image_folder}", f"output_dir={output}"])
    )


@pytest.fixture(scope="session")
def code_folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, tokenizer_run: Path) -> Path:
    """The code dataset of `image_folder` by `tokenizer_run`: splits train (12) and test (6), 4x4 codes of 16."""
    output = tmp_path_factory.mktemp("runs") / "codes"
    overrides = [f"tokenizer={tokenizer_run}", f"data.dataset={image_folder}", f"output_dir={output}"]
    return encode_dataset(load_config(EncodingConfig, None, overrides))


@pytest.fixture(scope="session")
def prior_run(tmp_path_factory: pytest.TempPathFactory, code_folder: Path) -> Path:
    """The run folder of a tiny class-conditional GPT trained for 4 steps on `code_folder`."""
    output = tmp_path_factory.mktemp("runs") / "prior"
    overrides = [*TINY_PRIOR, *TINY_RUN, "steps=4", f"codes={code_folder}", f"output_dir={output}"]
    return train_prior(load_config(PriorTrainingConfig, None, overrides))
