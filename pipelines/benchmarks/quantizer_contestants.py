"""Who is measured on quantization: our quantizers, the sketch that they are to reach, and vector-quantize-pytorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.devices import default_device
from tokenizer.quantizers import Quantizer, build_quantizer
from tokenizer.quantizers.codebook import CodebookQuantizer
from tokenizer.quantizers.cvq import CVQ

SIDE = 32
DECAY, BETA, EPSILON = 0.99, 0.25, 1e-5


class Outcome(NamedTuple):
    """What a run gives, for tests that all contestants do the same."""

    codes: Tensor | None = None
    quantized: Tensor | None = None
    loss: Tensor | None = None
    codebook: Tensor | None = None
    """Moved by the update, or with a gradient."""


@dataclass(frozen=True)
class Work:
    """What all contestants of a case are given: latents of 32x32 positions an image, and a codebook to start from."""

    num_images: int
    vocab_size: int
    dim: int
    backward: bool = True
    """Whether a run goes backward, from the losses and from what a decoder would send to the quantized latents."""

    @property
    def num_vectors(self) -> int:
        return self.num_images * SIDE * SIDE

    def latents(self) -> Tensor:
        """`(num_images, D, 32, 32)` float32 that ask for a gradient; channels last, the memory order of a training."""
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(self.num_images, self.dim, SIDE, SIDE, generator=generator)
        return latents.to(default_device(), memory_format=torch.channels_last).requires_grad_()

    def codebook(self) -> Tensor:
        """`(K, D)` float32."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.vocab_size, self.dim, generator=generator).to(default_device())


def _backward(loss: Tensor | None, quantized: Tensor, upstream: Tensor) -> None:
    roots = [quantized] if loss is None else [quantized, loss]
    torch.autograd.backward(roots, [upstream, None][: len(roots)])


def our_quantizer(work: Work, options: dict[str, Any]) -> Quantizer:
    """Our quantizer of a YAML block, with the work's codes in every codebook."""
    quantizer = build_quantizer(options, work.dim).train().to(default_device())
    for part in quantizer.modules():
        if isinstance(part, CodebookQuantizer):
            part.set_codes(torch.arange(work.vocab_size, device=default_device()), work.codebook())
    return quantizer


def training_step(work: Work, quantizer: Quantizer) -> Callable[[], Outcome]:
    """Our forward pass, backward pass where the work has one, and update."""
    latents, steps = work.latents(), itertools.count()
    upstream = torch.ones_like(latents) if work.backward else None  # channels last as well

    def run() -> Outcome:
        latents.grad = None
        quantizer.zero_grad()
        output = quantizer(latents)
        loss = torch.stack([*output.losses.values()]).sum() if output.losses else None
        if upstream is not None:
            _backward(loss, output.quantized, upstream)
        quantizer.update(next(steps))
        return Outcome(output.codes, output.quantized, loss, getattr(quantizer, "codebook", None))

    return run


def tessera(work: Work, options: dict[str, Any]) -> Callable[[], Outcome]:
    return training_step(work, our_quantizer(work, options))


def tessera_cvq(work: Work, options: dict[str, Any], *, all_move: bool) -> Callable[[], Outcome]:
    """CVQ as in a long run, where codes are in use, or as in its first steps, where each code looks for an anchor."""
    quantizer = our_quantizer(work, options)
    assert isinstance(quantizer, CVQ)
    step = training_step(work, quantizer)
    if not all_move:
        quantizer.decay = 0.0  # the running use is at once what it becomes after hundreds of steps
        for _ in range(10):
            step()
        quantizer.decay = DECAY
        return step

    def run() -> Outcome:
        quantizer.usage.zero_()
        return step()

    return run


def tessera_kmeans(work: Work) -> Callable[[], Outcome]:
    quantizer = our_quantizer(work, {"name": "ema", "vocab_size": work.vocab_size})
    latents = work.latents().detach()

    def run() -> Outcome:
        quantizer.initialize(latents)
        return Outcome()

    return run


@torch.no_grad()
def search_by_blocks(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codes `(N,)` of vectors `(N, D)`: addmm and argmin, with 2^20 scores in one buffer."""
    half_norms = codebook.square().sum(1) / 2
    rows = min(len(vectors), (1 << 20) // len(codebook))
    scores = vectors.new_empty(rows, len(codebook))
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows]
        torch.addmm(half_norms, block, codebook.t(), alpha=-1, out=scores[: len(block)])
        torch.argmin(scores[: len(block)], 1, out=codes[start : start + rows])
    return codes


def reference_ema(work: Work) -> Callable[[], Outcome]:
    """The sketch: search by blocks, straight-through, commitment, moving averages by index_add and lerp."""
    latents, codebook = work.latents(), work.codebook()
    sizes, sums = torch.ones_like(codebook[:, 0]), codebook.clone()

    def run() -> Outcome:
        vectors = latents.movedim(1, -1).flatten(0, -2)  # (N, D)
        codes = search_by_blocks(vectors, codebook)
        chosen = codebook[codes]
        loss = BETA * F.mse_loss(vectors, chosen)
        quantized = vectors + (chosen - vectors).detach()
        with torch.no_grad():
            counts = torch.zeros_like(sizes).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
            sizes.lerp_(counts, 1 - DECAY)
            sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, vectors), 1 - DECAY)
            smoothed = (sizes + EPSILON) / (sizes.sum() + len(codebook) * EPSILON) * sizes.sum()
            torch.div(sums, smoothed.unsqueeze(1), out=codebook)
        return Outcome(codes, quantized, loss, codebook)

    return run


def reference_vq(work: Work) -> Callable[[], Outcome]:
    """The sketch: search by blocks, then plain autograd for straight-through and both terms."""
    latents, codebook = work.latents(), nn.Parameter(work.codebook())
    upstream = torch.ones(work.num_vectors, work.dim, device=latents.device)

    def run() -> Outcome:
        latents.grad = codebook.grad = None
        vectors = latents.movedim(1, -1).flatten(0, -2)  # (N, D)
        codes = search_by_blocks(vectors, codebook)
        chosen = F.embedding(codes, codebook)
        loss = BETA * F.mse_loss(vectors, chosen.detach()) + F.mse_loss(chosen, vectors.detach())
        quantized = vectors + (chosen - vectors).detach()
        _backward(loss, quantized, upstream)
        return Outcome(codes, quantized, loss, codebook)

    return run
