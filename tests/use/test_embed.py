"""Sets of any kind, embedded into one file that says what it holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import INSIGHTFACE, complaint, run
from marked_photographs import DiscDetector, photograph, placed
from trained_models import noise, write_model

from partialfc import InputError, load_model
from partialfc.data.images import encode_png
from partialfc.data.photographs.align import align_photographs
from partialfc.evaluation.images import Files
from partialfc.evaluation.run import in_order
from partialfc.model.contract import contract_of
from partialfc.model.feature_table import read_table, write_table
from partialfc.model.features import FeatureWriter, describe, read_features
from partialfc.use.embed import embed_into

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "people"
    for name, seeds in {"ann": (0, 1), "bob": (2,)}.items():
        (folder / name).mkdir(parents=True)
        for seed in seeds:
            (folder / name / f"{seed}.png").write_bytes(encode_png(noise(seed)))
    (folder / "bob" / "broken.png").write_bytes(b"no image")
    return folder


def embed(*arguments: object) -> int:
    return run("embed", *arguments, "--workers", 0)


def test_a_table_has_names_labels_and_embeddings(
    capsys: pytest.CaptureFixture[str], model: Path, people: Path, tmp_path: Path
) -> None:
    out = tmp_path / "people.parquet"
    assert embed(model, people, "--out", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["failed"], facts["width"]) == (4, 1, 8)
    table = pq.read_table(out)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[8]"
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [Path(row["name"]).name for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    assert [(row["label"], row["identity"]) for row in rows] == [(0, "ann"), (0, "ann"), (1, "bob"), (1, "bob")]
    assert [row["failed"] for row in rows] == [False, False, False, True]
    loaded = load_model(model)
    expected = loaded.embed([noise(seed) for seed in range(3)]).numpy()
    np.testing.assert_allclose([row["embedding"] for row in rows[:3]], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([row["quality"] for row in rows[:3]], np.linalg.norm(expected, axis=1), rtol=1e-5)
    features = read_features(out, contract_of(loaded))
    assert features.contract == facts["contract"] == contract_of(loaded)
    assert features.failed.tolist() == [False, False, False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people.parquet"]
    assert "exists already" in complaint(capsys, "embed", model, people, "--out", out)


def test_a_folder_of_images_and_a_single_image(
    capsys: pytest.CaptureFixture[str], model: Path, people: Path, tmp_path: Path
) -> None:
    assert embed(model, people / "ann", "--out", tmp_path / "ann.parquet") == 0
    assert pq.read_table(tmp_path / "ann.parquet").column("label").to_pylist() == [None, None]
    assert embed(model, people / "ann" / "1.png", "--out", tmp_path / "one.npy") == 0
    both, one = read_features(tmp_path / "ann.parquet"), read_features(tmp_path / "one.npy")
    np.testing.assert_allclose(one.embeddings[0], both.embeddings[1], rtol=1e-4, atol=1e-6)
    assert one.names == [str(people / "ann" / "1.png")]


def test_aligned_crops_of_112_pixels_fit_any_model(model: Path, tmp_path: Path) -> None:
    assert embed(model, INSIGHTFACE, "--out", tmp_path / "set.parquet") == 0
    table = pq.read_table(tmp_path / "set.parquet")
    assert len(set(table.column("label").to_pylist())) > 1
    assert table.column("identity").null_count in (0, len(table))


def test_features_of_another_model_and_damaged_tables(
    capsys: pytest.CaptureFixture[str], model: Path, people: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.parquet"
    assert embed(model, people, "--out", out) == 0
    with pytest.raises(InputError, match="features of another model"):
        read_features(out, "0" * 64)
    (tmp_path / "short.parquet").write_bytes(out.read_bytes()[:-20])
    with pytest.raises(InputError, match="no whole table of features"):
        read_features(tmp_path / "short.parquet")
    facts, embeddings = read_table(out)
    names = facts.pop("names")
    newer = {**facts, "schema_version": 9}
    write_table(tmp_path / "newer.parquet", embeddings, np.zeros(4, bool), newer, names=names)
    with pytest.raises(InputError, match="schema_version 9"):
        read_features(tmp_path / "newer.parquet")
    fewer = describe((3, 8), facts["contract"], mirrored=True, source="")
    write_table(tmp_path / "fewer.parquet", embeddings, np.zeros(4, bool), fewer, names=names)
    with pytest.raises(InputError, match="names for 3 rows"):
        read_features(tmp_path / "fewer.parquet")


def test_what_cannot_be_embedded(capsys: pytest.CaptureFixture[str], model: Path, people: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    large = tmp_path / "large"
    large.mkdir()
    (large / "a.png").write_bytes(encode_png(noise(0, size=40)))
    out = tmp_path / "out.parquet"
    for data, sentence in {
        tmp_path / "pipe.png": "no regular file",
        tmp_path / "none": "does not exist",
        large: "a.png is 40 × 40 pixels, which is no aligned crop",
    }.items():
        assert sentence in complaint(capsys, "embed", model, data, "--out", out, "--workers", 0)
    assert "written as .parquet or .npy" in complaint(capsys, "embed", model, people, "--out", tmp_path / "a.csv")
    assert "There is no folder" in complaint(capsys, "embed", model, people, "--out", tmp_path / "x" / "a.npy")
    pipe = tmp_path / "model.onnx"
    os.mkfifo(pipe)
    assert "is no model" in complaint(capsys, "embed", pipe, people, "--out", out)
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in complaint(capsys, "embed", broken, people, "--out", out)


def test_what_is_passed_over_is_said(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """Images beside identity folders are not those of the set, and a hidden folder is no identity."""
    for name in ("0.png", "1.png", "ann/2.png", ".thumbs/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(encode_png(noise(0)))
    assert embed(model, tmp_path / "set", "--out", tmp_path / "set.npy") == 0
    assert "2 without an identity folder (such as 0.png)" in capsys.readouterr().err
    assert [Path(name).name for name in read_features(tmp_path / "set.npy").names or ()] == ["2.png"]
    shutil.rmtree(tmp_path / "set" / "ann")
    assert embed(model, tmp_path / "set", "--out", tmp_path / "loose.npy") == 0
    assert [Path(name).name for name in read_features(tmp_path / "loose.npy").names or ()] == ["0.png", "1.png"]


def test_a_picture_beside_folders_without_images_is_no_set(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "set" / "ann").mkdir(parents=True)
    (tmp_path / "set" / "ann" / "1.heic").write_bytes(b"")
    (tmp_path / "set" / "cover.png").write_bytes(encode_png(noise(0)))
    said = complaint(capsys, "embed", model, tmp_path / "set", "--out", tmp_path / "out.npy")
    assert "1 .heic (such as ann/1.heic)" in said


def test_names_that_are_no_utf_8_and_records_that_are_damaged(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path / "set") + b"/ren\xe9"))
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encode_png(noise(0)))
    out = tmp_path / "out.parquet"
    (tmp_path / "set" / "landmarks.jsonl").write_text('{"schema_version": 1}\n{"faces": [{}]}\n')
    assert "landmarks.jsonl is damaged" in complaint(capsys, "embed", model, tmp_path / "set", "--out", out)
    (tmp_path / "set" / "landmarks.jsonl").write_text("")
    assert embed(model, tmp_path / "set", "--out", out) == 0
    assert pq.read_table(out).column("identity").to_pylist() == ["ren\\udce9"]
    assert in_order(read_features(out), Files([folder / "0.png"]), out)[1]


def test_an_interrupted_table_goes_on(model: Path, people: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "a.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("partialfc.use.embed.write_table", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert embed(model, people, "--out", out) == 130
    assert not out.exists()
    assert embed(model, people, "--out", out) == 0
    assert torch.from_numpy(read_features(out).embeddings.copy()).isfinite().all()


def test_photographs_without_one_face_are_failures_to_enrol(model: Path, tmp_path: Path) -> None:
    one, two = placed(1, 10, (75, 90)), placed(1, -10, (225, 90))
    (tmp_path / "in").mkdir()
    for name, faces in {"none": (), "one": (one,), "two": (one, two)}.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(encode_png(photograph(300, 200, *faces)))
    features = embed_into(load_model(model), tmp_path / "in", tmp_path / "x.npy", workers=0, faces_in=DiscDetector())
    assert features.failed.tolist() == [True, False, True]


def test_the_scores_of_aligned_crops_are_those_of_the_detector(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "ann").mkdir(parents=True)
    for number, scale in enumerate((1.0, 1.5)):
        image = photograph(300, 300, placed(scale, 5, (100, 140)))
        (tmp_path / "in" / "ann" / f"{number}.png").write_bytes(encode_png(image))
    crops = tmp_path / "crops"
    align_photographs(tmp_path / "in", crops, DiscDetector(), quiet=True)
    embed_into(load_model(model), crops, tmp_path / "x.parquet", workers=0, quiet=True)
    assert pq.read_table(tmp_path / "x.parquet").column("score").to_pylist() == pytest.approx([0.99, 0.99])


def test_rows_of_another_detector_are_not_continued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode_png(photograph(300, 300, placed(1, 5, (100, 140)))))
    first, other = DiscDetector(), DiscDetector()
    other.facts = {**first.facts, "min_score": 0.5}
    options: dict[str, Any] = {"workers": 0, "batch_size": 1, "quiet": True}

    def embed_with(detector: DiscDetector) -> None:
        embed_into(load_model(model), tmp_path / "in", tmp_path / "x.npy", faces_in=detector, **options)

    with monkeypatch.context() as context:
        context.setattr(FeatureWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_with(first)
    embed_with(other)
    assert other.calls == 3
