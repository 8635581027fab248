"""The keys of scripts/evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.schema import SourceConfig
from configs.validation import Count, CountOrZero, Schema


@dataclass
class EvaluationConfig(Schema):
    """Measure a tokenizer on images, and a prior on codes."""

    tokenizer: str | None = None
    """A tokenizer's run folder or saved model: PSNR, codebook usage and perplexity on data."""
    prior: str | None = None
    """A prior's run folder or saved model: bits per code on codes."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Images for the tokenizer."""
    codes: str = "runs/codes"
    """Codes for the prior."""
    split: str = "test"
    """Split of the images and codes."""
    batch_size: Count = 128
    """Images per forward pass."""
    num_samples: CountOrZero = 0
    """Images to draw from the prior at once: its speed, and the codes that differ from those of eager float32."""
    compile: bool = False
    """Compile the steps of that sampling. Needs a compiler."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Autocast type."""
    output_file: str | None = None
    """Where to write the figures as JSON; they are printed in any case."""

    def validate(self) -> None:
        if self.tokenizer is None and self.prior is None:
            raise ValueError("give tokenizer=DIR, prior=DIR or both")
        if (self.num_samples and self.prior is None) or (self.compile and not self.num_samples):
            raise ValueError("compile=true is for the images of num_samples=, which prior= draws: give both of these")
