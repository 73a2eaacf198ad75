"""The link between a head's centers and the optimizer that updates them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from partialfc.head.softmax import CenterGradient, RowVisitor, class_rows
from partialfc.head.threads import alone_if


class RowGradients:
    """The link between a head's centers and their optimizer, hung on the parameter as `row_gradients`.

    Attributes:
        step: optimizer steps taken; the negatives of a step are drawn from it.
        deferred: what backward left for `step()` to compute, one entry a micro-step (update="deferred").
        prepare: what the optimizer does to rows (n,) before the head reads them, if anything.
        seed, first_row: of the head, and the global number of its first row: what stochastic rounding draws from.
    """

    def __init__(self, seed: int = 0, first_row: int = 0) -> None:
        self.seed, self.first_row = seed, first_row
        self.step = 0
        self.deferred: list[CenterGradient] = []
        self.prepare: Callable[[Tensor], None] | None = None

    def visit(self, centers: Tensor, visit: RowVisitor) -> None:
        """Show `visit` all rows that have a deferred gradient, each once, tile by tile, maybe in several threads.

        A tile is computed from its own rows only, which the visitor may change.
        """
        if not self.deferred:
            return
        with alone_if(self.deferred[0].path.in_threads):
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


def row_gradients_of(parameter: Tensor) -> RowGradients | None:
    """The link that a head hung on its centers, None on any other parameter."""
    return getattr(parameter, "row_gradients", None)
