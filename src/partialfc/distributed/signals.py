"""How a process ends: after SIGTERM and SIGINT, which are recorded and polled between two steps, or by itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_RETURN = 3.0  # that the main thread has after a signal, where other processes may have one too
_SECONDS_TO_SECOND_INTERRUPT = 2.0  # torchrun forwards the Ctrl-C that the terminal has already sent to all


class StopSignals:
    """While it is entered, SIGTERM and SIGINT do not end the process; a second Ctrl-C does, without saving.

    Attributes:
        received: number of the first signal, 0 before.
        say: shows a sentence after the first Ctrl-C; the loop prints it above its bar.
    """

    def __init__(self) -> None:
        self.received = 0
        self.say: Callable[[str], object] = lambda text: os.write(2, f"\n{text}\n".encode())
        self._received_at = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def exit_on_signal(self) -> Iterator[None]:
        """Inside, a signal ends this process unless the main thread returns within seconds.

        The main thread may be blocked in a library, where Python runs no handler, so another thread reads the signals.
        The exit status is 128 + signal.
        """
        if not self._handlers:
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        returned = threading.Event()
        watcher = threading.Thread(target=_exit_unless, args=(returned, reader), name="signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            returned.set()
            signal.set_wakeup_fd(before)
            os.write(writer, b"\0")
            watcher.join()
            os.close(writer)
            os.close(reader)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            if number == signal.SIGINT:
                self.say("stopping: saving after this step; once more to end at once, without saving")
        elif number == signal.SIGINT and time.monotonic() - self._received_at > _SECONDS_TO_SECOND_INTERRUPT:
            raise KeyboardInterrupt("interrupted without saving; go on from the last checkpoint with --resume")


def _exit_unless(returned: threading.Event, reader: int) -> None:
    """Read signal numbers, and exit some seconds after one of `_SIGNALS` unless `returned` is set."""
    while not returned.is_set():
        for number in os.read(reader, 16):
            if number in _SIGNALS and not returned.wait(_SECONDS_TO_RETURN):
                exit_unsaved(number)


def exit_unsaved(number: int, frame: FrameType | None = None) -> None:
    """Exit at once with a sentence and the status of the signal: a handler for when there is nothing to save."""
    name = signal.Signals(number).name
    os.write(2, f"partialfc: stopped by {name} while not training: there was nothing to save\n".encode())
    os._exit(128 + number)


def end_process(status: int) -> NoReturn:
    """End this process: without Python's own shutdown if it was one of several.

    Gloo's threads outlive their groups, which DDP never releases. If one of them still frees the tensors of the last
    exchange while Python shuts down, it waits for an interpreter that is gone, and the process aborts after all its
    work is done (pytorch/pytorch#179291).
    """
    collectives = sys.modules.get("partialfc.distributed.collectives")
    if collectives is None or not collectives.was_one_of_several:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
