"""Tiny priors that several files of tests share, and sampling by its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.layout import CodeGrid, CodeLayout
from configs.loading import options_of
from configs.random_streams import uniform
from prior import PRIOR_CONFIGS, PRIORS, Prior, build_prior
from prior.autoregressive import AutoregressivePrior
from prior.sampling import draw, filter_logits, guide

TINY = {"width": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "label_dropout": 0.1}

ROW = CodeLayout.single((1, 3), 3)
IMAGE = CodeLayout.single((4, 4), 16)
LINE = CodeLayout.single((6,), 7)
DEEP = CodeLayout.single((2, 3), 5, depth=2)
GRIDS = CodeLayout((CodeGrid((1, 2), 3), CodeGrid((2, 2), 5, 2)))
LAYOUTS = [IMAGE, LINE, DEEP, GRIDS]

OF_ONE_GRID = {"pixelcnn"}
"""Priors that model one 2-D grid of depth 1; the others model every layout."""
CODE_BY_CODE = [name for name, prior in PRIORS.items() if issubclass(prior, AutoregressivePrior)]
"""Priors whose logits are those of each code given the earlier ones."""


def can_model(name: str, layout: CodeLayout) -> bool:
    one_grid = len(layout.grids) == 1 and len(layout.grids[0].shape) == 2 and layout.grids[0].depth == 1
    return one_grid or name not in OF_ONE_GRID


def each_prior_on(*layouts: CodeLayout, names: Iterable[str] = PRIORS):
    """Run a test for each of the priors on those of the layouts that it can model."""
    cases = [(name, layout) for name in names for layout in layouts if can_model(name, layout)]
    return pytest.mark.parametrize(("name", "layout"), cases, ids=str)


def fresh_prior(name: str, layout: CodeLayout, num_classes: int = 0, **options: Any) -> Prior:
    """A prior in eval mode with the tiny options that it has and the given ones."""
    known = options_of(PRIOR_CONFIGS[name])
    model = {"name": name, **{k: v for k, v in TINY.items() if k in known}, **options}
    return build_prior(model, layout, num_classes=num_classes).eval()


def tiny_prior(name: str, layout: CodeLayout, num_classes: int = 0, **options: Any) -> Prior:
    """A `fresh_prior` with weights that give uneven probabilities."""
    prior = fresh_prior(name, layout, num_classes, **options)
    for parameter in prior.parameters():
        if parameter.ndim > 1:
            # A convolution sums over many more inputs than a matrix of width 16, and would saturate its gate.
            nn.init.normal_(parameter, std=0.5 if parameter.ndim == 2 else 2 / math.sqrt(parameter[0].numel()))
    return prior


def vocab_sizes(layout: CodeLayout) -> list[int]:
    """The K of every code."""
    return [grid.vocab_size for grid in layout.grids for _ in range(grid.num_codes)]


def random_codes(layout: CodeLayout, batch_size: int) -> Tensor:
    parts = [torch.randint(0, grid.vocab_size, (batch_size, grid.num_codes)) for grid in layout.grids]
    return torch.cat(parts, dim=1).view(batch_size, *layout.shape)


def every_image(layout: CodeLayout) -> Tensor:
    """All codes that a tiny layout allows, `(N, *layout.shape)`, the last code fastest."""
    return torch.tensor(list(itertools.product(*map(range, vocab_sizes(layout))))).view(-1, *layout.shape)


def shares(codes: Tensor, layout: CodeLayout) -> Tensor:
    """How often each of `every_image` is among codes `(N, *layout.shape)`, as a share."""
    index = torch.zeros(len(codes), dtype=torch.int64)
    for j, K in enumerate(vocab_sizes(layout)):
        index = index * K + codes.flatten(1)[:, j]
    return torch.bincount(index, minlength=len(every_image(layout))) / len(codes)


def assert_shares(codes: Tensor, layout: CodeLayout, probabilities: Tensor) -> None:
    """The images have these probabilities `(N,)`, within five standard deviations of a binomial."""
    n = len(codes)
    bound = 5 * (probabilities * (1 - probabilities) / n).sqrt() + 1 / n
    assert ((shares(codes, layout) - probabilities).abs() <= bound).all()


@contextmanager
def batch_sizes(prior: Prior) -> Iterator[list[int]]:
    """The number of rows of every pass through a prior, all of which end in its head."""
    seen: list[int] = []
    handle = prior.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def masks(prior: Prior) -> Iterator[list[Tensor]]:
    """Which codes a MaskGIT sees masked in every pass, `(rows, num_codes)` bool."""
    seen: list[Tensor] = []
    mask_row = prior.code_embedding.num_embeddings - 1
    handle = prior.code_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] == mask_row))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def labels_seen(prior: Prior) -> Iterator[list[Tensor]]:
    """The labels of every pass through a prior, `(rows,)` int64, num_classes where there is no class."""
    seen: list[Tensor] = []
    handle = prior.class_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def sample_without_cache(
    prior: Prior,
    seeds: Tensor,
    labels: Tensor | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    **sampling: Any,
) -> Tensor:
    """The definition of sampling code by code: code j from the logits of the whole sequence, all computed anew."""
    layout, options = prior.code_layout, prior.sampling_options(**sampling)
    B, L = len(seeds), layout.num_codes
    codes = torch.zeros(B, *layout.shape, dtype=torch.int64)
    flat = codes.view(B, L)
    for j in range(L):
        logits = conditional = prior.logits(codes, labels)[:, j]
        if (scale := options.guidance_at(j, L)) != 1:
            guided = guide(conditional, prior.logits(codes)[:, j], scale)
            logits = guided.where(conditional.isfinite(), float("-inf"))
        temperature = options.temperature_at(j, L)
        allowed = filter_logits(logits, temperature=temperature, top_k=options.top_k, top_p=options.top_p)
        flat[:, j] = draw(allowed, uniform(seeds, j))
        if known is not None:
            here = known_mask.flatten(1)[:, j]
            flat[here, j] = known.flatten(1)[here, j]
    return codes
