"""The options of every quantizer: their names, ranges, defaults and help, and the advice that names them."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from quantizer_cases import VARIANTS, tiny_quantizer

from configs.loading import help_text, options_of
from configs.schema import TokenizerTrainingConfig
from configs.validation import Range
from tokenizer.quantizers import QUANTIZERS, build_quantizer

WRAPPERS = ["multiscale", "product", "residual"]


def type_of(name: str, option: str) -> Any:
    """The annotation of an option, from the constructor that declares it."""
    for owner in QUANTIZERS[name].__mro__:
        hints = typing.get_type_hints(vars(owner).get("__init__", lambda: None), include_extras=True)
        if option in hints:
            return hints[option]
    raise KeyError(option)


def wrong_values(hint: Any) -> Iterator[Any]:
    """Values just outside a type: beyond either bound, of no known name, of another type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, bounds = arguments[0], next(a for a in arguments[1:] if isinstance(a, Range))
        yield from (kind(v) for v in (bounds.minimum - 1, bounds.maximum + 1) if abs(v) != float("inf"))
        yield from ("many", float("nan"), True, *([1.5] if kind is int else []))
    elif origin is Literal:
        yield from ("nonsense", 77, None)
    elif origin in (typing.Union, types.UnionType):
        yield from wrong_values(next(a for a in arguments if a is not type(None)))
    elif origin is list:
        yield "several"
        yield from ([value] for value in wrong_values(arguments[0]))
    elif hint is bool:
        yield from ("perhaps", 2)
    else:
        yield from (3, "text")


def test_an_unknown_quantizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown quantizer 'vqq'; did you mean 'vq'") as error:
        build_quantizer({"name": "vqq"}, 4)
    assert ", ".join(sorted(QUANTIZERS)) in str(error.value)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown option of {name} 'quantizer.nonsense'; .*choose one of") as error:
        build_quantizer({"name": name, "nonsense": 1}, 4)
    assert all(f"quantizer.{option}" in str(error.value) for option in options_of(QUANTIZERS[name]))


@pytest.mark.parametrize(
    ("name", "option"), [(name, key) for name in QUANTIZERS for key in options_of(QUANTIZERS[name])]
)
def test_a_value_out_of_range_is_refused_and_the_message_names_the_option(name, option):
    for value in wrong_values(type_of(name, option)):
        with pytest.raises(ValueError, match=rf"^{option}(\[0\])? should be .*, got |quantizer.{option}") as error:
            build_quantizer({"name": name, option: value}, 4)
        assert (name, option) == ("ibq", "gradient") or repr(value[0] if "[0]" in str(error.value) else value) in str(
            error.value
        )


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_value_out_of_range_inside_a_wrapper_is_refused_too(name):
    with pytest.raises(ValueError, match=r"^decay should be number from 0 to 0.999999, got 2"):
        build_quantizer({"name": name, "quantizer": {"name": "ema", "decay": 2}}, 4)
    with pytest.raises(ValueError, match=r"unknown option of ema 'quantizer.dekay'; did you mean 'quantizer.decay'"):
        build_quantizer({"name": name, "quantizer": {"name": "ema", "dekay": 0.5}}, 4)
    with pytest.raises(ValueError, match=r"the quantizer inside needs a name, .*give quantizer.quantizer.name="):
        build_quantizer({"name": name, "quantizer": {"vocab_size": 8}}, 4)


@pytest.mark.parametrize(
    "inner",
    [
        {"name": "residual"},
        {"name": "product"},
        {"name": "multiscale"},
        {"name": "multiscale", "grid_dims": 1, "num_convolutions": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_quantizer_of_several_codes_a_position_is_refused_inside_a_wrapper(name, inner):
    with pytest.raises(ValueError, match="the quantizer inside should give one code a position"):
        build_quantizer({"name": name, "quantizer": inner}, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vq", "initial_vocab_size": 17, "vocab_size": 16}, "initial_vocab_size=17 should be at most"),
        ({"name": "ibq", "gradient": "rotation"}, "ibq has a gradient of its own"),
        ({"name": "fsq", "levels": []}, "levels should be a list of integers, one a channel, got an empty one"),
        ({"name": "product", "depth": 3}, "4 channels do not divide into depth=3 groups"),
        ({"name": "multiscale", "scales": [2, 1]}, r"scales should be rising sides of grids, got \[2, 1\]"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer(options, 4)


@pytest.mark.parametrize(
    ("scales", "grid", "message"),
    [
        (None, (7,), "expected latents on a grid of 2 axes, got .7,.; give quantizer.grid_dims="),
        (None, (2, 2), r"4 convolutions for 2 scales, .* give quantizer.num_convolutions=2"),
        ([1, 4], (5, 3), r"quantizer.scales end at 4, but the latents' grid is \(5, 3\); end at 5"),
    ],
)
def test_a_grid_that_multiscale_was_not_built_for_is_refused(scales, grid, message):
    quantizer = tiny_quantizer("multiscale", scales=scales)
    for verb in (quantizer.code_layout, lambda grid: quantizer(torch.randn(2, 4, *grid))):
        with pytest.raises(ValueError, match=message):
            verb(grid)


# Defaults and help

ALIVE = {"codebook_start": "kmeans", "revive_after": "50", "revive_below": "0.5", "initial_vocab_size": "0"}
BITS = {"num_bits": "10", "entropy_weight": "0.01", "diversity_weight": "1.0", "entropy_group_bits": "14"}

DEFAULTS = {
    "ema": ALIVE | {"vocab_size": "512", "entropy_weight": "0.0", "decay": "0.99"},
    "vq": ALIVE | {"commitment_weight": "0.25", "gradient": "straight_through", "codebook_learning_rate": "10.0"},
    "cvq": ALIVE | {"revive_after": "0", "anchor": "closest", "decay": "0.99", "commitment_weight": "0.25"},
    "ibq": ALIVE
    | {"codebook_start": "normal", "codebook_learning_rate": "10.0", "distance": "euclidean"}
    | {"commitment_weight": "0.05", "codebook_weight": "0.01", "double_quantization_weight": "0.05"}
    | {"entropy_weight": "0.01", "entropy_temperature": "1.0"},
    "simvq": ALIVE | {"vocab_size": "512", "codebook_learning_rate": "5.0"},
    "lfq": BITS | {"entropy_temperature": "1.0", "commitment_weight": "0.01"},
    "bsq": BITS | {"entropy_temperature": "0.1", "commitment_weight": "0.01"},
    "gumbel": {"kl_weight": "0.0005", "entropy_weight": "0.01", "straight_through": "True"},
    "fsq": {"levels": "[8, 5, 5, 5]", "entropy_weight": "0.003"},
    "product": {"depth": "2"},
    "residual": {"depth": "4", "shared": "False", "quantizer_dropout": "0.0"},
    "multiscale": {"scales": "None", "num_convolutions": "4", "grid_dims": "2"},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_options_and_defaults_are_those_of_the_class_and_what_it_inherits(name):
    options = options_of(QUANTIZERS[name])
    assert {option: options[option][1] for option in DEFAULTS[name]} == DEFAULTS[name]
    declared: dict[str, str] = {}
    for owner in reversed(QUANTIZERS[name].__mro__):
        parameters = inspect.signature(vars(owner).get("__init__", lambda: None)).parameters.values()
        declared |= {p.name: str(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {option: default for option, (_, default, _) in options.items()} == declared


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_defaults_that_are_listed_are_those_that_are_used(name):
    quantizer = build_quantizer({"name": name}, 8)
    for option, (_, default, _) in options_of(QUANTIZERS[name]).items():
        stored = getattr(quantizer, option, None)
        if isinstance(stored, int | float | str) and option not in ("code_dim", "distance", "temperature"):
            assert str(stored) == default, option


def test_help_shows_inherited_options_with_the_defaults_of_each_quantizer():
    text = help_text(TokenizerTrainingConfig, {"quantizer": QUANTIZERS})
    sections = dict(re.findall(r"    with quantizer\.name=(\w+):\n(.*?)(?=\n    with|\Z)", text, flags=re.DOTALL))
    assert sections.keys() == QUANTIZERS.keys()
    for name, defaults in DEFAULTS.items():
        for option, default in defaults.items():
            assert f"  quantizer.{option}={'none' if default == 'None' else default}  (" in sections[name]
    assert "quantizer.initial_vocab_size=0  (integer at least 0)" in sections["ibq"]
    assert "quantizer.num_bits=10  (integer from 1 to 24)" in sections["bsq"]


# What to try where a codebook collapses


def advised_options(advice: str) -> list[str]:
    return re.findall(r"([\w.]+)=", advice)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"revive_after": 50},
        {"codebook_start": "kmeans"},
        {"codebook_start": "kmeans", "revive_after": 50},
        {"codebook_start": "kmeans", "revive_after": 50, "entropy_weight": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_advice_against_collapse_names_options_that_exist(name, options):
    quantizer = tiny_quantizer(name, **options)
    cls, prefix = QUANTIZERS[VARIANTS[name]["name"]], "quantizer."
    while "quantizer" in options_of(cls):
        quantizer, prefix = quantizer.first, f"{prefix}quantizer."
        cls = type(quantizer)
    advised = advised_options(tiny_quantizer(name, **options).collapse_advice())
    assert advised
    for option in advised:
        assert option.startswith(prefix)
        assert option.removeprefix(prefix) in options_of(cls)


@pytest.mark.parametrize("name", ["ema", "simvq", "vq"])
def test_the_advice_names_the_first_flag_that_is_off(name):
    on: dict[str, Any] = {}
    for option, value in (("codebook_start", "kmeans"), ("revive_after", 50), ("entropy_weight", 0.1)):
        advice = tiny_quantizer(name, **on).collapse_advice()
        assert advice == f"quantizer.{option}={value}"
        assert isinstance(build_quantizer({"name": name, option: value}, 4), QUANTIZERS[name])
        on[option] = value
    assert set(advised_options(tiny_quantizer(name, **on).collapse_advice())) == {
        "quantizer.entropy_weight",
        "quantizer.vocab_size",
    }
