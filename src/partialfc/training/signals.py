"""SIGTERM and SIGINT ask a run to end: they are remembered, and looked at between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_SECOND_INTERRUPT = 2.0  # torchrun passes on the Ctrl-C that the terminal has already sent to all


class StopSignals:
    """While it is entered, neither signal ends the process; a second Ctrl-C does, without saving.

    Attributes:
        received: the first signal's number, 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {each: signal.signal(each, self._handle) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if number == signal.SIGINT:
                os.write(2, b"\ninterrupted: saving after this step; once more to end at once, without saving\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECONDS_TO_SECOND_INTERRUPT:
            raise KeyboardInterrupt
