"""State_dict files of the reference implementation: recognised, loaded, and refused in one sentence."""

from pathlib import Path

import pytest
import torch

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.model.files import load_model
from partialfc.model.recognise import recognise


@pytest.mark.parametrize(
    ("name", "size"), [("r18", 32), ("r200", 112), ("mbf", 48), ("mbf_large", 112), ("vit_h", 112), ("vit_t", 27)]
)
def test_architectures_are_recognised(name: str, size: int) -> None:
    with torch.device("meta"):
        weights = create_backbone(name, embedding_dim=24, image_size=size).state_dict()
    assert recognise(weights) == (name, 24, size)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
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
        ({"epoch": 3, "state_dict": weights}, "holds no bare state_dict"),
        ([1, 2], "holds no bare state_dict"),
        ({"layers.0.weight": torch.zeros(2)}, "keys .layers.0.weight, .* are those of no IResNet"),
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
