"""Tiny pipelines that several files of tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from prior_cases import tiny_prior

from pipelines import ImageGenerationPipeline
from tokenizer import build_tokenizer

TOKENIZERS: dict[str, dict[str, Any]] = {
    "one grid": {"name": "ema", "vocab_size": 16},
    "depth": {"name": "residual", "depth": 2, "quantizer": {"name": "vq", "vocab_size": 16}},
    "several grids": {
        "name": "multiscale",
        "scales": [1, 2, 4],
        "num_convolutions": 1,
        "quantizer": {"name": "vq", "vocab_size": 16},
    },
}


def make_pipeline(quantizer: str = "one grid", prior: str = "gpt", image_size: int = 16) -> ImageGenerationPipeline:
    """A pipeline of a VQ-VAE with patches of 4 pixels and a prior with the classes cat and dog."""
    model = {"name": "vqvae", "channels": 8, "residual_channels": 4, "latent_dim": 4, "downsampling_factor": 4}
    tokenizer = build_tokenizer(model, TOKENIZERS[quantizer], image_size=image_size).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made = tiny_prior(prior, tokenizer.code_layout, num_classes=2)
    made.config.class_names, made.config.fingerprint = ["cat", "dog"], tokenizer.fingerprint
    pipeline = ImageGenerationPipeline(tokenizer, made)
    pipeline.progress_bar = False
    return pipeline


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
