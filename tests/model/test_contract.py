"""The contract of a model changes with everything that changes an embedding, and with nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from partialfc.backbones import create_backbone
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of, same_source, variant_of
from partialfc.model.embed import embed
from partialfc.model.files import Model, load_model, save_model

CONFIG = ModelConfig("mini", embedding_dim=8, image_size=16)


def mini(seed: int = 0) -> Model:
    return Model(create_backbone("mini", embedding_dim=8, image_size=16, seed=seed), CONFIG)


def model_of(entries: dict[str, torch.Tensor]) -> Model:
    """A model whose state_dict has these entries, in this order."""
    backbone = nn.Module()
    for name, tensor in entries.items():
        backbone.register_buffer(name, tensor)
    return Model(backbone, CONFIG)


def test_it_is_the_hash_that_its_description_says() -> None:
    weights = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor(7)}
    content = json.dumps(["partialfc-contract-1", "mini", 8, 16, "rgb", 0.5, 0.5, "arcface-112", True]).encode() + b"\n"
    content += b'["a", "int64", []]\n' + (7).to_bytes(8, "little")
    content += b'["b", "float32", [2, 3]]\n' + np.arange(6, dtype="<f4").tobytes()
    assert contract_of(model_of(weights)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "r18"},
        {"embedding_dim": 9},
        {"image_size": 32},
        {"color_order": "bgr"},
        {"mean": 0.4},
        {"std": 0.25},
        {"flip": False},
    ],
)
def test_each_value_of_the_configuration_changes_it(changes: dict[str, Any]) -> None:
    model = mini()
    assert contract_of(replace(model, config=replace(CONFIG, **changes))) != contract_of(model)


def test_the_template_changes_it() -> None:
    model, other = mini(), replace(CONFIG)
    object.__setattr__(other, "template", "another")  # there is only one so far
    assert contract_of(replace(model, config=other)) != contract_of(model)


def test_names_shapes_dtypes_and_bytes_of_weights_change_it() -> None:
    values = torch.arange(6, dtype=torch.float32)
    contracts = [
        contract_of(model_of(entries))
        for entries in (
            {"a": values},
            {"b": values},
            {"a": values.view(2, 3)},
            {"a": values.view(3, 2)},
            {"a": values.long()},
            {"a": values.int()},
            {"a": values + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
            {"a": values, "b": values[:0]},
            {"a": values[:3], "b": values[3:]},
            {"a": values[:2], "b": values[2:]},
        )
    ]
    assert len(set(contracts)) == len(contracts)


def test_one_changed_bit_of_any_entry_changes_it() -> None:
    model = mini()
    before = contract_of(model)
    for tensor in model.backbone.state_dict().values():
        value = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] += 1
        assert contract_of(model) != before
        tensor.view(-1)[-1] = value
    assert contract_of(model) == before


def reordered(model: Model) -> None:
    """Register one layer again, as the last."""
    layer = model.backbone.bn
    del model.backbone.bn
    model.backbone.bn = layer


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.backbone.train(),
        lambda model: model.backbone.requires_grad_(False),
        lambda model: model.backbone.to(memory_format=torch.channels_last),
        lambda model: embed(model, np.zeros((2, 16, 16, 3), np.uint8)),
        lambda model: setattr(model, "origin", "elsewhere"),
        lambda model: model.backbone.double(),
        reordered,
    ],
)
def test_nothing_else_changes_it(act: Callable[[Model], Any]) -> None:
    model = mini()
    before = contract_of(model)
    act(model)
    assert contract_of(model) == before


def test_it_outlives_every_way_through_a_file(tmp_path: Path) -> None:
    model = mini()
    contract = contract_of(model)
    save_model(tmp_path / "folder", model.backbone, model.config)
    loaded = load_model(tmp_path / "folder")
    assert contract_of(loaded) == contract
    save_model(tmp_path / "again", loaded.backbone, loaded.config)
    assert contract_of(load_model(tmp_path / "again")) == contract
    model.backbone.half()  # other numbers
    half = contract_of(model)
    assert half != contract
    save_model(tmp_path / "half", model.backbone, model.config)  # in 16 bits, and loaded as float32
    assert contract_of(load_model(tmp_path / "half")) == half


def test_a_bare_state_dict_has_the_contract_of_the_saved_model(tmp_path: Path) -> None:
    backbone = create_backbone("mbf", embedding_dim=8, image_size=32)
    torch.save({f"module.{name}": tensor for name, tensor in backbone.state_dict().items()}, tmp_path / "model.pt")
    save_model(tmp_path / "folder", backbone, ModelConfig("mbf", embedding_dim=8, image_size=32))
    assert contract_of(load_model(tmp_path / "model.pt")) == contract_of(load_model(tmp_path / "folder"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_the_same_on_another_device() -> None:
    model = mini()
    contract = contract_of(model)
    model.backbone.to("cuda")
    assert contract_of(model) == contract


def test_exports_have_the_contract_of_their_source() -> None:
    first, second = contract_of(mini(0)), contract_of(mini(1))
    export = variant_of(first, "onnx-float16")
    assert export != first
    assert same_source(first, first)
    assert same_source(export, first)
    assert same_source(export, variant_of(first, "bfloat16"))
    assert not same_source(export, second)
    assert not same_source(first, second)
