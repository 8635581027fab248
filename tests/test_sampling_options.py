"""The options that every prior's sampling has: their values at each step, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from prior_cases import GRIDS, IMAGE, ROW, sample_without_cache, tiny_prior

from configs.generation import GenerationConfig
from configs.loading import load_config
from configs.sampling import SamplingOptions
from prior import PRIORS
from prior.maskgit import MaskGITOptions

SCHEDULES = ["constant", "linear", "cosine", "power_cosine"]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 16])
def test_a_number_is_the_temperature_of_every_step(num_steps):
    options = SamplingOptions(temperature=0.7)
    assert [options.temperature_at(step, num_steps) for step in range(num_steps)] == [0.7] * num_steps


@pytest.mark.parametrize("num_steps", [1, 2, 5, 16])
def test_a_list_of_one_temperature_is_that_of_every_step(num_steps):
    options = SamplingOptions(temperature=[0.7])
    assert [options.temperature_at(step, num_steps) for step in range(num_steps)] == [0.7] * num_steps


def test_a_list_of_temperatures_starts_with_its_first_ends_with_its_last_and_is_in_the_middle_between():
    options = SamplingOptions(temperature=[1.2, 0.8])
    assert options.temperature_at(0, 5) == 1.2
    assert options.temperature_at(2, 5) == pytest.approx(1.0)
    assert options.temperature_at(4, 5) == pytest.approx(0.8)
    options = SamplingOptions(temperature=[1, 3, 0])
    assert [options.temperature_at(step, 5) for step in range(5)] == pytest.approx([1, 2, 3, 1.5, 0])


@pytest.mark.parametrize("temperatures", [[1.2, 0.8], [0, 1], [1, 0.5, 2], [0.1, 4, 0.2, 3, 0.3]], ids=str)
@pytest.mark.parametrize("num_steps", [2, 3, 7, 16, 257])
def test_a_list_of_temperatures_is_interpolated_evenly_over_the_steps(temperatures, num_steps):
    options = SamplingOptions(temperature=temperatures)
    found = [options.temperature_at(step, num_steps) for step in range(num_steps)]
    expected = np.interp(np.linspace(0, 1, num_steps), np.linspace(0, 1, len(temperatures)), temperatures)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_an_only_step_is_the_last():
    options = SamplingOptions(temperature=[1.2, 0.8], guidance_scale=3, guidance_schedule="linear")
    assert options.temperature_at(0, 1) == pytest.approx(0.8)
    assert options.guidance_at(0, 1) == 3
    assert options.guided_steps(1) == 1


def test_a_list_of_temperatures_is_used_code_by_code():
    prior, seeds = tiny_prior("gpt", IMAGE).double(), torch.arange(32)
    codes = prior.sample(32, seeds=seeds, temperature=[3, 0])
    assert torch.equal(codes, sample_without_cache(prior, seeds, temperature=[3, 0]))
    assert not torch.equal(codes, prior.sample(32, seeds=seeds, temperature=[0, 3]))
    assert torch.equal(prior.sample(32, seeds=seeds, temperature=[2]), prior.sample(32, seeds=seeds, temperature=2))


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_a_list_that_stays_at_zero_is_the_temperature_zero(name):
    prior = tiny_prior(name, GRIDS)
    greedy = prior.sample(8, seeds=torch.arange(8), temperature=0)
    assert torch.equal(prior.sample(8, seeds=torch.arange(8), temperature=[0, 0]), greedy)
    assert not torch.equal(prior.sample(8, seeds=torch.arange(8), temperature=[1, 0]), greedy)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [3, 3, 3, 3, 3]),
        ("linear", [1, 1.5, 2, 2.5, 3]),
        ("cosine", [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3]),
        ("power_cosine", [1, *(2 - math.cos(math.pi * p**4) for p in (0.25, 0.5, 0.75)), 3]),
    ],
)
def test_a_guidance_schedule_follows_its_formula(schedule, expected):
    options = SamplingOptions(guidance_scale=3, guidance_schedule=schedule)
    assert [options.guidance_at(step, 5) for step in range(5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("power", [0.5, 1, 2, 6])
def test_the_power_of_power_cosine_is_the_exponent_of_the_progress(power):
    options = SamplingOptions(guidance_scale=5, guidance_schedule="power_cosine", guidance_power=power)
    for step in range(11):
        share = (1 - math.cos(math.pi * (step / 10) ** power)) / 2
        assert options.guidance_at(step, 11) == pytest.approx(1 + 4 * share, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scale_below_one_is_approached_from_one(schedule):
    options = SamplingOptions(guidance_scale=0.5, guidance_schedule=schedule)
    scales = [options.guidance_at(step, 9) for step in range(9)]
    assert scales == sorted(scales, reverse=True)
    assert scales[0] == (0.5 if schedule == "constant" else 1)
    assert scales[-1] == 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_interval_guides_its_steps_as_without_it_and_no_others(schedule):
    always = SamplingOptions(guidance_scale=3, guidance_schedule=schedule)
    inside = dataclasses.replace(always, guidance_interval=[0.25, 0.5])
    # Both ends belong to the interval.
    expected = [1, 1, *(always.guidance_at(step, 9) for step in (2, 3, 4)), 1, 1, 1, 1]
    assert [inside.guidance_at(step, 9) for step in range(9)] == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("interval", "num_steps", "expected"),
    [([0, 1], 9, 9), ([0, 0.5], 9, 5), ([0.25, 0.5], 9, 5), ([0.3, 0.6], 11, 7), ([0.31, 0.39], 11, 0), ([1, 1], 4, 4)],
)
def test_guided_steps_end_with_the_last_step_in_the_interval(schedule, interval, num_steps, expected):
    options = SamplingOptions(guidance_scale=3, guidance_schedule=schedule, guidance_interval=interval)
    assert options.guided_steps(num_steps) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_guidance_no_step_is_guided(schedule):
    options = SamplingOptions(guidance_scale=1, guidance_schedule=schedule)
    assert options.guided_steps(16) == 0
    assert {options.guidance_at(step, 16) for step in range(16)} == {1}


def test_a_schedule_that_is_still_at_one_does_not_guide():
    only_first = {"guidance_scale": 3, "guidance_interval": [0, 0]}
    assert SamplingOptions(**only_first, guidance_schedule="constant").guided_steps(16) == 1
    assert SamplingOptions(**only_first, guidance_schedule="linear").guided_steps(16) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": []}, "temperature should be a number or a list of numbers, got an empty list"),
        ({"temperature": [1, -1]}, r"temperature should be .*at least 0.*, got \[1, -1\]"),
        ({"temperature": [1, float("nan")]}, r"temperature should be .*, got \[1, nan\]"),
        ({"temperature": "hot"}, "temperature should be .*number.*, got 'hot'"),
        (
            {"guidance_schedule": "sine"},
            r"guidance_schedule should be constant \| linear \| .*, got 'sine'",
        ),
        ({"guidance_power": 0}, "guidance_power should be number from 0.01 to 100, got 0"),
        ({"guidance_interval": [0.6, 0.3]}, r"guidance_interval should be \[first, last\], got \[0.6, 0.3\]"),
        ({"guidance_interval": [0.5]}, r"guidance_interval should be \[first, last\], got \[0.5\]"),
        ({"guidance_interval": [0.0, 0.5, 1.0]}, r"guidance_interval should be \[first, last\], got \[0.0, 0.5, 1.0\]"),
        ({"guidance_interval": [0, 1.5]}, r"guidance_interval\[1\] should be number from 0 to 1, got 1.5"),
        ({"top_k": 2.5}, "top_k should be .*integer.*, got 2.5"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", PRIORS)
def test_options_out_of_range_are_refused_with_what_came_and_what_was_expected(name, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_prior(name, ROW, num_classes=2).sample(2, torch.tensor([0, 1]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps should be integer at least 1, got 0"),
        ({"order": "random"}, r"order should be confidence \| halton, got 'random'"),
        ({"schedule": "cubic"}, r"schedule should be .*cosine \| linear \| square \| arccos \| root.*, got 'cubic'"),
        ({"choice_temperature": -1}, "choice_temperature should be .*at least 0.*, got -1"),
        ({"guidance_interval": [0.6, 0.3]}, "guidance_interval should be"),
    ],
    ids=str,
)
def test_options_of_maskgit_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskGITOptions(**options)


def test_guidance_before_its_interval_still_needs_labels_and_label_dropout():
    options = {"guidance_scale": 2.0, "guidance_interval": [0.9, 1.0]}
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs labels"):
        tiny_prior("maskgit", ROW, num_classes=2).sample(2, **options)
    with pytest.raises(ValueError, match=r"model.label_dropout=0"):
        tiny_prior("maskgit", ROW, num_classes=2, label_dropout=0.0).sample(2, torch.tensor([0, 1]), **options)


def test_a_command_line_gives_lists_and_numbers():
    parts = ["tokenizer=a", "prior=b", "temperature=[1.2,0.8]", "guidance_interval=[0.2,0.7]", "guidance_power=2"]
    config = load_config(GenerationConfig, None, parts)
    assert (config.temperature, config.guidance_interval, config.guidance_power) == ([1.2, 0.8], [0.2, 0.7], 2.0)
    assert load_config(GenerationConfig, None, ["tokenizer=a", "prior=b", "temperature=2"]).temperature == 2.0
