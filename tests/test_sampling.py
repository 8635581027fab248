"""From logits to codes: each filter against its definition, and the draw against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prior.sampling import draw, filter_logits, guide

NONE = {"temperature": 1.0, "top_k": None, "top_p": None}


def kept(logits: Tensor, **options: float | None) -> list[list[int]]:
    """The codes of each row that a filter leaves."""
    filtered = filter_logits(logits, **(NONE | options))
    return [row.isfinite().nonzero().squeeze(1).tolist() for row in filtered]


def test_guidance_is_the_unconditional_plus_the_scaled_difference():
    conditional, unconditional = torch.randn(3, 7), torch.randn(3, 7)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 2.5), expected, rtol=0, atol=0)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional, rtol=0, atol=0)


def test_no_filter_changes_no_logit():
    logits = torch.randn(3, 7)
    assert torch.equal(filter_logits(logits, **NONE), logits)
    assert torch.equal(filter_logits(logits, temperature=1.0, top_k=7, top_p=1.0), logits)
    assert torch.equal(filter_logits(logits, temperature=1.0, top_k=100, top_p=None), logits)


def test_temperature_divides_the_logits():
    logits = torch.randn(3, 7)
    torch.testing.assert_close(filter_logits(logits, temperature=0.3, top_k=None, top_p=None), logits / 0.3)


def test_temperature_zero_keeps_the_likeliest_code_and_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 2.0], [float("-inf"), -5.0, -5.0]])
    assert kept(logits, temperature=0.0) == [[1], [0], [1]]
    assert kept(logits, temperature=0.0, top_k=2, top_p=0.9) == [[1], [0], [1]]


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_top_k_keeps_the_k_likeliest_codes(k):
    logits = torch.randn(20, 11)
    expected = [sorted(sorted(range(11), key=lambda i, row=row: -row[i])[:k]) for row in logits.tolist()]
    assert kept(logits, top_k=k) == expected


def test_top_k_keeps_the_equals_of_the_kth():
    assert kept(torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]]), top_k=2) == [[0, 1, 2, 4]]


def fewest_that_reach(probabilities: list[float], p: float) -> list[int]:
    """The likeliest codes, one by one until together they have probability p."""
    chosen: list[int] = []
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if math.fsum(probabilities[j] for j in chosen) >= p:
            break
        chosen.append(i)
    return sorted(chosen)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_likeliest_codes_that_reach_it(p):
    logits = 2 * torch.randn(50, 11)
    expected = [fewest_that_reach(row, p) for row in logits.double().softmax(-1).tolist()]
    assert kept(logits, top_p=p) == expected


def test_filters_apply_in_the_order_temperature_top_k_top_p():
    logits = torch.randn(30, 11)
    expected = []
    for row in (logits.double() / 0.5).tolist():
        likeliest = sorted(range(11), key=lambda i, row=row: -row[i])[:4]
        weights = [math.exp(value) if i in likeliest else 0.0 for i, value in enumerate(row)]
        expected.append(fewest_that_reach([weight / math.fsum(weights) for weight in weights], 0.8))
    assert kept(logits, temperature=0.5, top_k=4, top_p=0.8) == expected


def test_filters_keep_what_was_impossible_impossible():
    logits = torch.randn(10, 11)
    logits[:, 5:] = float("-inf")
    for options in ({"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.9999}, {"temperature": 0.0}):
        assert all(max(row) < 5 for row in kept(logits, **options))


def test_what_a_filter_keeps_keeps_its_value():
    logits = torch.randn(5, 11)
    filtered = filter_logits(logits, temperature=1.0, top_k=6, top_p=0.8)
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_drawn_codes_have_the_frequencies_of_their_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 100_000
    codes = draw(probabilities.log().expand(n, -1), torch.rand(n))
    counts = torch.bincount(codes, minlength=6)
    # Six standard deviations of a binomial.
    bound = 6 * (n * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - n * probabilities).abs() <= bound).all()


def test_a_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999])
    assert draw(logits.expand(6, -1), uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_uniform_just_below_one_takes_the_last_code_of_nonzero_probability():
    logits = torch.randn(200, 16_384)
    logits[:, 16_000:] = float("-inf")
    largest = torch.tensor(1 - 2.0**-24)
    # The float32 sums of some rows end below the largest uniform: without the guard these draw a code past the end.
    short = logits.softmax(-1).cumsum(-1)[:, -1] <= largest
    assert short.any()
    assert (draw(logits, largest.expand(200))[short] == 15_999).all()


@pytest.mark.parametrize("vocab_size", [3, 1000, 16_384])
def test_no_draw_takes_a_code_of_zero_probability(vocab_size):
    logits = torch.randn(64, vocab_size)
    hidden = torch.rand(64, vocab_size) < 0.5
    hidden[:, vocab_size // 2] = False
    hidden[:8, : vocab_size // 2] = True
    hidden[8:16, vocab_size // 2 + 1 :] = True
    logits = logits.masked_fill(hidden, float("-inf"))
    for value in (0.0, 2.0**-24, 0.5, 0.999999, 1 - 2.0**-24):
        codes = draw(logits, torch.full((64,), value))
        assert not hidden.gather(1, codes[:, None]).any()
