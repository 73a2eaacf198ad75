"""Processes of one launch agree on a fresh session id, so that stale keys from earlier restarts are ignored.

torchrun keeps one store over all its restarts, and PyTorch's process groups would read the addresses of dead processes
from it; everything of a launch is therefore kept under its session id. On the way rank 0 compares the launch
information of all ranks, so that processes which do not fit together fail at once instead of waiting for each other.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from partialfc.core.errors import InputError, JobError

LaunchInfo = Mapping[str, Any]
_SLEEP, _LONGEST_SLEEP = 0.02, 0.5
_LISTED = 8  # ranks named in one message


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...

    def multi_set(self, keys: list[str], values: list[str], /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


def agree_on_session(
    store: Store,
    rank: int,
    world_size: int,
    launch_info: LaunchInfo,
    validate: Callable[[Sequence[LaunchInfo]], str | None],
    seconds: float,
) -> str:
    """Wait for all ranks of this launch and return their session id, the same on all ranks and new in each launch.

    Every rank sends its launch information; rank 0 answers each with the session id; each confirms; rank 0 closes the
    rendezvous. If rank 0 has read a message of an earlier launch, it reads again and answers with a new session id.

    Args:
        launch_info: JSON-serialisable description of this process.
        validate: called on rank 0 with the information of all ranks in rank order; returns a sentence if they do not
            fit together, else None.
        seconds: timeout.

    Raises:
        InputError: on all ranks alike, with the sentence of `validate`.
        JobError: a rank is missing at the timeout; rank 0 names the missing ones.
    """
    until = time.monotonic() + seconds
    if rank == 0:
        session_id, refusal = _receive(store, world_size, launch_info, validate, until)
    else:
        session_id, refusal = _arrive(store, rank, launch_info, until)
    if refusal is not None:
        raise InputError(refusal)
    return session_id


def _receive(
    store: Store,
    world_size: int,
    launch_info: LaunchInfo,
    validate: Callable[[Sequence[LaunchInfo]], str | None],
    until: float,
) -> tuple[str, str | None]:
    """Rank 0's part."""
    others = range(1, world_size)
    seen: list[bytes] = []
    session_id, refusal, pause = "", None, _SLEEP
    while True:
        if store.check([_hello(rank) for rank in others]):
            found = store.multi_get([_hello(rank) for rank in others])
            if found != seen:
                seen, session_id, pause = found, secrets.token_hex(8), _SLEEP
                said = [json.loads(each) for each in found]
                refusal = validate([launch_info, *(each["launch_info"] for each in said)])
                answers = [json.dumps([each["nonce"], session_id, refusal]) for each in said]
                store.multi_set([_answer(rank) for rank in others], answers)
            if store.check([_confirmation(session_id, rank) for rank in others]):
                store.set(_end(session_id), "")
                return session_id, refusal
        if time.monotonic() > until:
            keys = {rank: _confirmation(session_id, rank) if session_id else _hello(rank) for rank in others}
            raise JobError(_missing(store, keys, world_size))
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)


def _missing(store: Store, keys: Mapping[int, str], world_size: int) -> str:
    missing = [rank for rank, key in keys.items() if not store.check([key])]
    named = ", ".join(map(str, missing[:_LISTED])) + (" and others" if len(missing) > _LISTED else "")
    return f"{len(missing)} of {world_size} processes did not come (rank {named}): see what they or their hosts print."


def _arrive(store: Store, rank: int, launch_info: LaunchInfo, until: float) -> tuple[str, str | None]:
    """The part of another rank."""
    mine = secrets.token_hex(8)
    store.set(_hello(rank), json.dumps({"nonce": mine, "launch_info": launch_info}))
    confirmed, refusal, pause = "", None, _SLEEP
    while time.monotonic() <= until:
        # First, since rank 0 may already be in its next meeting and answer what it finds of this one.
        if confirmed and store.check([_end(confirmed)]):
            return confirmed, refusal
        if store.check([_answer(rank)]):
            nonce, session_id, validated = json.loads(store.multi_get([_answer(rank)])[0])
            if nonce == mine and session_id != confirmed:
                store.set(_confirmation(session_id, rank), "")
                confirmed, refusal, pause = session_id, validated, _SLEEP
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)
    raise JobError(f"Rank {rank} has waited in vain for rank 0 or others: see what the other processes print.")


def _hello(rank: int) -> str:
    return f"partialfc/meeting/hello/{rank}"


def _answer(rank: int) -> str:
    return f"partialfc/meeting/answer/{rank}"


def _confirmation(session_id: str, rank: int) -> str:
    return f"partialfc/meeting/{session_id}/{rank}"


def _end(session_id: str) -> str:
    return f"partialfc/meeting/{session_id}/end"
