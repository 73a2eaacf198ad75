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
Validate = Callable[[Sequence[LaunchInfo]], str | None]
_SLEEP, _LONGEST_SLEEP = 0.02, 0.5
_LISTED = 8  # ranks named in one message


class Store(Protocol):
    """The methods used of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...

    def multi_set(self, keys: list[str], values: list[str], /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


def agree_on_session(
    store: Store, rank: int, world_size: int, launch_info: LaunchInfo, validate: Validate, seconds: float
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
    deadline = time.monotonic() + seconds
    if rank == 0:
        session_id, refusal = _lead(store, world_size, launch_info, validate, deadline)
    else:
        session_id, refusal = _follow(store, rank, launch_info, deadline)
    if refusal is not None:
        raise InputError(refusal)
    return session_id


def _lead(
    store: Store, world_size: int, launch_info: LaunchInfo, validate: Validate, deadline: float
) -> tuple[str, str | None]:
    """The part of rank 0."""
    others = range(1, world_size)
    hellos = [_key("hello", rank) for rank in others]
    answered: list[bytes] = []
    session_id, refusal, pause = "", None, _SLEEP
    while True:
        if store.check(hellos):
            received = store.multi_get(hellos)
            if received != answered:
                answered, session_id, pause = received, secrets.token_hex(8), _SLEEP
                messages = [json.loads(message) for message in received]
                refusal = validate([launch_info, *(message["launch_info"] for message in messages)])
                answers = [json.dumps([message["nonce"], session_id, refusal]) for message in messages]
                store.multi_set([_key("answer", rank) for rank in others], answers)
            if store.check([_key(session_id, rank) for rank in others]):
                store.set(_key(session_id, "end"), "")
                return session_id, refusal
        if time.monotonic() > deadline:
            missing = [rank for rank in others if not store.check([_key(session_id or "hello", rank)])]
            named = ", ".join(map(str, missing[:_LISTED])) + (" and others" if len(missing) > _LISTED else "")
            raise JobError(
                f"{len(missing)} of {world_size} processes did not come (rank {named}): see what they or their hosts "
                "print."
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)


def _follow(store: Store, rank: int, launch_info: LaunchInfo, deadline: float) -> tuple[str, str | None]:
    """The part of another rank."""
    own_nonce = secrets.token_hex(8)
    store.set(_key("hello", rank), json.dumps({"nonce": own_nonce, "launch_info": launch_info}))
    confirmed, refusal, pause = "", None, _SLEEP
    while time.monotonic() <= deadline:
        # First, since rank 0 may already be in its next rendezvous and answer what it finds of this one.
        if confirmed and store.check([_key(confirmed, "end")]):
            return confirmed, refusal
        if store.check([_key("answer", rank)]):
            nonce, session_id, validated = json.loads(store.multi_get([_key("answer", rank)])[0])
            if nonce == own_nonce and session_id != confirmed:
                store.set(_key(session_id, rank), "")
                confirmed, refusal, pause = session_id, validated, _SLEEP
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)
    raise JobError(f"Rank {rank} has not reached rank 0 or others in time: see what the other processes print.")


def _key(part: str, name: int | str) -> str:
    """The key of a rank's message, or of a session's confirmations and end."""
    return f"partialfc/rendezvous/{part}/{name}"
