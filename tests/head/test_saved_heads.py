"""A head and its optimizer as a folder and as a state_dict: whole, or an error in one sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import saving_scenarios as scenarios
import torch
from torch import nn

from partialfc import ArcFace, CosFace, InputError, PartialFC, RowwiseAdamW, RowwiseSGD, load_head, save_head
from partialfc.checkpoint import write
from partialfc.checkpoint.read import Checkpoint
from partialfc.checkpoint.write import CheckpointNotWritten, Snapshot, save_checkpoint
from partialfc.head.files import head_rows, head_state, row_shard
from partialfc.head.margins import CurricularFace


def make(**options: Any) -> PartialFC:
    return PartialFC(**({"num_classes": 20, "embedding_dim": 8, "sample_rate": 0.5} | options))


def step(head: PartialFC, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        embeddings = torch.randn(
            6, 8, generator=generator, dtype=torch.promote_types(head.centers.dtype, torch.float32)
        )
        head(embeddings, torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A head after two steps."""
    head = make()
    optimizer = RowwiseSGD(head.parameters(), lr=0.1)
    step(head, optimizer, 2)
    save_head(head, optimizer, tmp_path / "head")
    return tmp_path / "head"


# -- folders ---------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    options = {"num_classes": np.int64(20), "embedding_dim": np.int32(8), "sample_rate": np.float32(0.5)}
    more = {"scale": np.float64(16.0), "seed": np.int64(3), "conflict_threshold": np.float32(0.5)}
    head = make(**options, **more, margin=CosFace(np.float64(0.25)))
    save_head(head, None, tmp_path / "head")
    loaded = load_head(tmp_path / "head")
    assert repr(loaded) == repr(head) == repr(make(scale=16.0, seed=3, conflict_threshold=0.5, margin=CosFace(0.25)))
    assert torch.equal(loaded.state_dict()["centers"], head.state_dict()["centers"])


def test_a_folder_behind_a_link_and_none_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    save_head(make(), None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_head(tmp_path / "large").num_classes == 20
    monkeypatch.chdir(tmp_path / "large")
    with pytest.raises(InputError, match="would be replaced as a whole: give a folder by its name"):
        save_head(make(), None, ".")


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize("kind", ["sgd", "lazy", "adamw"])
def test_a_loaded_head_goes_on_bit_for_bit(kind: str, update: Any, tmp_path: Path) -> None:
    heads = []
    for _ in range(2):
        head = make(update=update, dtype=torch.bfloat16, margin=CurricularFace(0.3), scale=16.0)
        optimizer: Any = RowwiseAdamW(head.parameters(), lr=0.01)
        if kind != "adamw":
            lazily: Any = "lazy_dense" if kind == "lazy" else "freeze"
            optimizer = RowwiseSGD(head.parameters(), unsampled=lazily, state_dtype=torch.float32)
        heads.append((head, optimizer))
    step(*heads[0], times=3)
    step(*heads[1])
    save_head(*heads[0], tmp_path / "head")
    assert load_head(tmp_path / "head", *heads[1]) is heads[1][0]
    for head, optimizer in heads:
        step(head, optimizer, 3)
        optimizer.flush()
    first, second = (head for head, _ in heads)
    assert torch.equal(first.centers, second.centers)
    assert (second.step, second.margin_state()) == (6, first.margin_state())


def test_a_head_is_built_as_it_was_saved(tmp_path: Path) -> None:
    options = {"sample_rate": 0.3, "margin": ArcFace(0.2, "straight_through"), "scale": 32.0, "update": "deferred"}
    options |= {"conflict_threshold": 0.4, "conflict_as_zero_logit": True, "operand_dtype": torch.bfloat16}
    head = make(**options, seed=1 << 70, dtype=torch.float64)
    save_head(head, None, tmp_path / "deep" / "head")
    built = load_head(tmp_path / "deep" / "head")
    assert (repr(built), built.loss_config, built.seed) == (repr(head), head.loss_config, head.seed)
    assert torch.equal(built.centers, head.centers)


def test_the_optimizer_gets_its_options_back(tmp_path: Path) -> None:
    head = make()
    optimizer = RowwiseAdamW([{"params": [nn.Parameter(torch.ones(1, 1))]}, {"params": head.parameters(), "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    save_head(head, optimizer, tmp_path / "head")
    lr: Any = torch.tensor(0.1)
    other = RowwiseAdamW(head.parameters(), lr, betas=(0.5, 0.5))
    load_head(tmp_path / "head", head, other)
    group = other.param_groups[0]
    assert group["lr"] is lr
    assert (float(lr), group["initial_lr"], group["betas"]) == (0.25, 0.5, (0.9, 0.999))


def test_the_wrappers_of_an_optimizer_are_taken_off(saved: Path) -> None:
    head = make()
    wrapped: Any = SimpleNamespace(optimizer=SimpleNamespace(optimizer=RowwiseSGD(head.parameters())))
    load_head(saved, head, wrapped)
    save_head(head, wrapped, saved)
    assert Checkpoint(saved).row_shapes.keys() == {"centers", "momentum_buffer"}


def test_a_checkpoint_of_a_training_is_read(tmp_path: Path) -> None:
    head = make()
    optimizer = RowwiseSGD(head.parameters())
    step(head, optimizer)
    state = {"head": head_state(head, optimizer), "skipped": 0}
    folder = save_checkpoint(
        tmp_path, Snapshot(7, {"backbone": {}}, row_shard(head), head_rows(head, optimizer), state)
    )
    assert torch.equal(load_head(folder).centers, head.centers)


def test_steps_that_only_the_device_counted_are_saved(tmp_path: Path) -> None:
    head = make()
    head.center_state.counter(head.centers.device).fill_(5)  # as a replayed CUDA graph does
    save_head(head, None, tmp_path / "head")
    assert load_head(tmp_path / "head").step == 5
    other = make()
    other.load_state_dict(head.state_dict())
    assert other.step == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 21}, "num_classes 20, not 21"),
        ({"embedding_dim": 9}, "embedding_dim 8, not 9"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"margin": CosFace(0.3)}, r"margin CosFace\(m=0.4\), not CosFace\(m=0.3\)"),
        ({"margin": CurricularFace()}, "margin CosFace"),
        ({"dtype": torch.float64}, "centers in float32, not float64"),
    ],
)
def test_another_head_is_refused_and_untouched(options: dict[str, Any], words: str, saved: Path) -> None:
    head = make(**options)
    before = head.centers.detach().clone()
    with pytest.raises(InputError, match=words):
        load_head(saved, head, RowwiseSGD(head.parameters()))
    assert torch.equal(head.centers, before)
    assert head.step == 0


@pytest.mark.parametrize(
    ("make_optimizer", "words"),
    [
        (lambda parameters: RowwiseAdamW(parameters), "optimizer RowwiseSGD, not RowwiseAdamW"),
        (lambda parameters: RowwiseSGD(parameters, state_dtype=torch.bfloat16), "momentum_buffer in float32"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "not SGD: pass that one, or None"),
        (lambda parameters: RowwiseSGD([nn.Parameter(torch.ones(2, 2))]), "does not hold the centers"),
    ],
)
def test_another_optimizer_is_refused(make_optimizer: Callable[..., Any], words: str, saved: Path) -> None:
    head = make()
    with pytest.raises(InputError, match=words):
        load_head(saved, head, make_optimizer(head.parameters()))
    assert head.step == 0


def test_state_that_was_not_saved_is_missed(tmp_path: Path) -> None:
    head = make()
    save_head(head, None, tmp_path / "head")
    with pytest.raises(InputError, match="holds optimizer None, not RowwiseSGD"):
        load_head(tmp_path / "head", head, RowwiseSGD(head.parameters()))


def test_a_margin_of_ones_own_is_not_guessed(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Own(CosFace):
        pass

    head = make(margin=Own())
    save_head(head, None, tmp_path / "head")
    with pytest.raises(InputError, match=r"does not know the margin .*Own\(.*: build the head and pass it"):
        load_head(tmp_path / "head")
    assert load_head(tmp_path / "head", make(margin=Own())).step == 0


def test_damage_is_named(saved: Path) -> None:
    (part,) = saved.glob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(InputError, match=f"{part.name} differs from what was written in block 0"):
        load_head(saved)
    part.unlink()
    with pytest.raises(InputError, match=f"{part.name} cannot be read"):
        load_head(saved)
    with pytest.raises(InputError, match="There is no folder"):
        load_head(saved.with_name("other"))
    with pytest.raises(InputError, match=r"manifest.json cannot be read"):
        load_head(saved.parent)


def test_files_of_others_are_not_deleted(saved: Path) -> None:
    (saved / "backbone.pt").touch()
    for folder in (saved, saved / "backbone.pt"):
        with pytest.raises(InputError, match=r"would delete .*backbone.pt: give save_head a folder of its own"):
            save_head(make(), None, folder)


def test_an_interrupted_save_leaves_the_old_head(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(write, "write_hashed", fail)
        with pytest.raises(CheckpointNotWritten, match="No space left"):
            save_head(make(), None, saved)
    assert load_head(saved).step == 2
    assert [path.name for path in saved.parent.iterdir()] == ["head"]
    saved.rename(saved.with_name(".head.01234567.old"))  # a process that died between two renames
    assert load_head(saved).step == 2
    save_head(make(), None, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["head"]
    assert load_head(saved).step == 0


# -- state_dict ------------------------------------------------------------------------------------------------------


def test_a_state_dict_keeps_the_step() -> None:
    """Also through torch.load of weights alone and through safetensors, and within another module."""
    both = nn.ModuleDict({"head": make()})
    head: Any = both["head"]
    optimizer = RowwiseSGD(head.parameters())
    step(head, optimizer, 3)
    file = io.BytesIO()
    torch.save(both.state_dict(), file)
    file.seek(0)
    for state in (
        torch.load(file, weights_only=True),
        safetensors.torch.load(safetensors.torch.save(both.state_dict())),
    ):
        other: Any = nn.ModuleDict({"head": make()})
        assert other.load_state_dict(state) == ([], [])
        assert other["head"].step == 3
        resumed = RowwiseSGD(other.parameters())
        resumed.load_state_dict(optimizer.state_dict())
        step(other["head"], resumed)
        again: Any = nn.ModuleDict({"head": make()})
        again.load_state_dict(state)
        third = RowwiseSGD(again.parameters())
        third.load_state_dict(optimizer.state_dict())
        step(again["head"], third)
        assert torch.equal(other["head"].centers, again["head"].centers)


def test_a_resumed_loop_goes_on_bit_for_bit() -> None:
    head, other = make(), make()
    first, second = RowwiseSGD(head.parameters()), RowwiseSGD(other.parameters())
    step(head, first, 3)
    other.load_state_dict(head.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        step(head, first)
        step(other, second)
    assert torch.equal(head.centers, other.centers)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seed": 1}, "seed 0, and this one has seed 1"), ({"num_classes": 21}, "num_classes 20, and this one has")],
)
def test_a_state_dict_of_another_head_is_refused(options: dict[str, Any], words: str) -> None:
    other = make(**options)
    before = other.centers.detach().clone()
    with pytest.raises(InputError, match=words):
        other.load_state_dict(make().state_dict(), strict=False)
    assert torch.equal(other.centers, before)


def test_centers_alone_are_taken_and_leave_the_step() -> None:
    head, other = make(seed=5), make()
    other.step = 7
    other.load_state_dict({"centers": head.centers})
    assert torch.equal(other.centers, head.centers)
    assert other.step == 7
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    assert scenarios.message(lambda: other.load_state_dict({}, strict=False)) == ""
