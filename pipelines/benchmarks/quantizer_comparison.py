"""All quantizers in the same network, on the same images, for the same number of steps: a table for the README."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from configs.validation import Count, Schema, did_you_mean
from pipelines.tokenizer_training import train_tokenizer
from tokenizer import ImageTokenizer
from tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput

PEER = "vector-quantize-pytorch"

ROWS: dict[str, dict[str, Any]] = {
    PEER: {"name": PEER, "vocab_size": 1024},
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


class PeerEMA(Quantizer):
    """The moving-average codebook of vector-quantize-pytorch, with k-means start and revival.

    Args:
        vocab_size: K, codes in the codebook.
    """

    def __init__(self, dim: int, *, vocab_size: int = 512) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(dim, vocab_size)
        options = {"kmeans_init": True, "threshold_ema_dead_code": 2, "decay": 0.99, "commitment_weight": 0.25}
        self.peer = VectorQuantize(dim=dim, codebook_size=vocab_size, **options)

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
    """Train a tokenizer with each quantizer and print what came of it; a finished row is not trained again."""

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
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Which rows of the table."""

    def validate(self) -> None:
        for row in self.rows:
            if row not in ROWS:
                raise ValueError(did_you_mean(row, ROWS, "row"))


def compare_quantizers(config: ComparisonConfig) -> str:
    """Train each row's tokenizer; returns and prints a Markdown table."""
    lines = [
        "| quantizer | codes | bits a position | PSNR | perplexity | codes in use | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*lines, *(_train_row(config, row) for row in config.rows)])
    print(table)
    return table


def _train_row(config: ComparisonConfig, row: str) -> str:
    if row == PEER:
        # Only here: it is a contestant, not something to build a tokenizer from.
        QUANTIZERS[PEER] = PeerEMA
    folder = Path(config.output_dir) / row.replace(", ", "-").replace(" ", "-")
    given = [f"data.dataset={config.dataset}", f"steps={config.steps}", f"output_dir={folder}", *config.overrides]
    training = load_config(TokenizerTrainingConfig, config.config, given)
    training.quantizer = ROWS[row]
    train_tokenizer(training)
    result = json.loads((folder / "result.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = [line["images_per_second"] for line in log if line["split"] == "train"][-1]
    layout = ImageTokenizer.from_pretrained(folder).code_layout
    bits = layout.bits / math.prod(layout.grids[-1].shape)
    return (
        f"| {row} | {layout} | {bits:.3g} | {result['psnr_db']:.2f} dB | {result['codebook_perplexity']:.0f} of "
        f"{layout.vocab_size} | {result['codebook_usage']:.1%} | {speed:,.0f} |"
    )
