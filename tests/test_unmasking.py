"""When a masked prior reveals which codes: schedules against formulas, the Halton order against its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import pytest
import torch

from configs.layout import CodeGrid, CodeLayout
from prior.unmasking import Schedule, expected_masked_count, halton_order, masked_counts, masked_share

SCHEDULES = get_args(Schedule)
FORMULAS = {
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "arccos": lambda r: 2 / math.pi * math.acos(r),
    "root": lambda r: 1 - math.sqrt(r),
}


def test_every_schedule_has_a_formula():
    assert set(SCHEDULES) == set(FORMULAS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_its_formula_and_falls_from_one_to_zero(schedule):
    progress = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = masked_share(schedule, progress)
    expected = torch.tensor([FORMULAS[schedule](r) for r in progress.tolist()], dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)
    assert (share.diff() < 0).all()
    assert share[0] == 1
    assert share[-1].abs() < 1e-12
    assert share.min() >= 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_past_the_ends_is_at_the_ends(schedule):
    share = masked_share(schedule, torch.tensor([-0.1, 1 + 1e-6]))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 8, 12, 64, 300])
def test_each_step_reveals_at_least_one_code_of_each_image_and_the_last_one_the_rest(schedule, num_steps):
    unknown = torch.tensor([256, 0, 1, 5, 12, 64, 255])
    counts = masked_counts(schedule, num_steps, unknown)
    assert counts.shape == (num_steps, len(unknown))
    assert counts.dtype == torch.int64
    assert counts.min() == 0
    assert (counts[-1] == 0).all()
    before = torch.cat([unknown[None], counts[:-1]])
    revealed = before - counts
    assert (revealed[before > 0] >= 1).all()
    assert (revealed[before == 0] == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_steps", "unknown"), [(8, 256), (12, 64), (5, 1000)])
def test_the_masked_codes_follow_the_schedule_where_it_reveals_enough(schedule, num_steps, unknown):
    counts = masked_counts(schedule, num_steps, torch.tensor([unknown]))[:, 0].tolist()
    left = unknown
    for step, count in enumerate(counts):
        wanted = math.ceil(FORMULAS[schedule]((step + 1) / num_steps) * unknown - 1e-6)
        assert count == max(0, min(wanted, left - 1))
        left = count


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_the_expected_number_of_masked_codes_is_its_mean_over_uniform_numbers(schedule, length):
    uniforms = [(i + 0.5) / 20_000 for i in range(20_000)]
    mean = sum(max(1, math.ceil(FORMULAS[schedule](u) * length)) for u in uniforms) / 20_000
    assert expected_masked_count(schedule, length) == pytest.approx(mean, abs=length * 1e-3)


def test_counts_of_known_cases():
    # 4 of 256: cos(pi / 8), cos(pi / 4), cos(3 pi / 8) and 0 times 256, rounded up.
    assert masked_counts("cosine", 4, torch.tensor([256]))[:, 0].tolist() == [237, 182, 98, 0]
    assert masked_counts("linear", 4, torch.tensor([8, 4, 6]))[:, :].T.tolist() == [
        [6, 4, 2, 0],
        [3, 2, 1, 0],
        [5, 3, 2, 0],
    ]
    assert masked_counts("cosine", 6, torch.tensor([3]))[:, 0].tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_image_is_unmasked_as_if_it_were_alone(schedule):
    unknown = torch.tensor([100, 0, 7, 33, 1])
    together = masked_counts(schedule, 10, unknown)
    alone = [masked_counts(schedule, 10, number[None]) for number in unknown]
    assert torch.equal(together, torch.cat(alone, dim=1))


def inverse(index: int, base: int) -> Fraction:
    """The digits of an index in a base, mirrored at the point."""
    digits = []
    while index:
        index, digit = divmod(index, base)
        digits.append(digit)
    return sum((Fraction(digit, base ** (place + 1)) for place, digit in enumerate(digits)), Fraction(0))


def visited(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The cells of a grid by their first visit on the Halton sequence with the bases 2, 3, 5, in exact fractions."""
    cells: dict[tuple[int, ...], None] = {}
    for index in itertools.count():
        cells.setdefault(tuple(int(inverse(index, base) * size) for base, size in zip((2, 3, 5), shape, strict=False)))
        if len(cells) == math.prod(shape):
            return list(cells)
    raise AssertionError


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout.single((1,), 2),
        CodeLayout.single((7,), 2),
        CodeLayout.single((32,), 2),
        CodeLayout.single((1, 1), 2),
        CodeLayout.single((16, 16), 2),
        CodeLayout.single((5, 11), 2),
        CodeLayout.single((1, 9), 2),
        CodeLayout.single((9, 1), 2),
        CodeLayout.single((2, 3, 4), 2),
        CodeLayout.single((4, 6), 2, depth=3),
        CodeLayout.single((5,), 2, depth=2),
        CodeLayout((CodeGrid((1, 1), 2), CodeGrid((2, 2), 3), CodeGrid((4, 3), 5, 2), CodeGrid((6,), 2))),
    ],
    ids=str,
)
def test_the_halton_order_is_a_permutation_of_the_codes(layout):
    order = halton_order(layout)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(layout.num_codes))


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_on_one_axis_of_a_power_of_two_the_order_is_the_reversal_of_bits(bits):
    expected = [int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits)]
    assert halton_order(CodeLayout.single((2**bits,), 2)).tolist() == expected


def test_a_line_of_eight_is_visited_as_van_der_corput_did():
    assert halton_order(CodeLayout.single((8,), 2)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


def test_the_first_cells_of_a_square_are_those_of_the_sequence_in_bases_two_and_three():
    cells = halton_order(CodeLayout.single((16, 16), 2))[:6]
    rows, columns = [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8], [0, 1 / 3, 2 / 3, 1 / 9, 4 / 9, 7 / 9]
    expected = [int(16 * row) * 16 + int(16 * column) for row, column in zip(rows, columns, strict=True)]
    assert cells.tolist() == expected


@pytest.mark.parametrize("shape", [(7,), (8, 8), (5, 11), (3, 3), (16, 16), (8, 9), (12, 18), (2, 3, 4)], ids=str)
def test_cells_are_visited_along_the_halton_sequence(shape):
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    expected = [sum(i * stride for i, stride in zip(cell, strides, strict=True)) for cell in visited(shape)]
    assert halton_order(CodeLayout.single(shape, 2)).tolist() == expected


@pytest.mark.parametrize("size", [16, 32])
def test_the_first_cells_of_a_square_are_spread_over_it(size):
    first = halton_order(CodeLayout.single((size, size), 2))[:24]
    blocks = (first // size * 2 // size) * 3 + (first % size * 3 // size)  # 2 rows of 3 blocks
    # Where the sizes divide as the bases do, as many points as blocks fall into each; elsewhere one more or less.
    assert torch.bincount(blocks, minlength=6).sub(4).abs().max() <= 1


def test_coarse_grids_come_before_finer_ones():
    grids = [CodeGrid((2, 2), 3), CodeGrid((4, 4), 5), CodeGrid((5,), 2)]
    order = halton_order(CodeLayout(tuple(grids)))
    parts = order.split([grid.num_codes for grid in grids])
    for grid, part, start in zip(grids, parts, (0, 4, 20), strict=True):
        assert torch.equal(part - start, halton_order(CodeLayout((grid,))))


def test_the_depths_of_a_grid_come_one_after_the_other_in_the_same_order():
    shape, depth = (4, 6), 3
    cells = halton_order(CodeLayout.single(shape, 2))
    levels = halton_order(CodeLayout.single(shape, 2, depth=depth)).view(depth, -1)
    for level, part in enumerate(levels):
        assert torch.equal(part % depth, torch.full_like(part, level))
        assert torch.equal(part // depth, cells)
