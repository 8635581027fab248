"""The interface of every quantizer: latents to integer codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from configs.layout import CodeLayout
from tokenizer.quantizers.projection import start_projection


@dataclass
class QuantizerOutput:
    """What quantizing gives."""

    quantized: Tensor
    """`(B, D, *grid)` float32, with a gradient estimator back to the latents."""
    codes: Tensor
    """`(B, *code_layout(grid).shape)` int64."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Weighted scalars; their sum is the quantizer's loss."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars to log."""


@contextmanager
def float32_only(device_type: str) -> Iterator[None]:
    """Products in full float32: no autocast, and no TF32 or bfloat16 passes, which would choose other codes."""
    backends: Any = torch.backends
    switches = [backends.mkldnn.conv, backends.cudnn.conv]
    legacy = "highest"
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer switches, which torch refuses to read through the older one
        switches += [backends.mkldnn.matmul, backends.cuda.matmul]
    changed = [(switch, switch.fp32_precision) for switch in switches if switch.fp32_precision not in ("ieee", "none")]
    with torch.autocast(device_type, enabled=False):
        try:
            if legacy != "highest":
                torch.set_float32_matmul_precision("highest")
            for switch, _ in changed:
                switch.fp32_precision = "ieee"
            yield
        finally:
            if legacy != "highest":
                torch.set_float32_matmul_precision(legacy)
            for switch, precision in changed:
                switch.fp32_precision = "none"  # as its parent says
                if switch.fp32_precision != precision:
                    switch.fp32_precision = precision


class Quantizer(nn.Module, ABC):
    """Latents `(B, D, *grid)` to codes and back, in float32 under any autocast, and when cast to another type.

    A training loop calls `initialize` once before the first step, `anneal` before and `update` after each optimizer
    step. In training mode each forward pass counts as one micro-batch, with or without gradients (as in batch norm);
    a pass that activation checkpointing repeats does not.

    A subclass implements `quantize` and `embed`, both between latents that are projected to `code_dim` and codes.

    Attributes:
        dim: D, channels of the latents.
        code_dim: channels in which codes are chosen; a linear layer each way where it is not D.
        vocab_size: K, codes are integers in [0, K).
        num_codebooks: codes on the last axis that belong to codebooks of their own; 1 where there is no such axis.
        estimator: the gradient estimator, where `quantized` is `estimator(latents, code vectors)` and nothing else.
        level_scale: how much smaller a further level of a residual quantizer should be than the one before, for all
            channels or each, `(code_dim,)`.
        num_start_vectors: how many vectors `initialize` would like to see; 0 where it needs none.
        signs_only: whether codes are signs of channels, whatever their scale; a projection then starts as the latents'
            principal components.
        bookkeeping: names of buffers that do not decide codes (counters, sums); the fingerprint leaves them out.
        stochastic: whether a training forward pass draws random numbers.
    """

    bookkeeping: ClassVar[frozenset[str]] = frozenset()
    num_codebooks: int = 1
    estimator: Callable[[Tensor, Tensor], Tensor] | None = None
    level_scale: float | Tensor = 1.0
    num_start_vectors: int = 0
    stochastic: bool = False
    signs_only: bool = False

    def __init__(self, dim: int, vocab_size: int, code_dim: int | None = None) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("vocab_size", vocab_size, 2)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} should be an integer of at least {least}, got {value!r}")
        self.dim = dim
        self.code_dim = code_dim or dim
        self.vocab_size = vocab_size
        projected = self.code_dim != dim
        self.project_in = nn.Linear(dim, self.code_dim, dtype=torch.float32) if projected else nn.Identity()
        self.project_out = nn.Linear(self.code_dim, dim, dtype=torch.float32) if projected else nn.Identity()

    @property
    def active_size(self) -> int:
        """How many codes can be chosen now: K, or fewer while a codebook grows."""
        return self.vocab_size

    def squeeze(self, latents: Tensor) -> Tensor:
        """Latents `(B, code_dim, *grid)` as the levels of a wrapper take them; called once, before the first level."""
        return latents

    def refine(self) -> None:
        """Become one of several levels that add up: called by a wrapper where it is built."""

    def learning_rate_scales(self) -> Iterator[tuple[nn.Parameter, float]]:
        """Parameters of its own that learn with so many times the learning rate of all others."""
        yield from ()

    def code_layout(self, grid: tuple[int, ...]) -> CodeLayout:
        """What the codes of latents `(B, D, *grid)` mean."""
        return CodeLayout.single(grid, self.vocab_size)

    def forward(self, latents: Tensor, seeds: Tensor | None = None) -> QuantizerOutput:
        """Quantize `(B, D, *grid)` of any floating type.

        Args:
            latents: `(B, D, *grid)`.
            seeds: `(B,)` int64, one an image and step, for whatever is random in training; by default drawn from
                torch's generator.

        Raises:
            ValueError: where the channels are not D.
        """
        if latents.ndim < 3 or latents.shape[1] != self.dim:
            raise ValueError(f"expected latents (B, {self.dim}, *grid), got {tuple(latents.shape)}")
        if seeds is None and self.stochastic and self.training:
            seeds = torch.randint(1 << 62, (len(latents),), device=latents.device)
        with float32_only(latents.device.type):
            output = self.quantize(_channels_last(self.project_in, latents.float()), seeds)
            output.quantized = _channels_last(self.project_out, output.quantized)
        return output

    def pass_through(self, latents: Tensor) -> QuantizerOutput:
        """Latents `(B, D, *grid)` through the projections, but not quantized: no code is chosen, codes are empty."""
        with float32_only(latents.device.type):
            quantized = _channels_last(self.project_out, _channels_last(self.project_in, latents.float()))
            # Data parallel training waits for a gradient of every parameter.
            quantized = quantized + sum(parameter.sum() * 0 for parameter in self.parameters())
        return QuantizerOutput(quantized, torch.empty(0, dtype=torch.int64, device=latents.device))

    def decode(self, codes: Tensor | Sequence[Tensor]) -> Tensor:
        """The latents `(B, D, *grid)` float32 that codes stand for.

        Args:
            codes: `(B, *code_layout(grid).shape)` int64, or those of each grid as `code_layout(grid).split` gives them,
                which is needed where there is more than one grid.
        """
        grids = [codes] if isinstance(codes, Tensor) else codes
        with float32_only(grids[0].device.type):
            return _channels_last(self.project_out, self.embed_grids(grids))

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Start the codebook from latents `(B, D, *grid)` of several batches and all processes."""
        with float32_only(latents.device.type):
            if self.signs_only and isinstance(self.project_in, nn.Linear) and isinstance(self.project_out, nn.Linear):
                vectors = latents.movedim(1, -1).flatten(0, -2).float()
                start_projection(self.project_in, self.project_out, vectors)
            self.start(_channels_last(self.project_in, latents.float()))

    @abstractmethod
    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize `(B, code_dim, *grid)` float32."""

    @abstractmethod
    def embed(self, codes: Tensor) -> Tensor:
        """The vectors `(B, code_dim, *grid)` float32 of codes of one grid."""

    def embed_grids(self, grids: Sequence[Tensor]) -> Tensor:
        """The vectors `(B, code_dim, *grid)` float32 of the codes of each grid, of which most quantizers have one."""
        (codes,) = grids
        return self.embed(codes)

    def start(self, latents: Tensor) -> None:
        """Start the codebook from latents `(B, code_dim, *grid)` float32."""

    def anneal(self, progress: float) -> None:
        """Set scheduled values for the share of training that is done, in [0, 1]."""

    def update(self, step: int, seed: int = 0) -> None:
        """Move the codebook with what was quantized since the last call; `step` counts optimizer steps from 0.

        What is random about it is drawn from (seed, step, index in the global batch).
        """

    def collapse_advice(self) -> str:
        """What to try where only few codes are in use, as `key=value`."""
        return "quantizer.vocab_size=, a smaller one"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Moves to a device go through; casts do not: which code is nearest must not depend on a model's type.
        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)


def recomputing() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing repeats a forward pass there."""
    return torch._C._current_graph_task_id() != -1


def _channels_last(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A layer over the channels of `(B, D, *grid)`."""
    return tensor if isinstance(layer, nn.Identity) else layer(tensor.movedim(1, -1)).movedim(-1, 1)
