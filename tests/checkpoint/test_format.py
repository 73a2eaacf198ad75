"""Format version 1: a checkpoint written by version 0.1 is read, and is written again byte for byte."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from checkpoint_samples import ThreadRank, ThreadShard, names, on_ranks
from small_runs import FIXTURES
from torch import Tensor

from partialfc.checkpoint.read import Checkpoint
from partialfc.checkpoint.write import Snapshot, save_checkpoint

STORED = FIXTURES / "checkpoint" / "step-00000005"


def numbers(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> Tensor:
    values = torch.arange(start, start + prod(shape)).reshape(shape).to(dtype)
    return values / 8 if dtype.is_floating_point else values


ROWS = {
    "centers": numbers(7, 4, dtype=torch.bfloat16),
    "exp_avg": numbers(7, 4, start=100),
    "step": numbers(7, dtype=torch.int64, start=5),
}
TENSORS = {
    "backbone": {
        "conv.weight": numbers(3, 2, 2),
        "bn.count": torch.tensor(9),
        "mask": torch.tensor([True, False]),
    },
    "backbone-optimizer": {"conv.weight.momentum_buffer": numbers(3, 2, 2, start=50)},
}
STATE = {"head_step": 5, "best_score": 0.1, "config": {"seed": 0, "name": "é"}, "margin_state": {}}
NAMES = ["Ada", "Grace", "Søren"]


def test_a_stored_checkpoint_is_read() -> None:
    checkpoint = Checkpoint(STORED)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.state, checkpoint.document("identities")) == (5, STATE, NAMES)
    assert checkpoint.row_shapes == {name: tuple(rows.shape) for name, rows in ROWS.items()}
    for name, rows in ROWS.items():
        assert torch.equal(checkpoint.rows(name, 1, 6), rows[1:6])
    for group, tensors in TENSORS.items():
        read = checkpoint.tensors(group)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_the_same_state_is_written_byte_for_byte(tmp_path: Path) -> None:
    def save(rank: ThreadRank) -> None:
        shard = ThreadShard.on(rank, 7)
        rows = {name: rows[shard.start : shard.stop] for name, rows in ROWS.items()}
        save_checkpoint(tmp_path, Snapshot(5, TENSORS, shard, rows, STATE, {"identities": NAMES}), block_bytes=64)

    assert on_ranks(2, save) == [None, None]
    assert names(tmp_path / STORED.name) == names(STORED)
    for path in STORED.iterdir():
        assert (tmp_path / STORED.name / path.name).read_bytes() == path.read_bytes(), path.name
