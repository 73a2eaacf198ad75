"""Loss, gradients, figures and updates of the head against a dense float64 computation, at world sizes 1 to 4."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import head_cases
import pytest
import reference
import torch
from distributed_workers import run_ranks
from head_cases import ADAMW, MARGINS, SGD, STATES, STEP, Case, build, cases
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.head.sampling import sample_classes

CASES = cases()
Results = dict[str, dict[str, Tensor]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Gradients have the dtype of the embeddings.
EMBEDDING_TOLERANCE = TOLERANCE | {torch.bfloat16: 4e-3, torch.float16: 1e-3}
SEVERAL = [pytest.param(size, marks=[pytest.mark.slow, pytest.mark.multiprocess]) for size in (2, 3, 4)]
everywhere = pytest.mark.parametrize("world_size", [1, *SEVERAL])
each_case = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(scope="module")
def merged_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """The merged results of every case at a world size; four processes serve the sizes 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("cases")

    @cache
    def run(alone: bool) -> None:
        if alone:
            head_cases.run_cases(folder)
        else:
            run_ranks(4, head_cases.work, folder)

    @cache
    def results(world_size: int) -> Results:
        run(world_size == 1)
        by_rank = [
            torch.load(folder / f"cases-{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
        return {name: head_cases.merge(case, [rank[name] for rank in by_rank]) for name, case in CASES.items()}

    return results


def draws(case: Case, count: int) -> Tensor:
    """The noise of the step for `count` samples."""
    (key,) = keyed_random.keys_at([keyed_random.derive_key(case.seed, "margin")], torch.tensor(STEP))
    return keyed_random.normal(key, torch.arange(count))


def oracle_options(case: Case, state: dict[str, float]) -> dict[str, Any]:
    """What `reference.dense_loss` needs to know about a case; `state` are the margin's running figures."""
    margins: dict[str, dict[str, Any]] = {
        "none": {"target": reference.no_margin},
        "cosface": {"target": reference.cosface(0.4)},
        "arcface": {"target": reference.arcface(0.5)},
        "straight": {"target": reference.arcface_straight_through(0.5)},
        "combined": {"target": reference.combined(1.35, 0.3, 0.2)},
        "adaface": {"target": reference.adaface(0.4, 0.333, state.get("mean", 0), state.get("deviation", 1))},
        "magface": reference.magface(2.0, 15.0, 0.1, 0.4, 2.0),
        "curricularface": reference.curricularface(0.5, state.get("t", 0)),
        "elasticface arc": {"target": lambda c, _: reference.arcface_logit(c, 0.5 + 0.05 * draws(case, len(c)))},
        "elasticface cos": {"target": lambda c, _: c - 0.35 - 0.05 * draws(case, len(c))},
        "subcenter": {"target": reference.arcface(torch.pi / 10)},
    }
    return margins[case.margin] | {
        "scale": case.scale,
        "conflict_threshold": case.threshold,
        "conflict_as_zero_logit": case.zero_logit,
        "sub_centers": MARGINS[case.margin].sub_centers,
    }


def sampled_classes(case: Case, labels: Tensor) -> Tensor:
    return sample_classes(
        labels.unique(),
        num_classes=case.num_classes,
        sample_rate=case.sample_rate,
        sampler=case.sampler,
        seed=case.seed,
        step=STEP,
        start=0,
        stop=case.num_classes,
    )


class Oracle:
    """A case computed densely in float64: mean loss of each micro-step, gradients of their mean, figures."""

    def __init__(self, case: Case) -> None:
        built = build(case, 1)
        self.embeddings = built.embeddings.double().requires_grad_()
        self.centers = built.centers.double().requires_grad_()
        self.losses, self.sampled = [], []
        self.state = dict(STATES.get(case.margin, {}))
        for embeddings, labels in zip(
            self.embeddings.chunk(case.micro_steps), built.labels.chunk(case.micro_steps), strict=True
        ):
            classes = sampled_classes(case, labels)
            cosine = reference.dense_cosines(embeddings, self.centers, MARGINS[case.margin].sub_centers).detach()
            self.target_cosine = cosine[torch.arange(len(labels)), labels].mean()
            norms = embeddings.detach().norm(dim=1)
            batch = {
                "t": self.target_cosine,
                "mean": norms.mean(),
                "deviation": norms.std(correction=min(1, len(norms) - 1)),
            }
            self.state = {name: 0.99 * value + 0.01 * float(batch[name]) for name, value in self.state.items()}
            options = oracle_options(case, self.state)
            self.losses.append(reference.dense_loss(embeddings, self.centers, labels, classes, **options))
            self.sampled.append(classes)
            negatives = cosine[:, classes].masked_fill(labels[:, None] == classes, -2)
            conflicts = (negatives > (case.threshold if case.threshold is not None else 2)).sum()
            self.conflict_share = float(conflicts) / max(1, (len(classes) - 1) * len(labels))
        torch.stack(self.losses).mean().backward()
        assert self.embeddings.grad is not None
        assert self.centers.grad is not None
        self.embeddings_gradient, self.gradient = self.embeddings.grad, self.centers.grad
        k = MARGINS[case.margin].sub_centers
        self.rows = (torch.cat(self.sampled).unique()[:, None] * k + torch.arange(k)).flatten()


@pytest.fixture(scope="module")
def oracles() -> dict[str, Oracle]:
    return {name: Oracle(case) for name, case in CASES.items()}


@each_case
@everywhere
def test_loss_and_gradients(
    name: str, world_size: int, merged_results: Callable[[int], Results], oracles: dict[str, Oracle]
) -> None:
    case, result, oracle = CASES[name], merged_results(world_size)[name], oracles[name]
    tolerance = TOLERANCE[case.dtype]
    for loss, expected in zip(result["losses"], oracle.losses, strict=True):
        assert reference.relative_error(loss, expected.detach()) < tolerance
    assert (
        reference.relative_error(result["embeddings_gradient"], oracle.embeddings_gradient)
        < EMBEDDING_TOLERANCE[case.dtype]
    )
    assert torch.equal(result["rows"], oracle.rows)
    assert reference.relative_error(result["values"], oracle.gradient[oracle.rows]) < tolerance


@each_case
@everywhere
def test_figures(
    name: str, world_size: int, merged_results: Callable[[int], Results], oracles: dict[str, Oracle]
) -> None:
    result, oracle = merged_results(world_size)[name], oracles[name]
    assert float(result["target_cosine"]) == pytest.approx(float(oracle.target_cosine), abs=1e-12)
    assert float(result["conflict_share"]) == pytest.approx(oracle.conflict_share, abs=1e-12)
    assert result["sampled"].tolist() == [len(classes) for classes in oracle.sampled]
    assert result["steps"].tolist() == [STEP + 1] * world_size
    for figure, value in oracle.state.items():
        assert float(result[f"margin {figure}"]) == pytest.approx(value, abs=1e-12)
    assert result["equal figures"].all()


@each_case
@everywhere
def test_step_moves_the_sampled_rows_and_no_other(
    name: str, world_size: int, merged_results: Callable[[int], Results], oracles: dict[str, Oracle]
) -> None:
    case, result, oracle = CASES[name], merged_results(world_size)[name], oracles[name]
    rows = oracle.rows
    rest = torch.ones(len(result["centers"]), dtype=torch.bool)
    rest[rows] = False
    before = {key.removesuffix(" before"): value for key, value in result.items() if key.endswith(" before")}
    assert torch.equal(result["centers"], build(case, 1).centers)
    for key, value in (before | {"centers": result["centers"]}).items():
        assert torch.equal(result[f"{key} after"][rest], value[rest])
        assert not torch.equal(result[f"{key} after"][rows], value[rows])
    values, gradient = result["centers"].double()[rows], oracle.gradient[rows]
    state = {key: value[rows].double() for key, value in before.items()}
    if case.optimizer == "sgd":
        expected = reference.sgd_step(values, gradient, state["momentum_buffer"], **SGD)
    else:
        expected = reference.adamw_step(values, gradient, state["exp_avg"], state["exp_avg_sq"], 3, **ADAMW)
    assert reference.relative_error(result["centers after"][rows], expected) < TOLERANCE[case.dtype]


@each_case
@pytest.mark.parametrize("world_size", SEVERAL)
def test_same_at_every_world_size(name: str, world_size: int, merged_results: Callable[[int], Results]) -> None:
    case, result, alone = CASES[name], merged_results(world_size)[name], merged_results(1)[name]
    assert torch.equal(result["rows"], alone["rows"])
    tolerance = 1e-13 if case.dtype == torch.float64 else 1e-6
    # What is computed in tiles of another shape may differ in the cosines' last digit, times the scale; in a batch of
    # one nothing averages it out of the loss.
    of_loss = 4 * tolerance if name.startswith("batch of one") else tolerance
    assert torch.allclose(result["losses"].double(), alone["losses"].double(), rtol=of_loss, atol=0)
    assert reference.relative_error(result["centers after"], alone["centers after"]) < 4 * tolerance
