"""What an image's codes mean: the contract between a tokenizer and a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CodeGrid:
    """One grid of codes."""

    shape: tuple[int, ...]
    """Positions: `(height, width)`, or `(length,)`, or `(time, height, width)`."""
    vocab_size: int
    """K: codes are integers in [0, K)."""
    depth: int = 1
    """Codes per position: residual levels or product sub-spaces. The axis is absent when 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for name, numbers in (("shape", self.shape), ("vocab_size", (self.vocab_size,)), ("depth", (self.depth,))):
            if not numbers or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(f"a code grid needs positive integers, got {name}={getattr(self, name)!r}")

    @property
    def num_codes(self) -> int:
        return math.prod(self.shape) * self.depth

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one image's codes on this grid: positions, then depth where it is not 1."""
        return self.shape if self.depth == 1 else (*self.shape, self.depth)

    def __str__(self) -> str:
        depth = f" (depth {self.depth})" if self.depth > 1 else ""
        return f"{'x'.join(map(str, self.shape))}{depth} of {self.vocab_size}"


@dataclass(frozen=True)
class CodeLayout:
    """The grids of one image's codes, coarse to fine.

    Codes are always one int64 tensor `(B, *layout.shape)`. A single grid keeps its shape, so `16x16 of 1024` is
    `(B, 16, 16)` and `8x8 (depth 4) of 16384` is `(B, 8, 8, 4)`; several grids are flattened and joined to `(B, L)`.
    """

    grids: tuple[CodeGrid, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(self.grids))
        if not self.grids:
            raise ValueError("a code layout needs at least one grid, got none")

    @classmethod
    def single(cls, shape: tuple[int, ...], vocab_size: int, depth: int = 1) -> CodeLayout:
        """The layout of one grid."""
        return cls((CodeGrid(tuple(shape), vocab_size, depth),))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grids[0].code_shape if len(self.grids) == 1 else (self.num_codes,)

    @property
    def num_codes(self) -> int:
        return sum(grid.num_codes for grid in self.grids)

    @property
    def vocab_size(self) -> int:
        """The largest K of the grids: every code is in [0, vocab_size)."""
        return max(grid.vocab_size for grid in self.grids)

    @property
    def bits(self) -> float:
        """Bits an image takes when every code is stored at log2(K) bits."""
        return sum(grid.num_codes * math.log2(grid.vocab_size) for grid in self.grids)

    def split(self, codes: Any) -> list[Any]:
        """The codes of each grid, `(B, *grid.code_shape)`, as views of `codes` `(B, *self.shape)`."""
        if tuple(codes.shape[1:]) != self.shape:
            raise ValueError(
                f"codes of [{self}] have shape (B, {', '.join(map(str, self.shape))}), got {tuple(codes.shape)}"
            )
        if len(self.grids) == 1:
            return [codes]
        parts, start = [], 0
        for grid in self.grids:
            part = codes[:, start : start + grid.num_codes]
            parts.append(part.reshape(len(codes), *grid.code_shape))
            start += grid.num_codes
        return parts

    def require_equal(self, other: CodeLayout, mine: str, theirs: str) -> None:
        """Raise a ValueError that names both sides where the layouts differ."""
        if self != other:
            raise ValueError(f"{mine} has codes laid out as [{self}], but {theirs} has [{other}]; use a matching pair")

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON data; `from_list` reads it back."""
        return [{"shape": list(g.shape), "vocab_size": g.vocab_size, "depth": g.depth} for g in self.grids]

    @classmethod
    def from_list(cls, grids: list[dict[str, Any]]) -> CodeLayout:
        try:
            return cls(tuple(CodeGrid(tuple(g["shape"]), g["vocab_size"], g.get("depth", 1)) for g in grids))
        except (TypeError, KeyError) as error:
            raise ValueError(f"a code layout is a list of {{shape, vocab_size, depth}}, got {grids!r}") from error

    def __str__(self) -> str:
        names = [str(grid) for grid in self.grids]
        return " + ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
