"""Checkpoints return what was saved, bit for bit, at any world size, and read no more than they must."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import DTYPES, assert_holds, fill, flip, head_rows, newest, on_ranks, save, save_on
from distributed_workers import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from partialfc.checkpoint import blocks
from partialfc.checkpoint.read import Checkpoint, load_latest
from partialfc.checkpoint.write import Snapshot, save_checkpoint
from partialfc.distributed.collectives import Shard, all_reduce, split_evenly


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 37])
def test_any_world_size_reads_what_any_other_wrote(tmp_path: Path, saved_at: int, total: int) -> None:
    whole = head_rows(total)
    paths = on_ranks(saved_at, lambda rank: save_on(rank, tmp_path, 5, whole))
    assert paths == [tmp_path / "step-00000005"] * saved_at
    opened = Checkpoint(paths[0])
    opened.verify()
    assert opened.row_shapes == {name: tuple(rows.shape) for name, rows in whole.items()}
    for loaded_at in (1, 2, 3, 4):
        for rank in range(loaded_at):
            start, stop = split_evenly(total, loaded_at, rank)
            for name, rows in whole.items():
                assert torch.equal(opened.rows(name, start, stop), rows[start:stop])
                assert opened.rows(name, start, stop).dtype == rows.dtype


def test_what_ranks_share_is_rank_0s(tmp_path: Path) -> None:
    on_ranks(3, lambda rank: save_on(rank, tmp_path, 5, head_rows(7)))
    opened = newest(tmp_path)
    assert opened is not None
    assert opened.state == {"rank": 0}
    assert torch.equal(opened.tensors("backbone")["conv"], torch.zeros(3, 3))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), total=st.integers(1, 90), block_bytes=st.integers(1, 300))
def test_any_rows_with_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, total: int, block_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    save(root, 1, total, block_bytes=block_bytes)
    opened = Checkpoint(root / "step-00000001")
    for name, rows in head_rows(total, 1).items():
        start = data.draw(st.integers(0, total))
        stop = data.draw(st.integers(start, total))
        assert torch.equal(opened.rows(name, start, stop), rows[start:stop])
        strided = torch.empty((2 * (stop - start), *rows.shape[1:]), dtype=rows.dtype)[::2]
        opened.read_rows(name, start, strided)
        assert torch.equal(strided, rows[start:stop])


def test_strided_rows_larger_than_a_staging_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    target = torch.zeros(6, 30).t()
    Checkpoint(tmp_path / "step-00000001").read_rows("momentum_buffer", 4, target)
    assert torch.equal(target, head_rows(37, 1)["momentum_buffer"][4:34])


def test_every_dtype_stride_and_shape_returns_bit_for_bit(tmp_path: Path) -> None:
    tensors = {str(dtype): fill((3, 5), dtype, 1) for dtype in DTYPES}
    base = fill((4, 6), torch.float32, 2)
    tensors |= {
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "columns": base[:, 1:4],
        "shared": base[1:],
        "expanded": base[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(base),
        "channels_last": fill((2, 3, 4, 5), torch.bfloat16, 3).to(memory_format=torch.channels_last),
        "bits": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    folder = save(tmp_path, 1, tensors={"backbone": tensors})
    opened = Checkpoint(folder)
    for reader in (opened.tensors("backbone"), load_file(folder / "backbone.safetensors")):
        assert reader.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (reader[name].dtype, reader[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                reader[name].reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8)
            )
    assert opened.tensors("ema") == {}
    assert opened.document("notes") is None


def test_the_file_of_a_rank_says_its_rows(tmp_path: Path) -> None:
    whole = head_rows(7)
    on_ranks(3, lambda rank: save_on(rank, tmp_path, 5, whole))
    encoded = (tmp_path / "step-00000005" / "head-00001-of-00003.safetensors").read_bytes()
    header = json.loads(encoded[8 : 8 + int.from_bytes(encoded[:8], "little")])
    assert header["__metadata__"] == {"start": "2", "stop": "4", "total": "7"}


def hashed_blocks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The blocks that are read and verified from here on."""
    hashed: list[bytes] = []
    sha256 = hashlib.sha256

    def recorded(block: bytes) -> Any:
        hashed.append(block)
        return sha256(block)

    monkeypatch.setattr(hashlib, "sha256", recorded)
    return hashed


def test_only_the_blocks_of_the_wanted_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1, total=4000)
    file = folder / "head-00000-of-00001.safetensors"
    opened = Checkpoint(folder)
    encoded = file.read_bytes()
    data = 8 + int.from_bytes(encoded[:8], "little")
    place = data + json.loads(encoded[8:data])["momentum_buffer"]["data_offsets"][0]
    start, stop = place + 1000 * 24, place + 1100 * 24
    expected = {*range(-(-data // 256)), *range(start // 256, -(-stop // 256))}
    for block in set(range(-(-file.stat().st_size // 256))) - expected:
        flip(file, 256 * block)
    hashed = hashed_blocks(monkeypatch)
    rows = opened.rows("momentum_buffer", 1000, 1100)
    assert torch.equal(rows, head_rows(4000, 1)["momentum_buffer"][1000:1100])
    assert set(hashed) == {encoded[256 * block : 256 * (block + 1)] for block in expected}
    assert len(hashed) <= len(expected) + 1


def test_neighbouring_tensors_share_one_read_of_their_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{number:03}": torch.full((2,), number) for number in range(100)}
    folder = save(tmp_path, 1, tensors={"backbone": tensors}, block_bytes=1 << 20)
    opened = Checkpoint(folder)
    hashed = hashed_blocks(monkeypatch)
    assert len(opened.tensors("backbone")) == 100
    assert len(hashed) == 1


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ShortReads(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            return super().readinto(memoryview(buffer)[:100])

    save(tmp_path, 1, block_bytes=1 << 20)
    monkeypatch.setattr(Path, "open", lambda path, mode, **_: io.BufferedReader(ShortReads(path)))
    assert_holds(newest(tmp_path), 1)


def test_wrong_rows_and_targets_are_mistakes(tmp_path: Path) -> None:
    opened = Checkpoint(save(tmp_path, 1))
    for start, stop in ((-1, 3), (30, 38)):
        with pytest.raises(ValueError, match="do not exist: it has 37"):
            opened.rows("centers", start, stop)
    with pytest.raises(ValueError, match="cannot hold rows of it"):
        opened.read_rows("centers", 0, torch.zeros(3, 6))
    with pytest.raises(ValueError, match="cannot hold rows of it"):
        opened.read_rows("centers", 0, torch.zeros(3, 7, dtype=torch.bfloat16))


def save_and_load_on_a_rank(rank: int, folder: Path) -> None:
    root, whole, shard = folder / "checkpoints", head_rows(20), Shard.of(20)
    tensors = {"backbone": {"conv": torch.full((3, 3), float(rank))}}
    for step in (1, 2):
        rows = {name: rows[shard.start : shard.stop] for name, rows in whole.items()}
        save_checkpoint(root, Snapshot(step, tensors, shard, rows, {"step": step}), block_bytes=64)
    if rank == 0:
        flip(root / "step-00000002" / "head-00002-of-00003.safetensors", -1)
    all_reduce(torch.zeros(1))  # every rank waits for the damage
    read = load_latest(root, lambda opened: (opened.step, opened.rows("centers", shard.start, shard.stop)))
    assert read is not None
    assert read[0] == 1
    assert torch.equal(read[1], whole["centers"][shard.start : shard.stop])


@pytest.mark.multiprocess
def test_three_processes_save_and_agree_and_one_reads(tmp_path: Path) -> None:
    run_ranks(3, save_and_load_on_a_rank, tmp_path)
    refused: list[str] = []
    opened = newest(tmp_path / "checkpoints", warn=refused.append)
    assert opened is not None
    assert opened.state == {"step": 1}
    assert len(refused) == 1
    for name, rows in head_rows(20).items():
        assert torch.equal(opened.rows(name, 0, 20), rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_pass_through_the_host_in_pieces(tmp_path: Path) -> None:
    rows = {name: tensor.cuda() for name, tensor in head_rows(37).items()}
    save(tmp_path, 1, rows=rows)
    opened = newest(tmp_path)
    assert opened is not None
    for name, tensor in rows.items():
        target = torch.empty_like(tensor)
        opened.read_rows(name, 0, target)
        assert torch.equal(target, tensor)
