"""What the wrappers share: quantizers made of inner ones, built from the inner one's YAML block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.random_streams import mix
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.projection import NUM_START_VECTORS


class CompositeQuantizer(Quantizer):
    """Inner quantizers of one kind, one a level; a single one is shared by all levels.

    Args:
        quantizer: the inner quantizer: name, then its options; one code a position.
    """

    def __init__(self, dim: int, inner: list[Quantizer], code_dim: int) -> None:
        first = inner[0]
        super().__init__(dim, first.vocab_size, code_dim)
        self.inner = nn.ModuleList(inner)
        self.stochastic = first.stochastic
        self.signs_only = first.signs_only
        projected = self.signs_only and code_dim != dim
        self.num_start_vectors = NUM_START_VECTORS if projected else first.num_start_vectors

    @property
    def first(self) -> Quantizer:
        return self.inner[0]  # type: ignore[return-value]

    @property
    def active_size(self) -> int:
        return self.first.active_size

    def level(self, index: int) -> Quantizer:
        """The inner quantizer of a level."""
        return self.inner[index % len(self.inner)]  # type: ignore[return-value]

    def scale(self, exponent: float, ndim: int) -> float | Tensor:
        """The inner level_scale to a power, to divide `ndim` axes `(B, code_dim, *grid)` by."""
        base = self.first.level_scale
        if isinstance(base, Tensor):
            base = base.view(-1, *[1] * (ndim - 2))
        return base**exponent

    def anneal(self, progress: float) -> None:
        for quantizer in self.inner:
            quantizer.anneal(progress)  # type: ignore[operator]

    def update(self, step: int, seed: int = 0) -> None:
        for quantizer in self.inner:
            quantizer.update(step, seed)  # type: ignore[operator]

    def collapse_advice(self) -> str:
        return self.first.collapse_advice().replace("quantizer.", "quantizer.quantizer.")


def build_inner(options: Mapping[str, Any], dim: int) -> Quantizer:
    """A fresh inner quantizer for latents of `dim` channels."""
    from tokenizer.quantizers import QUANTIZERS, build_quantizer  # the table imports the wrappers

    if "name" not in options:
        raise ValueError(f"the quantizer inside needs a name, got {dict(options)}; give quantizer.quantizer.name=")
    if issubclass(QUANTIZERS.get(options["name"], Quantizer), CompositeQuantizer):
        plain = sorted(name for name, cls in QUANTIZERS.items() if not issubclass(cls, CompositeQuantizer))
        raise ValueError(
            f"the quantizer inside should give one code a position, but {options['name']} wraps others itself; "
            f"choose one of {', '.join(plain)}"
        )
    return build_quantizer(options, dim)


def level_seeds(seeds: Tensor | None, level: int) -> Tensor | None:
    """Seeds of a level, so that levels draw different numbers."""
    return None if seeds is None else mix(seeds, level)


@torch.no_grad()
def nearest_vectors(quantizer: Quantizer, latents: Tensor) -> Tensor:
    """The code vectors of latents `(B, code_dim, *grid)`, outside training."""
    training = quantizer.training
    quantizer.eval()
    codes = quantizer.quantize(latents, None).codes
    quantizer.train(training)
    return quantizer.embed(codes)


def as_one_image(latents: list[Tensor]) -> Tensor:
    """Latents `(B, D, *grid)` of several grids as `(1, D, N)`, for the start of a shared codebook."""
    return torch.cat([latent.movedim(1, -1).flatten(0, -2) for latent in latents]).t().unsqueeze(0)


def mean_of(outputs: list[QuantizerOutput]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and metrics by name, as means over the outputs of all levels."""

    def means(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    return means([output.losses for output in outputs]), means([output.metrics for output in outputs])
