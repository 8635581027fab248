"""The contract between the stages: what a CodeLayout says about a tensor of codes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from configs.layout import CodeGrid, CodeLayout

SQUARE = CodeLayout.single((16, 16), 1024)
RESIDUAL = CodeLayout.single((8, 8), 16384, depth=4)
LINE = CodeLayout.single((32,), 4096)
VIDEO = CodeLayout.single((4, 8, 8), 512)
TWO_GRIDS = CodeLayout((CodeGrid((4, 4), 512), CodeGrid((8, 8), 256)))
DEEP_GRIDS = CodeLayout((CodeGrid((2, 3), 8, depth=2), CodeGrid((5,), 16), CodeGrid((1, 1), 2)))
PYRAMID = CodeLayout(tuple(CodeGrid((side, side), 4096) for side in (1, 2, 3, 4, 16)))
LAYOUTS = [SQUARE, RESIDUAL, LINE, VIDEO, TWO_GRIDS, DEEP_GRIDS, PYRAMID]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (SQUARE, (16, 16)),
        (RESIDUAL, (8, 8, 4)),
        (LINE, (32,)),
        (VIDEO, (4, 8, 8)),
        (TWO_GRIDS, (16 + 64,)),
        (DEEP_GRIDS, (12 + 5 + 1,)),
        (PYRAMID, (1 + 4 + 9 + 16 + 256,)),
    ],
    ids=str,
)
def test_a_single_grid_keeps_its_shape_and_several_are_joined(layout, shape):
    assert layout.shape == shape


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (SQUARE, "16x16 of 1024"),
        (RESIDUAL, "8x8 (depth 4) of 16384"),
        (LINE, "32 of 4096"),
        (VIDEO, "4x8x8 of 512"),
        (TWO_GRIDS, "4x4 of 512 + 8x8 of 256"),
        (DEEP_GRIDS, "2x3 (depth 2) of 8 + 5 of 16 + 1x1 of 2"),
        (PYRAMID, "1x1 of 4096 + 2x2 of 4096 + ... + 16x16 of 4096"),
    ],
)
def test_a_layout_prints_as_its_grids_coarse_to_fine(layout, text):
    assert str(layout) == text


def test_four_grids_are_printed_in_full():
    layout = CodeLayout(tuple(CodeGrid((side,), 2) for side in (1, 2, 3, 4)))
    assert str(layout) == "1 of 2 + 2 of 2 + 3 of 2 + 4 of 2"


@each_layout
def test_num_codes_is_the_number_of_elements_of_the_shape(layout):
    assert layout.num_codes == math.prod(layout.shape) == sum(grid.num_codes for grid in layout.grids)
    assert all(grid.num_codes == math.prod(grid.code_shape) for grid in layout.grids)


def test_vocab_size_is_the_largest_of_the_grids():
    assert TWO_GRIDS.vocab_size == 512
    assert DEEP_GRIDS.vocab_size == 16


def test_bits_are_those_of_every_code_at_its_own_grid():
    assert SQUARE.bits == 16 * 16 * 10
    assert RESIDUAL.bits == 8 * 8 * 4 * 14
    assert TWO_GRIDS.bits == 16 * 9 + 64 * 8
    assert CodeLayout.single((3,), 5).bits == pytest.approx(3 * math.log2(5))


@each_layout
def test_joining_what_split_gives_returns_the_codes(layout):
    codes = torch.arange(3 * layout.num_codes).view(3, *layout.shape)
    parts = layout.split(codes)
    assert [tuple(part.shape) for part in parts] == [(3, *grid.code_shape) for grid in layout.grids]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), codes.flatten(1))


@each_layout
def test_split_gives_views_of_contiguous_codes(layout):
    codes = torch.zeros(2, *layout.shape, dtype=torch.int64)
    for index, part in enumerate(layout.split(codes)):
        part.fill_(index + 1)
    expected = torch.cat([torch.full((grid.num_codes,), i + 1) for i, grid in enumerate(layout.grids)])
    assert torch.equal(codes.flatten(1), expected.expand(2, -1))


@each_layout
def test_split_of_an_empty_batch_has_the_shapes_of_the_grids(layout):
    parts = layout.split(torch.zeros(0, *layout.shape, dtype=torch.int64))
    assert [tuple(part.shape) for part in parts] == [(0, *grid.code_shape) for grid in layout.grids]


@pytest.mark.parametrize("shape", [(2, 16, 15), (2, 256), (16, 16), (2, 16, 16, 1)])
def test_split_refuses_codes_of_another_shape_and_names_the_one_expected(shape):
    with pytest.raises(ValueError, match=r"16x16 of 1024.*\(B, 16, 16\)"):
        SQUARE.split(torch.zeros(shape, dtype=torch.int64))


@each_layout
def test_a_layout_survives_json(layout):
    restored = CodeLayout.from_list(json.loads(json.dumps(layout.to_list())))
    assert restored == layout
    assert hash(restored) == hash(layout)


def test_from_list_takes_a_missing_depth_as_one():
    assert CodeLayout.from_list([{"shape": [16, 16], "vocab_size": 1024}]) == SQUARE


@pytest.mark.parametrize(
    "grids",
    [
        [{"shape": [4, 4]}],
        [{"vocab_size": 4}],
        ["4x4 of 8"],
        [{"shape": 4, "vocab_size": 8}],
        [{"shape": [4, 4], "vocab_size": "8"}],
        [None],
        None,
        [],
        3,
        "ab",
    ],
    ids=repr,
)
def test_from_list_of_anything_else_is_a_value_error(grids):
    with pytest.raises(ValueError, match=r"code layout|code grid"):
        CodeLayout.from_list(grids)


def test_equal_layouts_are_accepted_however_they_were_built():
    CodeLayout((CodeGrid((16, 16), 1024, 1),)).require_equal(SQUARE, "the prior", "the tokenizer")
    CodeLayout([CodeGrid([16, 16], 1024)]).require_equal(SQUARE, "the prior", "the tokenizer")


@pytest.mark.parametrize("other", [layout for layout in LAYOUTS if layout is not SQUARE], ids=str)
def test_the_message_for_different_layouts_names_both_sides(other):
    with pytest.raises(ValueError, match="laid out as") as raised:
        SQUARE.require_equal(other, "the prior", "codes=runs/codes")
    assert str(raised.value) == (
        f"the prior has codes laid out as [16x16 of 1024], but codes=runs/codes has [{other}]; use a matching pair"
    )


def test_layouts_differ_where_only_vocabulary_depth_or_order_differ():
    assert CodeLayout.single((4, 4), 8) != CodeLayout.single((4, 4), 16)
    assert CodeLayout.single((4, 4), 8, depth=2) != CodeLayout.single((4, 4, 2), 8)
    assert CodeLayout(TWO_GRIDS.grids[::-1]) != TWO_GRIDS


@pytest.mark.parametrize(
    ("shape", "vocab_size", "depth", "named"),
    [
        ((), 8, 1, "shape"),
        ((0, 4), 8, 1, "shape"),
        ((4, -4), 8, 1, "shape"),
        ((4.0, 4), 8, 1, "shape"),
        ((True, 4), 8, 1, "shape"),
        ((4, 4), 0, 1, "vocab_size"),
        ((4, 4), 8.0, 1, "vocab_size"),
        ((4, 4), 8, 0, "depth"),
        ((4, 4), 8, None, "depth"),
    ],
)
def test_a_grid_of_anything_but_positive_integers_is_refused_by_name(shape, vocab_size, depth, named):
    with pytest.raises(ValueError, match=rf"positive integers, got {named}="):
        CodeGrid(shape, vocab_size, depth)


def test_a_layout_without_grids_is_refused():
    with pytest.raises(ValueError, match="at least one grid"):
        CodeLayout(())
