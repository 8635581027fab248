"""Random numbers that belong to an image: the same from Python, numpy and torch, and random enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.random_streams import integer, mix, uniform

LARGEST, SMALLEST = (1 << 63) - 1, -(1 << 63)
INTERESTING = [0, 1, 2, 3, -1, -2, 255, 1 << 31, (1 << 32) - 1, 1 << 40, LARGEST, LARGEST - 1, SMALLEST, SMALLEST + 1]
PAIRS = [(key, counter) for key in INTERESTING for counter in INTERESTING]
KEYS, COUNTERS = (list(column) for column in zip(*PAIRS, strict=True))

FUNCTIONS = {"mix": mix, "uniform": uniform, "integer": lambda key, counter: integer(key, counter, 1000)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)

NUM_DRAWS = 100_000


def draws(function, key, num=NUM_DRAWS):
    return function(key, np.arange(num, dtype=np.int64))


@each_function
def test_python_integers_numpy_and_torch_give_the_same_numbers(name):
    function = FUNCTIONS[name]
    from_python = [function(key, counter) for key, counter in PAIRS]
    from_numpy = function(np.array(KEYS, dtype=np.int64), np.array(COUNTERS, dtype=np.int64))
    from_torch = function(torch.tensor(KEYS), torch.tensor(COUNTERS))
    assert from_numpy.tolist() == from_python
    assert from_torch.tolist() == from_python


@each_function
def test_a_python_integer_and_an_array_broadcast_like_two_arrays(name):
    function = FUNCTIONS[name]
    counters = torch.arange(10)
    expected = [function(7, counter) for counter in range(10)]
    assert function(7, counters).tolist() == function(torch.tensor(7), counters).tolist() == expected
    grid = function(torch.arange(4)[:, None], counters)
    assert grid.shape == (4, 10)
    assert grid.tolist() == [[function(key, counter) for counter in range(10)] for key in range(4)]


@each_function
@pytest.mark.parametrize("key", [1 << 63, (1 << 64) + 5, 10**30, -(10**30)])
def test_a_key_beyond_64_bits_gives_the_same_numbers_with_arrays(name, key):
    function = FUNCTIONS[name]
    expected = [function(key, counter) for counter in range(8)]
    assert function(key, np.arange(8, dtype=np.int64)).tolist() == expected
    assert function(key, torch.arange(8)).tolist() == expected


def test_mix_fits_a_signed_64_bit_integer():
    assert all(SMALLEST <= mix(key, counter) <= LARGEST for key, counter in PAIRS)
    assert mix(torch.tensor(KEYS), torch.tensor(COUNTERS)).dtype == torch.int64


def test_the_hash_never_changes():
    # Saved seeds name pictures: a changed hash would change every one of them.
    assert [mix(0, 0), mix(0, 1), mix(1, 0)] == [2552199142464223214, -5638451033706726217, 2952883746484342094]


def test_uniform_numbers_are_multiples_of_2_to_the_minus_24_in_the_unit_interval():
    numbers = draws(uniform, 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.array_equal(numbers * 2**24, np.floor(numbers * 2**24))
    assert np.array_equal(numbers.astype(np.float32).astype(np.float64), numbers)


@pytest.mark.parametrize("key", [0, 1, 12345, -1])
def test_uniform_numbers_of_a_key_pass_the_kolmogorov_smirnov_test(key):
    numbers = np.sort(draws(uniform, key))
    steps = np.arange(NUM_DRAWS + 1) / NUM_DRAWS
    distance = max(np.abs(numbers - steps[:-1]).max(), np.abs(numbers - steps[1:]).max())
    assert distance * NUM_DRAWS**0.5 < 1.95  # exceeded with probability 0.001


def test_first_numbers_of_consecutive_keys_pass_the_kolmogorov_smirnov_test():
    numbers = np.sort(uniform(np.arange(NUM_DRAWS, dtype=np.int64), 0))
    distance = np.abs(numbers - np.arange(NUM_DRAWS) / NUM_DRAWS).max()
    assert distance * NUM_DRAWS**0.5 < 1.95


@pytest.mark.parametrize("bound", [2, 10, 16])
def test_integers_pass_the_chi_square_test(bound):
    counts = np.bincount(draws(lambda key, counter: integer(key, counter, bound), 3), minlength=bound)
    assert len(counts) == bound
    expected = NUM_DRAWS / bound
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = bound - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5  # mean plus five deviations of chi-square, with a tail


@pytest.mark.parametrize("bound", [1, 2, 7, 1000, 1 << 40])
def test_integers_stay_below_the_bound(bound):
    for numbers in (
        integer(torch.tensor(KEYS), torch.tensor(COUNTERS), bound),
        integer(np.array(KEYS), np.array(COUNTERS), bound),
    ):
        assert int(numbers.min()) >= 0
        assert int(numbers.max()) < bound


def correlation(one, other):
    return abs(np.corrcoef(one, other)[0, 1])


def test_streams_of_consecutive_keys_are_uncorrelated():
    streams = np.stack([draws(uniform, key) for key in range(8)])
    correlations = np.corrcoef(streams)[np.triu_indices(8, k=1)]
    assert np.abs(correlations).max() < 4.5 / NUM_DRAWS**0.5


def test_neighbours_along_keys_and_along_counters_are_uncorrelated():
    counters, keys = np.arange(NUM_DRAWS, dtype=np.int64), np.arange(NUM_DRAWS, dtype=np.int64)
    along_counters, along_keys = uniform(5, counters), uniform(keys, 5)
    for numbers in (along_counters, along_keys):
        assert correlation(numbers[:-1], numbers[1:]) < 4.5 / NUM_DRAWS**0.5
    assert correlation(along_counters, along_keys) < 4.5 / NUM_DRAWS**0.5


def test_key_and_counter_are_not_interchangeable():
    index = np.arange(1000, dtype=np.int64)
    assert not np.any(mix(index, index + 1) == mix(index + 1, index))


def test_flipping_any_bit_of_key_or_counter_flips_about_half_of_the_hash():
    key, counter = np.arange(2000, dtype=np.int64), np.arange(2000, dtype=np.int64) * 31
    before = mix(key, counter)
    for bit in range(63):
        flip = np.int64(1) << np.int64(bit)
        for after in (mix(key ^ flip, counter), mix(key, counter ^ flip)):
            flipped = np.unpackbits((before ^ after).view(np.uint8)).mean()
            assert abs(flipped - 0.5) < 0.02, bit


def test_different_seeds_share_no_values():
    values = mix(np.arange(100, dtype=np.int64)[:, None], np.arange(1000, dtype=np.int64))
    assert len(np.unique(values)) == values.size


def test_streams_of_streams_share_no_values():
    index = np.arange(40, dtype=np.int64)
    values = mix(mix(index[:, None, None], index[:, None]), index)
    assert len(np.unique(values)) == values.size
