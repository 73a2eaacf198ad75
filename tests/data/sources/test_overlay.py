from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_runs import write_images

from partialfc.core.errors import InputError
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Sample, Source, mapping_of
from partialfc.data.sources.overlay import DROPPED, Decisions, Overlay, decide, read_overlay, write_overlay
from partialfc.data.sources.subset import SubsetSource


class Listed(Source):
    """A set of given labels, whose images are the numbers of the records."""

    path, format = Path("listed"), "listed"

    def __init__(self, labels: list[int], num_classes: int, identities: list[str] | None = None) -> None:
        self._labels, self.num_classes, self.identities = labels, num_classes, identities

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"record {index}"

    def labels(self) -> np.ndarray:
        return np.array(self._labels, np.int64)

    def read(self, index: int) -> Sample:
        return Sample(b"%d" % index, self._labels[index], self.name(index))


def decisions(source: Source, changes: dict[int, int], merges: dict[int, int] | None = None) -> Decisions:
    return decide(source, np.array([*changes], np.int64), np.array([*changes.values()], np.int64), merges)


def content(source: Source) -> list[tuple[str, int]]:
    return [(sample.encoded.decode(), sample.label) for sample in map(source.read, range(len(source)))]


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    changes=st.dictionaries(st.integers(0, 29), st.integers(-1, 8), max_size=12),
    merges=st.sampled_from([{}, {0: 1}, {4: 2, 2: 3}, {5: 0, 6: 0}]),
)
@settings(max_examples=150, deadline=None)
def test_samples_are_those_of_a_set_rewritten_image_by_image(
    labels: list[int], changes: dict[int, int], merges: dict[int, int]
) -> None:
    changes = {index: label for index, label in changes.items() if index < len(labels)}
    source = Listed(labels, 6)
    largest = max([6, *(label + 1 for label in changes.values())])
    merges = {old: new for old, new in merges.items() if max(old, new) < largest}
    expected = []
    for index, label in enumerate(labels):
        label = changes.get(index, label)
        while label in merges:
            label = merges[label]
        if label != DROPPED:
            expected.append((str(index), label))
    if not expected:
        with pytest.raises(InputError, match="leave no image of listed"):
            decisions(source, changes, merges)
        return
    remaining = sorted({label for _, label in expected})
    overlay = Overlay(source, decisions(source, changes, merges))
    assert content(overlay) == [(image, remaining.index(label)) for image, label in expected]
    assert overlay.labels().tolist() == [label for _, label in content(overlay)]
    assert overlay.num_classes == len(remaining)
    if overlay.identities is not None:
        assert overlay.identities == [str(label) for label in remaining]


def test_names_follow(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "set", ["anna", "bert", "carl", "dora"], shots=3))
    overlay = Overlay(source, decisions(source, {0: 4, 2: 5, 6: DROPPED, 7: DROPPED, 8: DROPPED, 9: 5}, {3: 1}))
    assert overlay.identities == ["anna", "bert", "anna#1", "anna#2"]
    assert [Path(overlay.name(index)).parent.name for index in (0, 5, 6)] == ["anna", "bert", "dora"]
    assert overlay.read(6).name == overlay.name(6)
    with pytest.raises(IndexError):
        overlay.read(9)
    assert Overlay(source, decisions(source, {0: 1})).identities == source.identities
    nameless = Listed([0, 0, 1], 2)
    assert Overlay(nameless, decisions(nameless, {0: 1})).identities is None
    assert Overlay(nameless, decisions(nameless, {0: 2, 1: DROPPED})).identities == ["1", "2"]


def test_a_class_without_images_disappears_and_unreadable_records_stay() -> None:
    source = Listed([0, -1, 2, 2], 4)
    overlay = Overlay(source, decisions(source, {1: 2}))
    assert (overlay.num_classes, overlay.identities) == (2, ["0", "2"])
    assert overlay.labels().tolist() == [0, -1, 1, 1]


def test_a_file_comes_back(tmp_path: Path, im2rec: Path) -> None:
    source = open_source(im2rec)
    made = decisions(source, {0: 3, 5: DROPPED, 40: 8}, {1: 2})
    write_overlay(tmp_path / "a.overlay", made)
    read = read_overlay(tmp_path / "a.overlay")
    assert read.digest() == made.digest()
    opened = open_source(im2rec, overlay=tmp_path / "a.overlay")
    assert content_labels(opened) == content_labels(Overlay(source, made))
    with pytest.raises(InputError, match="exists already"):
        write_overlay(tmp_path / "a.overlay", made)
    with pytest.raises(InputError, match="No such file"):
        write_overlay(tmp_path / "nowhere" / "a.overlay", made)
    with pytest.raises(InputError, match=r"b\.overlay: No such file"):
        read_overlay(tmp_path / "b.overlay")


def content_labels(source: Source) -> list[tuple[bytes, int]]:
    return [(sample.encoded, sample.label) for sample in map(source.read, range(len(source)))]


def test_another_set_is_refused(tmp_path: Path, im2rec: Path, with_header: Path) -> None:
    write_overlay(tmp_path / "a.overlay", decisions(open_source(im2rec), {0: 3}))
    with pytest.raises(InputError, match=r"a\.overlay was made .*, but .*insightface.train\.rec has other labels or"):
        open_source(with_header, overlay=tmp_path / "a.overlay")
    with pytest.raises(InputError, match=r"made for a set of 48 images of 8 identities, but .* has 48 images of 9 id"):
        open_source(im2rec, num_classes=9, overlay=tmp_path / "a.overlay")
    shorter = Listed([0] * 47, 8)
    with pytest.raises(InputError, match="but listed has 47 images of 8 identities"):
        Overlay(shorter, read_overlay(tmp_path / "a.overlay"))


def test_the_mapping_covers_every_decision() -> None:
    source = Listed([0, 1, 1, 2, 2], 3)
    made = [
        decisions(source, changes, merges)
        for changes, merges in (
            ({}, {}),
            ({1: 0}, {}),
            ({1: 2}, {}),
            ({3: 1}, {}),
            ({1: DROPPED}, {}),
            ({}, {1: 2}),
            ({}, {2: 1}),
            ({1: 3}, {}),
        )
    ]
    mappings = [mapping_of(Overlay(source, each)) for each in made]
    assert len({*mappings, None}) == len(made) + 1
    twice = Overlay(Overlay(source, made[0]), decisions(Overlay(source, made[0]), {1: 0}))
    assert mapping_of(twice) not in mappings
    assert mapping_of(SubsetSource(twice, 1)) == mapping_of(twice)
    assert mapping_of(source) is None


@pytest.mark.parametrize(
    ("changes", "merges", "sentence"),
    [
        ({9: 0}, {}, r"record 9 of an overlay is no index of a record in \[0, 4\)"),
        ({0: -2}, {}, r"label -2 of an overlay is no class id"),
        ({}, {0: 1, 1: 0}, "merges lead from class 0 back"),
        ({}, {0: 0}, "merges lead from class 0 back"),
        ({}, {0: 5}, r"merged class 5 of an overlay is no class id in \[0, 2\)"),
    ],
)
def test_impossible_decisions(changes: dict[int, int], merges: dict[int, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decisions(Listed([0, 0, 1, 1], 2), changes, merges)


def test_two_decisions_about_a_record() -> None:
    with pytest.raises(InputError, match="record 2 is decided on twice"):
        decide(Listed([0, 0, 1], 2), np.array([2, 0, 2]), np.array([0, 1, 1]))


class TestDamagedFiles:
    @pytest.fixture
    def changed(self, tmp_path: Path) -> Callable[..., Path]:
        def change(facts: dict[str, str] | None = None, **arrays: Any) -> Path:
            path = tmp_path / "a.overlay"
            write_overlay(path, decisions(Listed([0, 0, 1, 1], 2), {0: 1, 2: 2}))
            own = {"kind": "overlay", "schema_version": "1", "images": "4", "classes": "2", "fingerprint": "0"}
            save_file({**load_file(path), **arrays}, path, own | (facts or {}))
            return path

        return change

    def test_a_newer_version(self, changed: Callable[..., Path]) -> None:
        with pytest.raises(InputError, match=r"version 2, and this partialfc reads them up to 1: install"):
            read_overlay(changed({"schema_version": "2"}))

    @pytest.mark.parametrize(
        ("facts", "arrays"),
        [
            ({"kind": "model"}, {}),
            ({"schema_version": "one"}, {}),
            ({"images": "many"}, {}),
            ({"classes": "0"}, {}),
            ({"images": "2"}, {}),
            ({}, {"records": np.array([2, 0])}),
            ({}, {"records": np.array([0])}),
            ({}, {"records": np.array([0, 2], np.int32)}),
            ({}, {"labels": np.array([1, 3])}),
            ({}, {"labels": np.array([[1, 2]])}),
            ({}, {"merges": np.array([1, 2])}),
            ({}, {"merges": np.array([[1, 9]])}),
            ({}, {"absent": np.array([-1])}),
            ({}, {"absent": np.array([[0]])}),
            ({}, {"parents": np.array([2])}),
        ],
    )
    def test_values_that_no_overlay_has(
        self, changed: Callable[..., Path], facts: dict[str, str], arrays: dict[str, Any]
    ) -> None:
        with pytest.raises(InputError, match=r"a\.overlay is (damaged or )?no overlay file"):
            read_overlay(changed(facts, **arrays))

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        path = tmp_path_factory.mktemp("any") / "a.overlay"
        write_overlay(path, decisions(Listed([0, 0, 1, 1], 2), {0: 1, 2: 2}))
        original = path.read_bytes()
        damaged = bytearray(original[: data.draw(st.integers(0, len(original)))])
        for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)):
            if damaged:
                damaged[place] = data.draw(st.integers(0, 255))
        path.write_bytes(damaged)
        source = Listed([0, 0, 1, 1], 2)
        refusal = None
        try:
            overlay = Overlay(source, read_overlay(path), path)
            labels = [overlay.read(index).label for index in range(len(overlay))]
            assert all(0 <= label < overlay.num_classes for label in labels)
        except InputError as error:
            refusal = str(error)
        assert refusal is None or "a.overlay" in refusal

    def test_labels_of_images_that_are_said_to_be_gone(self, changed: Callable[..., Path]) -> None:
        read = read_overlay(changed(absent=np.array([0])))
        source = Listed([0, 0, 1, 1], 2)
        overlay = Overlay(source, Decisions(**{**vars(read), "fingerprint": decisions(source, {}).fingerprint}), "it")
        with pytest.raises(InputError, match="record 1 has label 0, of which no image is left by it"):
            overlay.read(1)
