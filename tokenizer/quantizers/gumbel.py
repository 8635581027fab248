"""Gumbel-softmax quantization (Jang et al. 2017, arXiv:1611.01144), as in DALL-E (Ramesh et al. 2021)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.random_streams import mix
from configs.validation import Count, Range, checked
from tokenizer.collectives import mean_over_processes
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.entropy import entropy

Temperature = Annotated[float, Range(1e-3, 1e3)]


class GumbelQuantizer(Quantizer):
    """Logits over codes from a linear layer; training draws a code by Gumbel noise, evaluation takes the likeliest.

    The logits `(N, K)` are the model here, so they exist in memory.

    Args:
        vocab_size: K, codes in the codebook.
        code_dim: channels of the codebook and of the logits' input, by a linear projection each way; by default those
            of the latents.
        straight_through: quantize to one code and pass the softmax's gradient; false mixes codes by the softmax
            (relaxed), as DALL-E does.
        temperature: of the softmax at the start of training.
        final_temperature: at its end, approached along a cosine.
        kl_weight: weight of the divergence of each position's distribution of codes from the uniform one, their mean.
        entropy_weight: weight of the divergence of the mean distribution of all positions from the uniform one, which
            keeps codes in use without asking a position to be undecided.
    """

    stochastic = True

    @checked
    def __init__(
        self,
        dim: int,
        *,
        vocab_size: Annotated[int, Range(2)] = 512,
        code_dim: Count | None = None,
        straight_through: bool = True,
        temperature: Temperature = 1.0,
        final_temperature: Temperature = 0.0625,
        kl_weight: Annotated[float, Range(0, 100)] = 5e-4,
        entropy_weight: Annotated[float, Range(0, 100)] = 0.01,
    ) -> None:
        super().__init__(dim, vocab_size, code_dim)
        self.straight_through = straight_through
        self.temperature = self.first_temperature = temperature
        self.final_temperature = final_temperature
        self.kl_weight = kl_weight
        self.entropy_weight = entropy_weight
        self.to_logits = nn.Linear(self.code_dim, vocab_size, dtype=torch.float32)
        self.codebook = nn.Parameter(nn.init.normal_(torch.empty(vocab_size, self.code_dim, dtype=torch.float32)))

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Draw a code at each position."""
        B, _, *grid = latents.shape
        logits = self.to_logits(latents.movedim(1, -1).flatten(1, -2))  # (B, positions, K)
        log_p = F.log_softmax(logits, dim=-1)
        p = log_p.exp()
        kl = (p * (log_p + math.log(self.vocab_size))).sum(-1).mean()
        losses = {"kl": self.kl_weight * kl}
        if self.training and self.entropy_weight:
            mean_entropy = entropy(mean_over_processes(p.mean((0, 1))))
            losses["entropy"] = self.entropy_weight * (math.log(self.vocab_size) - mean_entropy)
        noisy = logits
        if self.training:
            assert seeds is not None
            noisy = (logits + _gumbel_noise(seeds, logits)) / self.temperature
        codes = noisy.argmax(-1)
        if not self.training:
            quantized = F.embedding(codes, self.codebook)
        elif self.straight_through:
            mixed = noisy.softmax(-1) @ self.codebook.detach()
            quantized = F.embedding(codes, self.codebook) + (mixed - mixed.detach())
        else:
            quantized = noisy.softmax(-1) @ self.codebook
        return QuantizerOutput(
            quantized.view(B, *grid, -1).movedim(-1, 1),
            codes.view(B, *grid),
            losses,
            {"kl_to_uniform": kl.detach(), "gumbel_temperature": kl.new_tensor(self.temperature)},
        )

    def embed(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def anneal(self, progress: float) -> None:
        """Set the temperature."""
        share = (1 + math.cos(math.pi * progress)) / 2
        self.temperature = self.final_temperature + (self.first_temperature - self.final_temperature) * share

    def collapse_advice(self) -> str:
        return f"a larger quantizer.entropy_weight= (it is {self.entropy_weight}) or quantizer.final_temperature="


def _gumbel_noise(seeds: Tensor, like: Tensor) -> Tensor:
    """Gumbel noise `(B, positions, K)`, that of image i from a generator seeded with seeds[i]."""
    noise = torch.empty_like(like)
    generator = torch.Generator(like.device)
    for row, seed in zip(noise, mix(seeds, 0).tolist(), strict=True):
        row.uniform_(generator=generator.manual_seed(seed))  # several times as fast as exponential_ on a CPU
    return noise.clamp_(min=torch.finfo(like.dtype).tiny).log_().neg_().log_().neg_()
