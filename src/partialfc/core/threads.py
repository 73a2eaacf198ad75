"""Work spread over threads, in each of which PyTorch's operations are single-threaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations are single-threaded; other threads keep their number."""
    all_started = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes this thread's number; otherwise its first operation would take the default
        all_started.wait()

    pool = ThreadPoolExecutor(threads, "partialfc-head", start)
    before = torch.get_num_threads()
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(before)  # the workers' calls changed the default of future threads
    return pool


_caller = threading.local()


@contextmanager
def single_threaded_if(condition: bool) -> Iterator[None]:
    """Make operations in this thread single-threaded; `run_parallel` inside still uses the number of threads outside.

    After an operation in several threads OpenMP's threads spin for some milliseconds, which doubles the time of the
    workers of `run_parallel`.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not condition:
        yield
        return
    _caller.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del _caller.threads


def run_parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` on each item without autograd, in as many threads as PyTorch uses; results in order."""
    items = list(items)

    def without_autograd(item: T) -> R:
        with torch.no_grad():
            return work(item)

    threads = getattr(_caller, "threads", torch.get_num_threads())
    if threads == 1 or len(items) <= 1:
        return [without_autograd(item) for item in items]
    return list(_pool(threads).map(without_autograd, items))
