"""The training loop on the fixtures: what it writes, and that an interruption leaves no trace."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import PAIRS, final_tensors, interrupt_at, poison_images_at, small_config, timeless

from partialfc.checkpoint.read import steps_in
from partialfc.config.options import HeadConfig, OutputConfig, ScheduleConfig
from partialfc.core.errors import InputError, JobError
from partialfc.data.images import encode_png
from partialfc.evaluation.pairs import PairResult, evaluate_pairs
from partialfc.model.files import load_model
from partialfc.training import loop
from partialfc.training.run.log import read_metrics


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    root = tmp_path_factory.mktemp("straight") / "run"
    loop.train(small_config(), root, benchmarks=PAIRS, quiet=True)
    return root


def test_a_run_writes_what_it_should(straight: Path) -> None:
    lines = read_metrics(straight / "metrics.jsonl")
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, 11))  # 2 epochs of 48 images by 10, rounded
    for key in (
        "loss",
        "lr",
        "lr_head",
        "images_per_second",
        "data_wait",
        "target_cosine",
        "grad_norm",
        "conflict_share",
    ):
        assert all(isinstance(line[key], float) for line in train_lines), key
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [5, 10]  # once an epoch and at the end
    assert steps_in(straight / "checkpoints") == [9, 10]
    assert load_model(straight).config.image_size == 112
    assert (straight / "model" / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize("stop_after", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 8))])
def test_an_interrupted_run_is_resumed_bit_by_bit(straight: Path, tmp_path: Path, stop_after: int) -> None:
    """Interrupted inside the step after `stop_after`, in the middle of its micro-steps, and resumed."""
    root = tmp_path / "run"
    with interrupt_at(stop_after, micro_step=1):
        loop.train(small_config(), root, benchmarks=PAIRS, quiet=True)
    result = loop.train(small_config(), root, benchmarks=PAIRS, resume=True, quiet=True)
    assert result.steps == 10
    expected, actual = final_tensors(straight), final_tensors(root)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert timeless(read_metrics(root / "metrics.jsonl")) == timeless(read_metrics(straight / "metrics.jsonl"))


def test_resuming_a_finished_run_evaluates_only(straight: Path) -> None:
    before = final_tensors(straight)
    result = loop.train(small_config(), straight, benchmarks=PAIRS, resume=True, quiet=True)
    assert result.steps == 10
    assert result.benchmarks["lfw"]["pairs"] == 40
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_tensors(straight).items())


def test_the_best_model_stays_without_the_benchmarks_that_chose_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    config = small_config(output=OutputConfig(log_every=1, checkpoint_every=3, evaluate_every=2))
    worse = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])

    def at_the_first_evaluation(embeddings: torch.Tensor, is_same: np.ndarray) -> PairResult:
        return replace(evaluate_pairs(embeddings, is_same), accuracy=next(worse))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_pairs", at_the_first_evaluation)
        loop.train(config, root, benchmarks=PAIRS, quiet=True)
    best = (root / "model" / "best" / "model.safetensors").read_bytes()
    assert best != (root / "model" / "last" / "model.safetensors").read_bytes()
    for benchmarks in ({}, {"other": PAIRS["lfw"]}):
        result = loop.train(config, root, benchmarks=benchmarks, resume=True)
        assert "lfw chose the best model, that of step 2; it stays without them" in capsys.readouterr().err
        assert (result.best_score, result.best_step) == (0.9, 2)
        assert (root / "model" / "best" / "model.safetensors").read_bytes() == best


def test_a_run_that_ended_between_its_first_model_and_checkpoint_is_resumed(
    tmp_path: Path,
) -> None:
    config = small_config(output=OutputConfig(log_every=1, checkpoint_every=9, evaluate_every=2))
    with interrupt_at(4):
        loop.train(config, tmp_path / "run", benchmarks=PAIRS, quiet=True)
    assert (tmp_path / "run" / "model" / "best").is_dir()
    assert not steps_in(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="holds another run"):
        loop.train(config, tmp_path / "run", benchmarks=PAIRS, quiet=True)
    assert loop.train(config, tmp_path / "run", benchmarks=PAIRS, resume=True, quiet=True).steps == 10


def test_what_a_new_run_would_replace_is_refused(straight: Path, tmp_path: Path) -> None:
    """A configuration of one's own, and a model whose checkpoints were removed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("model: resnet\n")
    with pytest.raises(InputError, match=r"was not written by a run .it lacks .* and would be replaced"):
        loop.train(small_config(), tmp_path / "mine", quiet=True)
    assert (tmp_path / "mine" / "config.yaml").read_text() == "model: resnet\n"
    small = tmp_path / "small"
    shutil.copytree(straight, small)
    shutil.rmtree(small / "checkpoints")
    for resume in (True, False):
        with pytest.raises(InputError, match="holds a model but no checkpoint, and a new run would replace it"):
            loop.train(small_config(), small, resume=resume, quiet=True)
    assert (small / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_folder_with_another_run_is_refused(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds another run.*--resume"):
        loop.train(small_config(), straight, quiet=True)
    with pytest.raises(InputError, match=r"another head\.scale"):
        loop.train(small_config(head=HeadConfig(scale=8.0, sample_rate=0.5)), straight, resume=True, quiet=True)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        loop.train(small_config(), tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_other_data_is_refused_at_resume(straight: Path, tmp_path: Path) -> None:
    config = small_config()
    config = replace(config, data=replace(config.data, num_classes=9))
    with pytest.raises(InputError, match=r"trained on data with classes 8, but now classes is 9.*head.from_run"):
        loop.train(config, straight, resume=True, quiet=True)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    with poison_images_at([2]):
        loop.train(small_config(), tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines if line["kind"] == "train"] == [0, 0] + [1] * 8
    assert all(torch.isfinite(tensor).all() for tensor in final_tensors(tmp_path / "run").values())


def test_ten_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with poison_images_at(range(20), value=torch.inf), pytest.raises(JobError, match=r"10 steps in a row"):
        loop.train(small_config(schedule=ScheduleConfig(epochs=4)), tmp_path / "run", quiet=True)


def test_too_many_unreadable_records_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    for identity in range(2):
        (folder / str(identity)).mkdir(parents=True)
    for number in range(6):
        image = torch.full((32, 32, 3), 40 * number, dtype=torch.uint8).numpy()
        (folder / str(number % 2) / f"{number}.png").write_bytes(encode_png(image))
    (folder / "1" / "broken.png").write_bytes(b"\x89PNG but no more")
    config = small_config()
    data = replace(config.data, path=str(folder), global_batch_size=7, max_unreadable=0)
    with pytest.raises(InputError, match=r"broken\.png"):
        loop.train(replace(config, data=data), tmp_path / "run", quiet=True)
    loop.train(replace(config, data=replace(data, max_unreadable=1)), tmp_path / "run2")
    [said] = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert "1 record cannot be read and others take their places; one is " in said
    assert said.endswith("broken.png")
    last = read_metrics(tmp_path / "run2" / "metrics.jsonl")[-1]
    assert last["step"] == 2


def test_a_run_that_failed_before_its_first_step_is_no_other_run(tmp_path: Path) -> None:
    """Its folder holds a configuration and nothing else."""
    config = small_config()
    data = replace(config.data, num_classes=5)
    with pytest.raises(InputError, match="outside the range"):
        loop.train(replace(config, data=data), tmp_path / "run", quiet=True)
    assert loop.train(config, tmp_path / "run", quiet=True).steps == 10


def test_nothing_is_written_for_a_head_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scale"):
        loop.train(small_config(head=HeadConfig(scale=500.0)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
