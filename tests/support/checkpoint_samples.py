"""Checkpoints whose contents follow from their step, and ranks that are threads: a group is a place to meet."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from partialfc.core.errors import InputError, JobError
from partialfc.distributed.collectives import Shard, split_evenly
from partialfc.training.checkpoint import read as checkpoint_reading
from partialfc.training.checkpoint import write as checkpoint
from partialfc.training.checkpoint.write import (
    Checkpoint,
    RowTensors,
    load_latest,
    save_checkpoint,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def fill(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of any dtype that tell their seed."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values > 0 if dtype == torch.bool else (values * 20).to(dtype)


def head_rows(total: int, seed: int = 0) -> dict[str, Tensor]:
    return {
        "centers": fill((total, 6), torch.bfloat16, seed),
        "momentum_buffer": fill((total, 6), torch.float32, seed + 1),
        "step": fill((total,), torch.int64, seed + 2),
    }


def save(root: Path, step: int, total: int = 37, **options: Any) -> Path:
    """One process's checkpoint whose contents follow from the step, in blocks of 256 bytes."""
    arguments: dict[str, Any] = {
        "tensors": {"backbone": {"conv": fill((9, 9), torch.float32, step), "bias": fill((9,), torch.float32, step)}},
        "rows": RowTensors(Shard.of(total), head_rows(total, step)),
        "state": {"epoch": step // 10, "best_score": 1e-5, "name": "é"},
        "documents": {"identities": ["Ada", "Grace", "Søren"] * 30},
        "block_bytes": 256,
    }
    return save_checkpoint(root, step, **{**arguments, **options})


def assert_holds(opened: Checkpoint | None, step: int, total: int = 37) -> None:
    """It is the checkpoint of `step` as `save` writes it, bit for bit."""
    assert opened is not None
    assert opened.step == step
    opened.verify()
    for name, rows in head_rows(total, step).items():
        assert torch.equal(opened.rows(name, 0, total), rows)
    assert torch.equal(opened.tensors("backbone")["conv"], fill((9, 9), torch.float32, step))
    assert opened.state == {"epoch": step // 10, "best_score": 1e-5, "name": "é"}
    assert opened.document("identities") == ["Ada", "Grace", "Søren"] * 30


def read_all(opened: Checkpoint) -> Checkpoint:
    opened.verify()
    return opened


def newest(root: Path, **options: Any) -> Checkpoint | None:
    return load_latest(root, read_all, **options)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


class Meeting:
    """Where the threads that play the ranks exchange values."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size


class Seat:
    """One rank's place at a meeting; it stands where the process group would."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank


class SeatedShard(Shard):
    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def world_size(self) -> int:
        return self.group.meeting.size


def gather_json(value: Any, *, group: Seat) -> list[Any]:
    """As the real one: every rank's value, in rank order, on every rank."""
    group.meeting.values[group.rank] = json.dumps(value)
    group.meeting.barrier.wait()
    values = [json.loads(each) for each in group.meeting.values]
    group.meeting.barrier.wait()
    return values


def on_ranks(world_size: int, work: Callable[[Seat], Any]) -> list[Any]:
    """What `work` returns, or the exception it raises, on each rank."""
    meeting = Meeting(world_size)

    def guarded(rank: int) -> Any:
        try:
            return work(Seat(meeting, rank))
        except BaseException as error:
            if not isinstance(error, InputError | JobError):
                meeting.barrier.abort()
            return error

    with (
        patch.object(checkpoint, "gather_json", gather_json),
        patch.object(checkpoint_reading, "gather_json", gather_json),
        patch.object(checkpoint_reading, "rank_of", lambda group: group.rank),
        ThreadPoolExecutor(world_size) as pool,
    ):
        return list(pool.map(guarded, range(world_size)))


def save_on(seat: Seat, root: Path, step: int, whole: dict[str, Tensor], **options: Any) -> Path:
    """Every rank brings its share of the rows of `whole`, and a backbone and state that only rank 0's may count."""
    total = len(whole["centers"])
    start, stop = split_evenly(total, seat.meeting.size, seat.rank)
    rows = RowTensors(SeatedShard(start, stop, total, seat), {name: rows[start:stop] for name, rows in whole.items()})
    tensors = {"backbone": {"conv": torch.full((3, 3), float(seat.rank))}}
    arguments: dict[str, Any] = {"tensors": tensors, "rows": rows, "state": {"rank": seat.rank}, "block_bytes": 64}
    return save_checkpoint(root, step, **{**arguments, **options})
