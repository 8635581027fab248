"""Compiled sampling: the codes of eager sampling, and one compilation a shape however many shapes there are."""

from __future__ import annotations

import functools

import pytest
import torch
from prior_cases import GRIDS, IMAGE, tiny_prior

from prior import Prior

GUIDED = {"guidance_scale": 2.0, "guidance_interval": [0.0, 0.5]}


@pytest.fixture
def graphs(monkeypatch) -> list[object]:
    """Lets torch.compile trace only, as no machine needs a compiler for, and collects what it traces."""
    traced: list[object] = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return traced


def sample(prior: Prior, num_images: int, **options) -> torch.Tensor:
    labels = torch.arange(num_images) % 2
    return prior.sample(num_images, labels, seeds=torch.arange(num_images), **options)


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("layout", [IMAGE, GRIDS], ids=str)
@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_compiled_steps_draw_the_codes_of_eager_ones(name, layout, options, graphs):
    prior = tiny_prior(name, layout, num_classes=2, num_layers=1)
    expected = sample(prior, 3, **options)
    assert sample(prior.compile_sampling(), 3, **options).equal(expected)
    assert graphs


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_a_shape_is_compiled_once(name, graphs):
    prior = tiny_prior(name, IMAGE, num_classes=2, num_layers=1).compile_sampling()
    sample(prior, 3, **GUIDED)
    before = len(graphs)
    sample(prior, 3, temperature=0.7, **GUIDED)
    assert len(graphs) == before


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_more_shapes_than_torch_allows_by_default_are_compiled(name, graphs):
    prior = tiny_prior(name, IMAGE, num_layers=1).compile_sampling()
    with torch.compiler.config.patch(recompile_limit=2):
        for num_images in (1, 2, 3, 4):
            prior.sample(num_images)
        assert torch.compiler.config.recompile_limit == 2
    assert len(graphs) > 3


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_compiling_can_be_taken_back(name, graphs):
    prior = tiny_prior(name, IMAGE).compile_sampling().compile_sampling(False)
    prior.sample(2)
    assert not graphs


def test_a_prior_without_steps_to_compile_says_so():
    prior = tiny_prior("pixelcnn", IMAGE)
    with pytest.raises(ValueError, match="pixelcnn has no steps to compile in sampling; leave compile out"):
        prior.compile_sampling()
    assert prior.compile_sampling(False).sample(1).shape == (1, 4, 4)
