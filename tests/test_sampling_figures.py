"""Sampling is measured beside the same images drawn one by one in eager float32."""

from __future__ import annotations

import functools

import pytest
import torch
from prior_cases import GRIDS, IMAGE, random_codes, tiny_prior

from configs.evaluation import EvaluationConfig
from configs.loading import load_config
from pipelines import evaluate
from pipelines.devices import make_accelerator
from pipelines.sampling_figures import measure_sampling


@pytest.mark.parametrize("name", ["gpt", "maskgit", "pixelcnn"])
def test_no_code_differs_in_eager_float32(name):
    figures = measure_sampling(tiny_prior(name, IMAGE, num_classes=2), 5, make_accelerator("no"))
    assert figures["differing_codes"] == 0
    assert figures["samples_per_second"] > 0


def test_the_share_of_differing_codes_is_over_all_codes_of_all_images(monkeypatch):
    prior = tiny_prior("gpt", IMAGE)
    sample = prior.sample

    def altered(num_images, *arguments, **options):
        codes = sample(num_images, *arguments, **options)
        if num_images == 4:
            codes[1, 2, :3] += 1
        return codes

    monkeypatch.setattr(prior, "sample", altered)
    assert measure_sampling(prior, 4, make_accelerator("no"))["differing_codes"] == pytest.approx(3 / 64)


def test_codes_differ_in_bfloat16():
    prior = tiny_prior("gpt", IMAGE, num_classes=2)
    assert 0 < measure_sampling(prior, 32, make_accelerator("bf16"))["differing_codes"] < 1


def test_steps_are_compiled_for_the_batch_alone(monkeypatch):
    rows = []

    def backend(graph, inputs):
        rows.extend(x.shape[0] for x in inputs if x.ndim == 2 and x.dtype == torch.int64)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr("pipelines.sampling_figures.require_compiler", lambda device: None)
    prior = tiny_prior("gpt", IMAGE, num_layers=1)
    assert measure_sampling(prior, 3, make_accelerator("no"), compiled=True)["differing_codes"] == 0
    assert set(rows) == {3}
    assert not prior.compiled_sampling


def test_a_prior_of_one_grid_is_given_the_coarser_codes():
    prior = tiny_prior("pixelcnn", GRIDS.__class__((GRIDS.grids[0], IMAGE.grids[0])), grid=1)
    _, condition = prior.split_condition(random_codes(prior.config.code_layout, 3))
    assert measure_sampling(prior, 3, make_accelerator("no"), condition)["differing_codes"] == 0
    with pytest.raises(ValueError, match="num_samples=4 needs as many coded images, got 3"):
        measure_sampling(prior, 4, make_accelerator("no"), condition)


def test_evaluating_with_samples_reports_them(prior_run, code_folder):
    figures = evaluate(load_config(EvaluationConfig, None, [f"prior={prior_run}", f"codes={code_folder}"]))
    assert "samples_per_second" not in figures
    options = [f"prior={prior_run}", f"codes={code_folder}", "num_samples=3"]
    assert evaluate(load_config(EvaluationConfig, None, options))["differing_codes"] == 0


@pytest.mark.parametrize("options", [["tokenizer=t", "num_samples=3"], ["prior=p", "compile=true"]])
def test_options_of_sampling_without_it_are_refused(options):
    with pytest.raises(ValueError, match="compile=true is for the images of num_samples=, which prior= draws"):
        load_config(EvaluationConfig, None, options)
