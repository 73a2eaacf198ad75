"""Plans: which rates fit, what limits a step, what is advised, and the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import changed, workload

from partialfc.config.recipes import RECIPES, data_set
from partialfc.core.errors import InputError
from partialfc.plan import planning
from partialfc.plan.memory import plan_memory, weights_memory
from partialfc.plan.network import network_size
from partialfc.plan.planning import Plan, largest_rate, make_plan, plan_text, plan_workload, recipe_memory
from partialfc.plan.rates import GIB, MachineRates
from partialfc.plan.step_time import backbone_flops, communication_time, head_time, head_work, step_time
from partialfc.plan.workload import Workload

MINI = workload(1_000_000, 16, gpus=8)
# Round figures, so that the times below can be computed by hand.
ROUND = MachineRates("round", "by hand", 1e12, 1e9, 1e6, 1e3, 2.0, 1e6, 0.25, 1e3, 4.0)


def planned(asked: Workload, rates: MachineRates = ROUND, gib: float = 8) -> Plan:
    return plan_workload(asked, rates, int(gib * GIB))


def test_the_head_is_some_products_and_the_rows_it_moves() -> None:
    asked = changed(MINI, head__update="deferred")
    flops, row_bytes, _ = head_work(asked)
    assert asked.sampled == 12_500
    assert flops == 4 * 2 * 128 * 12_500 * 64  # a GPU computes the cosines twice
    assert row_bytes == 12_500 * 64 * (3 + 2) * 4
    assert head_work(changed(asked, head__update="sparse"))[1] == 12_500 * 64 * (2 + 2 + 2 + 2) * 4
    assert head_work(changed(asked, head__state_on_host=True))[2] == 12_500 * 64 * 2 * 4
    assert head_time(asked, ROUND) == pytest.approx(2.0 + flops / 1e9 + row_bytes / 1e6)
    without_rows = head_time(asked, replace(ROUND, memory_rate=None))
    assert without_rows == pytest.approx(2.0 + flops / 1e9)
    on_cpu = changed(asked, device="cpu")
    assert head_work(on_cpu)[0] == 3 * 2 * 128 * 12_500 * 64
    # Half of these cosines fit the scratch memory, and the others are computed twice.
    twice = workload(1_000_000, 128, device="cpu", head__update="deferred", head__sample_rate=1.0)
    kept = (256 << 20) // (4 * 128)  # classes
    assert head_work(twice)[0] == pytest.approx((4 - kept / 1_000_000) * 2 * 128 * 1_000_000 * 64)


def test_a_schedule_of_the_rate_and_several_centers_are_counted() -> None:
    """Memory and the time of a step at the largest rate, the whole training as its phases take."""
    images = {"images": 8_000_000, "schedule__epochs": 1.0}
    asked = changed(MINI, **images, head__sample_rate=[[0.75, 0.1], [0.25, 1.0]])
    plan, few, all_ = planned(asked), planned(changed(MINI, **images)), planned(changed(asked, head__sample_rate=1.0))
    assert plan.memory == all_.memory
    assert plan.time == all_.time
    assert few.hours is not None
    assert all_.hours is not None
    assert plan.hours == pytest.approx(0.75 * few.hours + 0.25 * all_.hours)
    assert [phase[:2] for phase in plan.phases] == [(0.75, 0.1), (0.25, 1.0)]
    text = " ".join(plan_text(plan).split())
    assert "sample rate 0.1 for 75 % of the steps, then 1: at most 125,000 of 125,000 classes a GPU" in text
    assert "At sample rate 0.1 a step takes " in text
    three = changed(MINI, head__margin="subcenter")
    assert weights_memory(three)["centers"] == 3 * weights_memory(MINI)["centers"]
    assert head_work(three)[1] == 3 * head_work(MINI)[1]


@pytest.mark.slow
def test_the_backbone_runs_forward_once_and_backward_twice_as_long() -> None:
    once = backbone_flops(changed(MINI, backbone__name="r18"))
    assert backbone_flops(changed(MINI, backbone__name="r18", backbone__checkpointing=True)) == once * 4 / 3
    assert backbone_flops(changed(MINI, backbone__name="r18", data__global_batch_size=128 * 5)) == 5 * once
    passes = backbone_flops(MINI) / 1e12
    update = 4 * network_size(MINI).trained * 5 / 1e6
    assert step_time(MINI, ROUND).backbone == pytest.approx(2.0 + passes + update)
    measured = replace(ROUND, memory_rate=None, overhead=0.0)
    assert step_time(MINI, measured).backbone == pytest.approx(passes)


def test_collectives_pass_the_slowest_link() -> None:
    assert communication_time(workload(), ROUND, 1.0) == 0.0
    two, many = workload(1_000_000, 16, gpus=2), workload(1_000_000, 16, gpus=16)
    hidden = communication_time(two, ROUND, 1e9)
    embeddings = 2 * 0.5 * 4 * 32 * 64 / 1e6
    figures = 2 * 0.5 * 16 * 32 / 1e6
    latency = 0.25
    last_bucket = min(25 << 20, 4 * network_size(MINI).trained) / 1e6 + latency
    assert hidden == pytest.approx(embeddings + figures + 6 * latency + last_bucket)
    rounded = communication_time(changed(two, processes__gradients="bfloat16"), ROUND, 1e9)
    assert rounded == pytest.approx(hidden - 2 * network_size(MINI).trained / 1e6)
    in_parts = communication_time(changed(two, processes__backbone="fsdp"), ROUND, 0.0)
    size = network_size(MINI)
    moved = 0.5 * 4 * (2 * size.parameters + size.trained)
    assert in_parts == pytest.approx(hidden - last_bucket + moved / 1e6)
    assert communication_time(many, ROUND, 1e9) > 100 * hidden  # over the network


def test_a_slow_loader_is_the_limit() -> None:
    quick = replace(ROUND, backbone_flops=1e30, head_flops=1e30, memory_rate=None, overhead=0.0, node_rate=1e30)
    time = step_time(MINI, replace(quick, node_latency=0.0))
    assert time.limit == "loader"
    assert time.step == time.loader == pytest.approx(16 / (4 * 5000 * (112 / 32) ** 2))
    assert step_time(MINI, replace(quick, head_flops=1.0)).limit == "head"


@given(limit=st.floats(0, 1))
def test_the_largest_rate_is_one_that_holds(limit: float) -> None:
    rate = largest_rate(lambda rate: rate <= limit)
    assert rate is not None
    assert limit - max(0.01 * limit, 1e-8) <= rate <= limit


def test_no_rate_may_hold() -> None:
    assert largest_rate(lambda rate: False) is None
    assert largest_rate(lambda rate: True) == 1.0


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(1_000_000, 300_000_000), gib=st.floats(2, 40))
def test_the_rate_that_fits_fits_and_more_does_not(classes: int, gib: float) -> None:
    asked = changed(MINI, classes=classes)
    plan = planned(asked, gib=gib)
    if plan.fitting_rate is None:
        assert plan_memory(asked.with_rate(0.0)).peak > plan.capacity
        return
    assert plan_memory(asked.with_rate(plan.fitting_rate)).peak <= plan.capacity
    if plan.fitting_rate < 0.98:
        assert plan_memory(asked.with_rate(1.02 * plan.fitting_rate + 0.001)).peak > plan.capacity


def test_every_advice_fits() -> None:
    asked = workload(40_000_000, 16)
    plan = planned(asked, gib=19)
    assert not plan.fits
    assert plan.advice[-1] == "--gpus 2"
    assert "--head.update deferred --head.dtype bfloat16" in plan.advice
    assert plan_memory(changed(asked, gpus=2)).peak <= plan.capacity
    half = changed(asked, head__update="deferred", head__dtype="bfloat16")
    assert plan_memory(half).peak <= plan.capacity
    text = plan_text(plan)
    assert "It does not fit" in text
    assert "No sample rate fits" in text


@pytest.mark.slow
def test_a_large_batch_is_cut_or_recomputed() -> None:
    asked = workload(1000, 256, backbone__name="r18", image_size=64)
    plan = planned(asked, gib=2.5)
    assert plan.advice[0] == "--backbone.checkpointing true"
    assert plan.advice[1].startswith("--data.micro_batch_size ")
    smaller = changed(asked, data__micro_batch_size=int(plan.advice[1].split()[1]))
    assert smaller.micro_steps > 1
    assert plan_memory(smaller).peak <= plan.capacity
    in_one = planned(changed(asked, backbone__sync_batch_norm=True), gib=2.5)
    assert not any("micro_batch_size" in advice for advice in in_one.advice)


def test_no_more_gpus_than_images_for_them() -> None:
    assert planned(workload(1_000_000_000, 4), gib=20).advice == []


def test_the_rate_of_equal_cost() -> None:
    quick = replace(ROUND, overhead=0.0, memory_rate=None, backbone_flops=1e10)
    plan = planned(MINI, quick)
    assert plan.time is not None
    assert plan.equal_rate is not None
    at_that_rate = head_time(MINI.with_rate(plan.equal_rate), quick)
    assert 0.97 * plan.time.backbone < at_that_rate <= plan.time.backbone
    assert f"Beyond a sample rate of {plan.equal_rate:g}" in plan_text(plan)
    assert planned(MINI, replace(quick, head_flops=1e15)).equal_rate is None
    assert planned(MINI, replace(quick, head_flops=1.0)).equal_rate == 0


def test_text_and_values_agree() -> None:
    plan = make_plan(MINI)
    assert MINI.config.data.fewest_processes == MINI.gpus
    values, text = plan.to_dict(), plan_text(plan)
    assert values["memory"]["peak_bytes"] == sum(values["memory"]["parts"].values())
    assert "not measured" in text
    assert f"{values['images_per_second']:,.0f} images a second" in text
    for part in values["memory"]["parts"]:
        assert part in text


def test_what_does_not_fit_this_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_rates", None)
    plan = make_plan(changed(MINI, device="cpu"), gpu_memory=0.01)
    assert plan.time is plan.rates is plan.equal_rate is None
    text = plan_text(plan)
    assert "rates: not measured, since it does not fit this machine" in text
    assert "time of a step" not in text
    assert plan.to_dict()["images_per_second"] is None


def test_what_this_machine_has_free_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda device: 100 * GIB)
    asked = changed(MINI, device="cpu")
    assert planning.usable_bytes(asked, None) == pytest.approx(0.95 * 100 * GIB / 8, abs=8)
    assert planning.usable_bytes(asked, 4) == int(0.95 * 4 * GIB)
    assert planning.usable_bytes(asked, 400) == planning.usable_bytes(asked, None)
    assert planning.usable_bytes(MINI, 400) == int(0.95 * 400 * GIB)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("demo")])
def test_every_recipe_plans(name: str) -> None:
    config, data = RECIPES[name], data_set(name)
    assert data is not None
    asked = Workload(config, data[1], config.data.global_batch_size // config.data.micro_batch_size)
    asked.check()
    assert asked.gathered * asked.micro_steps == config.data.global_batch_size
    assert asked.batch_size == config.data.micro_batch_size
    memory = recipe_memory(name)
    assert memory is not None
    assert memory["centers"] == 2048 * asked.local_classes  # passes: test_every_backbone_is_counted
    assert memory["total"] == sum(weights_memory(asked).values())


def test_shares_are_those_of_training() -> None:
    asked = workload(1000, 16, gpus=3, data__global_batch_size=100)
    assert (asked.micro_steps, asked.gathered, asked.batch_size) == (3, 34, 12)
    assert changed(asked, data__micro_steps=4).gathered == 25
    assert changed(asked, data__micro_batch_size=50, backbone__sync_batch_norm=True).micro_steps == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": 0}, "--gpus is 0; it must be at least 1"),
        ({"classes": -3}, "--classes is -3"),
        ({"image_size": 0}, "--image-size is 0"),
        ({"head__sample_rate": 1.5}, "head.sample_rate is 1.5; it is a part of the classes"),
        ({"head__sample_rate": float("nan")}, "head.sample_rate is nan"),
        ({"head__scale": -1.0}, "head.scale is -1.0"),
        ({"head__margin_value": -1.0}, "CosFace's m is -1.0"),
        ({"backbone__name": "r51"}, "Did you mean 'r50'"),
        ({"data__workers": -1}, "data.workers is -1"),
        ({"image_size": 33}, "choose a multiple of 16"),
        ({"device": "tpu"}, "--device is 'tpu': choose one of v100,"),
        ({"precision": "float64"}, "precision float64 is for proofs"),
        ({"data__micro_steps": 1, "gpus": 2}, "on 2 GPUs that hold at most 16 each do not fit 1 micro-steps"),
    ],
)
def test_impossible_workloads(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_plan(changed(MINI, **changes))


def test_impossible_memory() -> None:
    with pytest.raises(InputError, match="a number of GiB above 0"):
        make_plan(MINI, gpu_memory=0.0)
