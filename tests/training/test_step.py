"""One optimizer step: what the backbone is handed, and options of the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import final_tensors, tiny_config, write_images
from torch import Tensor

from partialfc.backbones.mini import Mini
from partialfc.config.options import BackboneConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.training.loop import train


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set", [f"person {number}" for number in range(8)])


def keys_of_a_run(config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The keys that the backbone is given in training, in the order of the samples."""
    seen: list[Tensor] = []
    original = Mini.forward

    def forward(self: Mini, images: Tensor, keys: Tensor | None = None) -> Any:
        if self.training:
            assert keys is not None
            seen.append(keys)
        return original(self, images, keys)

    with monkeypatch.context() as patch:
        patch.setattr(Mini, "forward", forward)
        train(config, out, quiet=True)
    return torch.cat(seen)


def test_each_sample_has_its_key_however_the_batch_is_cut(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(images)
    whole = replace(config, data=replace(config.data, micro_batch_size=10))
    cut = keys_of_a_run(config, tmp_path / "cut", monkeypatch)
    assert cut.dtype == torch.int64
    assert len(cut) == len(cut.unique()) == 60  # also in the second epoch a sample has a new key
    assert torch.equal(cut, keys_of_a_run(whole, tmp_path / "whole", monkeypatch))
    assert not torch.equal(cut, keys_of_a_run(replace(whole, seed=1), tmp_path / "other", monkeypatch))


@pytest.mark.slow
def test_dropout_reaches_the_network_and_survives_a_resume(images: Path, tmp_path: Path) -> None:
    backbone = BackboneConfig("r18", 16, dropout=0.4)
    config = tiny_config(images, backbone=backbone)
    config = replace(config, schedule=replace(config.schedule, epochs=1, warmup_epochs=0))
    train(config, tmp_path / "straight", quiet=True)
    for _ in range(2):  # the second call finds the run at its end
        train(config, tmp_path / "twice", resume=True, quiet=True)
    plain = replace(config, backbone=BackboneConfig("r18", 16))
    train(plain, tmp_path / "plain", quiet=True)
    straight, twice, without = (final_tensors(tmp_path / name) for name in ("straight", "twice", "plain"))
    assert all(torch.equal(value, twice[name]) for name, value in straight.items())
    assert not torch.equal(straight["backbone/fc.weight"], without["backbone/fc.weight"])


def test_an_option_that_a_network_does_not_know_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "nowhere", backbone=BackboneConfig("mini", 16, drop_path=0.1))
    with pytest.raises(InputError, match="Backbone mini does not take the option 'drop_path'"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
