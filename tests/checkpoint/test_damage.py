"""Damaged checkpoints: found by name, never used, and the same one passed over on all ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import ThreadRank, assert_holds, flip, head_rows, newest, on_ranks, save, save_on

from partialfc.checkpoint.blocks import write_hashed
from partialfc.checkpoint.format import DamagedCheckpoint
from partialfc.checkpoint.read import Checkpoint, load_latest
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import split_evenly


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
    folder = save(tmp_path, 1, block_bytes=4096)
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
    long_header = json.dumps({"conv": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    for content in (
        b"1234",
        len(good).to_bytes(8, "little") + good[8:],
        (2).to_bytes(8, "little") + b"[]",
        len(bad_header).to_bytes(8, "little") + bad_header + bytes(8),
        len(long_header).to_bytes(8, "little") + long_header + bytes(8),
    ):
        path.write_bytes(content)
        rewrite(folder, lambda body: body["files"].update({path.name: describe(path)}))
        with pytest.raises(DamagedCheckpoint, match=r"backbone\.safetensors"):
            Checkpoint(folder).tensors("backbone")


def describe(path: Path) -> dict[str, Any]:
    copy = path.with_suffix(".copy")
    record = write_hashed(copy, [path.read_bytes()], 1 << 20)
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


def test_ranks_agree_on_the_checkpoint_that_all_can_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        on_ranks(3, partial(save_on, root=tmp_path, step=step, whole=head_rows(30, step)))
    flip(tmp_path / "step-00000003" / "head-00002-of-00003.safetensors", -1)
    refused: list[tuple[int, str]] = []

    def load(rank: ThreadRank) -> Any:
        start, stop = split_evenly(30, 3, rank.rank)
        return load_latest(
            tmp_path,
            lambda opened: (opened.step, {name: opened.rows(name, start, stop) for name in opened.row_shapes}),
            warn=lambda text: refused.append((rank.rank, text)),
        )

    for rank, (step, rows) in enumerate(on_ranks(3, load)):
        start, stop = split_evenly(30, 3, rank)
        assert step == 2
        assert all(torch.equal(rows[name], whole[start:stop]) for name, whole in head_rows(30, 2).items())
    assert [rank for rank, _ in refused] == [0]
    assert "step-00000003/head-00002-of-00003.safetensors" in refused[0][1]


def test_ranks_that_see_different_checkpoints_are_told(tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path / str(rank), 7, state={"rank": rank})
    outcomes = on_ranks(2, lambda rank: load_latest(tmp_path / str(rank.rank), lambda opened: opened))
    assert all("The ranks see different checkpoints" in str(outcome) for outcome in outcomes)
