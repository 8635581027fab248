"""The keys of scripts/generate.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.sampling import SamplingOptions
from configs.validation import Count, Seed


@dataclass
class GenerationConfig(SamplingOptions):
    """Sample new images."""

    pipeline: str | None = None
    """A saved pipeline's folder or hub name; or give tokenizer= and prior=."""
    tokenizer: str | None = None
    """A tokenizer's run folder or saved model."""
    prior: str | None = None
    """A prior's run folder or saved model."""
    output_dir: str = "runs/samples"
    """Folder for the images and grid.png; it must be empty or new."""
    format: Literal["png", "parquet"] = "png"
    """png numbers files; parquet makes one, images.parquet: a Hugging Face dataset of image, label and index."""
    num_images: Count = 16
    """How many images; with labels=each, how many of each class."""
    labels: Any = None
    """One class (number or name), a list of num_images of them, or each; by default without a class."""
    seed: Seed = 0
    """Image i depends on (seed, i) only."""
    batch_size: Count = 64
    """Images sampled at once, on each process."""
    grid: list[Count] | None = None
    """Rows and columns of codes, for images larger than the prior was trained on."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Options that this prior alone has: maskgit's steps, order, schedule and choice_temperature."""
    compile: bool = False
    """Compile the steps of sampling; worth its minutes for many images. Needs a compiler."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Autocast type."""

    def validate(self) -> None:
        super().validate()
        given = [name for name in ("pipeline", "tokenizer", "prior") if getattr(self, name)]
        if given not in (["pipeline"], ["tokenizer", "prior"]):
            raise ValueError(f"give pipeline=DIR, or tokenizer=DIR and prior=DIR, got {' and '.join(given) or 'none'}")
