"""A training on several hosts of benchmarks/namespaces.py, each with a torchrun of its own: start, watch, read.

Used by benchmarks/hosts.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from namespaces import Host
from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.training.run.log import read_metrics

BATCH, IMAGES = 12, 150  # of benchmarks/elastic.py's patterns
PORT = 29400
SECONDS_OF_A_RUN = 300.0


@dataclass
class Run:
    """One training.

    Attributes:
        nodes, per_host, restarts: torchrun's --nnodes, --nproc-per-node and --max-restarts.
        heartbeat_timeout: processes.heartbeat_timeout_seconds.
        newest: the largest step ever seen in the metrics.
    """

    out: Path
    data: Path
    steps: int
    nodes: str = "2"
    per_host: int = 1
    restarts: int = 0
    heartbeat_timeout: int = 30
    started: dict[str, subprocess.Popen] = field(default_factory=dict)
    newest: int = 0

    def start(self, *hosts: Host) -> None:
        """Start torchrun on these hosts; the host that was started first holds the rendezvous."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for host in hosts:
            first = next(iter(self.started), host.name)
            self.started[host.name] = host.start(self.command(first), self._log(host.name))

    def command(self, first: str) -> list[str]:
        """The command line, the same on every host."""
        launch = ["-m", "torch.distributed.run", "--nnodes", self.nodes, "--nproc-per-node", str(self.per_host)]
        launch += ["--max-restarts", str(self.restarts), "--rdzv-id", self.out.name, "--rdzv-backend", "c10d"]
        launch += ["--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-conf", "last_call_timeout=5,join_timeout=120"]
        options = {
            "data.path": self.data,
            "data.global_batch_size": BATCH,
            "data.micro_batch_size": BATCH,
            "data.micro_steps": 2,
            "data.workers": 0,
            "backbone.name": "mini",
            "backbone.embedding_dim": 16,
            "backbone.sync_batch_norm": "true",
            "head.sample_rate": 0.5,
            "head.scale": 16,
            "optimizer.lr": 0.01,
            "optimizer.lr_scaling": "absolute",
            "schedule.epochs": self.steps * BATCH / IMAGES,
            "output.log_every": 1,
            "processes.heartbeat_timeout_seconds": self.heartbeat_timeout,
            "output.checkpoint_every": max(1, self.steps // 8),
            "output.evaluate_every": 10**9,
            "precision": "float64",
            "device": "cpu",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        # docs/launching.md says why; with one host it is not needed.
        own_store = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if self.nodes != "1" else []
        return [
            *own_store,
            sys.executable,
            *launch,
            "-m",
            "partialfc",
            "train",
            "--resume",
            "--out",
            str(self.out),
            *words,
        ]

    def log(self, *hosts: Host) -> str:
        """What the processes of these hosts have printed; of all hosts without arguments."""
        return "".join(self._log(name).read_text() for name in [host.name for host in hosts] or self.started)

    def _log(self, name: str) -> Path:
        return self.out.parent / f"{self.out.name}-{name}.log"

    def step(self) -> int:
        """The newest step in the metrics."""
        path = self.out / "metrics.jsonl"
        lines = read_metrics(path) if path.is_file() else []
        step = lines[-1]["step"] if lines else 0
        self.newest = max(self.newest, step)
        return step

    def resumed(self) -> list[int]:
        """The steps that its processes report to have resumed at, in the order of the hosts' logs."""
        return [int(step.replace(",", "")) for step in re.findall(r"resumed at step ([\d,]+)", self.log())]

    def wait_for_resume(self) -> tuple[int, float]:
        """Wait until it resumes; returns the steps that it repeats, and the seconds it took."""
        seconds = self.wait(lambda: bool(self.resumed()), SECONDS_OF_A_RUN, "the restart")
        return self.newest - self.resumed()[0], seconds

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have that step."""
        self.wait(lambda: self.step() >= step, SECONDS_OF_A_RUN, f"step {step}")

    def wait_for_end(self, host: Host, seconds: float) -> int:
        """Wait for a host's torchrun and return its exit status."""
        process = self.started[host.name]
        self.wait(lambda: process.poll() is not None, seconds, f"the end of {host.name}")
        return process.returncode

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait and return the seconds it took; TimeoutError with the last lines printed if it takes too long."""
        begin = time.monotonic()
        while not until():
            self.step()
            if time.monotonic() - begin > seconds or all(each.poll() is not None for each in self.started.values()):
                if until():
                    break
                raise TimeoutError(f"{what} did not come in {seconds:.0f} s; last printed:\n{self.log()[-2000:]}")
            time.sleep(0.1)
        return time.monotonic() - begin

    def workers(self, host: Host) -> list[int]:
        """The training processes of a host, in the order of their local ranks."""
        launcher = self.started[host.name].pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return sorted(int(each) for each in children)

    def losses(self) -> list[float]:
        """The loss curve."""
        return [line["loss"] for line in read_metrics(self.out / "metrics.jsonl") if line["kind"] == "train"]

    def final_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the last checkpoint."""
        root = self.out / "checkpoints"
        checkpoint = Checkpoint(root / f"step-{steps_in(root)[-1]:08d}")
        groups = ("backbone", "backbone-optimizer")
        tensors = {f"{group}/{key}": value for group in groups for key, value in checkpoint.tensors(group).items()}
        rows = {name: checkpoint.rows(name, 0, shape[0]) for name, shape in checkpoint.row_shapes.items()}
        return tensors | {f"rows/{name}": value for name, value in rows.items()}
