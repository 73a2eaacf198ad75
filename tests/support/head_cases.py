"""One step of the head for many configurations, run alike by one process and by several.

A test compares the results of all ranks with a dense oracle in the parent process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.distributed.collectives import Group, rank_of, split_evenly, world_size_of
from partialfc.head.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    SubCenterArcFace,
)
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC, Update
from partialfc.head.sampling import Sampler

STEP = 5
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MARGINS: dict[str, Margin] = {
    "none": Margin(),
    "cosface": CosFace(0.4),
    "arcface": ArcFace(0.5),
    "straight": ArcFace(0.5, "straight_through"),
    "combined": CombinedMargin(1.35, 0.3, 0.2),
    "adaface": AdaFace(),
    "magface": MagFace(2.0, 15.0, 0.1, 0.4, 2.0),
    "curricularface": CurricularFace(),
    "elasticface arc": ElasticFace("arc", deviation=0.05),
    "elasticface cos": ElasticFace("cos", deviation=0.05),
    "subcenter": SubCenterArcFace(torch.pi / 10),
}
# Running figures as after some training: the first ones leave AdaFace a fixed margin.
STATES = {"curricularface": {"t": 0.3}, "adaface": {"mean": 9.0, "deviation": 3.0}}
COSINES = (0.999, -0.95, 0.3, 0.9, 0.0, 0.99, 0.6, -0.2)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        batch: images of the global batch, spread unevenly over the ranks.
        labels: those of the images; drawn where empty.
        uneven: give the last rank no image at all.
    """

    margin: str = "cosface"
    num_classes: int = 149
    embedding_dim: int = 19
    batch: int = 11
    sample_rate: float = 0.1
    update: Update = "sparse"
    sampler: Sampler = "uniform"
    optimizer: str = "sgd"
    threshold: float | None = None
    zero_logit: bool = False
    scale: float = 64.0
    scratch_bytes: int = 256 << 20
    dtype: torch.dtype = torch.float32
    centers_dtype: torch.dtype = torch.float32
    labels: tuple[int, ...] = ()
    uneven: bool = False
    micro_steps: int = 1
    seed: int = 7


@dataclass
class Built:
    """The global batch of a case, and the centers it is built around; the same on every rank."""

    embeddings: Tensor
    labels: Tensor
    centers: Tensor
    counts: list[int] = field(default_factory=list)


def cases() -> dict[str, Case]:
    """Every margin, sample rate and update; then what is odd in some way."""
    found: dict[str, Case] = {}
    plain = list(MARGINS)[:4]
    for number, (margin, rate, update) in enumerate(
        (margin, rate, update) for margin in plain for rate in (1.0, 0.1, 0.0) for update in ("sparse", "deferred")
    ):
        found[f"{margin} {rate} {update}"] = Case(
            margin=margin,
            sample_rate=rate,
            update=update,  # type: ignore[arg-type]
            optimizer=("sgd", "adamw")[(number + number // 2) % 2],
            scratch_bytes=(256 << 20, 6000)[(number // 4) % 2],
            num_classes=(149, 83, 131)[number % 3],
        )
    for number, margin in enumerate(list(MARGINS)[4:]):
        several: dict[str, Any] = {"margin": margin, "batch": 15, "micro_steps": 3}
        tiles: dict[str, Any] = {"scratch_bytes": (256 << 20, 6000)[number % 2]}
        found |= {
            f"{margin}, sparse": Case(margin, sample_rate=1.0, **tiles),
            f"{margin}, sampled, deferred": Case(margin, update="deferred", optimizer="adamw"),
            f"{margin}, three micro-steps, deferred": Case(sample_rate=1.0, update="deferred", **several),
            f"{margin}, conflicts, three micro-steps": Case(threshold=0.25, **several, **tiles),
        }
    for update in ("sparse", "deferred"):
        odd = {
            "several blocks": {"num_classes": 9001},
            "several blocks, adamw": {"num_classes": 9001, "optimizer": "adamw", "scratch_bytes": 1 << 14},
            "conflicts": {"threshold": 0.15, "scratch_bytes": 6000},
            "conflicts at rate 1": {"threshold": 0.15, "sample_rate": 1.0, "optimizer": "adamw"},
            "conflicts as zero logits": {"threshold": 0.15, "zero_logit": True},
            "conflicts among raised": {"threshold": 0.15, "margin": "curricularface", "sample_rate": 1.0},
            "sweep": {"sampler": "sweep", "num_classes": 9001},
            "runs": {"sampler": "runs", "num_classes": 9001},
            "fewer classes than ranks": {"num_classes": 2, "batch": 5, "sample_rate": 1.0},
            "one class": {"num_classes": 1, "batch": 3, "sample_rate": 1.0},
            "batch of one": {"batch": 1},
            "batch of one, positives only": {"batch": 1, "sample_rate": 0.0},
            "more positives than samples": {"num_classes": 40, "labels": tuple(range(3, 36, 3))},
            "positives on one rank": {"labels": (1, 2, 2, 0, 1, 3, 4, 1, 2, 2, 1), "sample_rate": 0.0},
            "one label only": {"labels": (17,) * 11},
            "a rank without images": {"uneven": True, "batch": 7},
            "large batch": {"batch": 67, "scratch_bytes": 1 << 14},
            "small scale": {"scale": 8.0},
            "shifted exponents": {"scale": 83.0, "sample_rate": 1.0},
            "float64": {"dtype": torch.float64, "centers_dtype": torch.float64, "optimizer": "adamw"},
            "bfloat16": {"dtype": torch.bfloat16},
            "float16": {"dtype": torch.float16},
            "three micro-steps": {"batch": 21, "micro_steps": 3},
            "three micro-steps in tiles": {"batch": 21, "micro_steps": 3, "scratch_bytes": 6000, "optimizer": "adamw"},
            "three micro-steps, several blocks": {"batch": 21, "micro_steps": 3, "num_classes": 5003},
        }
        found |= {f"{name}, {update}": Case(update=update, **options) for name, options in odd.items()}  # type: ignore[arg-type]
    return found


def build(case: Case, world_size: int) -> Built:
    """Embeddings around the initial centers at the cosines of `COSINES`, of unequal lengths."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = case.num_classes * MARGINS[case.margin].sub_centers
    key = keyed_random.derive_key(case.seed, "centers")
    centers = (keyed_random.normal_rows(key, 0, rows, case.embedding_dim) * 0.01).to(case.centers_dtype)
    labels = torch.randint(case.num_classes, (case.batch,), generator=generator)
    if case.labels:
        labels = torch.tensor(case.labels)
    unit = torch.nn.functional.normalize(centers.double(), dim=1)[labels * MARGINS[case.margin].sub_centers]
    other = torch.randn(unit.shape, generator=generator, dtype=torch.float64)
    other = torch.nn.functional.normalize(other - (other * unit).sum(dim=1, keepdim=True) * unit, dim=1)
    cosine = torch.tensor(COSINES, dtype=torch.float64).repeat(len(labels))[: len(labels), None]
    lengths = 1 + 20 * torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
    embeddings = (lengths * (cosine * unit + (1 - cosine**2).sqrt() * other)).to(case.dtype)
    parts = world_size - 1 if case.uneven and world_size > 1 else world_size
    batch = len(labels) // case.micro_steps
    counts = [stop - start for start, stop in (split_evenly(batch, parts, part) for part in range(parts))]
    return Built(embeddings, labels, centers, counts + [0] * (world_size - parts))


def make_head(case: Case, group: Group | None = None) -> tuple[PartialFC, RowwiseSGD | RowwiseAdamW]:
    """The head of a case and its optimizer, whose state is filled as if training had gone on for a while."""
    head = PartialFC(
        case.num_classes,
        case.embedding_dim,
        case.sample_rate,
        MARGINS[case.margin],
        case.scale,
        case.threshold,
        conflict_as_zero_logit=case.zero_logit,
        update=case.update,
        sampler=case.sampler,
        seed=case.seed,
        scratch_bytes=case.scratch_bytes,
        dtype=case.centers_dtype,
        group=group,
    )
    head.step = STEP
    for name, figure in STATES.get(case.margin, {}).items():
        head.get_buffer(f"margin_{name}").fill_(figure)
    optimizer = RowwiseSGD([head.centers], **SGD) if case.optimizer == "sgd" else RowwiseAdamW([head.centers], **ADAMW)
    state = optimizer.row_state(head.centers)
    first = head.shard.start * head.loss_config.margin.sub_centers
    for name, value in state.items():
        if name == "step":
            value.fill_(3)
        else:
            drawn = keyed_random.normal_rows(11, first, first + len(value), case.embedding_dim) * 0.1
            value.copy_(drawn.square() if name == "exp_avg_sq" else drawn)
    return head, optimizer


def run_case(case: Case, group: Group | None = None) -> dict[str, Tensor]:
    """One step of one rank: everything a test wants to look at, before and after."""
    rank = rank_of(group)
    built = build(case, world_size_of(group))
    head, optimizer = make_head(case, group)
    state = optimizer.row_state(head.centers)
    result = {"centers": head.centers.detach().clone()}
    result |= {f"{name} before": value.clone() for name, value in state.items()}
    batch = len(built.labels) // case.micro_steps
    start = sum(built.counts[:rank])
    losses, gradients, sampled = [], [], []
    for micro_step in range(case.micro_steps):
        first = micro_step * batch + start
        own = slice(first, first + built.counts[rank])
        embeddings = built.embeddings[own].requires_grad_()
        loss = head(embeddings, built.labels[own])
        (loss / case.micro_steps).backward()
        assert embeddings.grad is not None
        assert head.figures is not None
        losses.append(loss.detach())
        gradients.append(embeddings.grad)
        sampled.append(head.figures.sampled)
    rows, values = pending_gradient(head)
    optimizer.step()
    result |= {f"{name} after": value.clone() for name, value in state.items()}
    return result | {
        "losses": torch.stack(losses),
        "embeddings_gradient": torch.cat(gradients),
        "rows": rows + head.shard.start * head.loss_config.margin.sub_centers,
        "values": values,
        "centers after": head.centers.detach().clone(),
        "target_cosine": head.figures.target_cosine,
        "conflict_share": head.figures.conflict_share,
        "sampled": torch.tensor(sampled),
        "step": torch.tensor(head.step),
        **{f"margin {name}": value for name, value in head.margin_state().items()},
    }


def pending_gradient(head: PartialFC) -> tuple[Tensor, Tensor]:
    """Local rows and gradient that the optimizer's step is about to use."""
    if head.update == "sparse" and head.centers.grad is not None:
        gradient = head.centers.grad.coalesce()
        return gradient.indices()[0], gradient.values()
    seen: list[tuple[Tensor, Tensor]] = []
    head.center_state.visit(head.centers, lambda rows, values: seen.append((rows, values.clone())))
    if not seen:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, head.embedding_dim)
    rows, values = (torch.cat(parts) for parts in zip(*seen, strict=True))
    order = rows.argsort()
    return rows[order], values[order].detach()


def work(rank: int, folder: Path) -> None:
    """All cases at the world sizes 2, 3 and 4, in subgroups of four processes."""
    for world_size in (2, 3, 4):
        group = dist.new_group(list(range(world_size))) if world_size < 4 else None
        if rank < world_size:
            run_cases(folder, group)


def run_cases(folder: Path, group: Group | None = None) -> None:
    """All cases on one rank; the results go to a file of the rank."""
    results = {name: run_case(case, group) for name, case in cases().items()}
    torch.save(results, folder / f"cases-{world_size_of(group)}-{rank_of(group)}.pt")


def merge(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all ranks together hold: rows and images concatenated in their order, the rest from rank 0.

    The embeddings' gradient is that of one process: the ranks', divided by their number as DDP does.
    """
    world_size = len(results)
    merged = dict(results[0])
    for name in merged:
        if name.split()[0] in ("centers", "rows", "values", "momentum_buffer", "exp_avg", "exp_avg_sq") or name in (
            "step before",
            "step after",
        ):
            merged[name] = torch.cat([result[name] for result in results])
    counts = build(case, world_size).counts
    by_rank = [
        result["embeddings_gradient"].split(max(count, 1)) for result, count in zip(results, counts, strict=True)
    ]
    pieces = [by_rank[r][i] for i in range(case.micro_steps) for r in range(world_size) if counts[r]]
    merged["embeddings_gradient"] = torch.cat(pieces).double() / world_size
    merged["sampled"] = sum((result["sampled"] for result in results), torch.zeros_like(results[0]["sampled"]))
    figures = [name for name in merged if name.startswith("margin ")]
    merged["equal figures"] = torch.tensor(
        [torch.equal(result[name], merged[name]) for name in figures for result in results], dtype=torch.bool
    )
    merged["steps"] = torch.stack([result["step"] for result in results])
    return merged
