"""Published checkpoints become runs that go on as the published code would have, and wrong ones are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import complaint, run
from published_training import PublishedTraining, random_step
from small_runs import after_each_step, final_tensors, losses, on_micro_batch, write_images
from torch import Tensor

from partialfc.backbones import create_backbone
from partialfc.checkpoint.read import Checkpoint
from partialfc.data.augment import augment
from partialfc.data.loader import Batch
from partialfc.head.sampling import sample_classes
from partialfc.training.migrate import backbone_state, read_rank_file
from partialfc.training.step import Stepper

CLASSES, WIDTH, BATCH, RANKS, SIZE = 40, 64, 4, 3, 16
NETWORK = "r18"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "set", [f"{number:02}" for number in range(CLASSES)], 3)


def training(name: str = NETWORK, **options: Any) -> PublishedTraining:
    """Some steps of the published training with random images."""
    backbone = create_backbone(name, embedding_dim=WIDTH, image_size=SIZE)
    arguments: dict[str, Any] = {"world_size": RANKS, "total": 5, **options}
    published = PublishedTraining(backbone, CLASSES, WIDTH, **arguments)
    for seed in range(3):
        random_step(published, BATCH, SIZE, seed)
    return published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A folder in the published layout, with its configuration as config.py."""
    folder = tmp_path_factory.mktemp("published")
    run_ = training()
    run_.write_config(folder / "config.py", images, NETWORK, BATCH, 0.3)
    return run_.save(folder)


def migrate(folder: Path, out: Path, *options: object) -> int:
    return run("migrate", folder, "--config-file", folder / "config.py", "--out", out, "--compat=insightface", *options)


def resume(out: Path, *options: object) -> int:
    config = yaml.safe_load((out / "config.yaml").read_text())
    options = ("--data.workers=0", "--output.log-every=1", "--device=cpu", *options)
    return run("train", config["data"]["path"], "--config", out / "config.yaml", "--out", out, "--resume", *options)


@pytest.mark.parametrize(
    ("margin", "network", "warmup"), [((0.0, 0.4), "r18", 0), ((0.5, 0.0), "mbf", 2)]
)
def test_a_resumed_run_equals_the_published_continuation(
    tmp_path: Path, images: Path, margin: tuple[float, float], network: str, warmup: int
) -> None:
    published = training(network, margin=margin, warmup=warmup)
    published.write_config(tmp_path / "config.py", images, network, BATCH, 0.3)
    published.save(tmp_path)
    out = tmp_path / "run"
    assert migrate(tmp_path, out) == 0

    batches: dict[int, list[Batch]] = {}
    expected: list[float] = []
    differences: list[float] = []

    def record(stepper: Stepper, batch: Batch) -> None:
        batches.setdefault(batch.step, []).append(batch)

    def follow(stepper: Stepper) -> None:
        """Take the same step with the plain implementation, and compare."""
        parts, seed, step = batches[stepper.state.done], stepper.config.seed, stepper.state.done
        inputs = [augment(part.images, part.positions, seed, flip=True, preset="flip").double() for part in parts]
        labels = [part.labels for part in parts]
        sample = {"num_classes": CLASSES, "sample_rate": 0.3, "seed": seed, "step": step, "start": 0, "stop": CLASSES}
        expected.append(published.step(inputs, labels, sample_classes(torch.cat(labels), **sample)))
        theirs, ours = published.backbone.named_parameters(), dict(stepper.state.backbone.named_parameters())
        differences.append(max(float((value - ours[name]).detach().abs().max()) for name, value in theirs))

    with on_micro_batch(record), after_each_step(follow):
        assert resume(out) == 0
    assert sorted(batches) == [3, 4]
    assert losses(out) == pytest.approx(expected, rel=1e-12, abs=0)
    assert max(differences) < 1e-12
    tensors, state = final_tensors(out), published.optimizer.state
    assert float((tensors["rows/centers"] - published.weight).detach().abs().max()) < 1e-12
    momentum = state[published.weight]["momentum_buffer"]
    assert float(momentum.abs().max()) > 0
    assert float((tensors["rows/momentum_buffer"] - momentum).abs().max()) < 1e-12
    for name, parameter in published.backbone.named_parameters():
        if "momentum_buffer" in state[parameter]:
            ours = tensors[f"backbone-optimizer/{name}.momentum_buffer"]
            torch.testing.assert_close(ours, state[parameter]["momentum_buffer"], rtol=0, atol=1e-12)
