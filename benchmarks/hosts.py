"""Training on several hosts, and what happens when a host is cut off or a process is killed.

    sudo python benchmarks/hosts.py --out runs/hosts

The hosts are network namespaces of this machine (benchmarks/namespaces.py), each with a `torchrun -m partialfc train`
of its own. A scenario injects one fault into a running training and records what the processes do and print. Prints a
table, and writes it into docs/results/reliability.md when all scenarios have run.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from documents import items, write_between
from elastic import write_patterns
from host_runs import SECONDS_OF_A_RUN, Run
from namespaces import Host, network, why_not
from partialfc.bench.machine import describe

SIZE = 16  # pixels of benchmarks/elastic.py's patterns
SECONDS_TO_NOTICE = 60.0  # a lost process or host: heartbeat_timeout_seconds, time to end, and a busy machine


@dataclass(frozen=True)
class Outcome:
    """What one injected fault did.

    Attributes:
        fault: in words.
        as_written: whether it is what docs/reliability.md says.
        said: what happened, in a sentence.
        messages: the error that the processes of a host ended with, by host, where they ended with one.
        lost_steps: optimizer steps that were repeated; None where no run resumed.
        seconds: from the fault to the end of the processes, or to the first new step; None without a fault.
    """

    fault: str
    as_written: bool
    said: str
    lost_steps: int | None = None
    seconds: float | None = None
    messages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """What scenarios share.

    Attributes:
        steps: of each run.
        fault_step: the step after which the fault comes.
        heartbeat_timeout: processes.heartbeat_timeout_seconds of each run.
        hosts: two.
    """

    folder: Path
    data: Path
    steps: int
    fault_step: int
    heartbeat_timeout: int
    hosts: list[Host]

    def run(self, name: str, **options: object) -> Run:
        """A new run of that name."""
        return Run(self.folder / name, self.data, self.steps, heartbeat_timeout=self.heartbeat_timeout, **options)  # type: ignore[arg-type]

    def straight(self, nodes: int, per_host: int) -> Run:
        """The uninterrupted run on so many hosts, made once."""
        run = self.run(f"straight-{nodes}x{per_host}", nodes=str(nodes), per_host=per_host)
        if not run.out.exists():
            run.start(*self.hosts[:nodes])
            for host in self.hosts[:nodes]:
                run.wait_for_end(host, SECONDS_OF_A_RUN)
        return run


def two_hosts(stage: Stage) -> Outcome:
    """Two hosts with a process each train what one host with two processes trains."""
    apart, together = stage.straight(2, 1), stage.straight(1, 2)
    same = difference(together, apart)
    return Outcome("none: two hosts instead of one", same == 0, f"the final state {_apart(same)} that of one host")


def killed_rank(stage: Stage) -> Outcome:
    """SIGKILL to a rank under torchrun with --max-restarts, on one host: torchrun restarts the run."""
    host = stage.hosts[0]
    run = stage.run("killed-rank", nodes="1", per_host=2, restarts=3)
    run.start(host)
    run.wait_for_step(stage.fault_step)
    signal_rank(run, host, 1, signal.SIGKILL)
    lost, seconds = run.wait_for_resume()
    status = run.wait_for_end(host, SECONDS_OF_A_RUN)
    same = difference(stage.straight(1, 2), run)
    said = f"went on by itself; the final state {_apart(same)} that of the uninterrupted run"
    return Outcome("a rank killed under torchrun --max-restarts", (status, same) == (0, 0), said, lost, seconds)


def sigterm(stage: Stage) -> Outcome:
    """SIGTERM to torchrun on both hosts, as a scheduler sends it; a new start resumes."""
    run = stage.run("sigterm", nodes="2", restarts=3)
    run.start(*stage.hosts)
    run.wait_for_step(stage.fault_step)
    begin = time.monotonic()
    for host in stage.hosts:
        run.started[host.name].send_signal(signal.SIGTERM)
    statuses = [run.wait_for_end(host, SECONDS_TO_NOTICE) for host in stage.hosts]
    seconds = time.monotonic() - begin
    saved = len(re.findall(r"stopped by SIGTERM after step [\d,]+, and saved", run.log()))
    run.step()
    run.start(*stage.hosts)
    lost, _ = run.wait_for_resume()
    ended = [run.wait_for_end(host, SECONDS_OF_A_RUN) for host in stage.hosts]
    same = difference(stage.straight(2, 1), run)
    said = f"{saved} ranks saved and ended, torchrun with status {statuses}; a new start went on, and the final state "
    said += f"{_apart(same)} that of the uninterrupted run"
    return Outcome("SIGTERM to torchrun", (saved, ended, same) == (2, [0, 0], 0), said, lost, seconds)


def cut_off(stage: Stage, leaving: int) -> Outcome:
    """A host is cut off, and torchrun may not start again: the processes of both end by themselves.

    The first host has rank 0. The one that stays holds torchrun's rendezvous.
    """
    leaves, stays = stage.hosts[leaving], stage.hosts[1 - leaving]
    run = stage.run(f"cut-off-{leaves.name}", nodes="2")
    run.start(stays, leaves)
    run.wait_for_step(stage.fault_step)
    ranks = {host.name: run.workers(host) for host in stage.hosts}
    leaves.cut_off()
    begin = time.monotonic()
    try:
        ended = {}
        for host in (stays, leaves):
            run.wait(lambda name=host.name: not any(map(_is_running, ranks[name])), SECONDS_TO_NOTICE, host.name)
            ended[host.name] = time.monotonic() - begin
        status = run.wait_for_end(stays, SECONDS_TO_NOTICE)
    finally:
        leaves.put_back()
    said = {host.name: _last_sentence(run.log(host)) for host in stage.hosts}
    named = leaves.name in said[stays.name] and "partialfc: error" in said[leaves.name]
    outcome = (
        f"the processes of both ended and named what they lost; torchrun's status {status}; those of the host cut off "
        f"ended after {ended[leaves.name]:.0f} s"
    )
    which = "the first" if leaving == 0 else "the second"
    fault = f"a host cut off, {which} of two"
    return Outcome(fault, status == 1 and named, outcome, None, ended[stays.name], said)


def _last_sentence(log: str) -> str:
    """The last error that our processes printed; empty without one."""
    return next((line for line in reversed(log.splitlines()) if line.startswith("partialfc: error")), "")


def fewer_hosts(stage: Stage) -> Outcome:
    """A host is cut off under --nnodes 1:2 --max-restarts 3: the one with the rendezvous goes on alone."""
    said = "the other host went on alone"
    return _goes_on_alone(stage, "fewer-hosts", "a host cut off, --nnodes 1:2", said, Host.cut_off)


def preempted(stage: Stage) -> Outcome:
    """SIGTERM to torchrun on one host under --nnodes 1:2 --max-restarts 3, as when that host is taken away."""

    def end(host: Host) -> None:
        host.started[-1].send_signal(signal.SIGTERM)

    said = "all ranks saved; the other host went on alone"
    return _goes_on_alone(stage, "preempted", "SIGTERM to torchrun on one of two hosts, --nnodes 1:2", said, end)


def returned(stage: Stage) -> Outcome:
    """A second host comes under --nnodes 1:2: the first stops, saves, and both go on together."""
    first, second = stage.hosts
    run = stage.run("returned", nodes="1:2", restarts=3)
    run.start(first)
    run.wait_for_step(stage.fault_step)
    run.start(second)
    lost, seconds = run.wait_for_resume()
    statuses = [run.wait_for_end(host, SECONDS_OF_A_RUN) for host in stage.hosts]
    together = "2 x cpu" in run.log().split("resumed at step")[-1]
    apart = _curves_apart(stage.straight(2, 1), run)
    said = f"both went on together; the loss curve is within {apart:.0e} of the one of two hosts"
    as_written = (statuses, together) == ([0, 0], True) and apart < 1e-6
    return Outcome("a second host comes, --nnodes 1:2", as_written, said, lost, seconds)


def _goes_on_alone(stage: Stage, name: str, fault: str, said: str, inject: Callable[[Host], None]) -> Outcome:
    stays, leaves = stage.hosts
    run = stage.run(name, nodes="1:2", restarts=3)
    run.start(stays, leaves)
    run.wait_for_step(stage.fault_step)
    inject(leaves)
    try:
        lost, seconds = run.wait_for_resume()
        status = run.wait_for_end(stays, SECONDS_OF_A_RUN)
    finally:
        leaves.put_back()
    apart = _curves_apart(stage.straight(2, 1), run)
    said += f"; the loss curve is within {apart:.0e} of the uninterrupted one"
    return Outcome(fault, status == 0 and apart < 1e-6, said, lost, seconds)


def _curves_apart(one: Run, other: Run) -> float:
    """The largest relative difference of two loss curves; infinite if one is shorter."""
    left, right = one.losses(), other.losses()
    if len(left) != len(right) or not left:
        return float("inf")
    return max(abs(a - b) / abs(a) for a, b in zip(left, right, strict=True))


def signal_rank(run: Run, host: Host, local_rank: int, which: signal.Signals) -> None:
    """Send a signal to one training process."""
    os.kill(run.workers(host)[local_rank], which)


def difference(one: Run, other: Run) -> float:
    """The largest difference of the last checkpoints, relative to the largest value of a tensor; 0 if bit-identical."""
    left, right = one.final_tensors(), other.final_tensors()
    if left.keys() != right.keys():
        return float("inf")
    apart = [
        float((left[name] - right[name]).abs().max() / left[name].abs().max()) for name in left if left[name].any()
    ]
    return 0.0 if all(torch.equal(left[name], right[name]) for name in left) else max(apart)


def _apart(relative: float) -> str:
    return "is bit for bit" if relative == 0 else f"differs by {relative:.0e} from"


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[-1].split()[0] not in ("Z", "X")
    except OSError:
        return False


SCENARIOS: dict[str, Callable[[Stage], Outcome]] = {
    "two-hosts": two_hosts,
    "killed-rank": killed_rank,
    "sigterm": sigterm,
    "first-host-cut-off": lambda stage: cut_off(stage, 0),
    "second-host-cut-off": lambda stage: cut_off(stage, 1),
    "fewer-hosts": fewer_hosts,
    "preempted": preempted,
    "returned": returned,
}


@contextmanager
def opened_stage(
    folder: Path, steps: int, fault_step: int | None = None, heartbeat_timeout: int = 30
) -> Iterator[Stage]:
    """Data and two hosts in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "images"
    if not data.exists():
        write_patterns(data, SIZE)
    with network(["host-a", "host-b"], folder) as hosts:
        yield Stage(folder, data, steps, fault_step or steps // 2, heartbeat_timeout, hosts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for data and runs")
    parser.add_argument("--steps", type=int, default=200, help="of each run, at least 80")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if reason := why_not(options.out):
        print(f"This machine cannot have several hosts ({reason}): run it as root, with iproute2.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # hosts are removed on the way out
    lines = ["| fault | outcome | steps done again | seconds |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    messages: list[str] = []
    failed = False
    for name in options.scenarios:
        with opened_stage(options.out.resolve(), options.steps) as stage:
            outcome = SCENARIOS[name](stage)
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.0f}"
        lost = "" if outcome.lost_steps is None else outcome.lost_steps
        said = outcome.said if outcome.as_written else f"**not as written**: {outcome.said}"
        lines.append(f"| {outcome.fault} | {said} | {lost} | {seconds} |")
        print(lines[-1], flush=True)
        messages += [f"{outcome.fault}, {host}: `{message}`" for host, message in outcome.messages.items()]
        failed |= not outcome.as_written
    if not failed and options.scenarios == list(SCENARIOS):
        machine = describe("cpu")
        place = f"{machine['cores']} cores of {machine['cpu']}, torch {torch.__version__}"
        note = f"{options.steps} steps, once each; {place}."
        write_between(
            "results/reliability.md",
            "benchmarks/hosts.py",
            [*lines, "", note, "", "What the processes ended with:", "", *items(messages)],
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
