"""What this process is doing right now, for whoever must say what a stuck run waits for."""

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
        since: when it began, or last gave a sign of progress, by time.monotonic().
        waits: whether it needs other processes to get on, and so is not to blame if it does not.
    """

    what: str
    since: float
    waits: bool = False

    @property
    def seconds(self) -> float:
        """For how long there was no progress."""
        return time.monotonic() - self.since


_by_thread: dict[str, Activity] = {}


@contextmanager
def doing(what: str, *, waits: bool = False) -> Iterator[None]:
    """Say what this thread does inside; it may be nested, and the outer activity counts anew afterwards."""
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


def progress() -> None:
    """What this thread does takes long, and gets on."""
    thread = threading.current_thread().name
    now = _by_thread.get(thread)
    if now is not None:
        _by_thread[thread] = Activity(now.what, time.monotonic(), now.waits)


def activities() -> list[Activity]:
    """What all threads do that have said so."""
    return list(_by_thread.values())
