"""Procedural sets read as real data, with the same bytes however they are made; nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.data.images import decode_image, encode_jpeg
from partialfc.data.pair_files import read_pairs
from partialfc.data.sources import open_source
from partialfc.faces.parameters import GROUPS, group_of
from partialfc.faces.render import render_faces
from partialfc.faces.sets import (
    FIRST_HELD_OUT,
    FOLDS,
    FaceWorld,
    draw_pairs,
    write_contact_sheet,
    write_pair_set,
    write_training_set,
)
from partialfc.faces.settings import FaceSettings

IDENTITIES = range(20, 26)


def bytes_of(folder: Path) -> list[tuple[bytes, int]]:
    source = open_source(folder)
    return [(sample.encoded, sample.label) for sample in (source.read(index) for index in range(len(source)))]


def test_recordio_and_folder_hold_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_training_set(tmp_path / "a" / "record", identities=IDENTITIES, shots=3, size=32, seed=4, quiet=False)
    assert "rendering: 18/18 (100%)" in capsys.readouterr().err
    write_training_set(tmp_path / "folder", identities=IDENTITIES, shots=3, size=32, seed=4, layout="folder")
    records, files = bytes_of(tmp_path / "a" / "record"), bytes_of(tmp_path / "folder")
    assert records == files
    assert [label for _, label in records] == [label for label in range(6) for _ in range(3)]
    assert open_source(tmp_path / "a" / "record").num_classes == 6
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [str(n) for n in IDENTITIES] + [
        "faces.json"
    ]
    assert capsys.readouterr().err == ""
    about = json.loads((tmp_path / "folder" / "faces.json").read_text())
    assert about["identities"] == [20, 26, 1]
    assert about["seed"] == 4
    assert about["shots"] == 3
    assert about["settings"]["yaw"] == FaceSettings().yaw
    # Nothing temporary is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_the_images_are_those_of_render_faces(tmp_path: Path) -> None:
    settings = FaceSettings(jpeg_quality=(95, 95))
    write_training_set(tmp_path / "set", identities=IDENTITIES, shots=2, size=64, seed=1, settings=settings)
    pictures = np.stack([decode_image(encoded) for encoded, _ in bytes_of(tmp_path / "set")])
    identities = torch.tensor(IDENTITIES).repeat_interleave(2)
    faces = render_faces(1, identities, torch.arange(2).repeat(6), size=64, settings=settings)
    difference = np.abs(pictures.astype(int) - faces.images.numpy().astype(int))
    assert difference.mean() < 3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    write_training_set(tmp_path / "alone", identities=range(70), shots=4, size=16, workers=0)
    write_training_set(tmp_path / "helped", identities=range(70), shots=4, size=16, workers=1)
    for name in ("train.rec", "train.idx", "property", "faces.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "helped" / name).read_bytes()
    # More images than one task has, in order.
    assert [label for _, label in bytes_of(tmp_path / "helped")] == [number for number in range(70) for _ in range(4)]


def test_pairs_stand_in_ten_balanced_folds_of_one_group() -> None:
    members, is_same = draw_pairs(0, range(100, 180), 400)
    assert members.shape == (400, 2)
    folds = is_same.view(FOLDS, -1)
    assert folds.sum(1).tolist() == [20] * FOLDS
    assert bool(folds[:, :20].all())
    assert torch.equal(members[:, 0] == members[:, 1], is_same)
    assert torch.equal(group_of(members[:, 0]), group_of(members[:, 1]))
    impostor_groups = torch.bincount(group_of(members[~is_same][:, 0]), minlength=GROUPS)
    assert impostor_groups.tolist() == [50] * GROUPS
    # Genuine pairs cycle through all identities.
    counts = torch.bincount(members[is_same][:, 0] - 100, minlength=80)
    assert int(counts.max() - counts.min()) <= 1
    assert not torch.equal(members, draw_pairs(1, range(100, 180), 400)[0])


def test_a_pair_set_is_read_like_a_real_one(tmp_path: Path) -> None:
    path = tmp_path / "pairs.bin"
    write_pair_set(path, identities=range(8), pairs=20, size=48, seed=2)
    pairs = read_pairs(path)
    assert pairs.images.shape == (40, 48, 48, 3)
    assert pairs.is_same.tolist() == [True, False] * FOLDS
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["pairs"], about["folds"], about["seed"]) == (20, 10, 2)
    # No image appears twice.
    assert len(np.unique(pairs.images.reshape(40, -1), axis=0)) == 40
    write_pair_set(tmp_path / "again.bin", identities=range(8), pairs=20, size=48, seed=2)
    assert path.read_bytes() == (tmp_path / "again.bin").read_bytes()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "pairs.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        write_training_set(tmp_path / "set", identities=IDENTITIES, shots=1, size=16)
    with pytest.raises(InputError, match="exists already"):
        write_pair_set(tmp_path / "pairs.bin", identities=range(8), pairs=20, size=16)
    assert (tmp_path / "pairs.bin").read_bytes() == b"mine"
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("images", [0, 130])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    encoded = iter(range(images))

    def encode_some(image: np.ndarray, quality: int) -> bytes:
        if next(encoded, None) is None:
            raise KeyboardInterrupt
        return encode_jpeg(image, quality)

    monkeypatch.setattr("partialfc.faces.encode.encode_jpeg", encode_some)
    with pytest.raises(KeyboardInterrupt):
        write_training_set(tmp_path / "set", identities=range(300), shots=1, size=16, workers=0)
    with pytest.raises(KeyboardInterrupt):
        write_pair_set(tmp_path / "pairs.bin", identities=range(8), pairs=20, size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": range(0)}, "no range of identities"),
        ({"identities": range(-3, 5)}, "no range of identities"),
        ({"shots": 0}, "shots is 0"),
        ({"size": 8}, "at least 16 pixels"),
        ({"layout": "tar"}, "choose recordio or folder"),
    ],
)
def test_numbers_that_make_no_training_set(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"identities": IDENTITIES, "shots": 1, "size": 16} | change
    with pytest.raises(InputError, match=message):
        write_training_set(tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 30}, "multiple of 20"),
        ({"pairs": 0}, "multiple of 20"),
        ({"identities": range(7)}, "at least 8"),
        ({"identities": range(0, 40, 2)}, "fewer than two"),
        ({"identities": range(0)}, "no range"),
        ({"size": 4}, "at least 16 pixels"),
    ],
)
def test_numbers_that_make_no_pair_set(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"identities": range(8), "pairs": 20, "size": 16} | change
    with pytest.raises(InputError, match=message):
        write_pair_set(tmp_path / "pairs.bin", **options)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Cannot write"):
        write_training_set(tmp_path / "file" / "set", identities=IDENTITIES, shots=1, size=16)
    with pytest.raises(InputError, match="there is no folder"):
        write_pair_set(tmp_path / "nowhere" / "pairs.bin", identities=range(8), pairs=20, size=16)
    with pytest.raises(InputError, match="Cannot write a contact sheet"):
        write_contact_sheet(tmp_path / "nowhere" / "sheet.png", identities=IDENTITIES, shots=1, size=16)
    with pytest.raises(InputError, match="Cannot write a contact sheet"):
        write_contact_sheet(tmp_path / "sheet.unknown", identities=IDENTITIES, shots=1, size=16)
    with pytest.raises(InputError, match="shots is 0"):
        write_contact_sheet(tmp_path / "sheet.png", identities=IDENTITIES, shots=0, size=16)


def test_a_contact_sheet_has_a_row_for_each_identity(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "sheet.png", identities=range(4, 7), shots=2, size=32, seed=9)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (64, 96)
        pixels = np.asarray(sheet)
    face = render_faces(9, torch.tensor([6]), torch.tensor([1]), size=32).images[0].numpy()
    assert np.array_equal(pixels[64:, 32:], face)


def test_a_world_is_a_training_set_and_pairs_of_other_identities(tmp_path: Path) -> None:
    world = FaceWorld(identities=5, shots=2, pairs=20, pair_identities=8, image_size=16, seed=3)
    facts = world.write(tmp_path / "world")
    write_training_set(tmp_path / "train", identities=range(5), shots=2, size=16, seed=3)
    held_out = range(FIRST_HELD_OUT, FIRST_HELD_OUT + 8)
    write_pair_set(tmp_path / "pairs.bin", identities=held_out, pairs=20, size=16, seed=3)
    for name in ("train/train.rec", "train/faces.json", "pairs.bin", "pairs.json"):
        assert (tmp_path / "world" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (facts["images"], facts["pairs"], facts["seed"]) == (10, 20, 3)
    with pytest.raises(InputError, match="exists already"):
        world.write(tmp_path / "world")
    (tmp_path / "world" / "pairs.bin").unlink()
    (tmp_path / "world" / "pairs.json").unlink()
    world.write(tmp_path / "world", resume=True)
    assert (tmp_path / "world" / "pairs.bin").read_bytes() == (tmp_path / "pairs.bin").read_bytes()
