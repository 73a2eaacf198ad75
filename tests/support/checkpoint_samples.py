"""Checkpoints whose contents follow from their step, and ranks that are threads."""

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

from partialfc.checkpoint import read, write
from partialfc.checkpoint.read import Checkpoint, load_latest
from partialfc.checkpoint.write import Snapshot, save_checkpoint
from partialfc.core.errors import InputError, JobError
from partialfc.distributed.collectives import Shard, split_evenly

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


def save(root: Path, step: int, total: int = 37, *, keep: int = 3, block_bytes: int = 256, **contents: Any) -> Path:
    """One process's checkpoint whose contents follow from the step."""
    usual: dict[str, Any] = {
        "tensors": {"backbone": {"conv": fill((9, 9), torch.float32, step), "bias": fill((9,), torch.float32, step)}},
        "shard": Shard.of(total),
        "rows": head_rows(total, step),
        "state": {"epoch": step // 10, "best_score": 1e-5, "name": "é"},
        "documents": {"identities": ["Ada", "Grace", "Søren"] * 30},
    }
    return save_checkpoint(root, Snapshot(step, **{**usual, **contents}), keep=keep, block_bytes=block_bytes)


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


class ThreadGroup:
    """Exchanges values between the threads that play the ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size


class ThreadRank:
    """One rank of a thread group; it takes the place of the process group."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group, self.rank = group, rank


class ThreadShard(Shard):
    group: Any

    @property
    def rank(self) -> int:
        return int(self.group.rank)

    @property
    def world_size(self) -> int:
        return int(self.group.group.size)

    @staticmethod
    def on(rank: ThreadRank, total: int) -> ThreadShard:
        """The even share of a rank."""
        group: Any = rank
        return ThreadShard(*split_evenly(total, rank.group.size, rank.rank), total, group)


_this_thread = threading.local()


def gather_json(value: Any, *, group: ThreadRank | None = None) -> list[Any]:
    """As the real one: every rank's value, in rank order, on every rank."""
    own = group or _this_thread.rank
    own.group.values[own.rank] = json.dumps(value)
    own.group.barrier.wait()
    values = [json.loads(encoded) for encoded in own.group.values]
    own.group.barrier.wait()
    return values


def on_ranks(world_size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """The result of `work`, or the exception that it raises, on each rank."""
    group = ThreadGroup(world_size)

    def guarded(rank: int) -> Any:
        _this_thread.rank = ThreadRank(group, rank)
        try:
            return work(_this_thread.rank)
        except BaseException as error:
            if not isinstance(error, InputError | JobError):
                group.barrier.abort()
            return error

    with (
        patch.object(write, "gather_json", gather_json),
        patch.object(read, "gather_json", gather_json),
        patch.object(read, "rank_of", lambda: _this_thread.rank.rank),
        ThreadPoolExecutor(world_size) as pool,
    ):
        return list(pool.map(guarded, range(world_size)))


def save_on(rank: ThreadRank, root: Path, step: int, whole: dict[str, Tensor], **contents: Any) -> Path:
    """Every rank saves its share of the rows of `whole`, and a backbone and state of which only rank 0's may count."""
    shard = ThreadShard.on(rank, len(whole["centers"]))
    rows = {name: rows[shard.start : shard.stop] for name, rows in whole.items()}
    tensors = {"backbone": {"conv": torch.full((3, 3), float(rank.rank))}}
    usual: dict[str, Any] = {"tensors": tensors, "shard": shard, "rows": rows, "state": {"rank": rank.rank}}
    return save_checkpoint(root, Snapshot(step, **{**usual, **contents}), block_bytes=64)
