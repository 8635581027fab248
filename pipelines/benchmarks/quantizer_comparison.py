"""All quantizers in the same network, on the same images, for the same number of steps: a table for the README."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from torch import Tensor

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from configs.validation import Count, Schema, did_you_mean
from pipelines.benchmarks.harness import alternate
from pipelines.benchmarks.training_speed import tokenizer_step
from pipelines.devices import default_device
from pipelines.tokenizer_training import train_tokenizer
from tokenizer import ImageTokenizer
from tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput

PEER = "vector-quantize-pytorch"

TEN_BITS: dict[str, dict[str, Any]] = {
    PEER: {"name": PEER, "vocab_size": 1024},
    f"{PEER}, straight-through": {"name": PEER, "vocab_size": 1024, "rotation_trick": False},
    "ema": {"name": "ema", "vocab_size": 1024},
    "vq": {"name": "vq", "vocab_size": 1024},
    "vq, cosine, 8 channels": {"name": "vq", "vocab_size": 1024, "distance": "cosine", "code_dim": 8},
    "vq, rotation trick": {"name": "vq", "vocab_size": 1024, "gradient": "rotation"},
    "cvq": {"name": "cvq", "vocab_size": 1024},
    "simvq": {"name": "simvq", "vocab_size": 1024},
    "ibq": {"name": "ibq", "vocab_size": 1024},
    "gumbel": {"name": "gumbel", "vocab_size": 1024},
    "fsq": {"name": "fsq", "levels": [4, 4, 4, 4, 4]},
    "lfq": {"name": "lfq", "num_bits": 10},
    "bsq": {"name": "bsq", "num_bits": 10},
    "residual": {"name": "residual", "depth": 2, "quantizer": {"name": "ema", "vocab_size": 32}},
    "product": {"name": "product", "depth": 2, "quantizer": {"name": "ema", "vocab_size": 32}},
    "multiscale": {"name": "multiscale", "quantizer": {"name": "vq", "vocab_size": 1024}},
}
"""Quantizers of 10 bits a position, multiscale apart, which has several grids."""

ALIVE: dict[str, dict[str, Any]] = {
    "ema, 512 codes": {"name": "ema", "vocab_size": 512},
    "ema, 8192 codes": {"name": "ema", "vocab_size": 8192},
    "cvq, 512 codes": {"name": "cvq", "vocab_size": 512},
    "cvq, 8192 codes": {"name": "cvq", "vocab_size": 8192},
    "simvq, 512 codes": {"name": "simvq", "vocab_size": 512},
    "simvq, 8192 codes": {"name": "simvq", "vocab_size": 8192},
    "fsq, 512 codes": {"name": "fsq", "levels": [8, 8, 8]},
    "fsq, 8192 codes": {"name": "fsq", "levels": [8, 8, 8, 4, 4]},
    "lfq, 512 codes": {"name": "lfq", "num_bits": 9},
    "lfq, 8192 codes": {"name": "lfq", "num_bits": 13},
}
"""Whether codes stay in use where nothing but the size of the vocabulary is chosen."""

TABLES = {"ten_bits": TEN_BITS, "alive": ALIVE}


class PeerEMA(Quantizer):
    """The moving-average codebook of vector-quantize-pytorch, with k-means start and revival.

    Args:
        vocab_size: K, codes in the codebook.
        rotation_trick: as it is by default there; otherwise straight-through.
    """

    def __init__(self, dim: int, *, vocab_size: int = 512, rotation_trick: bool = True) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(dim, vocab_size)
        options = {"kmeans_init": True, "threshold_ema_dead_code": 2, "decay": 0.99, "commitment_weight": 0.25}
        self.peer = VectorQuantize(dim=dim, codebook_size=vocab_size, rotation_trick=rotation_trick, **options)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        B, _, *grid = latents.shape
        quantized, codes, loss = self.peer(latents.movedim(1, -1).flatten(1, -2))
        return QuantizerOutput(
            quantized.view(B, *grid, -1).movedim(-1, 1), codes.view(B, *grid), {"commitment": loss.sum()}
        )

    def embed(self, codes: Tensor) -> Tensor:
        return self.peer.get_codes_from_indices(codes).movedim(-1, 1)


@dataclass
class ComparisonConfig(Schema):
    """Train a tokenizer with each quantizer and print what came of it; a finished row is not trained again.

    images/s is measured afterwards, with steps of all rows taking turns in one process.
    """

    dataset: str
    """The images, as data.dataset= of the training."""
    config: str = "configs/tokenizer/cifar10_vqvae.yaml"
    """The tokenizer's preset; its quantizer is replaced."""
    overrides: list[str] = field(default_factory=list)
    """More key=value pairs for every training."""
    steps: Count = 2000
    """Optimizer steps of each."""
    output_dir: str = "runs/comparison"
    """A run folder for each row is made in here."""
    table: Literal["ten_bits", "alive"] = "ten_bits"
    """All quantizers at 10 bits a position, or the use of small and large vocabularies."""
    rows: list[str] | None = None
    """Which rows of the table; by default all."""

    def validate(self) -> None:
        for row in self.rows or []:
            if row not in TABLES[self.table]:
                raise ValueError(did_you_mean(row, TABLES[self.table], "row"))


def compare_quantizers(config: ComparisonConfig) -> str:
    """Train each row's tokenizer; returns and prints a Markdown table."""
    # Only here: it is a contestant, not something to build a tokenizer from.
    QUANTIZERS[PEER] = PeerEMA
    trainings = {row: _training(config, row) for row in config.rows or TABLES[config.table]}
    for training in trainings.values():
        train_tokenizer(training)
    times = alternate({row: tokenizer_step(training) for row, training in trainings.items()}, default_device())
    lines = [
        "| quantizer | codes | bits a position | PSNR | perplexity | codes in use | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, training in trainings.items():
        lines.append(f"{_figures(row, Path(training.output_dir))} {training.batch_size / median(times[row]):,.0f} |")
    table = "\n".join(lines)
    print(table)
    return table


def _training(config: ComparisonConfig, row: str) -> TokenizerTrainingConfig:
    folder = Path(config.output_dir) / row.replace(", ", "-").replace(" ", "-")
    given = [f"data.dataset={config.dataset}", f"steps={config.steps}", f"output_dir={folder}", *config.overrides]
    training = load_config(TokenizerTrainingConfig, config.config, given)
    training.quantizer = TABLES[config.table][row]
    return training


def _figures(row: str, folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    layout = ImageTokenizer.from_pretrained(folder).code_layout
    bits = layout.bits / math.prod(layout.grids[-1].shape)
    return (
        f"| {row} | {layout} | {bits:.3g} | {result['psnr_db']:.2f} dB | {result['codebook_perplexity']:.0f} of "
        f"{layout.vocab_size} | {result['codebook_usage']:.1%} |"
    )
