"""Checkpoints: bit-identical at any world size, and never a damaged or half-written one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from distributed_workers import run_ranks
from partialfc.distributed import Shard, barrier, split_evenly
from partialfc.errors import InputError, JobError
from partialfc.training import checkpoint, checkpoint_io, checkpoint_reading
from partialfc.training.checkpoint import (
    Checkpoint,
    CheckpointNotWritten,
    DamagedCheckpoint,
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
        "row_step": fill((total,), torch.int64, seed + 2),
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


# Ranks as threads: a group is a place to meet, and a rank's view of it takes the place of a process group.


class Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size


class Seat:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank


class SeatedShard(Shard):
    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def world_size(self) -> int:
        return self.group.meeting.size


def gather_json(value: Any, device: torch.device | None = None, group: Seat | None = None) -> list[Any]:
    if group is None:
        return [value]
    group.meeting.values[group.rank] = json.dumps(value)
    group.meeting.barrier.wait()
    values = [json.loads(each) for each in group.meeting.values]
    group.meeting.barrier.wait()
    return values


@pytest.fixture
def seats(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    monkeypatch.setattr(checkpoint, "gather_json", gather_json)
    monkeypatch.setattr(checkpoint_reading, "gather_json", gather_json)
    monkeypatch.setattr(checkpoint_reading, "rank_of", lambda group: 0 if group is None else group.rank)
    return on_ranks


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

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(guarded, range(world_size)))


def save_on(seat: Seat, root: Path, step: int, whole: dict[str, Tensor], **options: Any) -> Path:
    """Every rank brings its share of the rows of `whole`, and a backbone and state that only rank 0's may count."""
    total = len(whole["centers"])
    start, stop = split_evenly(total, seat.meeting.size, seat.rank)
    rows = RowTensors(SeatedShard(start, stop, total, seat), {name: rows[start:stop] for name, rows in whole.items()})
    tensors = {"backbone": {"conv": torch.full((3, 3), float(seat.rank))}}
    arguments: dict[str, Any] = {"tensors": tensors, "rows": rows, "state": {"rank": seat.rank}, "block_bytes": 64}
    return save_checkpoint(root, step, **{**arguments, **options})


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 37])
def test_any_world_size_reads_what_any_other_wrote(seats: Any, tmp_path: Path, saved_at: int, total: int) -> None:
    whole = head_rows(total)
    paths = seats(saved_at, lambda seat: save_on(seat, tmp_path, 5, whole))
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


def test_what_ranks_share_is_rank_0s(seats: Any, tmp_path: Path) -> None:
    seats(3, lambda seat: save_on(seat, tmp_path, 5, head_rows(7)))
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
    monkeypatch.setattr(checkpoint_io, "BLOCK_BYTES", 100)
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


def test_the_file_of_a_rank_says_its_rows(seats: Any, tmp_path: Path) -> None:
    whole = head_rows(7)
    seats(3, lambda seat: save_on(seat, tmp_path, 5, whole))
    encoded = (tmp_path / "step-00000005" / "head-00001-of-00003.safetensors").read_bytes()
    header = json.loads(encoded[8 : 8 + int.from_bytes(encoded[:8], "little")])
    assert header["__metadata__"] == {"start": "2", "stop": "4", "total": "7"}


# Damage


@pytest.mark.parametrize("name", ["backbone.safetensors", "head-00000-of-00001.safetensors", "identities.json"])
def test_a_flipped_bit_in_any_block_is_found_by_name(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1) / name
    whole = path.read_bytes()
    blocks = -(-len(whole) // 256)
    assert blocks > 1
    for number in range(blocks):
        for position in {256 * number, min(256 * number + 255, len(whole) - 1)}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match=f"{name} differs .* block {number} .*use the step before"):
                Checkpoint(path.parent).verify()
    path.write_bytes(whole)
    Checkpoint(path.parent).verify()


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_or_means_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    meant = json.loads(whole)
    found = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            Checkpoint(folder)
            assert json.loads(damaged) == meant  # such as 1e-05 and 1E-05
        except DamagedCheckpoint:
            found += 1
    assert found > 0.99 * len(whole)


@pytest.mark.parametrize("change", ["a byte less", "half", "empty", "a byte more", "gone"])
@pytest.mark.parametrize(
    "name", ["backbone.safetensors", "head-00000-of-00001.safetensors", "identities.json", "manifest.json"]
)
def test_a_file_of_another_length_is_refused_and_the_step_before_used(tmp_path: Path, name: str, change: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    path.unlink()
    if change != "gone":
        lengths = {
            "a byte less": whole[:-1],
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "a byte more": whole + b"x",
        }
        path.write_bytes(lengths[change])
    refused: list[str] = []
    assert_holds(load_latest(tmp_path, lambda opened: opened, warn=refused.append), 1)
    assert len(refused) == 1
    assert name in refused[0]
    assert "step-00000002" in refused[0]


def test_damage_found_while_reading_falls_back_too(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step-00000002" / "head-00000-of-00001.safetensors", -1)
    refused: list[str] = []
    assert_holds(newest(tmp_path, warn=refused.append), 1)
    assert len(refused) == 1
    # What does not need the damaged block is not refused.
    assert load_latest(tmp_path, lambda opened: (opened.tensors("backbone"), opened.step)[1]) == 2


def test_a_file_that_shrinks_after_opening_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    opened = Checkpoint(folder)
    os.truncate(folder / "head-00000-of-00001.safetensors", 600)
    with pytest.raises(DamagedCheckpoint, match="differs from what was written"):
        opened.rows("centers", 0, 37)
    (folder / "backbone.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be read at bytes"):
        opened.tensors("backbone")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


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
    seen: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        seen.append(offset // 256)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    rows = opened.rows("momentum_buffer", 1000, 1100)
    assert torch.equal(rows, head_rows(4000, 1)["momentum_buffer"][1000:1100])
    assert set(seen) == expected
    assert len(seen) <= len(expected) + 1


def test_neighbouring_tensors_share_one_read_of_their_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{number:03}": torch.full((2,), number) for number in range(100)}
    folder = save(tmp_path, 1, tensors={"backbone": tensors}, block_bytes=1 << 20)
    opened = Checkpoint(folder)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or pread(*arguments))
    assert len(opened.tensors("backbone")) == 100
    assert len(reads) == 1


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 100), offset))
    assert_holds(newest(tmp_path), 1)


def test_a_whole_manifest_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    rewrite(folder, lambda body: body["rows"]["centers"].update(dtype="F32"))
    with pytest.raises(DamagedCheckpoint, match="against its manifest"):
        Checkpoint(folder).rows("centers", 0, 3)
    rewrite(folder, lambda body: body["rows"].update(weights=body["rows"]["centers"]))
    with pytest.raises(DamagedCheckpoint, match="holds no tensor weights"):
        Checkpoint(folder).rows("weights", 0, 3)
    rewrite(folder, lambda body: body["rows"]["centers"]["parts"][0].update(start=1))
    with pytest.raises(DamagedCheckpoint, match="row 0 of centers is in no file, or in two"):
        Checkpoint(folder)
    rewrite(folder, lambda body: body["rows"]["centers"].update(parts=[]))
    with pytest.raises(DamagedCheckpoint, match="the files hold 0 rows of centers, not 37"):
        Checkpoint(folder)
    rewrite(folder, lambda body: body.pop("rows"))
    with pytest.raises(DamagedCheckpoint, match="is not what was written"):
        Checkpoint(folder)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, block_bytes=1 << 20)
    path = folder / "backbone.safetensors"
    good = path.read_bytes()
    bad_header = json.dumps({"conv": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    for content in (
        b"1234",
        len(good).to_bytes(8, "little") + good[8:],
        (2).to_bytes(8, "little") + b"[]",
        len(bad_header).to_bytes(8, "little") + bad_header + bytes(8),
    ):
        path.write_bytes(content)
        rewrite(folder, lambda body, path=path: body["files"].update({path.name: describe(path)}))
        with pytest.raises(DamagedCheckpoint, match=r"backbone\.safetensors"):
            Checkpoint(folder).tensors("backbone")


def describe(path: Path) -> dict[str, Any]:
    copy = path.with_suffix(".copy")
    record = checkpoint_io.write_file(copy, [path.read_bytes()], 1 << 20)
    copy.unlink()
    return {"size": record.size, "sha256": record.sha256}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and sign it anew, starting each time from the one that was saved."""
    original = folder / "manifest.original"
    if not original.exists():
        shutil.copy(folder / "manifest.json", original)
    body = json.loads(original.read_text())
    change(body)
    body.pop("sha256")
    body["sha256"] = digest(body)
    (folder / "manifest.json").write_text(json.dumps(body))


def digest(body: dict[str, Any]) -> str:
    """As docs/checkpoint-format.md describes it."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_another_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    rewrite(save(tmp_path, 2), lambda body: body.update(version=2))
    with pytest.raises(InputError, match="format version 2, and this partialfc reads version 1"):
        newest(tmp_path)


def test_nothing_and_nothing_whole(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert newest(tmp_path) is None
    (save(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"All checkpoints in .* are damaged"):
        newest(tmp_path, warn=lambda text: None)


def test_a_refusal_is_logged_unless_a_warn_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "backbone.safetensors", -1)
    assert_holds(newest(tmp_path), 1)
    assert "step-00000002/backbone.safetensors differs" in caplog.text


# Writing


def test_keep(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    save(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["step-00000050"]
    assert_holds(newest(tmp_path), 50)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000020" / "backbone.safetensors").unlink()
    save(tmp_path, 40, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030", "step-00000040"]
    save(tmp_path, 50, keep=3)
    assert names(tmp_path) == ["step-00000030", "step-00000040", "step-00000050"]


def test_steps_past_the_saved_one_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_a_step_saved_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    flip(save(tmp_path, 10) / "backbone.safetensors", -1)
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]
    assert_holds(newest(tmp_path), 10)


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    for name in (".step-00000003.0123abcd.writing", ".step-00000002.0123abcd.old"):
        shutil.copytree(save(tmp_path / "other", 3), tmp_path / name)
    (tmp_path / ".mine").mkdir()
    shutil.rmtree(tmp_path / "other")
    save(tmp_path, 4)
    assert names(tmp_path) == [".mine", "step-00000004"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_old_checkpoints_that_cannot_be_deleted_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def refuse_old(source: Path, target: Path) -> None:
        if target.suffix == ".old":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_old)
    assert_holds(Checkpoint(save(tmp_path, 2, keep=1)), 2)
    assert "could not be deleted" in caplog.text


class Faults:
    """Counts what a save does to the file system, and fails at one of these moments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
        self.error = error
        self.countdown = 0
        for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"), (Path, "open")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))
        monkeypatch.setattr(hashlib, "sha256", self.wrap(hashlib.sha256))  # once for each block written

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.countdown -= 1
            if self.countdown == 0:
                raise self.error()
            return call(*arguments, **options)

        return counted


class Killed(BaseException):
    """No handler of the package catches it, as none runs in a process that is killed."""


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["the next step", "the same step again"])
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    faults = Faults(monkeypatch, Killed)
    outcomes = set()
    for moment in range(1, 1000):
        root = tmp_path / str(moment)
        save(root, steps[0], keep=1)
        faults.countdown = moment
        try:
            save(root, steps[1], keep=1)
            killed = False
        except Killed:
            killed = True
        faults.countdown = 0
        opened = newest(root)
        assert opened is not None
        assert_holds(opened, opened.step)
        outcomes.add((killed, opened.step))
        save(root, 3, keep=1)
        assert names(root) == ["step-00000003"]
        if not killed:
            break
    assert outcomes == {(True, steps[0]), (True, steps[1]), (False, steps[1])}
    assert moment > 30


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["the next step", "the same step again"])
def test_a_full_disk_at_any_moment_is_reported_and_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    faults = Faults(monkeypatch, lambda: OSError(errno.ENOSPC, "No space left on device"))
    messages = set()
    for moment in range(1, 1000):
        root = tmp_path / str(moment)
        save(root, steps[0])
        faults.countdown = moment
        try:
            save(root, steps[1])
            failed = False
        except CheckpointNotWritten as error:
            failed = True
            messages.add(str(error).split(" (")[1])
        done = faults.countdown > 0
        faults.countdown = 0
        opened = newest(root)
        assert_holds(opened, steps[0] if failed and opened.step == steps[0] else steps[1])
        assert not [name for name in names(root) if name.endswith(".writing")]
        if done:
            break
    assert moment > 30
    assert messages == {"rank 0: [Errno 28] No space left on device)"}


def test_a_failure_on_one_rank_is_the_same_error_on_all(seats: Any, tmp_path: Path) -> None:
    whole = head_rows(11)
    seats(3, lambda seat: save_on(seat, tmp_path, 1, whole))

    def broken(seat: Seat) -> Path:
        if seat.rank == 1:
            return save_on(seat, tmp_path, 2, {**whole, "centers": whole["centers"].to(torch.complex64)})
        return save_on(seat, tmp_path, 2, whole)

    outcomes = seats(3, broken)
    assert [type(outcome) for outcome in outcomes] == [CheckpointNotWritten] * 3
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert (
        "could not write a checkpoint (rank 1: ValueError: a checkpoint cannot hold tensors of torch.complex64"
        in str(outcomes[0])
    )
    assert names(tmp_path) == ["step-00000001"]


def test_ranks_that_disagree_about_the_rows_are_refused(seats: Any, tmp_path: Path) -> None:
    whole = head_rows(11)

    def save_some(seat: Seat) -> Path:
        return save_on(seat, tmp_path, 2, whole if seat.rank else {"centers": whole["centers"]})

    outcomes = seats(2, save_some)
    assert all("do not agree on the row tensors" in str(outcome) for outcome in outcomes)
    assert names(tmp_path) == []


def test_storage_that_the_ranks_do_not_share_is_refused(seats: Any, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    outcomes = seats(2, lambda seat: save_on(seat, tmp_path / str(seat.rank), 2, head_rows(11)))
    assert all("head-00001-of-00002.safetensors cannot be read" in str(outcome) for outcome in outcomes)


def test_ranks_agree_on_the_checkpoint_that_all_can_read(seats: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        seats(3, lambda seat, step=step: save_on(seat, tmp_path, step, head_rows(30, step)))
    flip(tmp_path / "step-00000003" / "head-00002-of-00003.safetensors", -1)
    refused: list[tuple[int, str]] = []

    def load(seat: Seat) -> Any:
        start, stop = split_evenly(30, 3, seat.rank)
        return load_latest(
            tmp_path,
            lambda opened: (opened.step, {name: opened.rows(name, start, stop) for name in opened.row_shapes}),
            group=seat,
            warn=lambda text: refused.append((seat.rank, text)),
        )

    for rank, (step, rows) in enumerate(seats(3, load)):
        start, stop = split_evenly(30, 3, rank)
        assert step == 2
        assert all(torch.equal(rows[name], whole[start:stop]) for name, whole in head_rows(30, 2).items())
    assert [rank for rank, _ in refused] == [0]
    assert "step-00000003/head-00002-of-00003.safetensors" in refused[0][1]


def test_ranks_that_see_different_checkpoints_are_told(seats: Any, tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path / str(rank), 7, state={"rank": rank})
    outcomes = seats(2, lambda seat: load_latest(tmp_path / str(seat.rank), lambda opened: opened, group=seat))
    assert all("The ranks see different checkpoints" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"state": {"a": {"b": [1.0, float("nan")]}}}, r"state\.a\.b\[1\] is nan, which JSON cannot hold"),
        ({"state": {"optimizer": {3: "x"}}}, "state.optimizer has the key 3, which is no string"),
        ({"tensors": {"head-1": {}}}, "'head-1' cannot name a file"),
        ({"documents": {"manifest": {}}}, "'manifest' cannot name a file"),
        ({"documents": {"../x": {}}}, "cannot name a file"),
        ({"rows": RowTensors(Shard.of(3), {"centers": torch.zeros(4, 2)})}, r"shape \(4, 2\), not 3 rows"),
        ({"rows": RowTensors(Shard.of(1), {"centers": torch.tensor(1.0)})}, "not 1 rows"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointNotWritten, match=reason):
        save(tmp_path, 1, **options)
    assert newest(tmp_path) is None


def test_keep_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 1, keep=0)


def test_wrong_rows_and_targets_are_mistakes(tmp_path: Path) -> None:
    opened = Checkpoint(save(tmp_path, 1))
    for start, stop in ((-1, 3), (30, 38)):
        with pytest.raises(ValueError, match="do not exist: it has 37"):
            opened.rows("centers", start, stop)
    with pytest.raises(ValueError, match="cannot hold rows of it"):
        opened.read_rows("centers", 0, torch.zeros(3, 6))
    with pytest.raises(ValueError, match="cannot hold rows of it"):
        opened.read_rows("centers", 0, torch.zeros(3, 7, dtype=torch.bfloat16))


# Real processes


def save_and_load_on_a_rank(rank: int, folder: Path) -> None:
    root, whole, shard = folder / "checkpoints", head_rows(20), Shard.of(20)
    tensors = {"backbone": {"conv": torch.full((3, 3), float(rank))}}
    for step in (1, 2):
        rows = RowTensors(shard, {name: rows[shard.start : shard.stop] for name, rows in whole.items()})
        save_checkpoint(root, step, tensors=tensors, rows=rows, state={"step": step}, block_bytes=64)
    if rank == 0:
        flip(root / "step-00000002" / "head-00002-of-00003.safetensors", -1)
    barrier()
    read = load_latest(root, lambda opened: (opened.step, opened.rows("centers", shard.start, shard.stop)))
    assert read is not None
    assert read[0] == 1
    assert torch.equal(read[1], whole["centers"][shard.start : shard.stop])


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
    save(tmp_path, 1, rows=RowTensors(Shard.of(37), rows))
    opened = newest(tmp_path)
    assert opened is not None
    for name, tensor in rows.items():
        target = torch.empty_like(tensor)
        opened.read_rows(name, 0, target)
        assert torch.equal(target, tensor)
