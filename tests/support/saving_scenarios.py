"""Heads that are saved, loaded and asked by groups of one to four ranks, alike on every rank; the tests compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Group, rank_of, split_evenly, world_size_of
from partialfc.head.files import load_head, save_head
from partialfc.head.margins import ArcFace, CurricularFace, Margin
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, DIM, BATCH, STEPS = 61, 8, 7, 3


def work(rank: int, folder: Path) -> None:
    """What three ranks save, others load; then the scenarios at the world sizes 2, 3 and 4."""
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3)} | {4: None}
    if rank < 3:
        save(folder, groups[3])
    dist.barrier()
    for world_size, group in groups.items():
        if rank < world_size:
            run(folder, group)
            torch.save(state_dicts(group) | errors(folder, group), folder / f"errors-{world_size}-{rank}.pt")


def make(
    kind: str, group: Group | None = None, margin: Margin | None = None
) -> tuple[PartialFC, RowwiseSGD | RowwiseAdamW]:
    """A head and its optimizer: "sgd", "lazy" or "adamw"."""
    margin = margin or CurricularFace(0.5)
    head = PartialFC(CLASSES, DIM, 0.2, margin, 16.0, seed=3, dtype=torch.float64, group=group)
    if kind == "adamw":
        return head, RowwiseAdamW(head.parameters(), lr=0.01)
    return head, RowwiseSGD(head.parameters(), lr=0.05, unsampled="lazy_dense" if kind == "lazy" else "freeze")


def train(head: PartialFC, optimizer: RowwiseSGD | RowwiseAdamW, first: int, last: int) -> None:
    """Steps [first, last) on this rank's part of a batch that depends on the step alone."""
    start, stop = split_evenly(BATCH, head.shard.world_size, head.shard.rank)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        head(embeddings[start:stop], labels[start:stop]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, group: Group | None) -> None:
    """Train each kind of optimizer for some steps and save it."""
    for kind in ("sgd", "lazy", "adamw"):
        head, optimizer = make(kind, group)
        train(head, optimizer, 0, STEPS)
        save_head(head, optimizer, folder / kind)
    save_head(make("sgd", group, ArcFace(0.3))[0], None, folder / "plain")


def embeddings_of(group: Group | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """This rank's embeddings to ask a head about; the last rank has none."""
    generator = torch.Generator().manual_seed(9)
    everything = torch.randn(12, DIM, generator=generator, dtype=torch.float64).to(dtype)
    parts = max(1, world_size_of(group) - 1)
    if rank_of(group) >= parts:
        return everything[:0]
    return everything[slice(*split_evenly(12, parts, rank_of(group)))]


def run(folder: Path, group: Group | None = None) -> None:
    """Load each kind, ask it, train it further; this rank's results go to a file."""
    results: dict[str, Any] = {}
    for kind in ("sgd", "lazy", "adamw"):
        head, optimizer = make(kind, group)
        load_head(folder / kind, head, optimizer)
        loaded = head.centers.detach().clone()
        logits = head.logits(embeddings_of(group))
        classes, cosines = head.predict(embeddings_of(group), 5)
        train(head, optimizer, STEPS, STEPS + 3)
        optimizer.flush()
        results[kind] = {
            "loaded": loaded,
            "trained": head.centers.detach(),
            "step": torch.tensor(head.step),
            "margin": head.margin_state()["t"],
            "logits": logits,
            "classes": classes,
            "cosines": cosines,
        }
    results["built"] = load_head(folder / "plain", group=group).centers.detach()
    torch.save(results, folder / f"results-{world_size_of(group)}-{rank_of(group)}.pt")


def state_dicts(group: Group | None) -> dict[str, Any]:
    """Each rank's own state_dict, and those of others."""
    head, optimizer = make("sgd", group)
    train(head, optimizer, 0, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = head.state_dict()
    other, _ = make("sgd", group)
    other.load_state_dict(state)
    same = torch.equal(other.centers, head.centers) and other.step == 2
    fresh = make("sgd", group)[1]
    part = {"centers": state["centers"], "margin_t": state["margin_t"]}
    return {
        "warnings": [str(warning.message) for warning in caught],
        "own": same,
        "without classes": message(lambda: other.load_state_dict(part)),
        "shard of another rank": message(lambda: other.load_state_dict(from_rank_0(head, group))),
        "optimizer of another rank": message(lambda: fresh.load_state_dict(from_rank_0(optimizer, group))),
    }


def from_rank_0(owner: PartialFC | RowwiseSGD | RowwiseAdamW, group: Group | None) -> dict[str, Any]:
    """The state_dict of rank 0, on every rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = [owner.state_dict()]
    dist.broadcast_object_list(states, group_src=0, group=group)
    return states[0]


def errors(folder: Path, group: Group | None) -> dict[str, str]:
    """What is wrong on the last rank alone, as every rank reports it."""
    is_last = rank_of(group) == world_size_of(group) - 1
    head, optimizer = make("sgd", group)
    others = {
        "optimizer": torch.optim.SGD(head.parameters(), lr=0.1),
        "head": make("sgd", group)[1],
        "kind": RowwiseAdamW(head.parameters()),
    }
    chosen = {name: other if is_last else optimizer for name, other in others.items()}
    found = {name: message(partial(load_head, folder / "sgd", head, one)) for name, one in chosen.items()}
    found["saving"] = message(lambda: save_head(head, chosen["optimizer"], folder / "new"))
    margin, _ = make("sgd", group, ArcFace(0.5)) if is_last else make("sgd", group)
    found["margin"] = message(lambda: load_head(folder / "sgd", margin))
    return found | {"untouched": str(head.step == 0 and not (folder / "new").exists())}


def message(work: Callable[[], Any]) -> str:
    """What the InputError of `work` says; "" if there is none."""
    try:
        work()
    except InputError as error:
        return str(error)
    return ""
