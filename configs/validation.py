"""Checked dataclasses: every field has a type, often a range, and a docstring underneath that --help prints."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

Constructor = TypeVar("Constructor", bound=Callable[..., None])


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive; put it into `Annotated[int, Range(1)]`."""

    minimum: float = float("-inf")
    maximum: float = float("inf")

    def __str__(self) -> str:
        if self.maximum == float("inf"):
            return f"at least {self.minimum:.10g}"
        return f"from {self.minimum:.10g} to {self.maximum:.10g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # numpy refuses larger ones
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def did_you_mean(name: str, known: Iterable[str], what: str) -> str:
    """The message for an unknown name: the nearest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {what} '{name}'; {hint}choose one of {', '.join(known)}"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        docs |= _docs_in_source(source)
    return docs


@functools.cache
def _docs_in_source(source: str) -> dict[str, str]:
    body, docs = ast.parse(textwrap.dedent(source)).body[0], {}
    if isinstance(body, ast.ClassDef):
        for field, doc in itertools.pairwise(body.body):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def field_hints(cls: type) -> dict[str, Any]:
    """The evaluated annotations of a dataclass and its bases, without those of other libraries' base classes."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] not in ("transformers", "huggingface_hub", "builtins"):
            hints |= inspect.get_annotations(base, eval_str=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not typing.ClassVar}


def type_name(hint: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [str(a) for a in arguments[1:] if isinstance(a, Range)]
        return " ".join([type_name(arguments[0]), *bounds])
    if origin in (Union, types.UnionType):
        return " | ".join("none" if a is type(None) else type_name(a) for a in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true | false", dict: "block"}.get(
        origin or hint, getattr(hint, "__name__", str(hint))
    )


def _coerce_number(value: Any, hint: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    if hint is int:
        if value != int(value):
            raise TypeError
        return int(value)
    return float(value)


def coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names the key, what came and what was expected."""
    origin, arguments = get_origin(hint), get_args(hint)
    problem = ValueError(f"{key} should be {type_name(hint)}, got {value!r}")
    if hint is Any:
        return value
    if origin is Annotated:
        value = coerce(value, arguments[0], key)
        bounds = next(a for a in arguments[1:] if isinstance(a, Range))
        if not bounds.minimum <= value <= bounds.maximum:
            raise problem
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            if option is type(None) and value is None:
                return None
        # Exact types first, so that 32 stays an integer where text would be allowed too.
        options = {a: (get_args(a) or (a,))[0] for a in arguments if a is not type(None)}
        if type(value) in (int, float) and {int, float} & set(options.values()):
            # A number out of range is a mistake, not a name written in digits.
            options.pop(str, None)
        for option in sorted(options, key=lambda a: type(value) is not options[a]):
            try:
                return coerce(value, option, key)
            except ValueError:
                continue
        raise problem
    if origin is Literal:
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in arguments else value
        for choice in arguments:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise problem
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise problem
        items = [coerce(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if isinstance(hint, type) and issubclass(hint, Schema):
        if isinstance(value, hint):
            return value
        if not isinstance(value, dict):
            raise problem
        return from_mapping(hint, value, prefix=f"{key}.")
    try:
        if hint in (int, float):
            return _coerce_number(value, hint)
        if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    except (TypeError, OverflowError, ValueError):
        raise problem from None
    if not isinstance(value, origin or hint):
        raise problem
    return value


def checked(constructor: Constructor) -> Constructor:
    """Check a constructor's keyword arguments against their annotations, types and ranges, before it runs."""

    @functools.wraps(constructor)
    def check(self: Any, *arguments: Any, **options: Any) -> None:
        hints = typing.get_type_hints(constructor, include_extras=True)
        for name in options.keys() & hints.keys():
            options[name] = coerce(options[name], hints[name], name)
        constructor(self, *arguments, **options)

    return typing.cast(Constructor, check)


@dataclass
class Schema:
    """A dataclass whose fields are checked against their types when it is built; `validate` checks the rest."""

    def __post_init__(self) -> None:
        hints = field_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, coerce(getattr(self, field.name), hints[field.name], field.name))
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError for values that do not go together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, ready for YAML or JSON."""
        return dataclasses.asdict(self)


def from_mapping(cls: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a Schema from nested plain data; unknown keys are refused with the nearest known one."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = field_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(did_you_mean(f"{prefix}{name}", [f"{prefix}{known}" for known in fields], "key"))
        arguments[name] = coerce(value, hints[name], f"{prefix}{name}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [f"{prefix}{name}=" for name in required if name not in arguments]:
        raise ValueError(f"please give {' and '.join(missing)} ({cls.__name__} has no default for it)")
    return cls(**arguments)
