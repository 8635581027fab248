"""The interface of every prior: a distribution over the codes of an image, built from their layout alone."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.layout import CodeLayout
from configs.pretrained import StrictConfig, StrictLoading
from configs.random_streams import uniform
from configs.sampling import SamplingOptions
from configs.validation import Share
from prior.checks import check_seeds, require_integers


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


@dataclass
class SamplingRequest:
    """What `Prior.sample` was asked for, checked and on the prior's device."""

    labels: Tensor
    """`(B,)` int64, num_classes where an image has no class."""
    seeds: Tensor
    """`(B,)` int64."""
    known: Tensor
    """`(B, num_codes)` int64, coarse to fine; what stands outside of the mask means nothing."""
    known_mask: Tensor
    """`(B, num_codes)` bool."""
    condition: Tensor | None
    """`(B, ...)` int64, for a prior of one grid of several."""
    compiled: bool
    """Whether steps are to be compiled."""


class Prior(StrictLoading, PreTrainedModel):
    """A distribution over codes `(B, *code_layout.shape)`; class `num_classes` means "no class"."""

    config_class = PriorConfig
    config: PriorConfig
    main_input_name = "codes"
    sampling_options: ClassVar[type[SamplingOptions]] = SamplingOptions
    """What the keywords of `sample` are."""
    has_log_prob: ClassVar[bool] = False
    """Whether the evaluation loss is exact; otherwise it is an upper bound on it."""
    compiled_sampling: bool = False
    """Whether `sample` compiles its steps (see `compile_sampling`)."""

    @property
    def code_layout(self) -> CodeLayout:
        """The layout of the codes that are modelled."""
        return self.config.code_layout

    def split_condition(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of an image's codes `(B, *config.code_layout.shape)`: those that are modelled, and those they are given."""
        return codes, None

    @abstractmethod
    def forward(
        self,
        codes: Tensor,
        labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> PriorOutput:
        """The training loss.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
            condition: the codes of coarser grids, `(B, ...)` int64, for a prior of one grid of several.
            seeds: `(B,)` int64, the key of what is random about each image: label dropout and masks in training, the
                masks of a bound in evaluation. Without it, torch's generator is used.
        """

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        condition: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw codes `(batch_size, *code_layout.shape)` int64.

        Args:
            batch_size: number of images.
            labels: `(batch_size,)` int64 in [0, num_classes]; None is "no class".
            seeds: `(batch_size,)` int64: each image's codes depend on its own seed only. Without it, torch's generator
                draws them.
            known: codes `(batch_size, *code_layout.shape)` int64 to keep.
            known_mask: where they are to be kept, bool of the same shape.
            condition: the codes of coarser grids, for a prior of one grid of several.
            **options: those of the prior's `sampling_options`: temperature, top_k, top_p, guidance_scale, ...

        Raises:
            ValueError: for values out of range, for guidance without labels or without label dropout in training, and
                for one of known and known_mask without the other.
            TypeError: for an option that this prior does not have.
        """
        checked = self.sampling_options(**options)
        self.check_sampling(labels is not None, checked)
        check_seeds(seeds, batch_size)
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (batch_size,), device=self.device)
        request = SamplingRequest(
            labels=self.check_labels(labels, batch_size),
            seeds=seeds.to(self.device),
            **self._check_known(known, known_mask, batch_size),
            condition=self.check_condition(condition, batch_size),
            compiled=self.compiled_sampling,
        )
        was_training = self.training
        self.eval()
        # Compiled steps are made for one shape: torch gives up at 8 of them unless told that more are meant.
        compiler: Any = torch.compiler.config
        shapes = compiler.patch(recompile_limit=256) if self.compiled_sampling else nullcontext()
        try:
            with shapes:
                codes = self.draw_codes(request, checked)
        finally:
            self.train(was_training)
        return codes.view(batch_size, *self.code_layout.shape)

    @abstractmethod
    def draw_codes(self, request: SamplingRequest, options: Any) -> Tensor:
        """Codes `(B, num_codes)` int64, coarse to fine, raster order within a grid; known ones as they came."""

    def compile_sampling(self, compiled: bool = True) -> Self:
        """Compile the steps of `sample`, once for each batch size and precision; near-ties may then fall otherwise."""
        self.compiled_sampling = compiled
        return self

    def hide_labels(self, labels: Tensor | None, batch_size: int, seeds: Tensor | None) -> Tensor | None:
        """Labels `(B,)` with a share of `label_dropout` replaced by "no class", in training.

        Raises:
            ValueError: for a class that the prior does not have, and where there is not one seed an image.
        """
        check_seeds(seeds, batch_size)
        if labels is None:
            return None
        labels = self.check_labels(labels, batch_size)
        if not self.training or self.config.label_dropout == 0:
            return labels
        drawn = torch.rand(len(labels), device=labels.device) if seeds is None else uniform(seeds, 0)
        return labels.masked_fill(drawn < self.config.label_dropout, self.config.num_classes)

    def vocab_sizes(self) -> Tensor:
        """The K of each code's grid, `(num_codes,)` int64."""
        return torch.cat([torch.full((grid.num_codes,), grid.vocab_size) for grid in self.code_layout.grids])

    def hide_foreign_codes(self, logits: Tensor, places: slice) -> Tensor:
        """Logits `(B, n, K)` of the codes at `places` as float32, -inf at codes at or above their own grid's K."""
        logits = logits.float()
        if all(grid.vocab_size == logits.shape[-1] for grid in self.code_layout.grids):
            return logits
        foreign = torch.arange(logits.shape[-1]) >= self.vocab_sizes()[places, None]
        return logits.masked_fill(foreign.to(logits.device), float("-inf"))

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes as `(B, num_codes)` int64, coarse to fine, raster order within a grid.

        Raises:
            ValueError: where they have another shape, or a code is outside its own grid's [0, K).
        """
        require_integers(codes, "codes")
        flat = []
        for grid, part in zip(self.code_layout.grids, self.code_layout.split(codes.long()), strict=True):
            part = part.flatten(1)
            # In training on an accelerator, reading a number back would make every step wait; loading has checked it.
            checked = part.numel() > 0 and not (self.training and part.is_cuda)
            if checked and not 0 <= int(part.min()) <= int(part.max()) < grid.vocab_size:
                raise ValueError(
                    f"codes of [{grid}] are in [0, {grid.vocab_size}), got {int(part.min())} to {int(part.max())}"
                )
            flat.append(part)
        return torch.cat(flat, dim=1)

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
        require_integers(labels, "labels")
        checked = batch_size > 0 and not (self.training and labels.is_cuda)
        if checked and not 0 <= int(labels.min()) <= int(labels.max()) <= self.config.num_classes:
            raise ValueError(
                f"this prior has classes 0 to {self.config.num_classes - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.to(self.device).long()

    def check_condition(self, condition: Tensor | None, batch_size: int) -> Tensor | None:
        """The codes of coarser grids; a prior of all grids has none.

        Raises:
            ValueError: where there is a condition and should be none, or the other way round.
        """
        if condition is not None:
            name = self.config.model_type.removeprefix("tessera-")
            raise ValueError(f"this {name} models all of [{self.code_layout}], but a condition was given; leave it out")
        return None

    def _check_known(self, known: Tensor | None, mask: Tensor | None, batch_size: int) -> dict[str, Tensor]:
        L = self.code_layout.num_codes
        if known is None and mask is None:
            nothing = torch.zeros(batch_size, L, dtype=torch.int64, device=self.device)
            return {"known": nothing, "known_mask": nothing.bool()}
        if known is None or mask is None:
            raise ValueError("known codes come with a known_mask of the same shape: give both, or neither")
        expected = (batch_size, *self.code_layout.shape)
        require_integers(known, "known codes")
        if known.shape != expected or mask.shape != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"known and known_mask (bool) have shape {expected}, got {tuple(known.shape)} and {tuple(mask.shape)} "
                f"({str(mask.dtype).removeprefix('torch.')})"
            )
        mask = mask.to(self.device)
        return {"known": self.check_codes(known.to(self.device).long() * mask), "known_mask": mask.flatten(1)}

    def check_sampling(self, labelled: bool, options: SamplingOptions) -> None:
        """Raise a ValueError for guidance that cannot be had."""
        scale = options.guidance_scale
        if scale != 1 and not labelled:
            raise ValueError(f"guidance_scale={scale} needs labels to guide towards; give labels, or leave it at 1")
        if scale != 1 and self.config.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={scale} needs a prior trained with label dropout, but this one was trained with "
                "model.label_dropout=0"
            )

    def require_codes(self, layout: CodeLayout, fingerprint: str, name: str) -> None:
        """Raise a ValueError where codes or a tokenizer are not the ones that this prior was trained for."""
        self.config.code_layout.require_equal(layout, "the prior", name)
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
