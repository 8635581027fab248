"""How fast a prior samples, and what its precision and its batches change."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.compilation import require_compiler
from pipelines.devices import wait_for
from prior import Prior


@torch.no_grad()
def measure_sampling(
    prior: Prior,
    num_images: int,
    accelerator: Accelerator,
    condition: Tensor | None = None,
    *,
    compiled: bool = False,
) -> dict[str, float]:
    """Draw images in one batch, under the accelerator's autocast, after a batch that is not counted.

    Args:
        prior: on the accelerator's device, in float32.
        num_images: B, images drawn; their classes take turns.
        accelerator: its autocast is what is measured.
        condition: `(B, ...)` int64, for a prior of one grid of several.
        compiled: compile the steps.

    Returns:
        samples_per_second, and differing_codes: the share of codes that are not those of the same images drawn one by
        one in eager float32; 0 where the batch is drawn so too.

    Raises:
        ValueError: for fewer conditions than images, for a prior without steps to compile, and without a compiler.
    """
    if condition is not None and len(condition) < num_images:
        raise ValueError(f"num_samples={num_images} needs as many coded images, got {len(condition)}")
    device = accelerator.device
    if compiled:
        require_compiler(device)
    seeds = torch.arange(num_images, device=device)
    labels = seeds % prior.config.num_classes if prior.config.num_classes else None

    def sample(rows: slice) -> Tensor:
        classes, given = (None if part is None else part[rows] for part in (labels, condition))
        return prior.sample(len(seeds[rows]), classes, seeds=seeds[rows], condition=given)

    expected = torch.cat([sample(slice(i, i + 1)) for i in range(num_images)])
    prior.compile_sampling(compiled)
    with accelerator.autocast():
        sample(slice(None))
        wait_for(device)
        start = time.perf_counter()
        codes = sample(slice(None))
        wait_for(device)
    seconds = time.perf_counter() - start
    prior.compile_sampling(False)
    differing = (codes != expected).float().mean().item()
    return {"samples_per_second": num_images / seconds, "differing_codes": differing}
