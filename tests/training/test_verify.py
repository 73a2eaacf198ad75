"""`--verify`: every byte of the checkpoint is read and compared before a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import flip, save
from small_runs import small_config, tiny_config, write_images

from partialfc import cli
from partialfc.checkpoint.format import DamagedCheckpoint
from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.training.loop import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Its checkpoints hold names of identities, which a run that goes on does not read."""
    base = tiny_config(write_images(tmp_path / "images", [f"person {number}" for number in range(8)]))
    return replace(base, output=replace(base.output, keep=3))


def test_it_says_what_it_read(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(config, out, resume=True, verify=True)
    assert "there is no checkpoint to verify" in capsys.readouterr().err
    newest = out / "checkpoints" / f"step-{steps_in(out / 'checkpoints')[-1]:08d}"
    files = [path for path in newest.iterdir() if path.name != "manifest.json"]
    train(config, out, resume=True, verify=True)
    size = sum(path.stat().st_size for path in files)
    said = f"{newest} is whole: all {size:,} bytes of its {len(files)} files were read and compared"
    assert said in capsys.readouterr().err


def test_it_finds_damage_in_blocks_that_no_rank_reads(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(config, out, quiet=True)
    before, newest = steps_in(out / "checkpoints")[-2:]
    flip(out / "checkpoints" / f"step-{newest:08d}" / "identities.json", 3)
    train(config, out, resume=True)
    assert f"resumed at step {newest}" in capsys.readouterr().err
    train(config, out, resume=True, verify=True)
    said = capsys.readouterr().err
    assert f"step-{newest:08d}/identities.json differs from what was written in block 0" in said
    assert f"step-{before:08d} is whole" in said
    assert f"resumed at step {before}" in said


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_the_parts_together_read_every_block(tmp_path: Path, parts: int) -> None:
    folder = save(tmp_path, 1)
    checkpoint = Checkpoint(folder)
    size = checkpoint.extent[1]
    assert size == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    for path in folder.iterdir():
        if path.name == "manifest.json":
            continue
        whole = path.read_bytes()
        for position in range(0, len(whole), 256):
            flip(path, position)
            assert sum(refused(Checkpoint(folder).verify, part, parts) for part in range(parts)) == 1
            path.write_bytes(whole)


def refused(verify: Callable[[int, int], None], part: int, parts: int) -> bool:
    try:
        verify(part, parts)
    except DamagedCheckpoint:
        return True
    return False


def test_without_resume_it_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give --resume too"):
        train(small_config(), tmp_path, verify=True, quiet=True)
    words = ["train", "--data.path", small_config().data.path, "--out", str(tmp_path), "--verify"]
    assert cli.main(words) == 2
    assert "--verify reads the checkpoint that a run goes on from: give --resume too." in capsys.readouterr().err
