"""From `--config FILE.yaml key=value ...` to a checked schema, and the `--help` that lists every key."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.validation import Schema, did_you_mean, field_docs, field_hints, from_mapping, type_name

S = TypeVar("S", bound=Schema)

Choices = Mapping[str, Mapping[str, Callable[..., Any]]]
"""For each free block: its names, and the class whose options the block takes."""

BLOCKS = ("model", "quantizer", "discriminator")
"""Keys of the free blocks: a name, and the options that go with it."""


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The plain contents of a YAML file, or a ValueError that says where it cannot be read."""
    if not Path(file).is_file():
        raise ValueError(f"there is no config file {file}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} should hold keys and values, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def write_yaml(file: str | Path, values: dict[str, Any]) -> None:
    OmegaConf.save(OmegaConf.create(values), file)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ValueError(f"expected key=value, got '{override}'; --help lists the keys")
    # YAML would read the colour #ff0000 as a comment.
    quoted = [re.sub("^([^=]*=)(#.*)$", r"\1'\2'", override) for override in overrides]
    try:
        container = OmegaConf.to_container(OmegaConf.from_dotlist(quoted), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {error}") from error
    return typing.cast(dict[str, Any], container)


def _merge(preset: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides over a preset. A new `name` of a block drops the block's other options; epochs and steps exclude."""
    merged = dict(preset)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            renamed = key in BLOCKS and "name" in value and value["name"] != old.get("name")
            merged[key] = value if renamed else _merge(old, value)
        else:
            merged[key] = value
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if overrides.get(given) is not None and overrides.get(other) is None:
            merged.pop(other, None)
    return merged


def load_config(cls: type[S], file: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """The configuration of a run: the schema's defaults, then a YAML file, then `key=value` overrides.

    Raises:
        ValueError: for an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    preset = {} if file is None else read_yaml(file)
    return from_mapping(cls, _merge(_merge(_default_blocks(cls), preset), _parse_overrides(overrides)))


def _default_blocks(cls: type[Schema]) -> dict[str, Any]:
    """The defaults of a schema's free blocks, those of the schemas inside it too."""
    defaults: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        default = _default_of(f)
        if f.name in BLOCKS:
            defaults[f.name] = default
        elif isinstance(default, Schema) and (inner := _default_blocks(type(default))):
            defaults[f.name] = inner
    return defaults


def options_of(factory: Callable[..., Any]) -> dict[str, tuple[str, str, str]]:
    """The options a block's class takes: name -> (type, default, meaning).

    A dataclass documents its fields underneath them; any other class in the Args of its docstring. A constructor that
    ends in `**options` takes those of its base class too.
    """
    if dataclasses.is_dataclass(factory) and isinstance(factory, type):
        docs, hints = field_docs(factory), field_hints(factory)
        return {
            f.name: (type_name(hints[f.name]), str(_default_of(f)), docs[f.name])
            for f in dataclasses.fields(factory)
            if f.name in docs
        }
    options: dict[str, tuple[str, str, str]] = {}
    owners = factory.__mro__ if inspect.isclass(factory) else (factory,)
    docs = {name: meaning for owner in reversed(owners) for name, meaning in _documented_arguments(owner).items()}
    for owner in owners:
        function = vars(owner).get("__init__") if inspect.isclass(owner) else owner
        if function is None:
            continue
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.name not in options and p.name in docs:
                options[p.name] = (type_name(hints[p.name]), str(p.default), docs[p.name])
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break  # a constructor with **options hands them to its base class
    return options


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _documented_arguments(owner: Callable[..., Any]) -> dict[str, str]:
    """The Args of a docstring: name -> meaning."""
    docs: dict[str, str] = {}
    section = inspect.cleandoc(owner.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    for line in textwrap.dedent(section).split("\n"):
        if not line.startswith(" ") and ":" in line:
            name, _, meaning = line.partition(":")
            docs[name] = meaning.strip()
        elif docs:
            docs[next(reversed(docs))] += " " + line.strip()
    return docs


def check_options(block: str, options: Mapping[str, Any], choices: Mapping[str, Callable[..., Any]]) -> None:
    """Raise a ValueError where a block names an unknown class or an option that its class does not have."""
    name = options["name"]
    if name not in choices:
        raise ValueError(did_you_mean(str(name), choices, block))
    known = options_of(choices[name])
    for option in options:
        if option != "name" and option not in known:
            raise ValueError(did_you_mean(f"{block}.{option}", [f"{block}.{k}" for k in known], f"option of {name}"))


def help_text(cls: type[Schema], choices: Choices | None = None) -> str:
    """Every key with its default, unit and meaning."""
    choices = choices or {}
    lines = [f"{(cls.__doc__ or '').strip()}", "", "usage: [--config FILE.yaml] key=value ...", ""]

    def describe(key: str, kind: str, default: str, meaning: str) -> None:
        lines.append(f"  {key}={default if default != 'None' else 'none'}  ({kind})")
        lines.extend(textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))

    def walk(schema: type[Schema], prefix: str) -> None:
        docs, hints = field_docs(schema), field_hints(schema)
        for f in dataclasses.fields(schema):
            hint = hints[f.name]
            if isinstance(hint, type) and issubclass(hint, Schema):
                walk(hint, f"{prefix}{f.name}.")
                continue
            default = _default_of(f)
            if f.name in choices:
                describe(f"{prefix}{f.name}.name", " | ".join(choices[f.name]), str(default["name"]), docs[f.name])
                for name, factory in choices[f.name].items():
                    lines.append(f"    with {prefix}{f.name}.name={name}:")
                    for option, description in options_of(factory).items():
                        describe(f"{prefix}{f.name}.{option}", *description)
            else:
                shown = "REQUIRED" if default is dataclasses.MISSING else str(default)
                describe(f"{prefix}{f.name}", type_name(hint), shown, docs[f.name])

    walk(cls, "")
    return "\n".join(lines)


def config_from_arguments(cls: type[S], arguments: Sequence[str], choices: Choices | None = None) -> S:
    """The configuration that a script's arguments describe; `--help` prints every key and leaves."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, choices))
        sys.exit(0)
    files, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag == "--config":
            files.append(value or next(rest, ""))
        else:
            overrides.append(argument)
    if len(files) > 1 or "" in files:
        raise ValueError(f"expected --config FILE.yaml once, got {' '.join(arguments)}")
    return load_config(cls, files[0] if files else None, overrides)
