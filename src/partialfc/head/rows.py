"""The link between a head's centers and the optimizer that updates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partialfc.head.backends.threads import single_threaded_if
from partialfc.head.loss import CenterGradient, RowVisitor
from partialfc.head.targets import class_rows


class CenterState:
    """The link between a head's centers and their optimizer, hung on the parameter as `center_state`.

    Attributes:
        step: optimizer steps taken; the negatives of a step are drawn from it.
        deferred: what backward left for `step()` to compute, one entry a micro-step (update="deferred").
        prepare: what the optimizer does to rows (n,) before the head reads them, if anything.
        flag: (1,) int64 on the device, not 0 if a batch was bad and nothing may be updated; None where a bad batch
            raises at once.
        seed, first_row: of the head, and the global number of its first row: what stochastic rounding draws from.
    """

    def __init__(self, seed: int = 0, first_row: int = 0) -> None:
        self.seed, self.first_row = seed, first_row
        self._step, self._counter = 0, torch.zeros((), dtype=torch.int64)
        self.flag: Tensor | None = None
        self.deferred: list[CenterGradient] = []
        self.prepare: Callable[[Tensor], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the head: what waits for an optimizer, and what that does, is the original's alone."""
        return self.__dict__ | {"deferred": [], "prepare": None}

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._counter.fill_(value)

    def advance(self) -> None:
        """One step more, on the device too: a replayed CUDA graph counts by itself."""
        self._step += 1
        self._counter.add_(1)

    def counter(self, device: torch.device) -> Tensor:
        """`step` as () int64 on `device`, the same tensor in every step."""
        if self._counter.device != device:
            self._counter = torch.full((), self._step, dtype=torch.int64, device=device)
        return self._counter

    def visit(self, centers: Tensor, visit: RowVisitor) -> None:
        """Show `visit` all rows that have a deferred gradient, each once, tile by tile, maybe in several threads.

        A tile is computed from its own rows only, which the visitor may change.
        """
        if not self.deferred:
            return
        self.deferred = [gradient.without_padding() for gradient in self.deferred]
        with single_threaded_if(self.deferred[0].path.uses_thread_pool):
            if len(self.deferred) == 1:
                self.deferred[0].visit(centers, visit)
            else:
                self._visit_merged(centers, visit)

    def _visit_merged(self, centers: Tensor, visit: RowVisitor) -> None:
        """The same over the union of several micro-steps' classes."""
        parts = self.deferred
        path, sub_centers = parts[0].path, parts[0].batch.margin.sub_centers

        def work(classes: Tensor) -> None:
            rows = class_rows(classes, sub_centers)
            gradient = parts[0].scaled_embeddings.new_zeros((len(rows), centers.shape[1]))
            for part in parts:
                ends = torch.stack([classes[0], classes[-1] + 1])
                first, last = torch.searchsorted(part.batch.classes, ends).tolist()
                if first < last:
                    places = torch.searchsorted(rows, part.batch.rows(first, last))
                    gradient.index_add_(0, places, part.tile(centers, first, last))
            visit(rows, gradient)

        classes = torch.cat([part.batch.classes for part in parts]).unique()
        path.spread(work, classes.split(min(path.tile_classes(part.batch) for part in parts)))


def center_state_of(parameter: Tensor) -> CenterState | None:
    """The link that a head hung on its centers, None on any other parameter."""
    return getattr(parameter, "center_state", None)
