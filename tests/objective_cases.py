"""Tiny objectives that their tests share: a tokenizer of 16x16 pixels, and stand-ins whose values are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.objective import ObjectiveConfig
from tokenizer import ImageTokenizer, build_tokenizer
from tokenizer.objective import TokenizerObjective

PATCHGAN = {"name": "patchgan", "channels": 4, "num_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vqgan": {"channels": 4, "channel_multipliers": [1, 1], "num_residual_blocks": 1, "z_channels": 4, "latent_dim": 4},
    "vqvae": {"channels": 8, "residual_channels": 4, "num_residual_blocks": 1, "latent_dim": 4},
}
ADVERSARIAL: dict[str, Any] = {"adversarial_weight": 1.0, "adversarial_start": 0.0, "discriminator": PATCHGAN}
PLAIN: dict[str, Any] = ADVERSARIAL | {"adaptive_weight": False}


class FourthPowers(nn.Module):
    """In place of LPIPS: mean (x - y)^4."""

    def __init__(self, file: str | None = None) -> None:
        super().__init__()
        self.file = file

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).pow(4).mean()


class MeanPixel(nn.Module):
    """In place of a discriminator: logits `(B, 1)` are weight * mean pixel; it remembers what it is given."""

    def __init__(self, weight: float = 3.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.batches: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(images.detach().clone())
        return self.weight * images.mean((1, 2, 3)).unsqueeze(1)


def make(
    name: str = "vqgan", total_steps: int = 100, stand_in: nn.Module | None = None, **options: Any
) -> tuple[TokenizerObjective, ImageTokenizer]:
    """The objective, with a stand-in for its discriminator where one is given, and its tokenizer."""
    config = ObjectiveConfig(**options)
    block = {"name": "vq", "vocab_size": 16, "revive_after": 0}
    tokenizer = build_tokenizer(
        {"name": name, **MODELS[name]}, block, image_size=16, decoder_output=config.decoder_output
    ).train()
    objective = TokenizerObjective(config, tokenizer, total_steps)
    if stand_in is not None:
        assert objective.adversary is not None
        objective.adversary.discriminator = stand_in
    return objective, tokenizer


def images_for(tokenizer: ImageTokenizer, batch_size: int = 4) -> Tensor:
    return torch.rand(batch_size, *tokenizer.image_shape) * 2 - 1


def losses_of(objective: TokenizerObjective, images: Tensor, step: int = 0) -> dict[str, Tensor]:
    return objective.tokenizer_losses(images, objective.tokenizer(images), step)[0]


def gradients_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """By name, zeros where there is none."""
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(parameters.items(), found, strict=True)}


def assert_mean_of_halves(whole: dict[str, Tensor], halves: list[dict[str, Tensor]]) -> None:
    """The gradient of a batch is the mean of those of its two micro-batches."""
    largest = max(gradient.abs().max() for gradient in whole.values())
    assert largest > 1e-4
    for name, gradient in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5 * float(largest), msg=name)
