"""The interface of every prior: a distribution over the codes of an image, built from their layout alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.layout import CodeLayout
from configs.pretrained import StrictConfig, StrictLoading
from configs.validation import Share


class PriorConfig(StrictConfig):
    """What every prior's config holds.

    The training writes `layout` (of the codes), `fingerprint` (of the tokenizer that made them), and `num_classes` with
    `class_names`; num_classes 0 is unconditional.
    """

    layout: list[dict[str, Any]] | None = None
    fingerprint: str | None = None
    num_classes: int = 0
    class_names: list[str] | None = None
    label_dropout: Share = 0.1
    """Share of training images whose class is hidden, so that sampling can be guided; 0 rules guidance out."""

    def validate(self) -> None:
        if self.num_classes < 0 or (self.class_names is not None and len(self.class_names) != self.num_classes):
            raise ValueError(f"num_classes={self.num_classes} does not fit class_names={self.class_names}")

    @property
    def code_layout(self) -> CodeLayout:
        """The layout of the codes that this prior models."""
        if self.layout is None:  # checked here, because transformers builds configs without arguments to compare with
            raise ValueError(f"{type(self).__name__} needs the layout of its codes: layout=code_layout.to_list()")
        return CodeLayout.from_list(self.layout)


@dataclass
class PriorOutput:
    """What a forward pass gives."""

    loss: Tensor
    """Mean nats per predicted code, a float32 scalar."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars to log."""


class Prior(StrictLoading, PreTrainedModel):
    """A distribution over codes `(B, *code_layout.shape)`; class `num_classes` means "no class"."""

    config_class = PriorConfig
    config: PriorConfig
    main_input_name = "codes"

    @property
    def code_layout(self) -> CodeLayout:
        return self.config.code_layout

    @abstractmethod
    def forward(self, codes: Tensor, labels: Tensor | None = None, *, seeds: Tensor | None = None) -> PriorOutput:
        """The training loss.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
            seeds: `(B,)` int64, the key of what is random about each image in training (label dropout); without it,
                torch's generator is used. Read in training mode only.
        """

    @abstractmethod
    def log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log probability of each image in nats, `(B,)` float32."""

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Draw codes `(batch_size, *code_layout.shape)` int64.

        Args:
            batch_size: number of images.
            labels: `(batch_size,)` int64 in [0, num_classes]; None is "no class".
            seeds: `(batch_size,)` int64: each image's codes depend on its own seed only. Without it, torch's generator
                draws them.
            temperature: logits are divided by it; 0 takes the likeliest code.
            top_k: keep the k likeliest codes.
            top_p: keep the likeliest codes that together have this probability.
            guidance_scale: classifier-free guidance; 1 is off.

        Raises:
            ValueError: for values out of range, and for guidance without labels or without label dropout in training.
        """

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes as `(B, num_codes)` int64, coarse to fine, raster order within a grid.

        Raises:
            ValueError: where they have another shape, or a code is outside its own grid's [0, K).
        """
        flat = []
        for grid, part in zip(self.code_layout.grids, self.code_layout.split(codes), strict=True):
            part = part.flatten(1)
            # In training on an accelerator, reading a number back would make every step wait; loading has checked it.
            checked = part.numel() > 0 and not (self.training and part.is_cuda)
            if checked and not 0 <= int(part.min()) <= int(part.max()) < grid.vocab_size:
                raise ValueError(
                    f"codes of [{grid}] are in [0, {grid.vocab_size}), got {int(part.min())} to {int(part.max())}"
                )
            flat.append(part)
        return torch.cat(flat, dim=1).long()

    def check_labels(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Labels `(B,)` int64, "no class" where there are none.

        Raises:
            ValueError: for a class that the prior does not have.
        """
        if labels is None:
            return torch.full((batch_size,), self.config.num_classes, dtype=torch.int64, device=self.device)
        if self.config.num_classes == 0:
            raise ValueError("this prior was trained without classes, but labels were given")
        if labels.shape != (batch_size,):
            raise ValueError(f"expected labels ({batch_size},), got {tuple(labels.shape)}")
        checked = batch_size > 0 and not (self.training and labels.is_cuda)
        if checked and not 0 <= int(labels.min()) <= int(labels.max()) <= self.config.num_classes:
            raise ValueError(
                f"this prior has classes 0 to {self.config.num_classes - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.to(self.device)

    def check_sampling(
        self, labels: Tensor | None, temperature: float, top_k: int | None, top_p: float | None, guidance_scale: float
    ) -> None:
        """Raise a ValueError for sampling options that are out of range or do nothing."""
        if not temperature >= 0:
            raise ValueError(f"temperature should be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k should be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p should be above 0 and at most 1, got {top_p}")
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale should be 0 or more, got {guidance_scale}")
        if guidance_scale != 1 and labels is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs labels to guide towards; give labels, or leave it at 1"
            )
        if guidance_scale != 1 and self.config.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a prior trained with label dropout, but this one was trained "
                "with model.label_dropout=0"
            )

    def require_codes(self, layout: CodeLayout, fingerprint: str, name: str) -> None:
        """Raise a ValueError where codes or a tokenizer are not the ones that this prior was trained for."""
        self.code_layout.require_equal(layout, "the prior", name)
        if self.config.fingerprint != fingerprint:
            raise ValueError(
                f"the prior was trained on codes of another tokenizer than {name}: both have [{layout}], but the "
                f"fingerprints are {str(self.config.fingerprint)[:12]} and {fingerprint[:12]}; "
                "decoding them with each other gives garbage"
            )

    @classmethod
    def known_classes(cls) -> tuple[str, dict[str, Any]]:
        from prior import PRIORS  # the table imports this file

        return "prior", PRIORS
