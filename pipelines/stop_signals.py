"""Ctrl-C and SIGTERM as a polite request: the loop finishes its step, saves and leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one acts as it always did.

    Args:
        announce: called once, when a stop is requested.
    """

    def __init__(self, announce: Callable[[], None]) -> None:
        self.announce = announce
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
        self.requested = True
        self._restore()
        self.announce()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
