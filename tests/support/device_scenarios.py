"""What ranks find when the head runs as on a GPU, in Triton's interpreter: padded classes, the flag for bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Group, rank_of, split_evenly, world_size_of
from partialfc.head import sampled_softmax
from partialfc.head.backends.base import Backend
from partialfc.head.backends.gpu import GPUBackend
from partialfc.head.backends.torch_chunked import ChunkedBackend
from partialfc.head.inputs import GlobalLabels
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC

WIDTH, BATCH = 8, 14
RATES = {"positives": (0.0, 4100), "blocks": (0.02, 9001), "all": (1.0, 149), "few": (0.3, 2)}
BAD = {  # a label, and what an embedding is multiplied by
    "too large": (1 << 40, 1.0),
    "just too large": (149, 1.0),
    "negative, and nan": (-1, torch.nan),
    "very negative": (-(1 << 63), 1.0),
    "nan": (1, torch.nan),
    "infinite": (1, -torch.inf),
}
SHARED = {name: BAD[name] for name in ("just too large", "nan")}  # at more than one process


class Tracking(CosFace):
    """CosFace that keeps the mean target cosine of the batch."""

    def initial_state(self) -> dict[str, Tensor]:
        return {"t": torch.zeros((), dtype=torch.float64)}

    def updated_state(self, target_cosine: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"t": 0.5 * batch.state["t"] + 0.5 * target_cosine.mean()}


def work(rank: int, folder: Path) -> None:
    """All at the world sizes 2 and 3."""
    for world_size in (2, 3):
        group = dist.new_group(list(range(world_size))) if world_size < 3 else None
        if rank < world_size:
            torch.save(play(group), folder / f"{world_size}-{rank}.pt")


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Every head uses this backend inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_softmax, "select_backend", lambda *arguments: backend)
        yield


def play(group: Group | None = None) -> dict[str, Any]:
    """What one rank found."""
    found: dict[str, Any] = {"flags": {}}
    for backend in (GPUBackend(), ChunkedBackend()):
        with using(backend):
            for name in RATES:
                found.setdefault(name, {})[type(backend).__name__] = train(name, backend, group)
    with using(GPUBackend()):
        for name, (label, value) in (BAD if world_size_of(group) == 1 else SHARED).items():
            found["flags"][name] = bad_step(group, label, value)
    return found


def local_batch(classes: int, step: int, group: Group | None) -> tuple[Tensor, Tensor, GlobalLabels]:
    """This rank's embeddings and labels, many of which repeat, and what it may know of all ranks."""
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(BATCH, WIDTH, generator=generator)
    labels = torch.randint(min(classes, 9), (BATCH,), generator=generator) * (classes // min(classes, 9))
    parts = [split_evenly(BATCH, world_size_of(group), rank) for rank in range(world_size_of(group))]
    own = slice(*parts[rank_of(group)])
    global_labels = GlobalLabels([stop - start for start, stop in parts], labels)
    return embeddings[own].requires_grad_(), labels[own].clone(), global_labels


def train(name: str, backend: Backend, group: Group | None) -> list[Tensor]:
    """Three steps: losses, embedding gradients, numbers of classes; then centers and momentum."""
    rate, classes = RATES[name]
    head = PartialFC(classes, WIDTH, rate, scale=16.0, update="deferred", seed=4, group=group)
    optimizer = RowwiseSGD(head.parameters(), lr=0.1)
    seen = []
    for step in range(3):
        embeddings, labels, global_labels = local_batch(classes, step, group)
        loss = head(embeddings, labels, global_labels=global_labels if step else None)
        loss.backward()
        (gradient,) = head.center_state.deferred
        assert (gradient.batch.count is not None) == isinstance(backend, GPUBackend)
        optimizer.step()
        seen += [loss.detach(), embeddings.grad, head.figures.sampled, head.figures.conflict_share]
    return [*seen, head.centers.detach(), optimizer.row_state(head.centers)["momentum_buffer"]]


def bad_step(group: Group | None, label: int, value: float) -> dict[str, Any]:
    """A good step, one that is bad on the last rank alone, and what comes of it in each way of finding out."""
    found: dict[str, Any] = {}
    for way in ("check", "next forward"):
        head = PartialFC(149, WIDTH, 0.3, Tracking(0.4), update="deferred", group=group)
        optimizer = RowwiseSGD(head.parameters(), lr=0.1)
        step(head, optimizer, 0, group)
        before = [*state(head, optimizer)]
        embeddings = step(head, optimizer, 1, group, label, value)
        result: dict[str, Any] = {
            "untouched": all(
                torch.equal(one, other) for one, other in zip(before, state(head, optimizer), strict=True)
            ),
            "gradient": float(embeddings.grad.abs().sum()),
        }
        try:
            if way == "check":
                head.check()
            else:
                step(head, optimizer, 2, group)
        except InputError as error:
            result["error"] = f"{type(error).__name__}: {error}"
        result["still untouched"] = torch.equal(before[0], head.centers)
        head.check()
        step(head, optimizer, 3, group)
        head.check()
        result["trains on"] = not torch.equal(before[0], head.centers) and bool(head.centers.isfinite().all())
        margin_state = head.get_buffer("margin_t")
        result["moves on"] = not torch.equal(before[2], margin_state) and bool(margin_state.isfinite())
        found[way] = result
    return found


def state(head: PartialFC, optimizer: RowwiseSGD) -> tuple[Tensor, ...]:
    return tuple(
        tensor.detach().clone()
        for tensor in (head.centers, optimizer.row_state(head.centers)["momentum_buffer"], head.get_buffer("margin_t"))
    )


def step(
    head: PartialFC, optimizer: RowwiseSGD, number: int, group: Group | None, label: int = 1, value: float = 1.0
) -> Tensor:
    """One step, whose last rank has this label and an embedding multiplied by this value; the embeddings."""
    embeddings, labels, _ = local_batch(149, number, group)
    if rank_of(group) == world_size_of(group) - 1 and (label, value) != (1, 1.0):
        labels[1], embeddings = label, (embeddings.detach() * value).requires_grad_()
    head(embeddings, labels).backward()
    optimizer.step()
    return embeddings
