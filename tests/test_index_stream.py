"""The stream of training items: each once an epoch, cut into the same positions for any number of processes."""

from __future__ import annotations

from itertools import chain, islice

import pytest

from pipelines.index_stream import IndexStream, hold_out

Item = tuple[int, int]


def take(
    num_items: int, batch_size: int, num_steps: int, *, num_processes: int = 1, **options: int
) -> list[list[Item]]:
    """The items of each global batch, micro-batches in order and within one the processes in order."""
    accumulation_steps = options.get("accumulation_steps", 1)
    processes = []
    for process_index in range(num_processes):
        stream = IndexStream(
            num_items, batch_size, num_processes=num_processes, process_index=process_index, **{"seed": 0} | options
        )
        processes.append(list(islice(stream, num_steps * accumulation_steps)))
    micro_batches = [list(chain(*parts)) for parts in zip(*processes, strict=True)]
    firsts = range(0, len(micro_batches), accumulation_steps)
    return [list(chain(*micro_batches[first : first + accumulation_steps])) for first in firsts]


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_every_item_comes_once_an_epoch_over_all_processes_and_accumulation_steps(num_processes, accumulation_steps):
    num_items, batch_size = 30, 12
    batches = take(num_items, batch_size, 10, num_processes=num_processes, accumulation_steps=accumulation_steps)
    rows = [row for batch in batches for row, _ in batch]
    assert len(rows) == 4 * num_items
    for epoch in range(4):
        assert sorted(rows[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(2, 1), (1, 2), (2, 2), (3, 4), (12, 1), (1, 12)])
@pytest.mark.parametrize("num_items", [7, 12, 100])
def test_processes_and_accumulation_steps_together_read_what_one_process_reads(
    num_items, num_processes, accumulation_steps
):
    alone = take(num_items, 12, 8)
    together = take(num_items, 12, 8, num_processes=num_processes, accumulation_steps=accumulation_steps)
    assert together == alone


def test_positions_count_up_from_the_first_item_of_the_start_step():
    positions = [position for batch in take(10, 4, 6, start_step=5) for _, position in batch]
    assert positions == list(range(20, 44))


def test_a_position_holds_the_item_of_its_epochs_permutation():
    stream = IndexStream(10, 4, seed=3)
    for batch in islice(stream, 20):
        assert all(row == stream.permutation(position // 10)[position % 10] for row, position in batch)


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("start", [1, 7, 40])
def test_starting_at_a_step_equals_skipping_the_steps_before_it(start, num_processes, accumulation_steps):
    options = {"num_processes": num_processes, "accumulation_steps": accumulation_steps}
    assert take(10, 4, 5, start_step=start, **options) == take(10, 4, start + 5, **options)[start:]


@pytest.mark.parametrize("num_items", [1, 3, 5])
def test_a_batch_larger_than_the_dataset_is_full_and_spans_epochs(num_items):
    batches = take(num_items, 16, 5)
    assert [len(batch) for batch in batches] == [16] * 5
    rows = [row for batch in batches for row, _ in batch]
    for start in range(0, len(rows) - num_items + 1, num_items):
        assert sorted(rows[start : start + num_items]) == list(range(num_items))


def test_every_micro_batch_has_the_same_size():
    stream = IndexStream(10, 24, seed=0, accumulation_steps=3, num_processes=2, process_index=1)
    assert {len(batch) for batch in islice(stream, 30)} == {4}


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(IndexStream(50, 10, seed=seed).permutation(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_two_iterations_of_a_stream_are_the_same():
    stream = IndexStream(9, 6, seed=1)
    assert list(islice(stream, 7)) == list(islice(stream, 7))


@pytest.mark.parametrize(("num_processes", "accumulation_steps"), [(3, 1), (1, 3), (2, 4), (16, 1)])
def test_a_batch_that_does_not_divide_into_equal_slices_is_refused_with_the_numbers(num_processes, accumulation_steps):
    with pytest.raises(ValueError, match="choose a multiple of") as error:
        IndexStream(100, 10, seed=0, accumulation_steps=accumulation_steps, num_processes=num_processes)
    message = str(error.value)
    assert "batch_size=10" in message
    assert f"{num_processes} processes" in message
    assert f"accumulation_steps={accumulation_steps}" in message
    assert message.endswith(f"a multiple of {num_processes * accumulation_steps}")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_share_leaves_at_least_one_item_on_either_side(share, count):
    kept, held_out = hold_out(count, share, seed=0)
    assert min(len(kept), len(held_out)) >= 1
    assert sorted([*kept, *held_out]) == list(range(count))


def test_a_share_of_one_item_is_refused():
    with pytest.raises(ValueError, match="cannot hold out a share of 1 image; give validation=0"):
        hold_out(1, 0.5, seed=0)
