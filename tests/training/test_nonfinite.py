"""A skipped step names the images behind it, on the ranks where something was not finite."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import on_micro_batch, poison_images_at, tiny_config, write_images
from torch import Tensor

from partialfc.config.options import TrainConfig
from partialfc.data.loader import Batch
from partialfc.training.build import open_loader
from partialfc.training.loop import train
from partialfc.training.nonfinite import MOST_NAMED, describe_skip, locate
from partialfc.training.run.log import read_metrics
from partialfc.training.step import Stepper


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    images = tmp_path_factory.mktemp("skipping") / "images"
    return tiny_config(write_images(images, [f"person {number}" for number in range(8)]), precision="float32")


def output(rows: list[float], gradient: list[float] | None) -> Tensor:
    """(B, 2) with a gradient of the same shape."""
    value = torch.tensor(rows)[:, None].repeat(1, 2).requires_grad_()
    if gradient is not None:
        value.grad = torch.tensor(gradient)[:, None].repeat(1, 2)
    return value


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("micro_steps", "where", "positions"),
    [
        ([([1.0, nan], None)], "embeddings", [11]),
        ([([1.0, 1.0], [0.0, 0.0]), ([inf, 1.0], None)], "embeddings", [12]),
        ([([1.0, 1.0], [nan, 0.0]), ([1.0, 1.0], [0.0, -inf])], "gradient of the embeddings", [10, 13]),
        ([([1.0, 1.0], [0.0, 0.0]), ([1.0, 1.0], None)], "gradient", [10, 11, 12, 13]),
    ],
)
def test_a_rank_finds_the_rows_that_are_not_finite(
    micro_steps: list[tuple[list[float], list[float] | None]], where: str, positions: list[int]
) -> None:
    outputs = [
        (torch.arange(10 + 2 * number, 12 + 2 * number), output(*rows)) for number, rows in enumerate(micro_steps)
    ]
    assert locate(outputs) == (where, positions)


def test_the_names_are_those_of_the_sample_stream_and_not_too_many(config: TrainConfig) -> None:
    loader = open_loader(config)
    seen = {}
    for batch in loader.batches(0, 6):
        for place, label in zip(batch.positions.tolist(), batch.labels.tolist(), strict=True):
            seen[place] = f"person {label}"
    line, sentence = describe_skip("embeddings", list(range(60)), 7, loader, None)
    assert line["images"] == 60
    assert line["positions"] == list(range(MOST_NAMED))
    assert [Path(name).parent.name for name in line["samples"]] == [seen[place] for place in range(MOST_NAMED)]
    assert sentence.startswith("step 7 is skipped: embeddings not finite on rank 0, 60 images such as /")


def skips(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "skipped_step"]


def test_a_run_logs_and_says_it(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with poison_images_at([2], micro_step=1):
        train(config, tmp_path / "run")
    [line] = skips(tmp_path / "run")
    assert (line["step"], line["where"], line["ranks"]) == (3, "embeddings", [0])
    assert line["positions"] == [23, 24, 25]  # the second of three micro-steps of the positions 20 to 29
    assert "step 3 is skipped: embeddings not finite on rank 0, 3 images such as" in capsys.readouterr().err


def poisoned_rank(rank: int, folder: Path) -> None:
    """In step 1 the images of rank 1 are NaN; in step 3 its gradient of a weight."""
    config = tiny_config(folder / "images", precision="float32")
    is_poisoned = False

    def poison_weight(stepper: Stepper, batch: Batch) -> None:
        nonlocal is_poisoned
        if (batch.step, batch.micro_step) == (0, 0):
            weight = next(stepper.state.backbone.parameters())
            weight.register_hook(lambda gradient: gradient * nan if is_poisoned else gradient)
        is_poisoned = rank == 1 and batch.step == 3

    with poison_images_at([1], micro_step=1) if rank == 1 else nullcontext(), on_micro_batch(poison_weight):
        train(config, folder / "run", quiet=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_only_the_rank_that_knows_names_its_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"person {number}" for number in range(8)])
    run_ranks(2, poisoned_rank, tmp_path)
    first, second = skips(tmp_path / "run")
    # Steps of ten images in two micro-steps of five: two for rank 0 and three for rank 1.
    assert (first["step"], first["where"], first["ranks"]) == (2, "embeddings", [1])
    assert first["positions"] == [17, 18, 19]
    assert (second["step"], second["where"], second["ranks"]) == (4, "gradient", [])
    assert sorted(second["positions"]) == list(range(30, 40))
    assert len(second["samples"]) == 10
