"""Ctrl-C and SIGTERM as a polite request: the loop finishes its step, saves and leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from torch import Tensor


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one acts as it always did.

    Args:
        announce: called once, when a stop is requested.
        patient: ignore further signals: whoever sends them will kill what does not end.
    """

    def __init__(self, announce: Callable[[], None], *, patient: bool = False) -> None:
        self.announce = announce
        self.patient = patient
        self.requested = False
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                # A job in the background is started with Ctrl-C ignored, and means it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        except ValueError:
            pass  # not in the main thread, where Python allows no handlers
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a loader process, which inherited the handler and ends with its parent
        if self.requested and self.patient:
            return
        self.requested = True
        if not self.patient:
            self._restore()
        self.announce()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


class StopAgreement:
    """Whether any process was asked to stop, told to all of them after the same step.

    One that stopped alone would leave the others waiting for it. They ask each other about every two seconds, by a
    count of steps that all of them know.

    Args:
        signals: of this process.
        accelerator: connects the processes.
    """

    seconds = 2.0

    def __init__(self, signals: StopSignals, accelerator: Accelerator) -> None:
        self.signals = signals
        self.accelerator = accelerator
        self._asked_at, self._asked_after = time.perf_counter(), 0
        self._wait = 1

    def reached(self, step: int, last: bool) -> bool:
        """Whether all are to stop after this step; every process calls it after every step, `last` after the last."""
        if self.accelerator.num_processes == 1:
            return self.signals.requested
        if not last and step - self._asked_after < self._wait:
            return False
        now = time.perf_counter()
        mine = [float(self.signals.requested), (now - self._asked_at) / max(1, step - self._asked_after)]
        asked = torch.tensor(mine, device=self.accelerator.device)
        requests, seconds = cast(Tensor, self.accelerator.reduce(asked, "sum")).tolist()
        self._wait = max(1, int(self.seconds * self.accelerator.num_processes / max(seconds, 1e-6)))
        self._asked_at, self._asked_after = now, step
        return requests > 0
