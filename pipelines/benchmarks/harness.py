"""Measures contestants side by side: their times in alternation, and the memory that one run of each needs."""

from __future__ import annotations

import ctypes
import datetime
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.devices import default_device, describe_hardware, peak_memory_mib, wait_for

OURS = "tessera"
Run = Callable[[], object]
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Case:
    """One piece of work, and those who do it."""

    name: str
    setting: dict[str, Any]
    """What a reader needs to repeat it: sizes and options, as JSON."""
    amount: int
    """Work of one run, in `unit`."""
    unit: str
    contestants: Mapping[str, Callable[[], Run] | None]
    """By name, what sets up and returns what is measured; None where it cannot do this work."""


@dataclass(frozen=True)
class Section:
    """Cases that belong together."""

    cases: Callable[[int], list[Case]]
    """The cases for a number of images, the unit of size; a function of a module, which a fresh process imports."""
    num_images: int
    """The size that is measured; 1 is the one that loads kernels before memory is measured."""


def measure(name: str, section: Section, case: Case, contestants: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each contestant: its median time and rate, and the median over rounds of its time over ours.

    All numbers of a contestant that cannot do the work are None. The ratio is above 1 where ours is faster.
    """
    device = default_device()
    able = {who: make for who in contestants if (make := case.contestants.get(who)) is not None}
    # Memory first: a contestant in a process of its own then has the machine, or the GPU, for itself.
    memory = {who: _extra_memory_elsewhere(section, case.name, who) for who in able}
    times = alternate({who: make() for who, make in able.items()}, device)
    where = {
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    for who in contestants:
        median = ratio = None
        if who in able:
            median = statistics.median(times[who])
            ratio = statistics.median(theirs / ours for theirs, ours in zip(times[who], times[OURS], strict=True))
        line = {"section": name, "case": case.name, "setting": case.setting | where, "contestant": who}
        yield line | {
            "median_s": _rounded(median),
            "rate": _rounded(case.amount / median if median else None),
            "unit": f"{case.unit}/s",
            "peak_extra_mib": _rounded(memory.get(who)),
            "ratio": _rounded(ratio),
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def alternate(runs: dict[str, Run], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each round, A B C A B C ..., after one run of each that does not count.

    There are 3 rounds where a run takes over 10 seconds, otherwise at least 5, and up to 25 that fit into 5 seconds.
    """
    slowest = max(_seconds(run, device) for run in runs.values())
    rounds = 3 if slowest > 10 else max(5, min(25, int(5 / slowest)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, device))
    return times


def _seconds(run: Run, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def _extra_memory_elsewhere(section: Section, case: str, contestant: str) -> float:
    """What `extra_memory_mib` finds in a fresh process."""
    # A forked server imports once for all contestants; a process that uses CUDA must not be forked.
    context = multiprocessing.get_context("forkserver" if default_device().type == "cpu" else "spawn")
    context.set_forkserver_preload([__name__, section.cases.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(extra_memory_mib, section, case, contestant).result()


def extra_memory_mib(section: Section, case: str, contestant: str) -> float:
    """The most memory, in MiB, that the first run of a contestant holds beyond what stands after it is set up."""

    def set_up(num_images: int) -> Run:
        (make,) = [each.contestants[contestant] for each in section.cases(num_images) if each.name == case]
        assert make is not None
        return make()

    set_up(1)()  # loads kernels and starts threads
    run = set_up(section.num_images)
    gc.collect()
    device = default_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not _CLEAR_REFS.exists():
        peak = peak_memory_mib(device)
        run()
        return peak_memory_mib(device) - peak
    if platform.libc_ver()[0] == "glibc":
        # Memory that the set-up freed would be used again uncounted; holes in the heap that the run makes do count.
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # the peak starts anew, see proc(5)
    resident = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - resident


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
