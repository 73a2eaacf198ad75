"""Starts groups of processes for tests: gloo on the CPU, as torchrun would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from partialfc.distributed import collectives
from partialfc.distributed.signals import end_process

Worker = Callable[[int, Path], None]

# The ranks of all tests are forked from one server that has imported torch, instead of each importing it anew. The
# server itself computes nothing, so that it has no threads which a fork would lose.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["partialfc.training.loop"])


def run_ranks(world_size: int, worker: Worker, folder: Path, *, joined: bool = True) -> None:
    """Run `worker(rank, folder)` in `world_size` fresh processes that form the default process group.

    The worker is a function of a module; it leaves its results in the folder. A failure in it fails the caller. Without
    `joined` the processes are as torchrun leaves them, and may form groups themselves.
    """
    # The parent keeps the store, as torchrun does, on a port that the system picks: no race for a free one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    arguments = (world_size, store.port, worker, folder, joined)
    mp.start_processes(_start, arguments, nprocs=world_size, start_method="forkserver")


def _start(rank: int, world_size: int, port: int, worker: Worker, folder: Path, joined: bool = True) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    group = collectives.process_group(torch.device("cpu"), timeout_seconds=60) if joined else nullcontext()
    with group:
        worker(rank, folder)
    end_process(0)


def run_apart(world_size: int, worker: Worker, folder: Path) -> list[int | None]:
    """`run_ranks` for processes that may die: the exit status of each, negative for a signal; none fails the caller."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    arguments = (world_size, store.port, worker, folder)
    processes = [_CONTEXT.Process(target=_start, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
