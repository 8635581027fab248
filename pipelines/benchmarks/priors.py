"""Benchmark cases of priors: sampling whole images, and an optimizer step on a batch of codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pipelines.benchmarks import prior_contestants as contestants
from pipelines.benchmarks import prior_training_contestants as trainers
from pipelines.benchmarks.harness import OURS, Case, Run, Section
from pipelines.benchmarks.prior_contestants import (
    NUM_HEADS,
    NUM_LAYERS,
    PIXELCNN_LAYERS,
    PIXELCNN_WIDTH,
    VOCAB_SIZE,
    WIDTH,
    Work,
)

PRECISIONS = {"": torch.float32, "-bf16": torch.bfloat16}
Maker = Callable[[Work], Run]


def _case(
    name: str, work: Work, ours: Maker, reference: Maker, peer: Maker | None = None, unit: str = "images"
) -> Case:
    network: dict[str, Any] = {"model": work.model, "codes": [work.side, work.side], "vocab_size": VOCAB_SIZE}
    if work.model == "pixelcnn":
        network |= {"width": PIXELCNN_WIDTH, "num_layers": PIXELCNN_LAYERS}
    else:
        network |= {"width": WIDTH, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS}
    setting = network | {"batch_size": work.batch_size, "dtype": str(work.dtype).removeprefix("torch.")}
    setting |= {"guided": work.guided, "compiled": work.compiled}
    amount = work.batch_size * (work.num_codes if unit == "tokens" else 1)
    others = {"reference": partial(reference, work), "transformers": None if peer is None else partial(peer, work)}
    return Case(name, setting, amount, unit, {OURS: partial(ours, work), **others})


def cases(num_images: int) -> list[Case]:
    """All cases, at batches of one image or of `num_images`."""
    found, numbers = [], {"one": 1, "many": num_images}
    for suffix, dtype in PRECISIONS.items():
        for number, batch_size in numbers.items():
            for guided in (False, True):
                name = f"gpt-{number}{'-guided' if guided else ''}{suffix}"
                work = Work("gpt", 16, batch_size, dtype, guided)
                peer = None if guided else contestants.sample_llama
                found.append(_case(name, work, contestants.sample, contestants.sample_plainly, peer))
    for number, batch_size in numbers.items():
        for guided in (False, True):
            name = f"gpt-{number}{'-guided' if guided else ''}-compiled"
            work = Work("gpt", 16, batch_size, torch.bfloat16, guided, compiled=True)
            found.append(_case(name, work, contestants.sample, contestants.sample_plainly))
    for suffix, dtype in PRECISIONS.items():
        for guided in (False, True):
            work = Work("maskgit", 16, num_images, dtype, guided)
            name = f"maskgit{'-guided' if guided else ''}{suffix}"
            found.append(_case(name, work, contestants.sample, contestants.fill_in_plainly))
    for guided in (False, True):
        work = Work("maskgit", 16, num_images, torch.bfloat16, guided, compiled=True)
        name = f"maskgit{'-guided' if guided else ''}-compiled"
        found.append(_case(name, work, contestants.sample, contestants.fill_in_plainly))
    for side in (8, 32):
        work = Work("pixelcnn", side, num_images)
        found.append(_case(f"pixelcnn-{side}x{side}", work, contestants.sample, contestants.recompute))
    for suffix, dtype in PRECISIONS.items():
        for side in (8, 16):
            work = Work("gpt", side, num_images * 2, dtype)
            makers = (trainers.train, trainers.train_plainly, trainers.train_llama)
            found.append(_case(f"train-{side**2}{suffix}", work, *makers, unit="tokens"))
    return found


SECTION = Section(cases, num_images=16)
