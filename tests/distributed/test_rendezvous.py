"""Processes of one start meet in a store that is empty, full of the past, or lacks somebody."""

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


def meeting(
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
def test_all_get_one_word_and_a_new_one_each_time(world_size: int) -> None:
    store = dist.HashStore()
    words = set()
    for _ in range(3):  # torchrun's store stays the same when it starts again
        found = meeting(store, range(world_size), world_size)
        assert len(set(found)) == 1
        words.add(found[0])
    assert len(words) == 3


def test_fewer_or_more_processes_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    for world_size in (4, 2, 3):
        assert len(set(meeting(store, range(world_size), world_size))) == 1


def test_rank_0_first_believes_the_past() -> None:
    """It finds the word of a dead rank 1, answers that, and answers anew when the living one comes."""
    store = dist.HashStore()
    store.set("partialfc/meeting/hello/1", json.dumps({"nonce": "dead", "launch_info": {"rank": "dead"}}))
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


def test_rank_0_may_be_in_its_next_meeting_already() -> None:
    """Processes that meet again and again, none waiting for the slowest, still have the same words."""
    store = dist.HashStore()

    def often(rank: int) -> list[str]:
        return [agree_on_session(store, rank, 3, {}, fits, 20.0) for _ in range(8)]

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(often, range(3))
    assert others == [first, first]
    assert len(set(first)) == 8


def test_a_refusal_reaches_all() -> None:
    found = meeting(dist.HashStore(), range(3), 3, lambda infos: f"no room for {len(infos)}")
    assert [(type(each), str(each)) for each in found] == [(InputError, "no room for 3")] * 3


def test_who_does_not_come_is_named() -> None:
    first, second = meeting(dist.HashStore(), [0, 2], 4, seconds=0.3)
    assert isinstance(first, JobError)
    assert str(first).startswith("2 of 4 processes did not come (rank 1, 3): ")
    assert isinstance(second, JobError)
    assert "Rank 2 has waited in vain" in str(second)


def test_the_dead_of_an_earlier_start_are_named_too() -> None:
    store = dist.HashStore()
    meeting(store, range(3), 3)
    first, _ = meeting(store, [0, 1], 3, seconds=0.5)
    assert str(first).startswith("1 of 3 processes did not come (rank 2): ")
