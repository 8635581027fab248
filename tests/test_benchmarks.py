"""The benchmark: contestants take turns, do the same work, and stand in lines of JSON."""

from __future__ import annotations

import importlib.util
import itertools
import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import pipelines.benchmarks as benchmarks
from pipelines.benchmarks import PEERS, SECTIONS, benchmark, harness, quantizers
from pipelines.benchmarks.harness import Case, Section, alternate, extra_memory_mib, measure
from pipelines.benchmarks.quantizer_contestants import Outcome, Work, search_by_blocks
from pipelines.benchmarks.quantizer_peer import fits
from pipelines.devices import default_device

ROOT = Path(__file__).resolve().parent.parent
PEER = "vector-quantize-pytorch"
KEYS = ["section", "case", "setting", "contestant", "median_s", "rate", "unit", "peak_extra_mib", "ratio"]
TINY = {case.name: case for case in quantizers.cases(1)}
SMALL = {name: case for name, case in TINY.items() if case.setting["vocab_size"] <= 8192}


def holder(num_images: int):
    """A contestant whose run holds 1 MiB an image."""
    return lambda: torch.ones(num_images, 1 << 18).sum()


def toy_cases(num_images: int) -> list[Case]:
    made = {"tessera": partial(holder, num_images), "reference": partial(holder, 2 * num_images), PEER: None}
    return [Case("sum", {"images": num_images}, num_images, "images", made)]


TOY = Section(toy_cases, num_images=48)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a run moves it on."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def scripted(clock, seconds: list[float], order: list[str] | None = None, name: str = ""):
    """A run that takes these seconds, one after the other."""
    durations = itertools.cycle(seconds)

    def run() -> None:
        clock[0] += next(durations)
        if order is not None:
            order.append(name)

    return run


def test_contestants_take_turns_after_a_run_each_that_does_not_count(clock):
    order: list[str] = []
    runs = {name: scripted(clock, [99.0, 1.0, 2.0, 3.0], order, name) for name in "ABC"}
    times = alternate(runs, default_device())
    assert order == list("ABC" * 4)
    assert times == {name: [1.0, 2.0, 3.0] for name in "ABC"}


@pytest.mark.parametrize(("seconds", "rounds"), [(11.0, 3), (9.0, 5), (0.5, 10), (0.001, 25)])
def test_slow_work_is_measured_in_fewer_rounds(clock, seconds, rounds):
    assert len(alternate({"A": scripted(clock, [seconds])}, default_device())["A"]) == rounds


def test_a_line_holds_medians_and_the_median_of_ratios_by_round(clock, monkeypatch):
    monkeypatch.setattr(harness, "_extra_memory_elsewhere", lambda *_: 1.0)
    ours, theirs = [20.0, 1.0, 2.0, 4.0], [20.0, 3.0, 8.0, 10.0]
    made = {"tessera": lambda: scripted(clock, ours), "reference": lambda: scripted(clock, theirs), PEER: None}
    case = Case("toy", {"size": 6}, 6, "codes", made)
    lines = list(measure("toys", TOY, case, ["tessera", "reference", PEER]))
    assert [list(line) for line in lines] == [KEYS] * 3
    assert [line["median_s"] for line in lines] == [2.0, 8.0, None]
    assert [line["ratio"] for line in lines] == [1.0, 3.0, None]
    assert [line["rate"] for line in lines] == [3.0, 0.75, None]
    assert [line["peak_extra_mib"] for line in lines] == [1.0, 1.0, None]
    assert all(line["unit"] == "codes/s" and line["setting"]["size"] == 6 for line in lines)
    assert all(line["setting"].keys() >= {"hardware", "threads", "torch", "date"} for line in lines)


def test_memory_is_what_a_run_holds_beyond_its_setup():
    assert extra_memory_mib(TOY, "sum", "tessera") == pytest.approx(48, abs=4)
    assert extra_memory_mib(TOY, "sum", "reference") == pytest.approx(96, abs=4)


def vectors_of(outcome: Outcome) -> torch.Tensor:
    """What the latents became, `(N, D)`, in the order of the codes."""
    assert outcome.quantized is not None
    quantized = outcome.quantized.detach()
    return quantized.movedim(1, -1).flatten(0, -2) if quantized.ndim == 4 else quantized.flatten(0, -2)


def assert_same_work(ours: Outcome, theirs: Outcome) -> None:
    assert ours.codes is not None
    assert theirs.codes is not None
    assert torch.equal(ours.codes.flatten(), theirs.codes.flatten().long())
    torch.testing.assert_close(vectors_of(ours), vectors_of(theirs), rtol=1e-5, atol=1e-5)


def assert_same_codebook(ours: Outcome, theirs: Outcome) -> None:
    mine, other = ours.codebook, theirs.codebook
    assert mine is not None
    assert other is not None
    if mine.requires_grad:
        mine, other = mine.grad, other.grad
    torch.testing.assert_close(mine, other.view_as(mine), rtol=1e-4, atol=1e-6)


def outcomes(case: Case, contestant: str, runs: int) -> list[Outcome]:
    run = case.contestants[contestant]()
    return [run() for _ in range(runs)]


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith(("ema", "vq"))])
@pytest.mark.parametrize("contestant", ["reference", PEER])
def test_the_same_codes_losses_and_codebook_as_the_reference_and_the_peer(name, contestant):
    pair = (outcomes(TINY[name], "tessera", 2), outcomes(TINY[name], contestant, 2))
    for ours, theirs in zip(*pair, strict=True):
        assert_same_work(ours, theirs)
        assert_same_codebook(ours, theirs)
        if contestant == "reference":  # the peer weighs its one term once
            torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.parametrize("name", ["ema-65536-8", "ema-262144-8", "vq-65536-8", "vq-262144-8"])
def test_the_same_codes_as_the_reference_in_a_large_codebook(name):
    (ours,), (theirs,) = outcomes(TINY[name], "tessera", 1), outcomes(TINY[name], "reference", 1)
    assert_same_work(ours, theirs)
    assert_same_codebook(ours, theirs)


@pytest.mark.parametrize(
    "name", ["residual-1024-8", "simvq-8192-64", "fsq-1000-4", "fsq-paper-1000-4", "lfq-1024-10", "bsq-1024-10"]
)
def test_the_same_codes_as_the_peer_where_it_has_the_quantizer(name):
    (ours,), (theirs,) = outcomes(TINY[name], "tessera", 1), outcomes(TINY[name], PEER, 1)
    assert_same_work(ours, theirs)


@pytest.mark.parametrize("name", [name for name in SMALL if "reference" not in TINY[name].contestants])
def test_each_other_case_runs(name):
    for contestant in ("tessera", PEER):
        if TINY[name].contestants[contestant]:
            outcomes(TINY[name], contestant, 1)


@pytest.mark.parametrize("anchor", ["closest", "random", "probabilistic"])
def test_codes_of_cvq_rest_in_the_long_run_and_all_move_at_the_start(anchor):
    def share_moved(name: str) -> float:
        run = TINY[name].contestants["tessera"]()
        before = run().codebook.detach().clone()
        return (run().codebook.detach() != before).any(1).float().mean().item()

    # With one image there is one vector a code: the least used of them still move.
    assert share_moved(f"cvq-{anchor}-1024-8") < share_moved(f"cvq-{anchor}-start-1024-8")


def test_the_sketch_finds_the_nearest_codes():
    work = Work(1, 1024, 8)
    vectors, codebook = work.latents().detach().movedim(1, -1).flatten(0, -2)[:1000], work.codebook()
    nearest = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(search_by_blocks(vectors, codebook), nearest)


def test_the_issue_s_table_is_all_there():
    cases = {case.name: case for case in quantizers.cases(SECTIONS["quantizers"].num_images)}
    for name in ("ema", "vq"):
        for size in ("1024-8", "8192-8", "8192-64", "65536-8", "262144-8"):
            assert cases[f"{name}-{size}"].setting["vectors"] == cases[f"{name}-{size}"].amount == 65_536
            assert cases[f"{name}-{size}"].setting["backward"] == (name == "vq")


def test_the_peer_is_not_tried_where_its_scores_do_not_fit():
    assert fits(Work(1, 1024, 8))
    assert not fits(Work(1 << 20, 262_144, 8))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantisers",), "unknown section 'quantisers'; did you mean 'quantizers'"),
        (("quantizers", "ema-1024"), "unknown case 'ema-1024'; did you mean 'ema-1024-8'"),
        (("quantizers", None, "vqtorch"), f"unknown peer 'vqtorch'; choose one of diffusers, transformers, {PEER}"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(arguments, says):
    with pytest.raises(ValueError, match=says):
        benchmark(*arguments)


def test_a_peer_that_does_none_of_the_work_is_refused():
    with pytest.raises(ValueError, match="vector-quantize-pytorch does none of the work of section tokenizers"):
        benchmark("tokenizers", against="vector-quantize-pytorch")


def test_a_peer_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(PEERS, PEER, "no_such_package")
    assert importlib.util.find_spec("no_such_package") is None
    with pytest.raises(ValueError, match=rf"not installed; run: .* -m pip install {PEER}"):
        benchmark("quantizers", "ema-1024-8", PEER)


def test_the_script_prints_a_line_a_contestant(monkeypatch, capsys):
    monkeypatch.setitem(benchmarks.SECTIONS, "quantizers", replace(SECTIONS["quantizers"], num_images=1))
    arguments = ["quantizers", "--case", "ema-1024-8", "--against", PEER]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in lines] == [KEYS] * 3
    assert [line["contestant"] for line in lines] == ["tessera", "reference", PEER]
    assert all(line["median_s"] > 0 and line["rate"] > 0 and line["unit"] == "vectors/s" for line in lines)
    assert all(line["peak_extra_mib"] >= 0 for line in lines)
    assert lines[0]["ratio"] == 1.0
    assert lines[0]["setting"]["vectors"] == 1024
