"""Embedding into a file: the same bytes however the work is cut, interrupted and shared."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_workers import run_apart, run_ranks
from numpy.typing import NDArray
from pictures import picture

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage, encode_png
from partialfc.data.sources import open_source
from partialfc.model import features
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of, variant_of
from partialfc.model.embed import Precision, SourceImages, embed, embed_source
from partialfc.model.files import Model

SIZE, COUNT, BATCH = 16, 23, 4


class Interrupted(BaseException):
    """The work broke off on purpose."""


@dataclass
class Pictures:
    """Random images; some are unreadable, of another size, or end the work."""

    count: int = COUNT
    unreadable: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()
    interrupt_at: int | None = None
    kill_at: int | None = None
    seen: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"picture {index}"

    def image(self, index: int) -> NDArray[np.uint8]:
        self.seen.append(index)
        if index == self.interrupt_at:
            raise Interrupted
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.unreadable:
            raise UnreadableImage(f"{self.name(index)} is broken")
        size = SIZE + 2 if index in self.wide else SIZE
        return np.random.default_rng(index).integers(0, 256, (size, SIZE, 3), dtype=np.uint8)


def model(seed: int = 0, **changes: Any) -> Model:
    config = ModelConfig("mini", embedding_dim=8, image_size=SIZE, **changes)
    return Model(create_backbone("mini", embedding_dim=8, image_size=SIZE, seed=seed), config)


run = partial(embed_source, source="pictures", batch_size=BATCH, workers=0, quiet=True)


@pytest.fixture(autouse=True)
def _saves_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SECONDS_BETWEEN_SAVES", 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flip", [True, False])
def test_the_file_holds_what_embed_gives(tmp_path: Path, flip: bool) -> None:
    pictures, ours = Pictures(), model(flip=flip)
    ours.backbone.train()
    result = run(ours, pictures, tmp_path / "a.npy", names=[f"n{index}" for index in range(COUNT)])
    assert ours.backbone.training
    expected = embed(ours, np.stack([pictures.image(index) for index in range(COUNT)]), batch_size=BATCH)
    np.testing.assert_array_equal(result.embeddings, expected.numpy())
    assert (result.contract, result.mirrored, result.source) == (contract_of(ours), flip, "pictures")
    assert result.names is not None
    assert result.names[22] == "n22"
    assert not result.failed.any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.json"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected.numpy())


def test_a_source_of_any_format_is_embedded(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "set" / str(number)).mkdir(parents=True)
        (tmp_path / "set" / str(number) / "a.png").write_bytes(encode_png(picture(number)))
    (tmp_path / "set" / "1" / "a.png").write_bytes(b"no image")
    images = SourceImages(open_source(tmp_path / "set"))
    result = run(model(), images, tmp_path / "a.npy")
    assert images.name(2).endswith(os.path.join("2", "a.png"))
    expected = embed(model(), np.stack([picture(0), np.zeros((SIZE, SIZE, 3), np.uint8), picture(2)]), batch_size=BATCH)
    expected[1] = 0
    np.testing.assert_array_equal(result.embeddings, expected.numpy())
    np.testing.assert_array_equal(result.failed, [False, True, False])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_a_failure_to_enrol(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = Pictures(unreadable=(0, 9, 22))
    result = run(model(), pictures, tmp_path / "a.npy", workers=workers, quiet=False)
    np.testing.assert_array_equal(np.flatnonzero(result.failed), [0, 9, 22])
    assert not result.embeddings[result.failed].any()
    assert result.embeddings[~result.failed].any(axis=1).all()
    assert json.loads((tmp_path / "a.npy.json").read_text())["failed"] == [0, 9, 22]
    assert "3 of 23 images cannot be read; the first is picture 0" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [0, 3, 4, 13, 22])
@pytest.mark.parametrize("leftover", [b"", b"half a row"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stop: int, leftover: bytes, tmp_path: Path) -> None:
    options: dict[str, Any] = {"names": [f"n{index}" for index in range(COUNT)]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    run(model(), Pictures(unreadable=(1, 15)), tmp_path / "whole" / "a.npy", **options)
    path = tmp_path / "parts" / "a.npy"
    with pytest.raises(Interrupted):
        run(model(), Pictures(unreadable=(1, 15), interrupt_at=stop), path, **options)
    assert not path.exists()
    with (tmp_path / "parts" / ".a.npy.part").open("ab") as file:
        file.write(leftover)  # what was written after the last save
    pictures = Pictures(unreadable=(1, 15))
    run(model(), pictures, path, **options)
    assert pictures.seen[0] == stop // BATCH * BATCH  # nothing is embedded twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_rows_that_were_never_saved_are_embedded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SECONDS_BETWEEN_SAVES", 1000.0)
    with pytest.raises(Interrupted):
        run(model(), Pictures(interrupt_at=13), tmp_path / "a.npy")
    pictures = Pictures()
    result = run(model(), pictures, tmp_path / "a.npy")
    assert pictures.seen == list(range(COUNT))
    expected = embed(model(), np.stack([pictures.image(index) for index in range(COUNT)]), batch_size=BATCH)
    np.testing.assert_array_equal(result.embeddings, expected.numpy())


class Renamed(Pictures):
    def name(self, index: int) -> str:
        return f"image {index}"


@pytest.mark.parametrize(
    ("changed", "pictures", "options"),
    [
        (model(1), Pictures(), {}),
        (model(flip=False), Pictures(), {}),
        (model(), Pictures(), {"precision": "bfloat16"}),
        (model(), Pictures(), {"batch_size": 8}),
        (model(), Pictures(), {"source": "others"}),
        (model(), Pictures(count=COUNT + 1), {}),
        (model(), Renamed(), {}),
    ],
)
def test_other_work_starts_anew(changed: Model, pictures: Pictures, options: Any, tmp_path: Path) -> None:
    for folder in ("alone", "after"):
        (tmp_path / folder).mkdir()
    with pytest.raises(Interrupted):
        run(model(), Pictures(interrupt_at=13), tmp_path / "after" / "a.npy")
    run(changed, pictures, tmp_path / "after" / "a.npy", **options)
    assert pictures.seen == list(range(len(pictures)))
    run(changed, pictures, tmp_path / "alone" / "a.npy", **options)
    assert contents(tmp_path / "after") == contents(tmp_path / "alone")


def test_progress_of_overwritten_rows_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        run(model(), Pictures(interrupt_at=13), tmp_path / "a.npy")
    with monkeypatch.context() as patch:
        patch.setattr(features, "_SECONDS_BETWEEN_SAVES", 1000.0)
        with pytest.raises(Interrupted):
            run(model(1), Pictures(interrupt_at=21), tmp_path / "a.npy")
    pictures = Pictures()
    result = run(model(), pictures, tmp_path / "a.npy")
    assert pictures.seen == list(range(COUNT))
    np.testing.assert_array_equal(result.embeddings, run(model(), Pictures(), tmp_path / "b.npy").embeddings)


def test_a_run_that_was_killed_at_its_end_only_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(features, "publish", publish)
        with pytest.raises(Interrupted):
            run(model(), Pictures(), tmp_path / "a.npy")
    assert not (tmp_path / "a.npy").exists()
    pictures = Pictures()
    result = run(model(), pictures, tmp_path / "a.npy")
    assert pictures.seen == []
    np.testing.assert_array_equal(result.embeddings, run(model(), Pictures(), tmp_path / "b.npy").embeddings)


def test_damaged_progress_starts_anew(tmp_path: Path) -> None:
    for content in (b"", b"[]", b'{"work": 1}', b"\xff"):
        with pytest.raises(Interrupted):
            run(model(), Pictures(interrupt_at=13), tmp_path / "a.npy")
        (tmp_path / ".a.npy.progress.json").write_bytes(content)
        pictures = Pictures()
        run(model(), pictures, tmp_path / "a.npy")
        assert pictures.seen == list(range(COUNT))


def test_a_finished_file_is_replaced(tmp_path: Path) -> None:
    run(model(0), Pictures(), tmp_path / "a.npy")
    pictures = Pictures(count=5)
    result = run(model(1), pictures, tmp_path / "a.npy")
    assert pictures.seen == [0, 1, 2, 3, 4]
    assert result.contract == contract_of(model(1))
    assert len(result.embeddings) == 5


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.999), ("float16", 0.99999)])
def test_mixed_precision_is_close_and_a_variant(precision: Precision, least: float, tmp_path: Path) -> None:
    exact = run(model(), Pictures(), tmp_path / "a.npy").embeddings
    result = run(model(), Pictures(), tmp_path / "b.npy", precision=precision)
    cosines = (exact * result.embeddings).sum(1)
    cosines /= np.linalg.norm(exact, axis=1) * np.linalg.norm(result.embeddings, axis=1)
    assert cosines.min() > least
    assert not np.array_equal(exact, result.embeddings)
    assert result.contract == variant_of(contract_of(model()), precision)


def test_progress_is_shown_with_rate_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        run(model(), Pictures(interrupt_at=13), tmp_path / "a.npy", quiet=False)
    assert "embedding: 12/23 (52%)" in capsys.readouterr().err
    run(model(), Pictures(), tmp_path / "a.npy", quiet=False)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "embedding: 12/23 (52%), estimating time left"
    assert last.startswith("embedding: 23/23 (100%), ")
    assert " images/s, in 0:0" in last
    run(model(), Pictures(), tmp_path / "a.npy")
    assert capsys.readouterr().err == ""


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for workers in (0, 2):
        with pytest.raises(InputError, match="picture 9 is 16 × 18 pixels but the model takes 16 × 16") as caught:
            run(model(), Pictures(wide=(9, 17)), path, workers=workers)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="pictures has 0 images"):
        run(model(), Pictures(count=0), path)
    with pytest.raises(InputError, match="a name for each or none"):
        run(model(), Pictures(), path, names=["a"])
    with pytest.raises(InputError, match="precision is 'float64': choose one of float32, bfloat16, float16"):
        run(model(), Pictures(), path, precision="float64")  # type: ignore[arg-type]
    broken = model()
    next(broken.backbone.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match="The embedding of picture 0 is not finite in float32"):
        run(broken, Pictures(), path)
    with pytest.raises(FileNotFoundError):
        run(model(), Pictures(), tmp_path / "nowhere" / "a.npy")
    assert not path.exists()


# -- several processes -------------------------------------------------------------------------------------------------


def embed_on_ranks(rank: int, folder: Path) -> None:
    features._SECONDS_BETWEEN_SAVES = 0.0
    result = run(model(), Pictures(unreadable=(5, 22)), folder / "a.npy")
    np.save(folder.parent / f"{folder.name}-{rank}.npy", result.embeddings)


def be_killed(rank: int, folder: Path) -> None:
    features._SECONDS_BETWEEN_SAVES = 0.0
    run(model(), Pictures(unreadable=(5, 22), kill_at=14), folder / "a.npy")


def refuse_on_ranks(rank: int, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        run(model(), Pictures(wide=(6,)), folder / "a.npy")  # in the batch of rank 1
    (folder / f"{rank}.txt").write_text(str(caught.value))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_goes_on_to_the_same_bytes_on_two_processes(tmp_path: Path) -> None:
    for name in ("one", "two", "killed"):
        (tmp_path / name).mkdir()
    run_ranks(1, embed_on_ranks, tmp_path / "one")
    run_ranks(2, embed_on_ranks, tmp_path / "two")
    assert run_apart(1, be_killed, tmp_path / "killed") == [-signal.SIGKILL]
    saved = json.loads((tmp_path / "killed" / ".a.npy.progress.json").read_text())
    assert (saved["rows"], saved["failed"]) == (12, [5])
    run_ranks(2, embed_on_ranks, tmp_path / "killed")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"two-{rank}.npy"), np.load(tmp_path / "one" / "a.npy"))


@pytest.mark.multiprocess
def test_all_processes_name_the_same_image(tmp_path: Path) -> None:
    run_ranks(2, refuse_on_ranks, tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("picture 6 is 16 × 18 pixels")
