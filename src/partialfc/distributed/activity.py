"""What each thread of this process is doing, so that a stuck run can say what it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """What one thread does.

    Attributes:
        what: in words that follow "has been", such as "reading the images of step 12".
        since: when it began or last made progress, by time.monotonic().
        waits: whether it depends on other processes, and is not the cause when it makes no progress.
    """

    what: str
    since: float
    waits: bool = False

    @property
    def seconds(self) -> float:
        """The time without progress."""
        return time.monotonic() - self.since


_by_thread: dict[str, Activity] = {}


@contextmanager
def activity(what: str, *, waits: bool = False) -> Iterator[None]:
    """Declare what this thread does inside; activities nest, and the time of the outer one restarts afterwards."""
    thread = threading.current_thread().name
    outer = _by_thread.get(thread)
    _by_thread[thread] = Activity(f"{outer.what}, {what}" if outer else what, time.monotonic(), waits)
    try:
        yield
    finally:
        if outer is None:
            _by_thread.pop(thread, None)
        else:
            _by_thread[thread] = Activity(outer.what, time.monotonic(), outer.waits)


def report_progress() -> None:
    """Restart the time without progress of this thread's activity."""
    thread = threading.current_thread().name
    now = _by_thread.get(thread)
    if now is not None:
        _by_thread[thread] = Activity(now.what, time.monotonic(), now.waits)


def activities() -> list[Activity]:
    """The current activities of all threads."""
    return list(_by_thread.values())
