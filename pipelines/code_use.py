"""Which codes are in use: figures for a log or a split, and a word of warning where the codebook collapses."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines import metrics
from tokenizer.quantizers import Quantizer

LEAST_PERPLEXITY = 0.1
"""Share of the codes below which a perplexity counts as collapse."""
_LEAST_CHOICES = 100


class CodeUse:
    """Counts the codes of batches over all processes, between two logging steps or over a split."""

    def __init__(self, quantizer: Quantizer, accelerator: Accelerator) -> None:
        self.quantizer = quantizer
        self.accelerator = accelerator
        self._counts = self._no_counts()

    def _no_counts(self) -> Tensor:
        shape = (self.quantizer.num_codebooks, self.quantizer.vocab_size)
        return torch.zeros(shape, dtype=torch.int64, device=self.accelerator.device)

    def add(self, codes: Tensor) -> None:
        """Count the codes of a micro-batch; the counts stay on the device until `take`."""
        self._counts += metrics.count_codes(codes, self.quantizer.vocab_size, self.quantizer.num_codebooks)

    def take(self) -> tuple[dict[str, float], str | None]:
        """Figures since the last call, codebook_usage and codebook_perplexity, and a warning where they are bad.

        Without codes, as before a quantizer starts, there are no figures.
        """
        counts = self.accelerator.reduce(self._counts, "sum").cpu()
        self._counts = self._no_counts()
        if not counts.any():
            return {}, None
        figures = {"codebook_usage": metrics.usage(counts), "codebook_perplexity": metrics.perplexity(counts)}
        return figures, collapse_warning(self.quantizer, counts)


def collapse_warning(quantizer: Quantizer, counts: Tensor) -> str | None:
    """What to tell a user whose codes were chosen this often, `(num_codebooks, K)`; None where all is well.

    The codebook that does worst decides. Of n choices even the best codebook has a perplexity of n at most, so that of
    few choices one above n / 2 says nothing; of fewer than 100, none does.
    """
    size, choices = quantizer.active_size, int(counts.sum()) / quantizer.num_codebooks
    perplexity = min(metrics.perplexity(each) for each in counts.split(1))
    if choices < min(size, _LEAST_CHOICES) or perplexity >= min(LEAST_PERPLEXITY * size, choices / 2):
        return None
    return (
        f"the codebook is collapsing: a perplexity of {perplexity:.1f} is below {LEAST_PERPLEXITY:.0%} of the "
        f"{size:,} codes; try {quantizer.collapse_advice()}"
    )
