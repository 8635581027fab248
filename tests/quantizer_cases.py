"""Tiny quantizers that the tests of all of them share: each name of the table, and variants whose options matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.loading import options_of
from tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer
from tokenizer.quantizers.codebook import CodebookQuantizer

CODEBOOKS = [name for name, cls in QUANTIZERS.items() if issubclass(cls, CodebookQuantizer)]

TINY = {"vocab_size": 16, "num_bits": 4, "levels": [4, 4], "codebook_start": "normal", "revive_after": 0}

VARIANTS: dict[str, dict[str, Any]] = {name: {"name": name} for name in QUANTIZERS} | {
    "cvq-random": {"name": "cvq", "anchor": "random"},
    "cvq-probabilistic": {"name": "cvq", "anchor": "probabilistic", "decay": 0.5},
    "ema-growing": {"name": "ema", "initial_vocab_size": 4},
    "ema-rotation": {"name": "ema", "gradient": "rotation"},
    "gumbel-relaxed": {"name": "gumbel", "straight_through": False},
    "ibq-cosine": {"name": "ibq", "distance": "cosine"},
    "simvq-growing": {"name": "simvq", "initial_vocab_size": 4},
    "vq-cosine": {"name": "vq", "distance": "cosine", "code_dim": 3},
    "vq-entropy": {"name": "vq", "entropy_weight": 0.1},
    "multiscale-bsq": {"name": "multiscale", "quantizer": {"name": "bsq"}},
    "multiscale-gumbel": {"name": "multiscale", "quantizer": {"name": "gumbel"}},
    "product-lfq": {"name": "product", "quantizer": {"name": "lfq"}},
    "residual-cvq": {"name": "residual", "quantizer": {"name": "cvq", "anchor": "random"}},
    "residual-dropout": {"name": "residual", "quantizer": {"name": "vq"}, "quantizer_dropout": 0.8},
    "residual-fsq": {"name": "residual", "quantizer": {"name": "fsq"}},
    "residual-gumbel": {"name": "residual", "quantizer": {"name": "gumbel"}},
    "residual-shared": {"name": "residual", "quantizer": {"name": "ema"}, "shared": True},
}


def tiny_block(block: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A quantizer's block with those tiny options that it has, and the given ones; so is the one inside a wrapper."""
    known = options_of(QUANTIZERS[block["name"]])
    filled = {k: v for k, v in TINY.items() if k in known} | dict(block)
    filled |= {k: v for k, v in options.items() if k in known}
    if "quantizer" in known:
        filled["quantizer"] = tiny_block(block.get("quantizer", {"name": "vq"}), **options)
    return filled


def tiny_quantizer(variant: str, dim: int = 4, **options: Any) -> Quantizer:
    """The quantizer of a variant, for latents of `dim` channels, with those of the options that it has."""
    return build_quantizer(tiny_block(VARIANTS[variant], **options), dim)


def decode(quantizer: Quantizer, codes: Tensor, *grid: int) -> Tensor:
    """The latents of codes of a grid, which may be several grids' codes in one tensor."""
    return quantizer.decode(quantizer.code_layout(grid).split(codes))


def loss_of(output: QuantizerOutput) -> Tensor:
    """A scalar that depends on everything with a gradient."""
    return output.quantized.square().mean() + sum(output.losses.values())


def train_step(quantizer: Quantizer, latents: Tensor, step: int, *, num_steps: int = 6, lr: float = 0.1) -> Tensor:
    """Anneal, forward, backward, plain gradient descent and update; what `quantized` was."""
    quantizer.anneal(step / num_steps)
    output = quantizer(latents.requires_grad_(), seeds=torch.arange(len(latents)) + 1000 * step)
    loss_of(output).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= lr * parameter.grad
            parameter.grad = None
    quantizer.update(step)
    return output.quantized.detach()


def rows(latents: Tensor) -> Tensor:
    """Latents `(B, D, *grid)` as rows `(N, D)`."""
    return latents.movedim(1, -1).flatten(0, -2)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)


STOCHASTIC = [name for name in VARIANTS if tiny_quantizer(name).stochastic]
