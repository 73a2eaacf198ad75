"""The rendezvous of one launch in a store that is empty, holds keys of earlier launches, or misses a rank."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from partialfc.core.errors import InputError, JobError
from partialfc.distributed.rendezvous import LaunchInfo, agree_on_session


def fits(infos: Sequence[LaunchInfo]) -> str | None:
    return None


def rendezvous(
    store: dist.Store,
    ranks: Sequence[int],
    world_size: int,
    validate: Callable[[Sequence[LaunchInfo]], str | None] = fits,
    seconds: float = 20.0,
) -> list[Any]:
    """What `agree_on_session` gives or raises on these ranks, each a thread."""

    def one(rank: int) -> Any:
        try:
            return agree_on_session(store, rank, world_size, {"rank": rank}, validate, seconds)
        except (InputError, JobError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_get_one_session_id_and_a_new_one_each_time(world_size: int) -> None:
    store = dist.HashStore()
    session_ids = set()
    for _ in range(3):  # torchrun's store stays the same when it starts again
        outcomes = rendezvous(store, range(world_size), world_size)
        assert len(set(outcomes)) == 1
        session_ids.add(outcomes[0])
    assert len(session_ids) == 3


def test_fewer_or_more_processes_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    for world_size in (4, 2, 3):
        assert len(set(rendezvous(store, range(world_size), world_size))) == 1


def test_rank_0_reads_a_message_of_an_earlier_launch_first() -> None:
    """It finds the message of a dead rank 1, answers it, and answers anew when the living one sends its own."""
    store = dist.HashStore()
    store.set("partialfc/rendezvous/hello/1", json.dumps({"nonce": "dead", "launch_info": {"rank": "dead"}}))
    asked: list[Any] = []
    answered = threading.Event()

    def validate(infos: Sequence[LaunchInfo]) -> str | None:
        asked.append([launch_info["rank"] for launch_info in infos])
        answered.set()
        return "the dead do not fit" if "dead" in asked[-1] else None

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(agree_on_session, store, 0, 2, {"rank": 0}, validate, 20.0)
        assert answered.wait(10)
        second = threads.submit(agree_on_session, store, 1, 2, {"rank": 1}, validate, 20.0)
        assert first.result() == second.result()
    assert asked == [[0, "dead"], [0, 1]]


def test_rank_0_may_be_in_its_next_rendezvous_already() -> None:
    """Processes in rendezvous after rendezvous, none waiting for the slowest, still agree on the session ids."""
    store = dist.HashStore()

    def often(rank: int) -> list[str]:
        return [agree_on_session(store, rank, 3, {}, fits, 20.0) for _ in range(8)]

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(often, range(3))
    assert others == [first, first]
    assert len(set(first)) == 8


def test_a_refusal_reaches_all() -> None:
    outcomes = rendezvous(dist.HashStore(), range(3), 3, lambda infos: f"no room for {len(infos)}")
    assert [(type(each), str(each)) for each in outcomes] == [(InputError, "no room for 3")] * 3


def test_a_missing_rank_is_named() -> None:
    first, second = rendezvous(dist.HashStore(), [0, 2], 4, seconds=0.3)
    assert isinstance(first, JobError)
    assert str(first).startswith("2 of 4 processes did not come (rank 1, 3): ")
    assert isinstance(second, JobError)
    assert "Rank 2 has not reached rank 0 or others in time" in str(second)


def test_the_dead_of_an_earlier_launch_are_named_too() -> None:
    store = dist.HashStore()
    rendezvous(store, range(3), 3)
    first, _ = rendezvous(store, [0, 1], 3, seconds=0.5)
    assert str(first).startswith("1 of 3 processes did not come (rank 2): ")
