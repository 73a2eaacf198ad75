"""Mirroring belongs to the model: from the training through its configuration to every embedding of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import INSIGHTFACE, LFW, QUICK, complaint, run
from torch import nn

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.data.pair_files import PairSet
from partialfc.evaluation.baselines import pixel_embeddings
from partialfc.evaluation.pairs import evaluate_pair_set, evaluate_pairs
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of
from partialfc.model.embed import embed
from partialfc.model.files import Model, load_model, save_model

SIZE = 16


class Flatten(nn.Module):
    """The pixels, weighted, as the embedding: a network that sees which side is which."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * self.weight


def letters(pairs: int = 60) -> PairSet:
    """Pictures of which the mirror image is another identity, like the letters b and d; half of the pairs are alike."""
    generator = np.random.default_rng(0)
    is_same = np.arange(pairs) % 2 == 0
    first = generator.integers(0, 236, (pairs, SIZE, SIZE, 3))
    second = np.where(is_same[:, None, None, None], first, first[:, :, ::-1])
    images = np.stack([first, second], axis=1).reshape(2 * pairs, SIZE, SIZE, 3)
    noise = generator.integers(0, 20, images.shape)
    return PairSet((images + noise).astype(np.uint8), is_same)


def test_the_configuration_decides_where_mirror_images_differ() -> None:
    pairs = letters()
    model = Model(Flatten(), ModelConfig("mini", embedding_dim=3 * SIZE**2, image_size=SIZE, flip=False))
    assert evaluate_pair_set(model, pairs).accuracy == 1.0
    assert evaluate_pair_set(model.with_flip(True), pairs).accuracy < 0.75  # b and d are one
    assert evaluate_pair_set(model.with_flip(None), pairs).accuracy == 1.0
    as_told = embed(model, pairs.images, flip=True)
    assert torch.equal(as_told, embed(model.with_flip(True), pairs.images))
    assert not torch.equal(as_told, embed(model, pairs.images))


def test_baselines_follow() -> None:
    pairs = letters()
    assert evaluate_pairs(pixel_embeddings(pairs.images, flip=False), pairs.is_same).accuracy > 0.95
    assert evaluate_pairs(pixel_embeddings(pairs.images, flip=True), pairs.is_same).accuracy < 0.75


def test_it_is_stored_and_an_older_model_is_mirrored(tmp_path: Path) -> None:
    backbone = create_backbone("mini", embedding_dim=8, image_size=SIZE)
    config = ModelConfig("mini", embedding_dim=8, image_size=SIZE, flip=False)
    save_model(tmp_path, backbone, config)
    assert load_model(tmp_path).config == config
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("flip") is False
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_model(tmp_path).config == replace(config, flip=True)
    assert contract_of(load_model(tmp_path)) != contract_of(Model(backbone, config))
    (tmp_path / "config.json").write_text(json.dumps({**values, "flip": "no"}))
    with pytest.raises(InputError, match="flip 'no' of a model must be true or false"):
        load_model(tmp_path)


@pytest.mark.slow
def test_a_training_without_mirroring_gives_a_model_without(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flip in ("true", "false"):
        options = [*QUICK, f"--data.flip={flip}", "--out", tmp_path / flip]
        assert run("train", "--data.path", INSIGHTFACE, *options, "--json") == 0
        assert load_model(tmp_path / flip).config.flip is (flip == "true")
    capsys.readouterr()

    def scores(*options: str) -> Any:
        assert run("evaluate", tmp_path / "false", "--benchmark", f"lfw={LFW}", "--json", *options) == 0
        return json.loads(capsys.readouterr().out)["benchmarks"]

    assert scores() == scores("--no-flip")
    assert scores() != scores("--flip")
    assert "--flop" in complaint(capsys, "evaluate", tmp_path / "false", "--benchmark", f"lfw={LFW}", "--flop")
