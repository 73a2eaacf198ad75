"""Checkpoints: bit-identical at any world size, and never a damaged or half-written one."""

from __future__ import annotations

from pathlib import Path

import torch

from partialfc.distributed import Shard
from partialfc.training.checkpoint import RowTensors, load_latest, save_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    centers = torch.randn(37, 5)
    rows = RowTensors(Shard.of(37), {"centers": centers, "momentum_buffer": torch.randn(37, 5)})
    backbone = {"conv.weight": torch.randn(3, 4).to(torch.bfloat16), "count": torch.tensor(7)}
    state = {"epoch": 3, "best_score": 0.1, "identities": None}
    folder = save_checkpoint(tmp_path, 12, tensors={"backbone": backbone}, rows=rows, state=state)
    assert folder.name == "step-00000012"

    checkpoint = load_latest(tmp_path, lambda opened: opened)
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert checkpoint.state == state
    torch.testing.assert_close(checkpoint.rows("centers", 3, 30), centers[3:30], rtol=0, atol=0)
    for name, tensor in checkpoint.tensors("backbone").items():
        assert tensor.dtype == backbone[name].dtype
        assert torch.equal(tensor, backbone[name])
