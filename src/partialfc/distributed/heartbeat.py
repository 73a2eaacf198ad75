"""Detects a process of a run that is dead, cut off or stuck: all the others name it and end.

A collective waits for every process, and reports a lost one late or not at all. Each process therefore writes a
heartbeat into the launcher's key-value store every two seconds, from a thread of its own, with the activities of its
threads. Rank 0 reads them all and writes a verdict, the sentence that names the lost process; every rank reads it and
ends.

- A process is dead when its heartbeats stop for `heartbeat_timeout_seconds`, or at once when this process can see in
  the system that it is gone.
- It is stuck when its heartbeats arrive, and one of its threads has made no progress for `timeout_seconds`.
- It has failed when its last heartbeat says so.
- The store itself is lost when it does not answer for `heartbeat_timeout_seconds`, as when its host is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from partialfc.core.errors import InputError, JobError, StoppedBySignal
from partialfc.distributed.activity import activities
from partialfc.distributed.collectives import (
    KeyValueStore,
    gather_json,
    has_store,
    is_broken_exchange,
    rank_of,
    world_size_of,
)

INTERVAL = 2.0  # seconds between two heartbeats
_SECONDS_TO_RAISE = 5.0  # that the main thread has to fail by itself after a verdict
_SECONDS_TO_EXIT = 20.0  # that it has to end once it has failed
_INTERVALS_AFTER_A_BREAK = 3  # without a heartbeat that prove a death once an exchange broke off
_REMEDY = "go on from the last checkpoint with --resume."
_SHOW_CURSOR = "\x1b[?25h"
_LISTED = 8  # ranks named in one message


@dataclass(frozen=True)
class Heartbeat:
    """What a process writes into the store.

    Attributes:
        number: increases by one, so that a repeated heartbeat is not taken for a new one.
        host, process: name of its host and process id, for messages.
        system: `own_system` of its host; two hosts, or containers, may have the same name.
        broken: whether an exchange with others broke off.
        threads: (activity, seconds without progress, waits for others) of each thread.
        end: None while the process works, "" after a good end, else what failed.
    """

    number: int
    host: str
    system: str
    process: int
    broken: bool
    threads: list[tuple[str, float, bool]]
    end: str | None


@dataclass(frozen=True)
class Peer:
    """The last heartbeat of one process, and when this process received it, by its own clock."""

    heartbeat: Heartbeat
    received_at: float

    @property
    def name(self) -> str:
        return f"on {self.heartbeat.host}, process {self.heartbeat.process}"


def lost_process(
    peers: Mapping[int, Peer], now: float, heartbeat_timeout: float, timeout: float, world_size: int
) -> str | None:
    """Which process is lost and why, as a sentence without its full stop; None if all is well.

    Args:
        peers: by rank; all of them on rank 0, and rank 0 elsewhere.
        now: by the clock of `received_at`.
        heartbeat_timeout: seconds after which a process without a heartbeat is dead.
        timeout: seconds after which a thread without progress is stuck.
        world_size: number of ranks.
    """
    for rank, peer in peers.items():
        heartbeat = peer.heartbeat
        if heartbeat.end:
            return f"rank {rank} ({peer.name}) failed: {heartbeat.end}"
        if heartbeat.end is not None:
            continue
        last = "; ".join(what for what, _, _ in heartbeat.threads)
        last = last and f"; it was last {last}"
        if heartbeat.system == own_system() and not _is_running(heartbeat.process):
            return f"rank {rank} ({peer.name}) is gone{last}"
        age = now - peer.received_at
        if age > heartbeat_timeout:
            return f"rank {rank} ({peer.name}) has sent no heartbeat for {age:.0f} s{last}"
    return _stuck(peers, timeout, world_size)


def _stuck(peers: Mapping[int, Peer], timeout: float, world_size: int) -> str | None:
    working = {rank: peer for rank, peer in peers.items() if peer.heartbeat.end is None}
    late = [
        (waits, f"rank {rank} ({peer.name}) has been {what} for {seconds:.0f} s")
        for rank, peer in working.items()
        for what, seconds, waits in peer.heartbeat.threads
        if seconds > timeout
    ]
    # A rank blocked in a collective is a victim, not the cause, unless every thread of every rank is blocked: another
    # may become late soon, or make progress, as a thread that writes a checkpoint while its main thread waits for it.
    causes = [sentence for waits, sentence in late if not waits]
    all_blocked = all(
        peer.heartbeat.threads and all(seconds > timeout for _, seconds, _ in peer.heartbeat.threads)
        for peer in working.values()
    )
    if not causes and all_blocked and len(peers) == world_size:
        causes = [sentence for _, sentence in late]
    if not causes:
        return None
    causes[_LISTED:] = [f"{len(causes) - _LISTED} others too"] if len(causes) > _LISTED else []
    return f"processes.timeout_seconds ({timeout:.0f}) has passed: {', '.join(causes)}"


@cache
def own_system() -> str:
    """Identifies the host, its boot, and the namespace of process ids that this process belongs to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _is_running(process: int) -> bool:
    """Whether a process of this host exists and is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[-1].split()[0] not in ("Z", "X")
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not Path("/proc/self/stat").exists()


class HeartbeatMonitor:
    """While it is entered, a lost process ends this one too; with one process it does nothing.

    All ranks enter it together, inside the process group. The main thread has some seconds to end by itself, since a
    broken exchange may have woken it; after that this process prints the verdict and exits with status 1, wherever its
    main thread is blocked. Entering it takes four collectives.

    Args:
        heartbeat_timeout_seconds: a process without a heartbeat for this long is dead.
        timeout_seconds: a thread without progress for this long is stuck.

    Attributes:
        verdict: which process is lost and why, None if all is well.
    """

    def __init__(self, heartbeat_timeout_seconds: float, timeout_seconds: float) -> None:
        self.heartbeat_timeout, self.timeout = heartbeat_timeout_seconds, timeout_seconds
        self.rank, self.world_size = rank_of(), world_size_of()
        self.enabled = self.world_size > 1 and has_store()
        self.verdict: str | None = None
        self._decided, self._ended, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._main_failed = False
        self._number = 0
        self._end: str | None = None
        self._peers: Mapping[int, Peer] = {}
        self._answered_at = time.monotonic()

    def __enter__(self) -> HeartbeatMonitor:
        if self.enabled:
            self._store = KeyValueStore(f"partialfc/{gather_json(secrets.token_hex(8))[0]}", self.heartbeat_timeout)
            if self.rank == 0:
                self._store.set("verdict", "")
            self._send()
            gather_json(None)  # every key is there from here on
            self._answered_at = time.monotonic()
            self._exchanger = threading.Thread(target=self._exchange, name="heartbeat exchange", daemon=True)
            self._exchanger.start()
            threading.Thread(target=self._watch, name="heartbeat watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        # An error that another rank's failure caused is not reported as one of this rank.
        own = error is not None and not self._main_failed and not isinstance(error, StoppedBySignal)
        self._end = _one_line(error) if own and error is not None else ""
        self._ended.set()
        self._wake.set()
        self._exchanger.join(2 * INTERVAL)

    def explain(self, error: BaseException) -> JobError | None:
        """The reason why an exchange broke off, after waiting some seconds for a verdict; None for other errors."""
        if not self.enabled or not is_broken_exchange(error):
            return None
        self._main_failed = True
        self._wake.set()
        self._decided.wait(self.heartbeat_timeout + 2 * INTERVAL)
        if self.rank == 0:
            time.sleep(2 * INTERVAL)  # the store may live in this process, and the others have yet to read the verdict
        reason = self.verdict or f"the exchange with the other processes broke off ({str(error).splitlines()[0]})"
        return JobError(f"{reason}: {_REMEDY}")

    # -- the two threads ---------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Send a heartbeat and read those of others every `INTERVAL`; at the end send a last one.

        No other thread uses the store: if it is lost, a call may never return, whatever its timeout.
        """
        watched = range(self.world_size) if self.rank == 0 else range(1)
        keys = ["verdict", *(str(rank) for rank in watched)]
        ended = False
        while not ended:
            self._wake.wait(INTERVAL)
            self._wake.clear()
            ended = self._ended.is_set()
            try:
                self._send()
                if self.verdict is not None:
                    self._store.set("verdict", self.verdict)
                if ended:
                    return
                verdict, *encoded = self._store.get(keys)
            except Exception:  # the store is lost or slow; the other thread measures for how long
                continue
            self._receive(watched, encoded)
            self._answered_at = time.monotonic()
            if verdict:
                self._decide(verdict)

    def _send(self) -> None:
        self._number += 1
        threads = [(each.what, each.seconds, each.waits) for each in activities()]
        heartbeat = Heartbeat(
            self._number, socket.gethostname(), own_system(), os.getpid(), self._main_failed, threads, self._end
        )
        self._store.set(str(self.rank), json.dumps(asdict(heartbeat)))

    def _receive(self, ranks: Sequence[int], encoded: Sequence[str]) -> None:
        now, peers = time.monotonic(), dict(self._peers)
        for rank, text in zip(ranks, encoded, strict=True):
            heartbeat = Heartbeat(**json.loads(text))
            if rank not in peers or heartbeat.number != peers[rank].heartbeat.number:
                peers[rank] = Peer(heartbeat, now)
        self._peers = peers

    def _watch(self) -> None:
        """Detect a lost process, and end this one if its main thread does not."""
        last = time.monotonic()
        while self.verdict is None:
            if self._ended.wait(INTERVAL / 2):
                return
            now = time.monotonic()
            if now - last > 2 * INTERVAL:  # this process was suspended itself, so the ages say nothing
                self._peers, self._answered_at = {}, now
            last = now
            reason = self._lost(now)
            if reason is not None:
                self._decide(reason)
                self._wake.set()
        if self._ended.wait(_SECONDS_TO_EXIT if self._main_failed else _SECONDS_TO_RAISE):
            return
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}\npartialfc: error: {self.verdict}: {_REMEDY}\n".encode())
        os._exit(1)

    def _lost(self, now: float) -> str | None:
        peers, timeout = self._peers, self.heartbeat_timeout
        if self._main_failed or any(peer.heartbeat.broken for peer in peers.values()):
            timeout = min(timeout, _INTERVALS_AFTER_A_BREAK * INTERVAL)
        unanswered = now - self._answered_at
        if unanswered > timeout and not (0 in peers and peers[0].heartbeat.end == ""):
            return f"{self._store.name} has not answered for {unanswered:.0f} s: its host is gone or cut off"
        return lost_process(peers, now, timeout, self.timeout, self.world_size)

    def _decide(self, reason: str) -> None:
        if self.verdict is None:
            self.verdict = reason
            self._decided.set()


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, InputError | JobError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500].rstrip(".")
