"""A dead, failed or stuck process is named by the others, which end within seconds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from distributed_workers import run_apart

from partialfc.core.errors import JobError
from partialfc.distributed import heartbeat
from partialfc.distributed.activity import activities, activity, report_progress
from partialfc.distributed.collectives import barrier, is_broken_exchange
from partialfc.distributed.heartbeat import Heartbeat, HeartbeatMonitor, Peer, lost_process, own_system

HERE = socket.gethostname()
GOOD = Peer(
    Heartbeat(5, HERE, own_system(), os.getpid(), False, [("computing step 3", 1.0, False)], None), received_at=100.0
)


def peer(received_at: float = 100.0, **changes: object) -> Peer:
    return Peer(replace(GOOD.heartbeat, **changes), received_at)  # type: ignore[arg-type]


def lost(*peers: Peer, now: float = 101.0) -> str | None:
    return lost_process(dict(enumerate(peers)), now, heartbeat_timeout=30.0, timeout=600.0, world_size=len(peers))


def test_all_is_well() -> None:
    assert lost(GOOD, GOOD) is None
    assert lost(GOOD, peer(threads=[("in an all-reduce", 599.0, True)])) is None
    assert lost(GOOD, peer(received_at=0.0, end=""), now=131.0) is not None  # no heartbeat of rank 0, rank 1 has ended
    assert lost(peer(received_at=0.0, end="")) is None


def test_a_process_without_heartbeats_is_named_with_its_last_activity() -> None:
    other = peer(received_at=60.0, host="elsewhere", system="another", process=77)
    assert lost(GOOD, other) == (
        "rank 1 (on elsewhere, process 77) has sent no heartbeat for 41 s; it was last computing step 3"
    )
    assert lost(GOOD, replace(other, received_at=72.0)) is None


def test_a_process_that_is_gone_from_this_host_is_named_at_once() -> None:
    assert lost(GOOD, peer(process=2**22 + 1, threads=[])) == f"rank 1 (on {HERE}, process {2**22 + 1}) is gone"


def test_a_process_of_another_host_of_the_same_name_is_not_checked_on_this_one() -> None:
    """Machines may all be called localhost, and containers share a host's name without its process numbers."""
    assert lost(GOOD, peer(system="another", process=2**22 + 1)) is None


def test_a_failed_process_is_named_with_its_own_error() -> None:
    sentence = lost(GOOD, peer(end="ValueError: odd"))
    assert sentence == f"rank 1 (on {HERE}, process {os.getpid()}) failed: ValueError: odd"


def test_the_stuck_process_is_named_and_not_those_that_wait_for_it() -> None:
    waiting = peer(threads=[("computing step 3, in an all-reduce", 700.0, True)])
    reading = peer(threads=[("reading the images of step 3", 690.0, False)])
    sentence = lost(waiting, reading, waiting)
    assert sentence is not None
    assert "rank 1 " in sentence
    assert "reading the images of step 3 for 690 s" in sentence
    assert "rank 0" not in sentence
    both = lost(waiting, waiting)
    assert both is not None  # all wait for each other: all are named
    assert "rank 0" in both
    assert "rank 1" in both
    assert lost(waiting, GOOD) is None  # the other may become late too, or makes progress
    assert (
        lost_process({0: waiting}, 101.0, heartbeat_timeout=30.0, timeout=600.0, world_size=2) is None
    )  # rank 0 knows better
    many = lost(*[waiting] * 20)
    assert many is not None
    assert many.count("rank ") == 8
    assert many.endswith(", 12 others too")


def test_a_checkpoint_that_makes_progress_may_block_all_others() -> None:
    """All main threads wait for it, each of them too long; one thread writes block after block."""
    waiting = ("computing step 9, waiting for its checkpoint of step 9", 700.0, True)
    gathering, writing = ("in an all-reduce", 690.0, True), ("writing step-00000009", 0.5, False)
    assert lost(peer(threads=[waiting, writing]), peer(threads=[waiting, gathering])) is None
    assert lost(peer(threads=[waiting, gathering]), peer(threads=[waiting, writing])) is None
    stuck_ranks = lost(peer(threads=[waiting, gathering]), peer(threads=[waiting, gathering]))
    assert stuck_ranks is not None
    assert "rank 0" in stuck_ranks


def test_activities_nest_and_count_from_the_last_progress() -> None:
    def mine() -> list[tuple[str, bool]]:
        return [(each.what, each.waits) for each in activities() if each.what.startswith("outer")]

    with activity("outer"):
        with activity("inner", waits=True):
            assert mine() == [("outer, inner", True)]
            time.sleep(0.02)
            assert min(each.seconds for each in activities()) >= 0.02
            report_progress()
            assert min(each.seconds for each in activities()) < 0.02
        assert mine() == [("outer", False)]
    assert mine() == []
    report_progress()  # no activity: no effect


def test_only_a_collective_breaks_off() -> None:
    assert is_broken_exchange(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_broken_exchange(RuntimeError("out of memory"))
    assert not is_broken_exchange(JobError("gloo said no"))
    assert not is_broken_exchange(ValueError("gloo"))
    with HeartbeatMonitor(30, 600) as alone:
        assert alone.explain(RuntimeError("gloo")) is None


# -- processes ---------------------------------------------------------------------------------------------------------


def wait_for_rank_1(rank: int, folder: Path, heartbeat_timeout: float = 4.0, timeout: float = 60.0) -> None:
    """Rank 1 is lost in the way that the folder is named for; the others wait for it."""
    heartbeat.INTERVAL, heartbeat._SECONDS_TO_RAISE = 0.2, 0.5
    with HeartbeatMonitor(heartbeat_timeout, timeout) as monitor:
        if rank == 1:
            with activity("working"):
                time.sleep(0.5)
                lose_this_process(folder.name)
        try:
            with activity("computing"):
                barrier()
        except RuntimeError as error:
            reason = monitor.explain(error)
            assert reason is not None
            (folder / f"{rank}.txt").write_text(str(reason))
            sys.exit(1)


def lose_this_process(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "failed":
        raise ValueError("something\nodd.")


def stuck(rank: int, folder: Path) -> None:
    if rank == 0:
        # The verdict of a process whose main thread is blocked goes to its standard error.
        os.dup2(os.open(folder / "0.txt", os.O_WRONLY | os.O_CREAT), 2)
    heartbeat.INTERVAL, heartbeat._SECONDS_TO_RAISE = 0.2, 0.5
    with HeartbeatMonitor(30.0, 2.0), activity("reading" if rank == 1 else "computing"):
        if rank == 1:
            time.sleep(100)
        barrier()


class LostStore:
    """No call comes back, as with a store whose host is cut off."""

    name = "the store"

    def set(self, key: str, value: str) -> None:
        time.sleep(100)

    def get(self, keys: list[str]) -> list[str]:
        time.sleep(100)
        return []


def without_store(rank: int, folder: Path) -> None:
    """Rank 1 loses the store in the middle of a wait; rank 0 ends while its calls to the store hang."""
    os.dup2(os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    heartbeat.INTERVAL, heartbeat._SECONDS_TO_RAISE = 0.2, 0.5
    with HeartbeatMonitor(2.0, 600.0) as monitor:
        monitor._store = LostStore()  # type: ignore[assignment]
        time.sleep(100 if rank == 1 else 0.5)
    os._exit(7)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_store_that_hangs_blocks_no_process(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run_apart(2, without_store, tmp_path) == [7, 1]
    assert time.monotonic() - started < 60
    said = (tmp_path / "1.txt").read_text()
    assert "partialfc: error: the store has not answered for" in said or "rank 0 (on" in said


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["killed", "failed"])
def test_the_others_name_a_process_that_is_lost(how: str, tmp_path: Path) -> None:
    folder = tmp_path / how
    folder.mkdir()
    started = time.monotonic()
    statuses = run_apart(3, wait_for_rank_1, folder)
    assert time.monotonic() - started < 60
    assert statuses == [1, -signal.SIGKILL if how == "killed" else 1, 1]
    said = {(folder / f"{rank}.txt").read_text() for rank in (0, 2)}
    assert len(said) == 1
    (message,) = said
    assert message.startswith(f"rank 1 (on {HERE}, process ")
    expected = " is gone; it was last working" if how == "killed" else " failed: ValueError: something odd"
    assert message.endswith(f"{expected}: go on from the last checkpoint with --resume.")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stuck_process_ends_all_within_the_timeout(tmp_path: Path) -> None:
    assert run_apart(2, stuck, tmp_path) == [1, 1]
    message = (tmp_path / "0.txt").read_text()
    assert "processes.timeout_seconds (2) has passed: rank 1 (on " in message
    assert "has been reading for " in message
