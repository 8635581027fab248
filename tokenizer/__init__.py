"""Tokenizers: images to grids of integer codes and back. One file and one line in the table each."""

from collections.abc import Mapping
from typing import Any

from configs.loading import check_options
from tokenizer.base import ImageTokenizer, ImageTokenizerConfig, TokenizerOutput
from tokenizer.vqgan import VQGAN
from tokenizer.vqvae import VQVAE

TOKENIZERS: dict[str, type[ImageTokenizer]] = {
    "vqgan": VQGAN,
    "vqvae": VQVAE,
}

TOKENIZER_CONFIGS: dict[str, type[ImageTokenizerConfig]] = {name: c.config_class for name, c in TOKENIZERS.items()}


def build_tokenizer(model: Mapping[str, Any], quantizer: Mapping[str, Any], **written: Any) -> ImageTokenizer:
    """A fresh tokenizer from the YAML blocks `model` and `quantizer`, and what the training writes into its config.

    Raises:
        ValueError: for an unknown name or option, or a value out of range.
    """
    check_options("model", model, TOKENIZER_CONFIGS)
    options = {key: value for key, value in model.items() if key != "name"}
    config = TOKENIZER_CONFIGS[model["name"]](**options, quantizer=dict(quantizer), **written)
    return TOKENIZERS[model["name"]](config)


__all__ = [
    "TOKENIZERS",
    "TOKENIZER_CONFIGS",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "TokenizerOutput",
    "build_tokenizer",
]
