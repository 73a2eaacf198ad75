"""Short runs that are alike on every rank of a group; the tests in the parent process check their results."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc.core.errors import InputError
from partialfc.distributed import collectives
from partialfc.distributed.collectives import Group, Shard, rank_of, split_evenly, world_size_of
from partialfc.head.inputs import GlobalLabels
from partialfc.head.margins import ArcFace
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC, Update

CLASSES, INPUTS, DIM, BATCH = 203, 7, 12, 13


def work(rank: int, folder: Path) -> None:
    """All scenarios at the world sizes 2, 3 and 4, in subgroups of four processes."""
    for world_size in (2, 3, 4):
        group = dist.new_group(list(range(world_size))) if world_size < 4 else None
        if rank < world_size:
            run_scenarios(folder, group)
        else:
            try:
                PartialFC(50, 4, group=group)
            except InputError as error:
                torch.save(str(error), folder / f"outside-{world_size}-{rank}.pt")


def run_scenarios(folder: Path, group: Group | None = None) -> None:
    """Run all scenarios; the results go to a file of the rank."""
    results = {name: run(group) for name, run in SCENARIOS.items()}
    torch.save(results, folder / f"scenarios-{world_size_of(group)}-{rank_of(group)}.pt")


def _training(group: Group | None) -> dict[str, Tensor]:
    """Six steps of a small float64 backbone under DDP beside the head, each of two micro-steps."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, DIM)).double()
    backbone: nn.Module = net
    if world_size_of(group) > 1:
        backbone = DistributedDataParallel(net, process_group=group)
    head = PartialFC(CLASSES, DIM, 0.1, ArcFace(0.5), 16.0, seed=3, dtype=torch.float64, group=group)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
        RowwiseSGD(head.parameters(), lr=0.05, weight_decay=1e-2),
    ]
    generator = torch.Generator().manual_seed(2)
    start, stop = split_evenly(BATCH, world_size_of(group), rank_of(group))
    losses, gradients, sampled = [], torch.empty(0), []
    for _ in range(6):
        for _ in range(2):
            images = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
            labels = torch.randint(CLASSES, (BATCH,), generator=generator)
            loss = head(backbone(images[start:stop]), labels[start:stop])
            (loss / 2).backward()
            losses.append(loss.detach())
        gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
        sampled.append(head.centers.grad.coalesce().indices()[0] + head.shard.start)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "backbone": nn.utils.parameters_to_vector(net.parameters()).detach(),
        "centers": head.centers.detach(),
        "sampled": sampled[-1],
        "step": torch.tensor(head.step),
    }


def _errors(group: Group | None) -> dict[str, str]:
    """Bad input on the last rank alone, then an empty batch; "untouched" if none of it changed the head."""
    rank, world_size = rank_of(group), world_size_of(group)
    found = {}
    head = PartialFC(50, 4, 0.5, update="deferred", group=group)
    optimizer = RowwiseSGD(head.parameters())
    before = head.centers.detach().clone()
    good = torch.ones(2, 4), torch.tensor([1, 49])
    is_last = rank == world_size - 1
    bad = {
        "label too large": (good[0], torch.tensor([1, 50])),
        "label negative": (good[0], torch.tensor([-1, 3])),
        "nan": (torch.full((2, 4), torch.nan), good[1]),
        "infinite": (torch.full((2, 4), torch.inf), good[1]),
    }
    for name, batch in bad.items():
        found[name] = _message(head, *(batch if is_last else good))
    found["empty"] = _message(head, torch.ones(0, 4), torch.zeros(0, dtype=torch.int64))
    optimizer.step()
    found["untouched"] = str(torch.equal(before, head.centers) and head.step == 0 and not head.center_state.deferred)
    found["afterwards"] = _message(head, *good)
    return found


def _wrapped(group: Group | None) -> dict[str, str]:
    """What the head says inside DistributedDataParallel, alone or within another module."""
    if world_size_of(group) == 1:
        return {}
    count = 12 * world_size_of(group)
    batch = torch.ones(1, 4), torch.tensor([1])
    head = DistributedDataParallel(PartialFC(count, 4, 1.0, group=group), process_group=group)
    both = DistributedDataParallel(BackboneAndHead(PartialFC(count, 4, 1.0, group=group)), process_group=group)
    return {"head": _message(head, *batch), "module": _message(both, *batch)}


class BackboneAndHead(nn.Module):
    """What must not be wrapped."""

    def __init__(self, head: PartialFC) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(images), labels)


def _global_labels(group: Group | None) -> dict[str, Any]:
    """The same step without and with the sample counts and labels of all ranks, and the collectives of each."""
    world_size, rank = world_size_of(group), rank_of(group)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    shares = [split_evenly(BATCH, world_size, part) for part in range(world_size)]
    start, stop = shares[rank]
    known = GlobalLabels([last - first for first, last in shares], labels)
    results: dict[str, Any] = {}
    for name, global_labels in (("exchanged", None), ("known", known)):
        head = PartialFC(CLASSES, DIM, 0.1, ArcFace(0.5), 16.0, seed=3, dtype=torch.float64, group=group)
        embeddings = images[start:stop].clone().requires_grad_()
        with torch.no_grad(), counted_collectives() as first:
            head(embeddings, labels[start:stop], global_labels=global_labels)
        with counted_collectives() as forward:
            loss = head(embeddings, labels[start:stop], global_labels=global_labels)
        with counted_collectives() as backward:
            loss.backward()
        results[name] = [loss.detach(), embeddings.grad, head.centers.grad.to_dense()]
        results[f"{name} collectives"] = [len(first), len(forward), len(backward)]
    return results


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """One entry for each collective within."""
    places = [(collectives, "_all_gather"), (collectives, "_reduce_scatter"), (dist, "all_reduce")]
    originals = [getattr(place, name) for place, name in places]
    calls: list[str] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*inputs, **options)

        return call

    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, counting(name, original))
    try:
        yield calls
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def _message(module: nn.Module, embeddings: Tensor, labels: Tensor) -> str:
    """What the InputError says, "" if there is none."""
    try:
        module(embeddings, labels)
    except InputError as error:
        return str(error)
    return ""


def _disagreement(group: Group | None) -> dict[str, str]:
    """Heads and batches that differ on the last rank; what this rank is told."""
    rank, world_size = rank_of(group), world_size_of(group)
    if world_size == 1:
        return {}
    is_last = rank == world_size - 1
    found = {}
    settings: dict[str, dict[str, Any]] = {
        "num_classes": {"num_classes": 51},
        "embedding_dim": {"embedding_dim": 5},
        "sample_rate": {"sample_rate": 0.25},
        "seed": {"seed": 1},
        "dtype": {"dtype": torch.float64},
        "margin": {"margin": ArcFace(0.4)},
        "update": {"update": "deferred"},
        "scale": {"scale": 32.0},
    }
    for name, other in settings.items():
        options: dict[str, Any] = {
            "num_classes": 50,
            "embedding_dim": 4,
            "sample_rate": 0.5,
            "margin": ArcFace(0.5),
            "group": group,
        }
        head = PartialFC(**(options | (other if is_last else {})))
        found[name] = _message(head, torch.ones(2, head.embedding_dim), torch.tensor([1, 49]))
    head = PartialFC(50, 4, 0.5, group=group)
    good = torch.ones(2, 4), torch.tensor([1, 49])
    batches: dict[str, tuple[Any, Any]] = {
        "width": (torch.ones(2, 3), good[1]),
        "embeddings int": (torch.ones(2, 4, dtype=torch.int64), good[1]),
        "labels int32": (good[0], good[1].int()),
        "labels list": (good[0], [1, 49]),
        "labels short": (good[0], good[1][:1]),
        "embeddings bfloat16": (good[0].bfloat16(), good[1]),
        "embeddings float64": (good[0].double(), good[1]),
    }
    for name, batch in batches.items():
        found[name] = _message(head, *(batch if is_last else good))
    head.step += is_last
    found["step"] = _message(head, *good)
    head.step = 3
    found["afterwards"] = _message(head, *good)
    return found


def _scaler(group: Group | None) -> dict[str, Any]:
    """A scale that overflows on one rank alone, by its centers, and one that overflows on all."""
    rank = rank_of(group)
    found: dict[str, Any] = {}
    updates: tuple[Update, ...] = ("sparse", "deferred")
    for update in updates:
        for case in ("one rank", "all"):
            head = PartialFC(50, 4, 0.1, update=update, group=group)
            if case == "one rank" and rank == 0:
                head.centers.data.mul_(1e-7)
            optimizer = RowwiseSGD(head.parameters(), lr=1e-3)
            before = head.centers.detach().clone()
            scale = 2.0**100 if case == "one rank" else 2.0**126
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-60)
            for step in range(2):
                labels = torch.tensor([0, 1])  # all on rank 0: the others have few rows or none
                scaler.scale(head(torch.ones(2, 4) + torch.arange(8).view(2, 4), labels)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                untouched = torch.equal(before, head.centers)
                found[f"{update}, {case}, {step}"] = [head.step, untouched, bool(head.centers.isfinite().all())]
            found[f"{update}, {case}, scale"] = scaler.get_scale()
    return found


def _copies(group: Group | None) -> dict[str, Any]:
    """A head with a group can be copied; it cannot be pickled, nor live outside its group."""
    head = PartialFC(50, 4, group=group)
    copied = copy.deepcopy(head)
    batch = torch.ones(2, 4), torch.tensor([1, 49])
    found: dict[str, Any] = {"copied": torch.equal(head(*batch), copied(*batch))}
    alone = PartialFC(50, 4, group=group)
    alone.shard = Shard(0, 50, 50, group)  # as if built before the group
    found["other shard"] = _message(alone, *batch)
    try:
        pickle.dumps(head)
    except InputError as error:
        found["pickled"] = str(error)
    return found


SCENARIOS: dict[str, Callable[[Group | None], Any]] = {
    "training": _training,
    "errors": _errors,
    "wrapped": _wrapped,
    "global labels": _global_labels,
    "disagreement": _disagreement,
    "scaler": _scaler,
    "copies": _copies,
}
