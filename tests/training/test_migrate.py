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


@pytest.mark.slow
@pytest.mark.parametrize(("margin", "network", "warmup"), [((0.0, 0.4), "r18", 0), ((0.2, 0.0), "mbf", 2)])
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
        sample: dict[str, Any] = {
            "num_classes": CLASSES,
            "sample_rate": 0.3,
            "seed": seed,
            "step": step,
            "start": 0,
            "stop": CLASSES,
        }
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
    largest = float(momentum.abs().max())
    assert largest > 0
    assert float((tensors["rows/momentum_buffer"] - momentum).abs().max()) < 1e-12 * largest
    for name, parameter in published.backbone.named_parameters():
        if "momentum_buffer" in state[parameter]:
            ours = tensors[f"backbone-optimizer/{name}.momentum_buffer"]
            torch.testing.assert_close(ours, state[parameter]["momentum_buffer"], rtol=1e-12, atol=1e-12)


@pytest.fixture
def copy(tmp_path: Path, published: Path) -> Path:
    """The published folder, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def change(path: Path, work: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a rank's file."""
    content = torch.load(path, weights_only=True)
    work(content)
    torch.save(content, path)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("ran"),)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_run(content: dict[str, Any]) -> None:
    content["state_dict_backbone"]["conv1.weight"].add_(1e-6)


def widen(content: dict[str, Any]) -> None:
    content["state_dict_softmax_fc"]["weight"] = torch.zeros(13, WIDTH + 1, dtype=torch.float64)


def cut_momentum(content: dict[str, Any]) -> None:
    content["state_optimizer"]["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: (folder / "checkpoint_gpu_1.pt").unlink(),
            "has no checkpoint_gpu_1.pt, but checkpoint_gpu_2.pt",
        ),
        (lambda folder: (folder / "checkpoint_gpu_2.pt").unlink(), "checkpoint_gpu_0.pt has centers of shape (14, 64)"),
        (lambda folder: truncate(folder / "checkpoint_gpu_1.pt"), "checkpoint_gpu_1.pt is no readable file"),
        (
            lambda folder: torch.save(Harmful(), folder / "checkpoint_gpu_1.pt"),
            "checkpoint_gpu_1.pt is no readable file",
        ),
        (lambda folder: torch.save({}, folder / "checkpoint_gpu_1.pt"), "checkpoint_gpu_1.pt has no epoch"),
        (
            lambda folder: change(folder / "checkpoint_gpu_2.pt", other_run),
            "checkpoint_gpu_2.pt has another conv1.weight",
        ),
        (
            lambda folder: change(folder / "checkpoint_gpu_2.pt", lambda content: content.update(global_step=9)),
            "checkpoint_gpu_2.pt has global_step 9, and checkpoint_gpu_0.pt has 3",
        ),
        (
            lambda folder: change(folder / "checkpoint_gpu_1.pt", widen),
            "checkpoint_gpu_1.pt has centers of shape (13, 65)",
        ),
        (
            lambda folder: change(folder / "checkpoint_gpu_0.pt", cut_momentum),
            "checkpoint_gpu_0.pt has an optimizer of",
        ),
    ],
)
def test_wrong_files_are_named(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(copy)
    found = complaint(capsys, "migrate", copy, "--config-file", copy / "config.py", "--out", "run", "--json")
    assert sentence in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]  # nothing is written, and no code ran


def test_folders_that_are_no_published_checkpoint_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = published / "config.py", tmp_path / "run"
    assert migrate(published, out, "--json") == 0
    capsys.readouterr()
    new = tmp_path / "new"
    assert "is a folder of partialfc already" in complaint(capsys, "migrate", out, "--out", new)
    assert "exists and is not empty" in complaint(capsys, "migrate", published, "--out", out)
    assert "give its configuration" in complaint(capsys, "migrate", published, "--out", new)
    assert "the folder with those of all" in complaint(
        capsys, "migrate", published / "checkpoint_gpu_0.pt", "--out", new
    )
    assert "how many there were" in complaint(capsys, "migrate", config, "--out", new)
    (tmp_path / "weights").mkdir()
    torch.save({}, tmp_path / "weights" / "backbone.pth")
    assert "give the file" in complaint(capsys, "migrate", tmp_path / "weights", "--out", new)
    other = published.parent / "other.py"
    other.write_text(config.read_text().replace(f'"{NETWORK}"', '"r50"'))
    refusal = complaint(capsys, "migrate", published, "--config-file", other, "--out", new)
    assert f"holds {NETWORK} with {WIDTH} values an embedding, but the configuration says r50" in refusal


def test_every_tensor_has_its_place(published: Path, tmp_path: Path) -> None:
    assert migrate(published, tmp_path / "run", "--json") == 0
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003")
    checkpoint.verify()
    files = [torch.load(published / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(RANKS)]
    weights = checkpoint.tensors("backbone")
    assert weights.keys() == files[0]["state_dict_backbone"].keys()
    assert all(torch.equal(weights[name], value) for name, value in files[0]["state_dict_backbone"].items())
    centers = torch.cat([file["state_dict_softmax_fc"]["weight"] for file in files])
    assert torch.equal(checkpoint.rows("centers", 0, CLASSES), centers)
    states = [file["state_optimizer"]["state"] for file in files]
    momentum = torch.cat([state[max(state)]["momentum_buffer"] for state in states])
    assert torch.equal(checkpoint.rows("momentum_buffer", 0, CLASSES), momentum)
    moments = checkpoint.tensors("backbone-optimizer")
    assert len(moments) == len(states[0]) - 1
    assert "features.weight.momentum_buffer" not in moments  # it is frozen, so the published optimizer has none
    assert torch.equal(moments["conv1.weight.momentum_buffer"], states[0][0]["momentum_buffer"])


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("r100", "r200", "vit_b", "vit_l")]


@pytest.mark.parametrize("network", ["r18", "r34", "r50", "mbf", "vit_t", "vit_s", *LARGE])
def test_state_is_mapped_by_name(tmp_path: Path, network: str) -> None:
    """Of a state_dict in any order: the optimizer's numbers follow the file's own order."""
    size = 27 if network.startswith("vit") else 16
    with torch.device("meta"):
        backbone = create_backbone(network, embedding_dim=8, image_size=size)
    entries = list(backbone.state_dict().items())
    entries = entries[7:] + entries[:7]  # as another order of registration gives
    small = {name: torch.zeros(()).expand(value.shape) for name, value in entries}
    names = [name for name in small if name in dict(backbone.named_parameters())]
    state: dict[int, dict[str, Any]] = {
        number: {"momentum_buffer": small[name]} for number, name in enumerate(names) if name != "features.weight"
    }
    groups = [{"params": list(range(len(names)))}, {"params": [len(names)]}]
    content = {
        "epoch": 1,
        "global_step": 2,
        "state_dict_backbone": small,
        "state_dict_softmax_fc": {"weight": torch.zeros(2, 8)},
        "state_optimizer": {"state": state, "param_groups": groups},
        "state_lr_scheduler": {},
    }
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    placed: dict[str, Tensor] = backbone_state(read_rank_file(tmp_path / "checkpoint_gpu_0.pt"))
    assert {name.removesuffix(".momentum_buffer") for name in placed} == set(names) - {"features.weight"}
    assert all(
        value.shape == dict(entries)[name.removesuffix(".momentum_buffer")].shape for name, value in placed.items()
    )


@pytest.mark.slow
def test_adamw_and_the_state_that_is_not_there(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = training("mbf", optimizer="adamw", margin=(0.0, 0.1), lr=1e-4, dtype=torch.float32)
    published.write_config(tmp_path / "config.py", images, "mbf", BATCH, 0.3)
    published.save(tmp_path)
    assert migrate(tmp_path, tmp_path / "run", "--json") == 0
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert checkpoint.rows("step", 0, CLASSES).tolist() == [3] * CLASSES
    moments = published.optimizer.state[published.weight]
    assert torch.equal(checkpoint.rows("exp_avg_sq", 0, CLASSES), moments["exp_avg_sq"])
    for rank in range(RANKS):
        change(tmp_path / f"checkpoint_gpu_{rank}.pt", lambda content: content["state_optimizer"].update(state={}))
    capsys.readouterr()
    assert migrate(tmp_path, tmp_path / "fresh") == 0
    assert "no optimizer state of all centers" in capsys.readouterr().out
    assert resume(tmp_path / "fresh", "--json") == 0
