"""Several hosts on one Linux machine: network namespaces with names and addresses of their own, joined by a switch.

Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2; `why_not` says what is missing. A host here has its own
network, host name and /etc/hosts, and shares the files, the clock and the processors of the machine.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_NETWORKS = itertools.count()
# Host name and /etc/hosts of a host: $0 is its name, $1 the file.
_ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: its host name, which every host of the network can resolve.
        namespace: of the network, as `ip netns` knows it.
        switch: the namespace of the switch.
        names: the file that is its /etc/hosts.
        started: what was started there.
    """

    name: str
    namespace: str
    switch: str
    names: Path
    started: list[subprocess.Popen] = field(default_factory=list, repr=False)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        """Start a command there; its output is appended to `log`. Its process is the command's own."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", _ENTER]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*inside, self.name, str(self.names), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def cut_off(self) -> None:
        """Unplug its cable: packets vanish, connections stay open, and processes that wait for it keep waiting."""
        _ip("-n", self.switch, "link", "set", f"to-{self.name}", "down")

    def put_back(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self.switch, "link", "set", f"to-{self.name}", "up")


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Hosts that can reach each other; all their processes are killed, and the network removed, at the end.

    Args:
        names: of the hosts, at most 8 letters each.
        folder: for the file of their addresses.
    """
    _remove_leftovers()
    begin = f"pfc{os.getpid()}x{next(_NETWORKS)}"
    switch = f"{begin}-switch"
    file = folder / f"{begin}-hosts"
    hosts = [Host(name, f"{begin}-{name}", switch, file) for name in names]
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    file.write_text("\n".join(lines) + "\n")
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            _plug_in(host, addresses[host.name])
        yield hosts
    finally:
        for host in hosts:
            _end_processes(host)
        for namespace in [*(host.namespace for host in hosts), switch]:
            with suppress(RuntimeError):
                _ip("netns", "delete", namespace)
        file.unlink(missing_ok=True)


def why_not(folder: Path) -> str | None:
    """Why this machine cannot have network namespaces, or None if it can."""
    try:
        with network(["here"], folder) as (host,):
            said = folder / "said"
            status = host.start(["true"], said).wait(timeout=20)
            return None if status == 0 else f"no host in a network namespace: {said.read_text().strip()}"
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespaces: {error}"


def _remove_leftovers() -> None:
    """Remove the networks of processes that were killed before they could."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        maker = re.fullmatch(r"pfc(\d+)x\d+-.*", name)
        if maker and not Path(f"/proc/{maker[1]}").exists():
            _kill_all(name)
            with suppress(RuntimeError):
                _ip("netns", "delete", name)


def _plug_in(host: Host, address: str) -> None:
    _ip("netns", "add", host.namespace)
    cable = ["link", "add", "eth0", "netns", host.namespace, "type", "veth"]
    _ip(*cable, "peer", "name", f"to-{host.name}", "netns", host.switch)
    _ip("-n", host.switch, "link", "set", f"to-{host.name}", "master", "bridge", "up")
    _ip("-n", host.namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", host.namespace, "link", "set", device, "up")


def _end_processes(host: Host) -> None:
    _kill_all(host.namespace)
    for started in host.started:
        started.wait(timeout=10)


def _kill_all(namespace: str) -> None:
    """Kill its processes until none is left: a launcher may start another."""
    for _ in range(50):
        processes: list[str] = []
        with suppress(RuntimeError):
            processes = _ip("netns", "pids", namespace).split()
        if not processes:
            return
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.1)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
