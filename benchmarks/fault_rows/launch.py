"""Training processes, forked from this one, which has imported everything, so that a start takes no time for imports.

Each process runs the command line itself (`partialfc train …`) as one of the ranks that a launcher would start, and
may first patch itself with a fault. This process starts no thread and no process group, and computes no gradient, so
that forking it is safe: `warm_up` makes sure of it. The launcher's key-value store lives in one more process, as it
does with torchrun.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from partialfc import cli
from partialfc.distributed.signals import exit_unsaved
from partialfc.head.partial_fc import PartialFC

Fault = Callable[[int], None]
"""A function that each process calls with its rank before it runs the command; it patches the code with the fault."""

_STUCK = 240.0  # seconds after which a run counts as stuck


def warm_up() -> None:
    """Import and compile in this process what every training process needs, which is half of its time otherwise."""
    importlib.import_module("torch._dynamo")  # which PyTorch imports with the first optimizer
    torch.set_num_threads(1)
    with torch.no_grad():
        head = PartialFC(8, 16, 0.5)
        head(torch.ones(4, 16), torch.arange(4))
    threads = list(Path("/proc/self/task").iterdir()) if Path("/proc/self/task").is_dir() else [None]
    if len(threads) > 1:
        raise RuntimeError(f"{len(threads)} threads are at work: this process cannot be forked safely")


class Run:
    """The processes of one training.

    Args:
        log: a path; the output of each rank goes to this name with `.<rank>` added.
        arguments: of `partialfc`.
        world_size: number of processes.
        fault: the fault to inject.
    """

    def __init__(self, log: Path, arguments: Sequence[str], world_size: int = 1, fault: Fault | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
        self._store: int | None = None
        port = 0
        if world_size > 1:
            self._store, port = _start_store()
        self.started = time.monotonic()
        self.pids = [_fork(rank, world_size, port, self.logs[rank], arguments, fault) for rank in range(world_size)]
        self.statuses: list[int | None] = [None] * world_size

    def poll(self) -> bool:
        """Whether all processes have ended; their statuses are in `statuses`, negative for signals."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return None not in self.statuses

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that are still alive."""
        for each, pid in enumerate(self.pids):
            if rank in (None, each) and self.statuses[each] is None:
                os.kill(pid, number)

    def wait(self, *, then: int | None = None) -> list[int]:
        """The exit statuses of all ranks. Once one has failed, the others get the signal `then`, as launchers do it.

        Raises:
            TimeoutError: the run is stuck; all processes are killed.
        """
        sent = False
        while not self.poll():
            if then is not None and not sent and any(status not in (None, 0) for status in self.statuses):
                self.send(then)
                sent = True
            if time.monotonic() - self.started > _STUCK:
                self.kill()
                raise TimeoutError(f"not done within {_STUCK:.0f} s")
            time.sleep(0.02)
        self._close()
        return [status for status in self.statuses if status is not None]

    def kill(self) -> None:
        """End all processes."""
        self.send(signal.SIGKILL)
        while not self.poll():
            time.sleep(0.02)
        self._close()

    def _close(self) -> None:
        if self._store is not None:
            os.kill(self._store, signal.SIGKILL)
            os.waitpid(self._store, 0)
            self._store = None

    def said(self, rank: int | None = None) -> str:
        """The output of a rank, or of all of them."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(path.read_text(errors="replace") for path in logs if path.exists())

    @property
    def resumed_at(self) -> int | None:
        """The step that the run resumed from, 0 for a new run; None if it ended before."""
        match = re.search(r"^(?:resumed at step ([\d,]+)|new run):", self.said(0), re.MULTILINE)
        return None if match is None else int((match[1] or "0").replace(",", ""))


def _start_store() -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
            os.write(write, str(store.port).encode())
            while os.getppid() != 1:
                time.sleep(1.0)
        finally:
            os._exit(0)
    os.close(write)
    port = int(os.read(read, 16))
    os.close(read)
    return pid, port


def _fork(rank: int, world_size: int, port: int, log: Path, arguments: Sequence[str], fault: Fault | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, exit_unsaved)  # as partialfc/__main__.py does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        if world_size > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        torch.set_num_threads(1)
        if fault is not None:
            fault(rank)
        status = cli.main(list(arguments))
        gc.collect()  # ends the processes that read the data
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
