"""How the processes of one start find each other in a store that may still hold what an earlier start left there.

torchrun keeps one store over all its restarts, and PyTorch's groups take the addresses of dead processes from it. So
the processes first agree on a word that no earlier start knew, and keep everything under it. On the way rank 0 compares
what each process says of itself, so that those that do not fit are refused before they wait for each other in vain.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from partialfc.errors import InputError, JobError

Card = Mapping[str, Any]
_SLEEP, _LONGEST_SLEEP = 0.02, 0.5
_LISTED = 8  # ranks named in one message


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...

    def multi_set(self, keys: list[str], values: list[str], /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


def meet(
    store: Store,
    rank: int,
    world_size: int,
    card: Card,
    judge: Callable[[Sequence[Card]], str | None],
    seconds: float,
) -> str:
    """Wait until all ranks of this start are there; a word that they alone have, the same on all.

    Every rank says who it is; rank 0 answers each with the word; each confirms; rank 0 ends the meeting. If what rank 0
    read came from an earlier start, it reads again and answers with another word.

    Args:
        card: what this process says of itself, as JSON holds it.
        judge: called on rank 0 with all cards in rank order; a sentence if they do not fit together.
        seconds: how long to wait.

    Raises:
        InputError: on all ranks alike, with the sentence of `judge`.
        JobError: not all came in time; rank 0 names those that did not.
    """
    until = time.monotonic() + seconds
    if rank == 0:
        word, refusal = _receive(store, world_size, card, judge, until)
    else:
        word, refusal = _arrive(store, rank, card, until)
    if refusal is not None:
        raise InputError(refusal)
    return word


def _receive(
    store: Store, world_size: int, card: Card, judge: Callable[[Sequence[Card]], str | None], until: float
) -> tuple[str, str | None]:
    """Rank 0's part."""
    others = range(1, world_size)
    seen: list[bytes] = []
    word, refusal, pause = "", None, _SLEEP
    while True:
        if store.check([_hello(rank) for rank in others]):
            found = store.multi_get([_hello(rank) for rank in others])
            if found != seen:
                seen, word, pause = found, secrets.token_hex(8), _SLEEP
                said = [json.loads(each) for each in found]
                refusal = judge([card, *(each["card"] for each in said)])
                answers = [json.dumps([each["nonce"], word, refusal]) for each in said]
                store.multi_set([_answer(rank) for rank in others], answers)
            if store.check([_confirmation(word, rank) for rank in others]):
                store.set(_end(word), "")
                return word, refusal
        if time.monotonic() > until:
            keys = {rank: _confirmation(word, rank) if word else _hello(rank) for rank in others}
            raise JobError(_missing(store, keys, world_size))
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)


def _missing(store: Store, keys: Mapping[int, str], world_size: int) -> str:
    missing = [rank for rank, key in keys.items() if not store.check([key])]
    named = ", ".join(map(str, missing[:_LISTED])) + (" and others" if len(missing) > _LISTED else "")
    return f"{len(missing)} of {world_size} processes did not come (rank {named}): see what they or their hosts print."


def _arrive(store: Store, rank: int, card: Card, until: float) -> tuple[str, str | None]:
    """The part of another rank."""
    mine = secrets.token_hex(8)
    store.set(_hello(rank), json.dumps({"nonce": mine, "card": card}))
    confirmed, refusal, pause = "", None, _SLEEP
    while time.monotonic() <= until:
        # First, since rank 0 may already be in its next meeting and answer what it finds of this one.
        if confirmed and store.check([_end(confirmed)]):
            return confirmed, refusal
        if store.check([_answer(rank)]):
            nonce, word, judged = json.loads(store.multi_get([_answer(rank)])[0])
            if nonce == mine and word != confirmed:
                store.set(_confirmation(word, rank), "")
                confirmed, refusal, pause = word, judged, _SLEEP
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)
    raise JobError(f"Rank {rank} has waited in vain for rank 0 or others: see what the other processes print.")


def _hello(rank: int) -> str:
    return f"partialfc/meeting/hello/{rank}"


def _answer(rank: int) -> str:
    return f"partialfc/meeting/answer/{rank}"


def _confirmation(word: str, rank: int) -> str:
    return f"partialfc/meeting/{word}/{rank}"


def _end(word: str) -> str:
    return f"partialfc/meeting/{word}/end"
