"""Published recipes: their settings, descriptions, and that each rule trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_images

from partialfc.config import recipes
from partialfc.config.options import BackboneConfig, OutputConfig
from partialfc.config.recipes import DATA_SETS, GPU_HOURS, RECIPES, SCORES, data_set, describe
from partialfc.core.errors import InputError
from partialfc.plan.planning import recipe_memory
from partialfc.plan.rates import preset
from partialfc.plan.step_time import step_time
from partialfc.plan.workload import Workload
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

MINI = BackboneConfig("mini", 64)
PUBLISHED = [name for name in RECIPES if not name.startswith("demo")]


def test_every_recipe_is_described() -> None:
    for name in PUBLISHED:
        facts = describe(name)
        assert facts["command"].startswith("torchrun"), name
        assert "lr" in facts["learning_rate"], name
    assert {data for data in DATA_SETS if any(name.startswith(f"{data}-") for name in PUBLISHED)} == set(DATA_SETS)
    assert set(SCORES) <= set(PUBLISHED)


def test_figures_of_one_plan() -> None:
    facts = describe("wf42m-r200")
    assert facts["score"] == "MFR-ALL 97.70, IJB-C 1e-4 97.97, 1e-5 96.93"
    assert facts["data"].startswith("WebFace42M: 2,059,906 identities")
    memory = recipe_memory("wf42m-r200")
    assert memory is not None
    assert memory["backbone weights"] == 4 * 118_833_920
    assert memory["centers"] == 4 * 512 * 257_489
    assert recipe_memory("demo") is None
    assert describe("wf12m-conflict-r50")["data"].startswith("WebFace12M-Conflict: 1,017,970")
    assert describe("ms1mv3-r50")["score"] == "none published"


def test_published_settings() -> None:
    flip = RECIPES["wf12m-flip40-r50-pfcstar0.1"]
    assert (flip.head.sample_rate, flip.head.conflict_threshold, flip.schedule.warmup_epochs) == (0.1, 0.4, 2)
    large = RECIPES["wf42m-vit_l"]
    assert (large.data.global_batch_size, large.backbone.mask_ratio, large.backbone.checkpointing) == (24576, 0.1, True)
    huge = RECIPES["wf42m-vit_h"]
    assert (huge.data.micro_batch_size, huge.head.sample_rate, huge.schedule.epochs) == (768, 0.5, 16)
    assert RECIPES["ms1mv2-mbf"].schedule.epochs == 40
    assert RECIPES["ms1mv2-mbf"].optimizer.weight_decay == 1e-4


def test_published_batches_and_what_is_our_choice() -> None:
    rows = {}
    for name in PUBLISHED:
        config = RECIPES[name]
        if "batch" in name:
            rows[name] = (config.data.global_batch_size, config.peak_lr(), config.schedule.warmup_epochs)
    assert rows == {
        "wf42m-r100-batch2048": (2048, 0.2, 2),
        "wf42m-r100-batch4096": (4096, 0.3, 1),
        "wf42m-r100-batch4096-warmup2": (4096, 0.4, 2),
        "wf42m-r100-batch8192": (8192, 0.6, 4),
        "wf42m-mbf-batch8192": (8192, 0.4, 2),
    }
    assert describe("wf42m-r100-batch4096")["our_choice"] == "the sample rate, the number of GPUs"
    assert describe("wf42m-vit_l")["our_choice"] == "nothing"
    assert describe("wf42m-vit_b")["our_choice"] == "the sample rate"
    assert "8,192 lr 0.6 (warm-up 4)" in describe("wf12m-r100-pfc0.1")["other_batches"]
    assert describe("wf42m-vit_l")["other_batches"].startswith("keep the learning rate")


@pytest.mark.parametrize("family", [recipes.convolutional, recipes.ms1m, recipes.glint360k, recipes.noisy, recipes.vit])
def test_docstrings_give_command_cost_and_score_as_described(family: Callable[..., Any]) -> None:
    text = " ".join(str(family.__doc__).split())
    name, command = re.findall(r"([\w.-]+): (torchrun .*? --recipe \S*\w)\.", text)[0]
    facts = describe(name)
    assert command == facts["command"]
    gpus, steps = facts["cost"].split(", ", 1)
    assert f"Cost: {steps} on {gpus}" in text
    score = SCORES.get(name)
    expected = "No published score" if score is None else "Score: " + ", ".join(f"{value:.2f}" for value in score)
    assert expected in text


@pytest.mark.parametrize(
    ("recipe", "backbone"),
    [
        ("wf12m-r100-pfc0.1", MINI),
        pytest.param("ms1mv3-r50", MINI, marks=pytest.mark.slow),
        pytest.param("wf12m-conflict-r50-pfcstar0.3", MINI, marks=pytest.mark.slow),
        pytest.param("wf42m-mbf-batch8192", MINI, marks=pytest.mark.slow),
        pytest.param(
            "wf42m-vit_b", BackboneConfig("vit_t", 64, mask_ratio=0.1, drop_path=0.05), marks=pytest.mark.slow
        ),
    ],
)
def test_scaled_down_its_loss_falls(recipe: str, backbone: BackboneConfig, tmp_path: Path) -> None:
    """The recipe's margin, scale, sampling, optimizer and schedule, on a small network and few faces."""
    data = write_images(tmp_path / "data", [f"person {k}" for k in range(24)], shots=4, size=32)
    whole = RECIPES[recipe]
    # A batch of 16 takes the learning rate of a batch of 16.
    share = 16 / whole.data.global_batch_size if whole.optimizer.name == "sgd" else 0.3
    config = replace(
        whole,
        backbone=backbone,
        data=replace(whole.data, path=str(data), global_batch_size=16, micro_batch_size=16, workers=0),
        optimizer=replace(whole.optimizer, lr=whole.peak_lr() * max(share, 0.02)),
        schedule=replace(whole.schedule, epochs=4, warmup_epochs=whole.schedule.warmup_epochs / 10),
        output=OutputConfig(log_every=1, evaluate_every=10_000, checkpoint_every=10_000),
        precision="float32",
    )
    train(config, tmp_path / "run", quiet=True)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 24
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5]), losses


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no recipe 'wf42m-r20'; .* Did you mean 'wf42m-r200'"):
        describe("wf42m-r20")


@pytest.mark.slow
def test_hours_are_those_of_the_plan() -> None:
    for name, hours in list(GPU_HOURS.items())[::6]:  # a prediction takes seconds
        data, config = data_set(name), RECIPES[name]
        assert data is not None
        workload = Workload(config, data[1], config.data.fewest_processes, images=data[2])
        planned = step_time(workload, preset(workload)).step * (workload.steps or 0) / 3600 * workload.gpus
        assert hours == pytest.approx(planned, rel=0.01), name
    assert set(GPU_HOURS) == set(PUBLISHED)
