"""Training on an overlay is training on the set rewritten, and a run is resumed with its own overlay only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import final_tensors, interrupt_at, losses, tiny_config, write_images

from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.sources import open_source
from partialfc.data.sources.overlay import DROPPED, decide, write_overlay
from partialfc.data.sources.recordio import RecordWriter
from partialfc.training.loop import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run on five identities of four images with an overlay: labels changed, images dropped, a merge, a split."""
    images = write_images(tmp_path / "images", "abcde")
    records, labels = np.array([1, 4, 7, 12, 13, 18]), np.array([1, DROPPED, 0, 5, 5, DROPPED])
    write_overlay(tmp_path / "a.overlay", decide(open_source(images), records, labels, {4: 1}))
    base = tiny_config(images, precision="float32")
    longer = replace(base.schedule, epochs=4)
    return replace(base, data=replace(base.data, overlay=str(tmp_path / "a.overlay")), schedule=longer)


def test_bit_for_bit_as_on_the_set_rewritten(config: TrainConfig, tmp_path: Path) -> None:
    source = open_source(config.data.path, overlay=config.data.overlay)
    with RecordWriter(tmp_path / "train.rec", header=False) as writer:
        for index in range(len(source)):
            sample = source.read(index)
            writer.write(sample.encoded, sample.label)
    train(config, tmp_path / "overlay", quiet=True)
    rewritten = replace(config, data=replace(config.data, path=str(tmp_path / "train.rec"), overlay=None))
    train(rewritten, tmp_path / "rewritten", quiet=True)
    assert losses(tmp_path / "overlay") == losses(tmp_path / "rewritten")
    expected, actual = final_tensors(tmp_path / "rewritten"), final_tensors(tmp_path / "overlay")
    assert expected["rows/centers"].shape[0] == 5
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_another_overlay_is_refused_on_resume(config: TrainConfig, tmp_path: Path) -> None:
    with interrupt_at(4):
        train(config, tmp_path / "run", quiet=True)
    own = open_source(config.data.path)
    # The same numbers of images and classes: two labels are exchanged.
    records, labels = np.array([1, 4, 7, 12, 13, 18]), np.array([0, DROPPED, 1, 5, 5, DROPPED])
    write_overlay(tmp_path / "b.overlay", decide(own, records, labels, {4: 1}))
    for overlay in (str(tmp_path / "b.overlay"), None):
        other = replace(config, data=replace(config.data, overlay=overlay))
        with pytest.raises(InputError, match=r"was trained on data with .* but now .*: resume with the same data"):
            train(other, tmp_path / "run", resume=True, quiet=True)
    moved = tmp_path / "moved.overlay"
    Path(str(config.data.overlay)).rename(moved)
    train(replace(config, data=replace(config.data, overlay=str(moved))), tmp_path / "run", resume=True, quiet=True)


def test_an_overlay_counts_the_classes(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"data\.overlay renumbers the classes and data\.num_classes counts them"):
        replace(config, data=replace(config.data, num_classes=6)).check()
