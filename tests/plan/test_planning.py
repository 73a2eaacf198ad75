"""Plans: which rates fit, what limits a step, what is advised, and what people read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.config.recipes import RECIPES, recipe_plan_request
from partialfc.core.errors import InputError
from partialfc.plan.memory import plan_memory, weights_memory
from partialfc.plan.network import network_size
from partialfc.plan.planning import largest_rate, leanest_that_fits, make_plan, usable_bytes
from partialfc.plan.rates import MachineRates
from partialfc.plan.request import PlanRequest
from partialfc.plan.step_time import backbone_flops, communication_time, head_time, head_work, step_time
from partialfc.plan.text import plan_text

MINI = PlanRequest(classes=1_000_000, gpus=8, backbone="mini", image_size=32, embedding_dim=64, batch_size=16)
# Round figures, so that the times below can be reckoned by hand.
ROUND = MachineRates("round", "by hand", 8 << 30, 1e12, 0.5, 1e9, 1e6, 2.0, 0.0, 1e3, 1e6, 0.25, 1e3, 4.0, 100.0)


def test_the_head_is_some_products_and_the_rows_it_moves() -> None:
    request = replace(MINI, sample_rate=0.1, head_update="deferred")
    work = head_work(request)
    assert request.sampled == 12_500
    assert work.flops == 4 * 2 * 128 * 12_500 * 64  # a GPU computes the cosines twice
    assert work.row_bytes == 12_500 * 64 * (3 + 2) * 4
    assert head_work(replace(request, head_update="sparse")).row_bytes == 12_500 * 64 * (2 + 2 + 2 + 2) * 4
    assert head_work(replace(request, state_on_host=True)).host_bytes == 12_500 * 64 * 2 * 4
    assert head_time(request, ROUND) == pytest.approx(2.0 + work.flops / 1e9 + work.row_bytes / 1e6)
    on_cpu = replace(request, device="cpu")
    assert head_work(on_cpu).flops == 3 * 2 * 128 * 12_500 * 64
    # Half of these cosines fit the scratch memory, and the others are computed twice.
    twice = replace(request, device="cpu", gpus=1, sample_rate=1.0, batch_size=128, head_dtype="float32")
    kept = (256 << 20) // (4 * 128)  # classes
    assert head_work(twice).flops == pytest.approx((4 - kept / 1_000_000) * 2 * 128 * 1_000_000 * 64)


def test_the_backbone_runs_forward_once_and_backward_twice_as_long() -> None:
    once = backbone_flops(replace(MINI, backbone="r18"), "float32")
    assert backbone_flops(replace(MINI, backbone="r18", checkpointing=True), "float32") == once * 4 / 3
    assert backbone_flops(replace(MINI, backbone="r18", micro_steps=5), "float32") == 5 * once
    assert step_time(MINI, ROUND, "float32").backbone == pytest.approx(0.5 + backbone_flops(MINI, "float32") / 1e12)


def test_collectives_pass_the_slowest_link() -> None:
    assert communication_time(replace(MINI, gpus=1), ROUND, 1.0) == 0.0
    hidden = communication_time(replace(MINI, gpus=2), ROUND, 1e9)
    embeddings = 2 * 0.5 * 4 * 32 * 64 / 1e6
    figures = 2 * 0.5 * 16 * 32 / 1e6
    latency = 0.25
    last_bucket = min(25 << 20, 4 * network_size(MINI).trained) / 1e6 + latency
    assert hidden == pytest.approx(embeddings + figures + 6 * latency + last_bucket)
    rounded = communication_time(replace(MINI, gpus=2, gradients="bfloat16"), ROUND, 1e9)
    assert rounded == pytest.approx(hidden - 2 * network_size(MINI).trained / 1e6)
    in_parts = communication_time(replace(MINI, gpus=2, processes_backbone="fsdp"), ROUND, 0.0)
    size = network_size(MINI)
    moved = 0.5 * 4 * (2 * size.parameters + size.trained)
    assert in_parts == pytest.approx(hidden - last_bucket + moved / 1e6)
    assert communication_time(replace(MINI, gpus=16), ROUND, 1e9) > 100 * hidden  # over the network


def test_a_slow_loader_is_the_limit() -> None:
    time = step_time(MINI, replace(ROUND, decode_rate=1e-3), "float32")
    assert time.limit == "loader"
    assert time.step == time.loader
    assert step_time(MINI, replace(ROUND, head_seconds=1e6), "float32").limit == "head"


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
    request = replace(MINI, classes=classes, gpu_memory=gib)
    plan = make_plan(request, rates=ROUND)
    if plan.fitting_rate is None:
        assert plan_memory(request.with_rate(0.0), "bfloat16").peak > plan.capacity
        return
    assert plan_memory(request.with_rate(plan.fitting_rate), plan.precision).peak <= usable_bytes(request, ROUND)
    if plan.fitting_rate < 0.98:
        assert plan_memory(request.with_rate(1.02 * plan.fitting_rate + 0.001), "bfloat16").peak > plan.capacity


def test_every_advice_fits() -> None:
    request = replace(MINI, classes=40_000_000, gpus=1, gpu_memory=20)
    plan = make_plan(request, rates=ROUND)
    assert not plan.fits
    assert plan.advice[-1] == "--gpus 2"
    assert "--head-update deferred --head-dtype bfloat16" in plan.advice
    assert plan_memory(replace(request, gpus=2), "bfloat16").peak <= plan.capacity
    half = replace(request, head_update="deferred", head_dtype="bfloat16")
    assert plan_memory(half, "bfloat16").peak <= plan.capacity
    name, leanest = leanest_that_fits(request, lambda asked: make_plan(asked, rates=ROUND))
    assert name == "bfloat16, deferred"
    assert leanest.fits
    text = plan_text(plan)
    assert "It does not fit" in text
    assert "No sample rate fits" in text


def test_the_rate_of_equal_cost() -> None:
    quick = replace(ROUND, head_seconds=0.0, head_row_bytes=1e12, backbone_flops=1e10)
    plan = make_plan(MINI, rates=quick)
    assert plan.equal_rate is not None
    at_that_rate = head_time(MINI.with_rate(plan.equal_rate), quick)
    assert 0.97 * plan.time.backbone < at_that_rate <= plan.time.backbone
    assert f"Beyond a sample rate of {plan.equal_rate:g}" in plan_text(plan)
    assert make_plan(MINI, rates=replace(quick, head_flops=1e15)).equal_rate is None
    assert make_plan(MINI, rates=ROUND).equal_rate == 0


def test_text_and_values_agree() -> None:
    plan = make_plan(MINI)
    values, text = plan.to_dict(), plan_text(plan)
    assert values["memory"]["peak_bytes"] == sum(values["memory"]["parts"].values())
    assert "not measured" in text.splitlines()[2]
    assert f"{values['images_per_second']:,.0f} images a second" in text
    for part in values["memory"]["parts"]:
        assert part in text


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("demo")])
def test_every_recipe_plans(name: str) -> None:
    request = recipe_plan_request(name)
    request.check()
    assert request.gathered * request.micro_steps == RECIPES[name].data.global_batch_size
    assert weights_memory(request)["centers"] == 2048 * request.local_classes  # passes: test_every_backbone_is_counted


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": 0}, "--gpus is 0; it must be at least 1"),
        ({"classes": 0}, "--classes is missing"),
        ({"classes": -3}, "--classes is -3"),
        ({"sample_rate": 1.5}, "from 0 to 1"),
        ({"sample_rate": float("nan")}, "from 0 to 1"),
        ({"backbone": "r51"}, "Did you mean 'r50'"),
        ({"gpu_memory": 0.0}, "a number of GiB above 0"),
        ({"workers": -1}, "--workers is -1"),
        ({"image_size": 33}, "choose a multiple of 16"),
    ],
)
def test_impossible_requests(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_plan(replace(MINI, **changes), rates=ROUND)  # type: ignore[arg-type]
