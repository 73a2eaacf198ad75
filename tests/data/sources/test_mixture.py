from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_runs import write_images

from partialfc.core.errors import InputError
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.base import mapping_of
from partialfc.data.sources.overlay import decide, write_overlay


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write_images(tmp_path / "one", ["anna", "bert"], shots=2)
    write_images(tmp_path / "two", ["bert", "carl", "dora"], shots=1)
    return tmp_path


def mixture(folder: Path, text: str) -> Path:
    (folder / "mixture.yaml").write_text(text)
    return folder / "mixture.yaml"


def test_disjoint_identities(two: Path) -> None:
    source = open_source(mixture(two, "sources: [{path: one}, {path: two, weight: 2}]"))
    assert (source.format, len(source), source.num_classes) == ("mixture", 4 + 2 * 3, 5)
    assert source.identities == ["one/anna", "one/bert", "two/bert", "two/carl", "two/dora"]
    assert source.labels().tolist() == [0, 0, 1, 1, *[2, 3, 4] * 2]
    samples = [source.read(index) for index in range(len(source))]
    assert [sample.label for sample in samples] == source.labels().tolist()
    assert [sample.name for sample in samples] == [source.name(index) for index in range(10)]
    assert samples[4].name == samples[7].name == str(two / "two" / "bert" / "0.png")
    for index in (-1, 10):
        with pytest.raises(IndexError):
            source.read(index)


def test_merged_identities(two: Path) -> None:
    source = open_source(mixture(two, "{identities: merged, sources: [{path: two}, {path: one}]}"))
    assert source.identities == ["bert", "carl", "dora", "anna"]
    assert source.labels().tolist() == [0, 1, 2, 3, 3, 0, 0]


def test_an_image_of_weight_two_comes_twice_an_epoch(two: Path) -> None:
    source = open_source(mixture(two, "sources: [{path: one}, {path: two, weight: 2}]"))
    loader = Loader(source, global_batch_size=5, micro_batch_size=5, seed=1)
    labels = np.concatenate([batch.labels.numpy() for batch in loader.batches(0, 2)])
    assert np.bincount(labels).tolist() == [2, 2, 2, 2, 2]


def test_overlays_of_single_sources(two: Path) -> None:
    own = open_source(two / "one")
    write_overlay(two / "one.overlay", decide(own, np.array([0]), np.array([-1])))
    text = "sources: [{path: one, overlay: one.overlay}, {path: one}]"
    source = open_source(mixture(two, text))
    assert source.labels().tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert source.identities == ["one/anna", "one/bert", "one (2)/anna", "one (2)/bert"]


def test_the_mapping_covers_sources_weights_and_classes(two: Path) -> None:
    texts = [
        "sources: [{path: one}, {path: two}]",
        "sources: [{path: two}, {path: one}]",
        "sources: [{path: one}, {path: two, weight: 2}]",
        "{identities: merged, sources: [{path: one}, {path: two}]}",
    ]
    assert len({mapping_of(open_source(mixture(two, text))) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "cannot read .*mixture.yaml as YAML"),
        ("one", "describes no mixture: write `sources:` and `identities:`"),
        ("{}", "has no list of sources"),
        ("sources: []", "has no list of sources"),
        ("sources: [one]", "describes no mixture: write `path:` and `weight:`"),
        ("sources: [{pth: one}]", "has the key 'pth', which no mixture has. Did you mean 'path'"),
        ("{source: [], sources: []}", "Did you mean 'sources'"),
        ("sources: [{weight: 2}]", "has a source with the path ''"),
        ("sources: [{path: mixture.yaml}]", "not of a mixture"),
        ("sources: [{path: one, weight: 0.5}]", "gives one the weight 0.5: write a whole number"),
        ("sources: [{path: one, weight: true}]", "gives one the weight True"),
        ("{identities: same, sources: [{path: one}]}", "has identities 'same': write disjoint or merged"),
        ("sources: [{path: three}]", "three does not exist"),
    ],
)
def test_files_that_describe_no_mixture(two: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_source(mixture(two, text))


def test_sources_without_names_cannot_be_merged(two: Path, im2rec: Path) -> None:
    text = f"{{identities: merged, sources: [{{path: one}}, {{path: {im2rec}}}]}}"
    with pytest.raises(InputError, match=r"train\.rec has no names: write `identities: disjoint`"):
        open_source(mixture(two, text))
    source = open_source(mixture(two, f"sources: [{{path: one}}, {{path: {im2rec}}}]"))
    assert source.identities is not None
    assert source.identities[2:4] == [f"{im2rec}/0", f"{im2rec}/1"]
    with pytest.raises(InputError, match="weight 100000000000: write a whole number from 1 to 1000"):
        open_source(mixture(two, "sources: [{path: one, weight: 100000000000}]"))
    with pytest.raises(InputError, match="leave num_classes out"):
        open_source(two / "mixture.yaml", num_classes=3)
