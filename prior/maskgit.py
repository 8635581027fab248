"""MaskGIT: a bidirectional transformer that fills in masked codes (Chang et al. 2022, arXiv:2202.04200)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.random_streams import integer, mix, uniform
from configs.sampling import SamplingOptions
from configs.validation import Count, NonNegative, Range
from prior.base import PriorOutput, SamplingRequest
from prior.sampling import draw, filter_logits, guide
from prior.transformer_prior import TransformerPrior, TransformerPriorConfig
from prior.unmasking import Schedule, expected_masked_count, halton_order, masked_counts, masked_share


class MaskGITConfig(TransformerPriorConfig):
    """Options of MaskGIT; see `PriorConfig` for what the training adds."""

    model_type = "tessera-maskgit"

    mask_schedule: Schedule = "cosine"
    """Share of the codes that is masked in training, as a function of a uniform number."""
    label_smoothing: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of the target's probability that is spread over all codes of the grid, in training."""


@dataclass
class MaskGITOptions(SamplingOptions):
    """Options of filling in masked codes step by step."""

    steps: Count = 12
    """Passes of the network; each reveals at least one code of each image."""
    order: Literal["confidence", "halton"] = "confidence"
    """What is revealed first: the codes of the highest probability, with some noise, or those of the Halton sequence,
    spread evenly over the grid (Besnier et al. 2025)."""
    schedule: Schedule | None = None
    """Share of the codes that is still masked after each step; by default cosine for confidence, arccos for halton."""
    choice_temperature: NonNegative | None = None
    """Weight of the Gumbel noise on log probabilities as confidence, falling to 0 over the steps; by default 4.5."""

    def validate(self) -> None:
        super().validate()
        if self.order == "halton" and self.choice_temperature is not None:
            raise ValueError(
                f"choice_temperature={self.choice_temperature} is the noise of order=confidence, but order=halton has "
                "none; leave it out"
            )


class MaskGIT(TransformerPrior):
    """p(masked codes | visible codes, class), each masked code on its own.

    It has no `log_prob`; `negative_log_prob_bound` bounds it.
    """

    config_class = MaskGITConfig
    config: MaskGITConfig
    sampling_options = MaskGITOptions

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config, special_codes=1)
        self.expected_count = expected_masked_count(config.mask_schedule, config.code_layout.num_codes)
        self._order: dict[torch.device, Tensor] = {}
        self._compiled_logits: Callable[..., Tensor] | None = None
        self.post_init()

    def logits(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(B, num_codes, K)` float32 of every code given those that are not masked.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            masked: bool of the same shape.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
        """
        flat = self.check_codes(codes)
        logits = self._logits(flat, masked.flatten(1), self.check_labels(labels, len(flat)))
        return self.hide_foreign_codes(logits, slice(None))

    def _logits(self, flat: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        offsets, rotary = self.tables()
        rows = (flat + offsets).masked_fill(masked, self.code_embedding.num_embeddings - 1)
        x = self.code_embedding(rows) + self.places(labels)
        return self.head(self.transformer(self.dropout(x), rotary))

    def forward(
        self,
        codes: Tensor,
        labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> PriorOutput:
        """The loss over masked codes in training; in evaluation the bound on the negative log probability, a code.

        In training the sum over the masked codes is divided by their expected number, so that the loss of a batch is
        the mean over its images however they are split into parts; so is masked_bits_per_code, the same in bits and
        without label smoothing.
        """
        self.check_condition(condition, len(codes))
        if not self.training:
            nats = self.negative_log_prob_bound(codes, labels, seeds=seeds).mean() / self.code_layout.num_codes
            return PriorOutput(nats, {"bits_per_code_bound": nats.detach() / math.log(2)})
        flat = self.check_codes(codes)
        B, L = flat.shape
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (B,), device=flat.device)
        share = masked_share(self.config.mask_schedule, uniform(mix(seeds, 1), 0))
        count = (share * L).ceil().clamp(1, L).long()
        masked = _random_mask(mix(seeds, 2), count, L)
        labels = self.check_labels(self.hide_labels(labels, B, seeds), B)
        logits = self.hide_foreign_codes(self._logits(flat, masked, labels), slice(None))
        log_p = logits.log_softmax(-1)
        losses = -log_p.gather(-1, flat[..., None])[..., 0]
        expected = B * self.expected_count
        nats = (losses * masked).sum() / expected
        if smoothing := self.config.label_smoothing:
            possible = log_p.isfinite()
            spread = -log_p.where(possible, 0).sum(-1) / possible.sum(-1)
            losses = (1 - smoothing) * losses + smoothing * spread
        loss = (losses * masked).sum() / expected
        return PriorOutput(loss, {"masked_bits_per_code": nats.detach() / math.log(2)})

    def negative_log_prob_bound(
        self, codes: Tensor, labels: Tensor | None = None, *, seeds: Tensor | None = None, num_draws: int = 1
    ) -> Tensor:
        """An estimate of an upper bound on -log p(codes) in nats, `(B,)` float32.

        -log p(x) <= E over t uniform in 1..L of (L / t) * sum over t random masked codes of -log p(code | visible)
        (Uria et al. 2014, arXiv:1310.1757; Hoogeboom et al. 2022, arXiv:2110.02037): the mean over all orders of what
        revealing one code after the other in that order costs.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
            seeds: `(B,)` int64, the key of an image's masks; without it, torch's generator is used.
            num_draws: masks to average over.
        """
        flat = self.check_codes(codes)
        B, L = flat.shape
        labels = self.check_labels(labels, B)
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (B,), device=flat.device)
        total = torch.zeros(B, device=flat.device)
        for number in range(num_draws):
            count = 1 + integer(mix(seeds, 2 * number), 0, L)
            masked = _random_mask(mix(seeds, 2 * number + 1), count, L)
            logits = self.hide_foreign_codes(self._logits(flat, masked, labels), slice(None))
            losses = F.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="none").view(B, L)
            total += (losses * masked).sum(1) * (L / count)
        return total / num_draws

    def draw_codes(self, request: SamplingRequest, options: MaskGITOptions) -> Tensor:
        B, L = request.known.shape
        codes, masked = request.known.clone(), ~request.known_mask
        device = codes.device
        schedule = options.schedule or ("cosine" if options.order == "confidence" else "arccos")
        counts = masked_counts(schedule, options.steps, masked.sum(1))
        places = torch.arange(L, device=device)
        guided_steps = options.guided_steps(options.steps)
        no_labels = torch.full_like(request.labels, self.config.num_classes)
        if request.compiled and self._compiled_logits is None:
            self._compiled_logits = torch.compile(self._logits, dynamic=False, fullgraph=True)
        network = self._compiled_logits if request.compiled and self._compiled_logits else self._logits
        for step, left in enumerate(counts):
            if not masked.any():
                break
            if step < guided_steps:
                both = [torch.cat(pair) for pair in ((codes, codes), (masked, masked), (request.labels, no_labels))]
                conditional, unconditional = network(*both).float().chunk(2)
                logits = guide(conditional, unconditional, options.guidance_at(step, options.steps))
            else:
                logits = network(codes, masked, request.labels)
            logits = self.hide_foreign_codes(logits, slice(None))
            filtered = filter_logits(
                logits,
                temperature=options.temperature_at(step, options.steps),
                top_k=options.top_k,
                top_p=options.top_p,
            )
            drawn = draw(filtered, uniform(mix(request.seeds, 2 * step)[:, None], places))
            if options.order == "halton":
                priority = -self._halton_ranks().to(torch.float32).expand(B, L)
            else:
                priority = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
                noise = uniform(mix(request.seeds, 2 * step + 1)[:, None], places)
                weight = 4.5 if options.choice_temperature is None else options.choice_temperature
                priority = priority + weight * (1 - (step + 1) / options.steps) * _gumbel(noise)
            revealed = masked & (_ranks(priority.masked_fill(~masked, float("-inf"))) < (masked.sum(1) - left)[:, None])
            codes = torch.where(revealed, drawn, codes)
            masked = masked & ~revealed
        return codes

    def _halton_ranks(self) -> Tensor:
        """The place of each code in the Halton order, `(num_codes,)` int64."""
        if self.device not in self._order:
            self._order[self.device] = halton_order(self.code_layout).argsort().to(self.device)
        return self._order[self.device]


def _random_mask(seeds: Tensor, count: Tensor, length: int) -> Tensor:
    """Masks `(B, length)` of `count` `(B,)` random places each, decided by the images' seeds `(B,)`."""
    numbers = uniform(seeds[:, None], torch.arange(length, device=seeds.device))
    return _ranks(numbers) < count[:, None]


def _ranks(values: Tensor) -> Tensor:
    """The place of each number `(B, L)` in falling order, the first of equals first."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _gumbel(uniforms: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniforms.clamp(min=2.0**-24)))
