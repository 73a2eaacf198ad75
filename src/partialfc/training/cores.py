"""A training on the cores of this machine: one process for each, since threads wait for each other in every operation.

Beside other programs, an operation on several threads takes as long as the thread that the operating system runs last;
processes of one thread wait only where a step exchanges something (docs/performance.md, "Training beside other
programs").
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from partialfc.config.options import TrainConfig
from partialfc.core.console import say
from partialfc.core.errors import StoppedBySignal
from partialfc.training.loop import train
from partialfc.training.timing import TrainResult

_FEWEST_IMAGES = 64  # of a process in a pass, for the sake of its batch statistics
_MOST_PROCESSES = 8  # each has a copy of the network
_SECONDS_TO_END = 10.0


def train_on_cores(
    config: TrainConfig,
    out: Path,
    *,
    benchmarks: Mapping[str, Path] | None = None,
    resume: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """`train`, for which this process starts others where that is faster: see `processes_for`.

    They are ranks as torchrun would start them, and rank 0 is this process. They stay in its session, since Linux
    shares the processors out by sessions.

    Args, Raises: those of `train`.
    """
    count = processes_for(config)
    if count == 1:
        return train(config, out, benchmarks=benchmarks, resume=resume, verify=verify, quiet=quiet)
    threads = torch.get_num_threads()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that the system picks
    launch = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # all ranks are its clients, as torchrun's are
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": str(threads // count),
    }
    if loopback := [name for _, name in socket.if_nameindex() if name.startswith("lo")]:
        launch["GLOO_SOCKET_IFNAME"] = loopback[0]  # whatever the name of this machine resolves to
    with tempfile.TemporaryDirectory(prefix="partialfc-") as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "partialfc", "train", "--config", str(file), "--out", str(out), "--json"]
        if benchmarks:
            command += ["--benchmark", *(f"{name}={path}" for name, path in benchmarks.items())]
        command += ["--resume"] * resume + ["--verify"] * verify
        with patch.dict(os.environ, launch | {"RANK": "0", "LOCAL_RANK": "0"}), _other_ranks(command, count, temporary):
            torch.set_num_threads(threads // count)
            try:
                return train(config, out, benchmarks=benchmarks, resume=resume, verify=verify, quiet=quiet)
            finally:
                torch.set_num_threads(threads)


def processes_for(config: TrainConfig) -> int:
    """How many processes of this machine train together: 1 on a GPU, or where torchrun has started this one.

    On a CPU it is one for each thread that PyTorch has (OMP_NUM_THREADS), at most eight, and so many that each has 64
    images at a time.
    """
    launched = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if launched or (config.device != "cpu" and torch.cuda.is_available()):
        return 1
    images = config.data.global_batch_size // (config.data.micro_steps or 1)
    return max(1, min(torch.get_num_threads(), _MOST_PROCESSES, images // _FEWEST_IMAGES))


@contextlib.contextmanager
def _other_ranks(command: list[str], count: int, folder: str) -> Iterator[None]:
    """Start ranks 1 and up, and end them at the end; their messages, which repeat those of rank 0, show if it fails."""
    messages = Path(folder) / "messages"
    with messages.open("wb") as file:
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
            for rank in range(1, count)
        ]
    try:
        yield
    except RuntimeError as error:
        _end(ranks)
        if not isinstance(error, StoppedBySignal):
            say(messages.read_text(encoding="utf-8", errors="replace").rstrip())
        raise
    finally:
        _end(ranks)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Give the processes time to end by themselves, as they do with this one, and end them if they do not."""
    for rank in ranks:
        for stop in (lambda: None, rank.terminate, rank.kill):
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(_SECONDS_TO_END)
                break
