"""Priors that factor into one code after another: their loss, their log probability, and how they are sampled."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.random_streams import mix, uniform
from configs.sampling import SamplingOptions
from configs.validation import Count
from prior.base import Prior, PriorOutput, SamplingRequest
from prior.sampling import draw, filter_logits, guide


@dataclass
class AutoregressiveOptions(SamplingOptions):
    """Options of sampling code by code."""

    num_candidates: Count = 1
    """With known codes: draw so many fills of each image, and keep one with a probability proportional to the
    likelihood of the known codes given the codes before them (importance resampling)."""


class CodeByCode(Protocol):
    """The logits of one code after another; what earlier codes computed is kept."""

    def next(self, codes: Tensor) -> Tensor:
        """Logits `(rows, K)` float32 of the code after `codes`.

        Args:
            codes: `(rows, n)` int64, those since the last call: n is 1, in the first call any number.
        """

    def keep(self, rows: int) -> None:
        """Go on with the first rows of the batch alone."""


class AutoregressivePrior(Prior):
    """log p(codes) = sum over j of log p(code j | earlier codes, class), coarse to fine, raster order within a grid."""

    sampling_options = AutoregressiveOptions
    has_log_prob = True

    @abstractmethod
    def logits(self, codes: Tensor, labels: Tensor | None = None, *, condition: Tensor | None = None) -> Tensor:
        """Logits `(B, num_codes, K)` float32 of every code given the earlier ones.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
            condition: the codes of coarser grids, for a prior of one grid of several.
        """

    def seen(self, codes: Tensor, seeds: Tensor | None) -> Tensor:
        """The codes as later ones see them in training."""
        return codes

    @abstractmethod
    def code_by_code(self, labels: Tensor, condition: Tensor | None, compiled: bool) -> CodeByCode:
        """What computes the logits of images with these labels `(rows,)` one code at a time."""

    def forward(
        self,
        codes: Tensor,
        labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> PriorOutput:
        labels = self.hide_labels(labels, len(codes), seeds)
        logits = self.logits(self.seen(codes, seeds), labels, condition=condition)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten().long())
        return PriorOutput(loss, {"bits_per_code": loss.detach() / math.log(2)})

    def log_prob(self, codes: Tensor, labels: Tensor | None = None, *, condition: Tensor | None = None) -> Tensor:
        """Log probability of each image in nats, `(B,)` float32."""
        logits = self.logits(codes, labels, condition=condition)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten().long(), reduction="none")
        return -losses.view(len(codes), -1).sum(1)

    def draw_codes(self, request: SamplingRequest, options: AutoregressiveOptions) -> Tensor:
        n = options.num_candidates
        if n == 1:
            return self._draw_rows(request, options)[0]
        # Known codes after unknown ones tell fills apart; elsewhere the first stays, beside whatever other images.
        weighed = (request.known_mask & (~request.known_mask).cumsum(1).bool()).any(1)
        if not weighed.any():
            return self._draw_rows(replace(request, seeds=mix(request.seeds, 0)), options)[0]
        B, device = len(request.seeds), request.seeds.device
        each = torch.arange(B, device=device).repeat_interleave(n)
        codes, log_likelihood = self._draw_rows(
            SamplingRequest(
                labels=request.labels[each],
                seeds=mix(request.seeds[each], torch.arange(B * n, device=device) % n),
                known=request.known[each],
                known_mask=request.known_mask[each],
                condition=None if request.condition is None else request.condition[each],
                compiled=request.compiled,
            ),
            options,
        )
        chosen = draw(log_likelihood.view(B, n), uniform(mix(request.seeds, n), 0)).where(weighed, 0)
        return codes.view(B, n, -1)[torch.arange(B, device=device), chosen]

    def _draw_rows(self, request: SamplingRequest, options: AutoregressiveOptions) -> tuple[Tensor, Tensor]:
        """Codes `(rows, num_codes)`, and the log likelihood `(rows,)` of the known ones that follow unknown ones."""
        rows, L = request.known.shape
        known_by_all, known_by_any = request.known_mask.all(0).tolist(), request.known_mask.any(0).tolist()
        # The beginning that all images know is read at once; it is the same for all candidates of an image.
        unknown = [j for j, known in enumerate(known_by_all) if not known]
        beginning = unknown[0] if unknown else L
        # What follows the last unknown code matters to the choice among candidates alone.
        end = unknown[-1] + 1 if unknown and options.num_candidates == 1 else L
        guided_steps = options.guided_steps(L)
        both = guided_steps > beginning
        labels, condition = request.labels, request.condition
        if both:
            # One batch of twice the size: images with their class, then the same images without.
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
            condition = None if condition is None else torch.cat([condition, condition])
        following = self.code_by_code(labels, condition, request.compiled)
        uniforms = uniform(request.seeds[:, None], torch.arange(L, device=request.seeds.device))
        codes = request.known.clone()
        log_likelihood = torch.zeros(rows, device=codes.device)
        given = codes[:, :beginning]
        for j in range(beginning, end):
            if both and j == guided_steps:
                both = False
                following.keep(rows)
            logits = following.next(torch.cat([given, given]) if both else given)
            conditional, place = logits[:rows, None], slice(j, j + 1)
            guided = guide(conditional, logits[rows:, None], options.guidance_at(j, L)) if both else conditional
            if known_by_any[j] and options.num_candidates > 1:
                log_p = self.hide_foreign_codes(conditional, place)[:, 0].log_softmax(-1)
                known = log_p.gather(1, codes[:, j : j + 1])[:, 0]
                log_likelihood += known.masked_fill(~request.known_mask[:, j], 0)
            if not known_by_all[j]:
                # Foreign codes are hidden after guidance, which would take -inf from -inf.
                allowed = self.hide_foreign_codes(guided, place)[:, 0]
                temperature = options.temperature_at(j, L)
                allowed = filter_logits(allowed, temperature=temperature, top_k=options.top_k, top_p=options.top_p)
                drawn = draw(allowed, uniforms[:, j])
                codes[:, j] = torch.where(request.known_mask[:, j], codes[:, j], drawn) if known_by_any[j] else drawn
            given = codes[:, j : j + 1]
        return codes, log_likelihood
