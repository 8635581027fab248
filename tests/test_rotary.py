"""Rotary positions against their definition, and their gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.layout import CodeGrid, CodeLayout
from prior.rotary import as_argument, code_positions, rotary_table, rotated_heads


def rotated_plainly(heads: Tensor, table: Tensor, num_rotated: int) -> Tensor:
    """Every pair of neighbouring channels by its matrix."""
    pairs = heads[:, :, :num_rotated].unflatten(-1, (-1, 2))
    cos, sin = table.unbind(-1)
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (L, head_dim / 2, 2, 2)
    rotated = (matrices[:, None] @ pairs.unsqueeze(-1)).squeeze(-1).flatten(-2)
    return torch.cat([rotated, heads[:, :, num_rotated:]], dim=2)


def table_of(length: int, head_dim: int = 8) -> Tensor:
    return rotary_table(torch.stack([torch.arange(length) // 3, torch.arange(length) % 3], dim=1).float(), head_dim)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (CodeLayout.single((2, 3), 5), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        (CodeLayout.single((3,), 5), [(0, 0), (0, 1), (0, 2)]),
        (CodeLayout.single((2, 1, 2), 5), [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (CodeLayout.single((1, 2), 5, depth=2), [(0, 0), (0, 0), (0, 1), (0, 1)]),
        (
            CodeLayout((CodeGrid((1, 1), 5), CodeGrid((1, 2), 5, 2), CodeGrid((2, 4), 5))),
            [(0.5, 1.5), *[(0.5, 0.5)] * 2, *[(0.5, 2.5)] * 2, *[(i, j) for i in range(2) for j in range(4)]],
        ),
    ],
    ids=str,
)
def test_a_code_stands_at_its_cell_and_one_of_a_coarse_grid_at_the_centre_of_what_it_covers(layout, expected):
    torch.testing.assert_close(code_positions(layout), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_rotary_angles_are_rows_then_columns_at_frequencies_from_one_down_to_one_over_the_base():
    cos, sin = rotary_table(torch.tensor([[2.0, 3.0]]), 12).unbind(-1)
    angles = torch.tensor([[2, 2 * 0.1, 2 * 0.01, 3, 3 * 0.1, 3 * 0.01]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_rotated_queries_and_keys_meet_as_the_offset_of_their_places_says():
    q, k, here, there = torch.randn(8), torch.randn(8), torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])

    def score(query_at: Tensor, key_at: Tensor) -> Tensor:
        heads = torch.stack([q, k, k]).view(1, 1, 3, 8)
        rotated_q = rotated_heads(heads.clone(), as_argument(rotary_table(query_at[None], 8)), 1, 1)[0]
        rotated_k = rotated_heads(heads.clone(), as_argument(rotary_table(key_at[None], 8)), 1, 1)[1]
        return rotated_q.flatten() @ rotated_k.flatten()

    expected = score(here, there)
    for shift in (torch.tensor([5.0, 0.0]), torch.tensor([0.0, 7.0]), torch.tensor([-2.5, 1.5])):
        torch.testing.assert_close(score(here + shift, there + shift), expected, rtol=1e-5, atol=1e-5)
        assert abs(score(here + shift, there) - expected) > 0.01
    torch.testing.assert_close(score(here, here), q @ k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("compiling", [False, True])
def test_heads_and_their_gradient_are_those_of_the_definition(num_kv_heads, compiling, monkeypatch):
    heads, table = torch.randn(2, 9, 4 + 2 * num_kv_heads, 8, dtype=torch.float64), table_of(9)
    inputs = [heads.clone().requires_grad_() for _ in range(2)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    mine = rotated_heads(inputs[0] * 1, as_argument(table), 4, num_kv_heads)
    assert [x.shape for x in mine] == [(2, h, 9, 8) for h in (4, num_kv_heads, num_kv_heads)]
    outputs = [torch.cat(mine, dim=1).transpose(1, 2), rotated_plainly(inputs[1], table.double(), 4 + num_kv_heads)]
    weights = torch.randn_like(heads)
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        again = rotated_heads(heads.clone(), as_argument(table), 4, num_kv_heads)
    for x, y in zip(again, mine, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype):
    heads, table = torch.randn(2, 9, 3, 8).to(dtype), table_of(9)
    expected = rotated_plainly(heads.float(), table, 2)
    inputs = heads.clone().requires_grad_()
    for leaf in (heads, inputs):
        rotated = torch.cat(rotated_heads(leaf * 1, as_argument(table), 1, 1), dim=1).transpose(1, 2)
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    rotated.sum().backward()
    assert inputs.grad is not None
    back = rotated_plainly(torch.ones(2, 9, 3, 8), table * torch.tensor([1, -1]), 2)
    torch.testing.assert_close(inputs.grad, back.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_what_another_gradient_needs_is_not_overwritten_in_silence():
    heads = torch.randn(1, 9, 3, 8, requires_grad=True)
    projected = heads.exp()  # whose gradient needs its output
    q, _, _ = rotated_heads(projected, as_argument(table_of(9)), 1, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()
