"""Work spread over threads, each of which computes alone."""

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
    """Threads in which an operation of PyTorch runs alone; the others keep the number of threads they have."""
    everyone_started = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes this thread's number; otherwise its first operation would take the default
        everyone_started.wait()

    pool = ThreadPoolExecutor(threads, "partialfc-head", start)
    before = torch.get_num_threads()
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(before)  # the workers' calls changed what threads to come start with
    return pool


_caller = threading.local()


@contextmanager
def single_threaded_if(condition: bool) -> Iterator[None]:
    """Compute in this thread only; `run_parallel` inside still takes as many threads as there were outside.

    An operation in several threads leaves OpenMP's spinning for some milliseconds, beside which the workers of
    `run_parallel` take twice as long.
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
    """`work` on each item without autograd, in as many threads as PyTorch has for an operation; results in order."""
    items = list(items)

    def without_autograd(item: T) -> R:
        with torch.no_grad():
            return work(item)

    threads = getattr(_caller, "threads", torch.get_num_threads())
    if threads == 1 or len(items) <= 1:
        return [without_autograd(item) for item in items]
    return list(_pool(threads).map(without_autograd, items))
