"""A trained head is continued with other identities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed_workers import run_ranks
from small_runs import final_tensors, tiny_config, write_images

from partialfc.config.options import BackboneConfig, HeadConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.images import decode_image
from partialfc.model.embed import embed
from partialfc.model.files import load_model
from partialfc.training.build import build_state, open_loader
from partialfc.training.initialize import fill_with_class_means, initialize, match_identities
from partialfc.training.loop import train
from partialfc.training.state import TrainState

OLD = ["anna", "bert", "carl", "dora", "emma", "fred"]
NEW = ["aaron", "anna", "bert", "dora", "emma", "fred", "zoe"]  # carl left, two came


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the old identities, and the images of the new ones."""
    folder = tmp_path_factory.mktemp("extending")
    write_images(folder / "new", NEW)
    train(tiny_config(write_images(folder / "old", OLD), device="cpu"), folder / "run", quiet=True)
    return folder


def extending(folder: Path, **head: Any) -> TrainConfig:
    return tiny_config(folder / "new", device="cpu", head=HeadConfig(1.0, from_run=str(folder / "run"), **head))


def state_at_start(config: TrainConfig) -> TrainState:
    loader = open_loader(config)
    state = build_state(config, loader, torch.device("cpu"))
    old_classes = initialize(state, config, loader)
    if old_classes is not None and config.head.new_centers == "mean":
        fill_with_class_means(state, old_classes, config, loader)
    return state


def test_old_centers_stay_bit_by_bit_and_new_ones_are_class_means(folder: Path) -> None:
    state = state_at_start(extending(folder))
    old, centers = final_tensors(folder / "run"), state.head.centers.detach()
    for number, name in enumerate(NEW):
        if name in OLD:
            assert torch.equal(centers[number], old["rows/centers"][OLD.index(name)]), name
    for name, value in state.backbone.state_dict().items():
        assert torch.equal(value, old[f"backbone/{name}"]), name
    model = load_model(folder / "run")
    shots = [decode_image(path.read_bytes()) for path in sorted((folder / "new" / "zoe").iterdir())]
    mean = F.normalize(embed(model, np.stack(shots)), dim=1).mean(dim=0)
    assert float(F.cosine_similarity(mean, centers[-1], dim=0)) == pytest.approx(1.0, abs=1e-5)
    kept = [OLD.index(name) for name in NEW if name in OLD]
    assert float(centers[-1].norm()) == pytest.approx(float(old["rows/centers"][kept].norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_centers_of_another_dtype_are_converted(folder: Path, tmp_path: Path, dtype: str) -> None:
    values = {"head.dtype": "bfloat16"} if dtype == "bfloat16" else {"precision": "float64"}
    train(tiny_config(folder / "old", device="cpu").with_values(values), tmp_path / "run", quiet=True)
    config = extending(folder).with_values({"head.from_run": str(tmp_path / "run")})
    centers, old = state_at_start(config).head.centers.detach(), final_tensors(tmp_path / "run")["rows/centers"]
    assert (centers.dtype, str(old.dtype)) == (torch.float32, f"torch.{dtype}")
    assert torch.equal(centers[NEW.index("anna")], old[OLD.index("anna")].float())


def test_the_centers_of_a_model_without_a_head_are_class_means_too(folder: Path) -> None:
    config = tiny_config(folder / "new", backbone=BackboneConfig("mini", 16, init=str(folder / "run")), device="cpu")
    state, model = state_at_start(config), load_model(folder / "run")
    shots = [decode_image(path.read_bytes()) for path in sorted((folder / "new" / "anna").iterdir())]
    mean = F.normalize(embed(model, np.stack(shots)), dim=1).mean(dim=0)
    centers = state.head.centers.detach()
    assert float(F.cosine_similarity(mean, centers[1], dim=0)) == pytest.approx(1.0, abs=1e-5)
    fresh = build_state(config, open_loader(config), torch.device("cpu")).head.centers.detach()
    assert float(centers[1].norm()) == pytest.approx(float(fresh.norm(dim=1).mean()), rel=1e-5)


def test_new_centers_at_random_are_those_of_the_seed(folder: Path) -> None:
    config = extending(folder, new_centers="random")
    fresh = build_state(config, open_loader(config), torch.device("cpu")).head.centers.detach()
    centers = state_at_start(config).head.centers.detach()
    assert torch.equal(centers[[0, -1]], fresh[[0, -1]])
    assert not torch.equal(centers[1], fresh[1])


def start_on_ranks(rank: int, folder: Path) -> None:
    state = state_at_start(extending(folder))
    torch.save(state.head.centers.detach().clone(), folder / f"centers-{rank}.pt")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_three_ranks_start_from_the_same_centers_as_one(folder: Path) -> None:
    run_ranks(3, start_on_ranks, folder)
    together = torch.cat([torch.load(folder / f"centers-{rank}.pt", weights_only=True) for rank in range(3)])
    alone = state_at_start(extending(folder)).head.centers.detach()
    known = [number for number, name in enumerate(NEW) if name in OLD]
    assert torch.equal(together[known], alone[known])
    torch.testing.assert_close(together, alone)


def test_an_extended_run_trains_resumes_and_names_its_identities(folder: Path, tmp_path: Path) -> None:
    config = extending(folder)
    train(config, tmp_path / "run", quiet=True)
    names = json.loads((tmp_path / "run" / "model" / "best" / "identities.json").read_text())
    assert names == {"schema_version": 1, "identities": NEW}
    assert load_model(tmp_path / "run").config.embedding_dim == 16  # the file beside it does not disturb
    assert train(config, tmp_path / "run", resume=True, quiet=True).steps == 6


def test_what_cannot_be_continued_is_refused_before_the_folder_is_made(folder: Path, tmp_path: Path) -> None:
    base = extending(folder)
    strangers = write_images(tmp_path / "strangers", ["x", "y"])
    for config, sentence in (
        (replace(base, backbone=BackboneConfig("mini", 32)), "embedding_dim 16, but this run has 32"),
        (replace(base, data=replace(base.data, path=str(strangers))), "None of the identities"),
        (replace(base, head=replace(base.head, from_run=str(tmp_path / "none"))), "has no checkpoint"),
    ):
        with pytest.raises(InputError, match=sentence):
            train(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


def test_identities_match_by_name_and_else_by_number() -> None:
    assert match_identities(["a", "b"], 2, ["b", "c", "a"], 3).tolist() == [1, -1, 0]
    assert match_identities(None, 2, None, 4).tolist() == [0, 1, -1, -1]
    assert match_identities(None, 3, None, 2).tolist() == [0, 1]
    assert match_identities(["a", "b"], 2, None, 3).tolist() == [0, 1, -1]
    assert match_identities(["0", "5"], 2, None, 6).tolist() == [0, -1, -1, -1, -1, 1]
    assert match_identities(None, 6, ["5", "7"], 2).tolist() == [5, -1]
