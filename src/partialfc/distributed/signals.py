"""How a process ends: by SIGTERM and SIGINT, which are remembered and looked at between two steps, or by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_MEET = 3.0  # after a signal, for processes that are to agree on the end
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

    @contextmanager
    def exit_on_signal(self) -> Iterator[None]:
        """Where the main thread waits for other processes, a signal ends this one if they do not come soon.

        The main thread may be deep in a library, where Python runs no handler, so another thread is told. The exit
        status is 128 + signal.
        """
        if not self._before:
            yield
            return
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        over = threading.Event()
        watcher = threading.Thread(target=_end_unless, args=(over, told), name="signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            signal.set_wakeup_fd(before)
            os.write(tell, b"\0")
            watcher.join()
            os.close(tell)
            os.close(told)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if number == signal.SIGINT:
                os.write(2, b"\ninterrupted: saving after this step; once more to end at once, without saving\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECONDS_TO_SECOND_INTERRUPT:
            raise KeyboardInterrupt


def _end_unless(over: threading.Event, told: int) -> None:
    """Read the numbers of signals; end the process some seconds after one that asks for it, unless `over` is set."""
    while not over.is_set():
        for number in os.read(told, 16):
            if number in _SIGNALS and not over.wait(_SECONDS_TO_MEET):
                end_at_once(number)


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End this process, which has nothing to save, with a sentence and the status of the signal."""
    name = signal.Signals(number).name
    os.write(2, f"partialfc: stopped by {name} while it was not training; nothing was to be saved\n".encode())
    os._exit(128 + number)


def end_process(status: int) -> NoReturn:
    """End this process at once, if it was one of several, instead of by Python's own end.

    Gloo's threads outlive their groups, which DDP never lets go of. If one of them still frees the tensors of the last
    exchange while Python ends, it waits for an interpreter that is gone, and the process aborts after all its work is
    done (pytorch/pytorch#179291).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
