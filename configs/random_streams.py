"""Random numbers that belong to an image: a hash of (key, counter), the same on any device, batch size and process.

Written with integer operators only, so that it works on torch and numpy int64 arrays and on Python integers alike.
The hash is the finalizer of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from typing import Any

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _wrap(value: Any) -> Any:
    """Two's complement 64 bits: arrays wrap by themselves, Python integers grow."""
    return ((value + (1 << 63)) % (1 << 64)) - (1 << 63) if isinstance(value, int) else value


def _shift(value: Any, bits: int) -> Any:
    """Logical right shift of a signed 64-bit integer."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(key: Any, counter: Any) -> Any:
    """A 64-bit hash of two integers (or int64 arrays that broadcast), as a signed integer.

    Nested calls give streams of streams: `mix(mix(seed, step), index)`.
    """
    value = _wrap((_wrap(key) ^ _wrap(_wrap(counter + 1) * _GOLDEN)) + _GOLDEN)
    value = _wrap((value ^ _shift(value, 30)) * _MIX_1)
    value = _wrap((value ^ _shift(value, 27)) * _MIX_2)
    value = value ^ _shift(value, 31)
    # A second round: the key alone is not spread by a single one when keys are consecutive.
    value = _wrap((value ^ _shift(value, 32)) * _MIX_1)
    return value ^ _shift(value, 29)


def uniform(key: Any, counter: Any) -> Any:
    """Uniform numbers in [0, 1) with 24 bits, exact in float32, from `mix(key, counter)`."""
    return _shift(mix(key, counter), 40) * 2.0**-24


def integer(key: Any, counter: Any, bound: Any) -> Any:
    """Integers in [0, bound) from `mix(key, counter)`; the bias is below bound / 2**63."""
    return _shift(mix(key, counter), 1) % bound
