"""Starts the processes of a benchmark on this machine: gloo's, one thread each, as torchrun would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from partialfc.distributed import collectives
from partialfc.distributed.signals import end_process


def run_processes(world_size: int, worker: Callable[..., None], *arguments: Any) -> None:
    """Call `worker(rank, *arguments)` in fresh processes that form the default process group."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    mp.spawn(_start, args=(world_size, store.port, worker, arguments), nprocs=world_size)


def _start(rank: int, world_size: int, port: int, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    with collectives.process_group(torch.device("cpu"), timeout_seconds=600):
        worker(rank, *arguments)
    end_process(0)
