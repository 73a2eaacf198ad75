"""State_dict files of the reference implementation: recognised, loaded, and refused in one sentence."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.model.config import ModelConfig
from partialfc.model.files import load_model, save_model
from partialfc.model.recognise import recognise


@pytest.mark.parametrize(
    ("name", "size"), [("r18", 32), ("r200", 112), ("mbf", 48), ("mbf_large", 112), ("vit_h", 112), ("vit_t", 27)]
)
def test_architectures_are_recognised(name: str, size: int) -> None:
    with torch.device("meta"):
        weights = create_backbone(name, embedding_dim=24, image_size=size).state_dict()
    assert recognise(weights) == (name, 24, size)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.backbone."])
def test_a_bare_state_dict_is_loaded(tmp_path: Path, prefix: str) -> None:
    backbone = create_backbone("mbf", embedding_dim=8, image_size=32).eval()
    torch.save({prefix + key: value for key, value in backbone.state_dict().items()}, tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    assert (model.config.backbone, model.config.embedding_dim, model.config.image_size) == ("mbf", 8, 32)
    assert "mbf, embedding_dim 8, image_size 32, recognised" in model.origin
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.backbone(images), backbone(images))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("ran"),)


def test_other_files_are_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    weights = create_backbone("mbf", embedding_dim=8, image_size=32).state_dict()
    damaged = {key: value for key, value in weights.items() if key != "conv_sep.layers.1.bias"}
    for content, message in [
        (Harmful(), "no readable file of weights alone"),
        (
            {"epoch": 3, "state": {"conv.weight": torch.zeros(2)}},
            r"it holds epoch \(int\), state \(1 entries such as conv",
        ),
        ({"state_dict": weights, "ema": weights}, "several backbones .state_dict, ema.: save one"),
        ({"state_dict": {"net.layer4.0.conv1.weight": torch.zeros(2)}}, "IResNet with .0, 0, 0, 1. blocks"),
        ({}, "it holds nothing"),
        ([1, 2], "holds a list and no state_dict"),
        ({"layers.0.weight": torch.zeros(2)}, r"it holds layers.0.weight \(Tensor\), and no state_dict of an IResNet"),
        ({"conv_sep.layers.0.weight": torch.zeros(2)}, "MobileFaceNet of 0 blocks"),
        ({"layer4.0.conv1.weight": torch.zeros(2)}, "IResNet with .0, 0, 0, 1. blocks"),
        ({"patch_embed.proj.weight": torch.zeros(256, 3)}, "ViT of width 256 and depth 0"),
        (damaged, "do not fit mbf .* conv_sep.layers.1.bias is missing"),
    ]:
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            load_model(path)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="no readable file"):
        load_model(path)
    assert not (tmp_path / "ran").exists()


HEAD = {"head.weight": torch.zeros(3, 8)}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "wrapped", "said"),
    [
        ("a.ckpt", lambda weights: {"epoch": 3, "state_dict": weights, "loops": {"fit": {"n": 1}}}, "(state_dict)"),
        ("a.pth.tar", lambda weights: {"state_dict": prefixed("module.", weights)}, "(state_dict module.*)"),
        ("A.CKPT", lambda weights: {"state_dict": prefixed("model.", weights) | HEAD}, "(state_dict model.*)"),
        ("a.pt", lambda weights: {"state_dict_backbone": weights, "state_dict_softmax_fc": HEAD}, "dict_backbone)"),
        ("a.pth", lambda weights: prefixed("backbone.", weights) | HEAD, "(backbone.*)"),
        ("a.pt", lambda weights: {**weights, "epoch": 3}, "recognised from"),
        ("pytorch_model.bin", lambda weights: weights, "recognised from"),
        ("without_suffix", lambda weights: weights, "recognised from"),
    ],
)
def test_a_backbone_is_found_in_what_holds_more(
    tmp_path: Path, name: str, wrapped: Callable[[dict[str, Tensor]], dict[str, Any]], said: str
) -> None:
    weights = create_backbone("mbf", embedding_dim=8, image_size=32).state_dict()
    torch.save(wrapped(weights), tmp_path / name)
    model = load_model(tmp_path / name)
    assert said in model.origin
    assert "lack" not in model.origin
    assert all(torch.equal(weights[key], value) for key, value in model.backbone.state_dict().items())


def test_safetensors_alone_or_in_a_model_folder(tmp_path: Path) -> None:
    backbone = create_backbone("mbf", embedding_dim=8, image_size=32)
    save_model(tmp_path / "model", backbone, ModelConfig("mbf", 8, 32))
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").origin == f"mbf, as the metadata of {tmp_path / 'a.safetensors'} say"
    save_file(backbone.state_dict(), tmp_path / "bare.safetensors")
    assert "recognised from" in load_model(tmp_path / "bare.safetensors").origin
    for name in ("model.safetensors", "config.json"):
        assert load_model(tmp_path / "model" / name).origin == f"mbf, as {tmp_path / 'model' / 'config.json'} says"


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    weights = create_backbone("mbf", embedding_dim=8, image_size=32).state_dict()
    torch.save({key: value for key, value in weights.items() if "num_batches" not in key}, tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    assert "lack num_batches_tracked" in model.origin
    assert all(value == 0 for key, value in model.backbone.state_dict().items() if "num_batches" in key)


def test_objects_that_need_code_are_named(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": argparse.Namespace(lr=1), "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"also holds objects of argparse.Namespace, which only its own program"):
        load_model(tmp_path / "a.ckpt")
