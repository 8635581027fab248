"""When a run stops: signals, and the agreement of several processes."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import torch

from pipelines.stop_signals import StopAgreement, StopSignals


class Together:
    """What the agreement uses of Accelerate in two processes, the other of which says `other`."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, other: list[float]) -> None:
        self.other = other
        self.num_asked = 0

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        self.num_asked += 1
        return tensor + torch.tensor(self.other)


def agreement(other: list[float]) -> tuple[StopAgreement, Any]:
    together: Any = Together(other)
    return StopAgreement(StopSignals(lambda: None), together), together


def test_a_request_of_the_other_process_is_obeyed_at_the_last_step_at_the_latest() -> None:
    found, together = agreement([0.0, 0.5])
    asked = [found.reached(step, last=False) for step in range(1, 4)]
    assert not any(asked)
    together.other = [1.0, 0.5]
    assert found.reached(100, last=True)


def test_processes_ask_each_other_about_every_two_seconds_of_their_mean_step() -> None:
    found, together = agreement([0.0, 0.5])  # here steps take no time: the mean is a quarter of a second
    counts = []
    for step in range(1, 40):
        found.reached(step, last=False)
        counts.append(together.num_asked)
    asked_at = [step for step, (a, b) in enumerate(zip([0, *counts], counts, strict=False), start=1) if a != b]
    assert asked_at[0] == 1
    assert all(6 <= late - early <= 8 for early, late in itertools.pairwise(asked_at))


def test_a_slow_step_is_asked_after_every_time() -> None:
    found, together = agreement([0.0, 30.0])
    for step in range(1, 6):
        found.reached(step, last=False)
    assert together.num_asked == 5


def test_one_process_asks_nobody() -> None:
    class Alone:
        num_processes = 1

    signals = StopSignals(lambda: None)
    alone: Any = Alone()
    found = StopAgreement(signals, alone)
    assert not found.reached(1, last=True)
    signals.requested = True
    assert found.reached(2, last=False)


def test_a_patient_run_ignores_further_signals() -> None:
    """After Ctrl-C the terminal signals every process, and the launcher does so once more."""
    announced: list[float] = []
    with StopSignals(lambda: announced.append(time.time()), patient=True) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested
    assert len(announced) == 1
