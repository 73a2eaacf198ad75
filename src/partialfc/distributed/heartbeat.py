"""Which process of a run is dead, cut off or stuck: found out by all the others, and said by name.

A collective waits for every process, and by itself tells of a lost one late or not at all. Each process therefore gives
a sign of life in the launcher's key-value store every two seconds, from a thread of its own, with what its threads are
doing. The first process reads them all and writes down whom the run has lost; every process reads that and ends.

- A process is dead when its heartbeats stop for `heartbeat_timeout_seconds`, or at once when this process can see in
  the system that it is gone.
- It is stuck when it gives signs, and one of its threads has been at the same thing for `timeout_seconds`.
- It has failed when it says so on its way out.
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

INTERVAL = 2.0  # seconds between two signs of life
_GRACE = 5.0  # seconds that the main thread has to notice by itself
_GRACE_OF_MAIN = 20.0  # and to end, once it has
_REMEDY = "go on from the last checkpoint with --resume."
_ROUNDS_AFTER_A_BREAK = 3  # intervals of silence that are enough once an exchange broke off
_SHOW_CURSOR = "\x1b[?25h"
_LISTED = 8  # ranks named in one message


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life.

    Attributes:
        number: of the sign, so that a repeated one is not taken for a new one.
        host, process: where it comes from, for people.
        system: that gives processes their numbers; two hosts, or containers, may bear the same name.
        broken: whether an exchange with others broke off.
        threads: (what, seconds without progress, waits for others) of each thread.
        end: None while at work, "" after a good end, or what failed.
    """

    number: int
    host: str
    system: str
    process: int
    broken: bool
    threads: list[tuple[str, float, bool]]
    end: str | None


@dataclass
class Peer:
    """The last sign of one process, and when it came, by this process's clock."""

    sign: Heartbeat
    came: float

    @property
    def name(self) -> str:
        return f"on {self.sign.host}, process {self.sign.process}"


def lost_process(peers: Mapping[int, Peer], now: float, silence: float, timeout: float, world_size: int) -> str | None:
    """Whom the run has lost and why, in a sentence without its end; None if all is well.

    Args:
        peers: by rank; all of them on rank 0, and rank 0 elsewhere.
        now: by the clock of `came`.
        silence: seconds after which a process without a sign is dead.
        timeout: seconds after which a thread without progress is stuck.
        world_size: how many ranks there are.
    """
    here = own_system()
    for rank, peer in peers.items():
        if peer.sign.end:
            return f"rank {rank} ({peer.name}) failed: {peer.sign.end}"
        if peer.sign.end is not None:
            continue
        last = "; ".join(what for what, _, _ in peer.sign.threads)
        last = last and f"; it was last {last}"
        if peer.sign.system == here and not _is_running(peer.sign.process):
            return f"rank {rank} ({peer.name}) is gone{last}"
        silent = now - peer.came
        if silent > silence:
            return f"rank {rank} ({peer.name}) has given no sign of life for {silent:.0f} s{last}"
    return _stuck(peers, timeout, world_size)


def _stuck(peers: Mapping[int, Peer], timeout: float, world_size: int) -> str | None:
    late = [
        (rank, peer, what, seconds, waits)
        for rank, peer in peers.items()
        if peer.sign.end is None
        for what, seconds, waits in peer.sign.threads
        if seconds > timeout
    ]
    # Whoever waits for others is not to blame, unless all do; another may be about to be late, or get on all the time,
    # as a thread that writes a checkpoint does while its own main thread waits for it.
    blamed = [each for each in late if not each[-1]]
    at_work = {rank for rank, peer in peers.items() if peer.sign.end is None}
    at_rest = {rank for rank in at_work if all(seconds > timeout for _, seconds, _ in peers[rank].sign.threads)}
    if not blamed and {rank for rank, *_ in late} & at_rest == at_work and len(peers) == world_size:
        blamed = late
    if not blamed:
        return None
    said = [f"rank {rank} ({peer.name}) has been {what} for {age:.0f} s" for rank, peer, what, age, _ in blamed]
    said[_LISTED:] = [f"{len(said) - _LISTED} others too"] if len(said) > _LISTED else []
    return f"processes.timeout_seconds ({timeout:.0f}) has passed: {', '.join(said)}"


@cache
def own_system() -> str:
    """Names the host, its boot, and the set of process numbers in it, that this process belongs to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _is_running(process: int) -> bool:
    """Whether a process of this host is there and has not ended (one that nobody has asked for its status counts)."""
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

    All ranks enter it together, inside the process group. The main thread gets some seconds to end by itself, since a
    broken exchange may have woken it; after that this process prints the sentence and exits with status 1, whatever
    its main thread waits for. Entering it takes four collectives.

    Args:
        heartbeat_timeout_seconds: without a sign for so long, a process is dead.
        timeout_seconds: without progress for so long, it is stuck.

    Attributes:
        verdict: whom the run has lost, None if all is well.
    """

    def __init__(self, heartbeat_timeout_seconds: float, timeout_seconds: float) -> None:
        self.silence, self.timeout = heartbeat_timeout_seconds, timeout_seconds
        self.rank, self.world_size = rank_of(), world_size_of()
        self.enabled = self.world_size > 1 and has_store()
        self.verdict: str | None = None
        self._found, self._ended = threading.Event(), threading.Event()
        self._main_ends = False
        self._number = 0
        self._end: str | None = None
        self._peers: Mapping[int, Peer] = {}
        self._answered = time.monotonic()
        self._told: str | None = None
        self._wake = threading.Event()

    def __enter__(self) -> HeartbeatMonitor:
        if self.enabled:
            self._store = KeyValueStore(f"partialfc/{gather_json(secrets.token_hex(8))[0]}", self.silence)
            if self.rank == 0:
                self._store.set("verdict", "")
            self._give_sign()
            gather_json(None)  # every key is there from here on
            self._answered = time.monotonic()
            self._exchanger = threading.Thread(target=self._exchange, name="liveness exchange", daemon=True)
            self._exchanger.start()
            threading.Thread(target=self._judge, name="liveness judge", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        # Whoever ends because of another's end has nothing of its own to tell.
        own = error is not None and not self._main_ends and not isinstance(error, StoppedBySignal)
        self._end = _in_words(error) if own and error is not None else ""
        self._ended.set()
        self._wake.set()
        self._exchanger.join(2 * INTERVAL)

    def explain(self, error: BaseException) -> JobError | None:
        """What lies behind an exchange that broke off, waiting some seconds to find out; None for other errors."""
        if not self.enabled or not is_broken_exchange(error):
            return None
        self._main_ends = True
        self._wake.set()
        self._found.wait(self.silence + 2 * INTERVAL)
        if self.rank == 0:
            time.sleep(2 * INTERVAL)  # it may keep the store, from which the others are about to read the verdict
        reason = self.verdict or f"the exchange with the other processes broke off ({str(error).splitlines()[0]})"
        return JobError(f"{reason}: {_REMEDY}")

    # -- the two threads ---------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Give a sign, and read those of others, every `INTERVAL`; at the end give a last one.

        No other thread uses the store: if it is lost, a call may never come back, however long its timeout.
        """
        watched = range(self.world_size) if self.rank == 0 else range(1)
        keys = ["verdict", *(str(rank) for rank in watched)]
        over = False
        while not over:
            self._wake.wait(INTERVAL)
            self._wake.clear()
            over = self._ended.is_set()
            try:
                self._give_sign()
                if self._told is not None:
                    self._store.set("verdict", self._told)
                if over:
                    return
                verdict, *signs = self._store.get(keys)
            except Exception:  # the store is lost, or slow: the other thread sees how long nothing has come
                continue
            self._take(watched, signs)
            self._answered = time.monotonic()
            if verdict:
                self._decide(verdict)

    def _take(self, watched: Sequence[int], signs: Sequence[str]) -> None:
        now = time.monotonic()
        peers = dict(self._peers)
        for rank, encoded in zip(watched, signs, strict=True):
            sign = Heartbeat(**json.loads(encoded))
            if rank not in peers or sign.number != peers[rank].sign.number:
                peers[rank] = Peer(sign, now)
        self._peers = peers

    def _judge(self) -> None:
        """Decide that a process is lost, and end this one if its main thread does not."""
        last = time.monotonic()
        while self.verdict is None:
            if self._ended.wait(INTERVAL / 2):
                return
            now = time.monotonic()
            if now - last > 2 * INTERVAL:  # this process itself was held up: nobody else is to blame for that
                self._peers, self._answered = {}, now
            last = now
            reason = self._lost(now)
            if reason is not None:
                self._decide(reason)
                self._told = reason
                self._wake.set()
        if self._ended.wait(_GRACE_OF_MAIN if self._main_ends else _GRACE):
            return
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}\npartialfc: error: {self.verdict}: {_REMEDY}\n".encode())
        os._exit(1)

    def _lost(self, now: float) -> str | None:
        peers = self._peers
        # After a broken exchange a short silence is proof enough.
        broken = self._main_ends or any(peer.sign.broken for peer in peers.values())
        silence = min(self.silence, _ROUNDS_AFTER_A_BREAK * INTERVAL) if broken else self.silence
        unanswered = now - self._answered
        if unanswered > silence and not (0 in peers and peers[0].sign.end == ""):
            return f"{self._store.name} has not answered for {unanswered:.0f} s: its host is gone or cut off"
        return lost_process(peers, now, silence, self.timeout, self.world_size)

    def _decide(self, reason: str) -> None:
        if self.verdict is None:
            self.verdict = reason
            self._found.set()

    def _give_sign(self) -> None:
        self._number += 1
        threads = [(each.what, each.seconds, each.waits) for each in activities()]
        sign = Heartbeat(
            self._number, socket.gethostname(), own_system(), os.getpid(), self._main_ends, threads, self._end
        )
        self._store.set(str(self.rank), json.dumps(asdict(sign)))


def _in_words(error: BaseException) -> str:
    words = str(error) if isinstance(error, InputError | JobError) else f"{type(error).__name__}: {error}"
    return " ".join(words.split())[:500].rstrip(".")
