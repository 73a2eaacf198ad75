"""Model folders: what is saved is what is loaded, a save is never half done, and each mistake is one sentence."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partialfc.backbones import create_backbone
from partialfc.core import files as core_files
from partialfc.core.errors import InputError
from partialfc.model.config import ModelConfig
from partialfc.model.embed import embed, embed_batches, prepare
from partialfc.model.files import Model, find_model, load_model, save_model

CONFIG = ModelConfig("mini", embedding_dim=8, image_size=16)


def make_backbone(seed: int = 0) -> nn.Module:
    return create_backbone("mini", embedding_dim=8, image_size=16, seed=seed)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    backbone = make_backbone().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    backbone(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))  # moves the running statistics
    save_model(tmp_path / "a" / "model", backbone, CONFIG)
    loaded = load_model(tmp_path / "a" / "model")
    assert loaded.config == CONFIG
    assert same_weights(loaded.backbone, backbone)
    assert not loaded.backbone.training
    trainable = {key: p.requires_grad for key, p in backbone.named_parameters()}
    assert {key: p.requires_grad for key, p in loaded.backbone.named_parameters()} == trainable
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == ["config.json", "model", "model.safetensors"]


def test_all_of_the_configuration_is_kept(tmp_path: Path) -> None:
    config = ModelConfig("mini", embedding_dim=8, image_size=16, color_order="bgr", mean=0.4, std=0.25, flip=False)
    save_model(tmp_path / "model", make_backbone(), config)
    assert load_model(tmp_path / "model").config == config
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {
        "trained_on": [],
        "format": "partialfc-model-1",
        "schema_version": 1,
        "backbone": "mini",
        "embedding_dim": 8,
        "image_size": 16,
        "color_order": "bgr",
        "mean": 0.4,
        "std": 0.25,
        "template": "arcface-112",
        "flip": False,
    }


def test_a_run_folder_gives_its_best_model_or_else_its_last(tmp_path: Path) -> None:
    last, best = make_backbone(1), make_backbone(2)
    save_model(tmp_path / "model" / "last", last, CONFIG)
    assert same_weights(load_model(tmp_path).backbone, last)
    save_model(tmp_path / "model" / "best", best, CONFIG)
    assert same_weights(load_model(str(tmp_path)).backbone, best)


def test_the_folder_between_run_and_model_is_taken_too(tmp_path: Path) -> None:
    save_model(tmp_path / "model" / "last", make_backbone(), CONFIG)
    assert find_model(tmp_path / "model") == (tmp_path / "model" / "last").resolve()


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "model", make_backbone(), CONFIG)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def test_versions_of_the_configuration(tmp_path: Path) -> None:
    save_model(tmp_path, make_backbone(), CONFIG)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "schema_version": 2, "depth": 7}))
    with pytest.raises(InputError, match=r"config.json has schema_version 2, and this partialfc reads them up to 1"):
        load_model(tmp_path)
    del values["schema_version"]  # as older ones
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_model(tmp_path).config == CONFIG


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_backbone().half(), CONFIG)
    dtypes = {p.dtype for p in load_model(tmp_path / "model").backbone.parameters()}
    assert dtypes == {torch.float32}


def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, make_backbone(1), CONFIG)
    (folder / "README.md").write_text("mine")
    save_model(folder, make_backbone(2), CONFIG)
    assert same_weights(load_model(folder).backbone, make_backbone(2))
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_save_leaves_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is interrupted at each of its steps in turn: the old model loads, or the new one."""
    folder = tmp_path / "model"
    old, new = make_backbone(1), make_backbone(2)
    save_model(folder, old, CONFIG)
    steps_done, failing = 0, -1

    def stop_at(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: object, **kwargs: object) -> object:
            nonlocal steps_done
            steps_done += 1
            if steps_done == failing:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    for owner, name in ((Path, "write_bytes"), (core_files, "fsync"), (Path, "rename"), (shutil, "rmtree")):
        stop_at(owner, name)
    save_model(folder, old, CONFIG)
    total, replaced = steps_done, []
    assert total >= 8  # the weights, two files and two folders flushed, two renames, an old folder removed
    for failing in range(1, total + 1):
        steps_done = 0
        with pytest.raises(KeyboardInterrupt):
            save_model(folder, new, CONFIG)
        replaced.append(same_weights(load_model(folder).backbone, new))
        assert replaced[-1] or same_weights(load_model(folder).backbone, old)
        steps_done, failing = 0, -1
        save_model(folder, old, CONFIG)
        assert same_weights(load_model(folder).backbone, old)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert replaced == sorted(replaced)  # the old one up to a rename, the new one from there on
    assert {False, True} == set(replaced)


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(InputError, match=f"{name} is not a model folder and would be overwritten"):
            save_model(tmp_path / name, make_backbone(), CONFIG)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", make_backbone(), CONFIG)
    assert load_model(tmp_path / "empty").config == CONFIG


def test_a_backbone_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, make_backbone(), CONFIG)
    with pytest.raises(ValueError, match=r"is it wrapped\?\): .* is missing"):
        save_model(folder, nn.Sequential(make_backbone(1)), CONFIG)
    with pytest.raises(ValueError, match="is no r18 as its config says"):
        save_model(folder, make_backbone(1), ModelConfig("r18", embedding_dim=8, image_size=16))
    assert same_weights(load_model(folder).backbone, make_backbone())


def test_paths_that_have_no_name_or_are_links_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", make_backbone(1), CONFIG)
    monkeypatch.chdir(tmp_path / "model")
    assert same_weights(load_model(".").backbone, make_backbone(1))
    with pytest.raises(InputError, match="/ holds no model"):
        load_model("/")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    save_model(tmp_path / "link", make_backbone(2), CONFIG)
    assert (tmp_path / "link").is_symlink()
    assert same_weights(load_model(tmp_path / "model").backbone, make_backbone(2))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra': the keys are backbone, embedding_dim"),
        ({"format": "other"}, '"format" must be "partialfc-model-1"'),
        ({"backbone": None}, "no key 'backbone'"),
        ({"backbone": "minni"}, "Did you mean 'mini'"),
        ({"backbone": ["r50"]}, "backbone .* must be a name"),
        ({"embedding_dim": "512"}, "embedding_dim '512' .* positive integer"),
        ({"embedding_dim": True}, "embedding_dim True .* positive integer"),
        ({"image_size": 0}, "image_size 0 .* positive integer"),
        ({"mean": "half"}, "mean 'half' .* number"),
        ({"std": 0}, "std 0 .* positive"),
        ({"color_order": "grb"}, "color_order 'grb' .* one of rgb, bgr"),
        ({"flip": 1}, "flip 1 .* must be true or false"),
        ({"template": "mine"}, "template 'mine' .* one of arcface-112"),
        ({"image_size": 30}, "image_size 30 .* multiple of 16"),
        ({"embedding_dim": 9}, r"do not fit mini with embedding_dim 9 at image_size 16: fc.weight is \(8, \d+\) and"),
        ({"backbone": "r18"}, "do not fit r18 .* and [0-9]+ more differences"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_model(tmp_path / "model", make_backbone(), CONFIG)
    change_config(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_wrong_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, make_backbone(), CONFIG)
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    bias = weights.pop("fc.bias")
    save_file({**weights, "extra.bias": bias}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"fc.bias is missing, extra.bias is left over\."):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"model.safetensors cannot be read .* save the model again"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model.safetensors: the folder is incomplete"):
        load_model(folder)


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no model"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors but no config.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="is no readable file of weights"):
        load_model(tmp_path / "model.safetensors")
    for text in ("{", "[1]", '"text"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json (is not JSON|does not describe)"):
            load_model(tmp_path)


def test_embed_adds_the_mirror_image_and_leaves_no_trace() -> None:
    backbone = make_backbone().train()
    backbone.bn.eval()  # a layer that the caller froze
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    model, pictures = Model(backbone, CONFIG), images(7)
    embeddings = embed(model, pictures, batch_size=3)
    assert backbone.training
    assert not backbone.bn.training
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())
    backbone.eval()
    with torch.no_grad():
        straight = backbone(prepare(torch.from_numpy(pictures), CONFIG))
        mirrored = backbone(prepare(torch.from_numpy(pictures[:, :, ::-1].copy()), CONFIG))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings, straight + mirrored, atol=1e-5)
    assert torch.allclose(embed(model, torch.from_numpy(pictures), flip=False), straight, atol=1e-5)
    # An ordinary tensor: autograd may use it.
    assert torch.ones(8, requires_grad=True).mul(embeddings).sum().requires_grad


def test_embed_takes_any_number_of_images_and_read_only_arrays() -> None:
    model = Model(make_backbone().eval(), CONFIG)
    pictures = images(5)
    pictures.flags.writeable = False
    assert embed(model, pictures[:0]).shape == (0, 8)
    together = embed(model, pictures)
    one_by_one = torch.cat([embed(model, pictures[number : number + 1]) for number in range(5)])
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_batches_put_the_mode_back_when_they_are_abandoned() -> None:
    model = Model(make_backbone().train(), CONFIG)
    batches = embed_batches(model, images(5), batch_size=2)
    assert [len(next(batches)), len(next(batches))] == [2, 2]
    assert not model.backbone.training
    batches.close()
    assert model.backbone.training


def test_embed_puts_the_mode_back_after_an_error() -> None:
    model = Model(make_backbone().train(), CONFIG)
    model.backbone.fc = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        embed(model, images(2))
    assert model.backbone.training
    assert model.backbone.features.training


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 16, 17, 3), (2, 16, 16, 1), (2, 16, 16)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"The images are {shape[1]} × {shape[2]} .* the model takes 16 × 16"):
        embed(Model(make_backbone(), CONFIG), np.zeros(shape, dtype=np.uint8))


def test_prepare_follows_the_configuration() -> None:
    pixels = torch.from_numpy(images(2))
    share = pixels.permute(0, 3, 1, 2).double() / 255
    assert torch.allclose(prepare(pixels, CONFIG).double(), (share - 0.5) / 0.5, atol=1e-6)
    other = ModelConfig("mini", image_size=16, color_order="bgr", mean=0.4, std=0.25)
    assert torch.allclose(prepare(pixels, other).double(), (share.flip(1) - 0.4) / 0.25, atol=1e-5)
