"""What the backends share: the input of their two passes over the sampled classes, and the result of each.

The first pass sums the negatives, the second computes the gradient of the centers. Both go through tiles of classes, so
no matrix of samples × classes exceeds the scratch budget.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from partialfc.core.threads import run_parallel
from partialfc.head.loss import LossConfig, class_rows

T = TypeVar("T")


@dataclass(frozen=True)
class ShardBatch:
    """One step on one shard: the input of both passes.

    Attributes:
        embeddings: (G, D) unit embeddings of the global batch, compute dtype.
        classes: (S,) int64, sorted local numbers of the sampled classes; with `count`, padded at the end with the
            number of local classes, to a size that does not depend on the labels.
        count: () int64 on the device, the number of `classes` without the padding; None if there is none.
        target_positions: (G,) int64, position of the sample's own class in `classes`; −1 where another shard owns it.
        hard_negatives: (G,) limits and () t of `Margin.hard_negatives`, compute dtype; None leaves negatives alone.
        config: the constants of the loss.
        scratch: memory for weights that the first pass keeps for the second.
    """

    embeddings: Tensor
    classes: Tensor
    count: Tensor | None
    target_positions: Tensor
    hard_negatives: tuple[Tensor, Tensor] | None
    config: LossConfig
    scratch: ScratchBuffer

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype to which operands of the large products are rounded; sums are float32 at least."""
        dtype = self.embeddings.dtype
        return dtype if dtype == torch.float64 else self.config.operand_dtype

    def rows(self, first: int, last: int) -> Tensor:
        """((last − first) × K,) int64, sorted: the local rows of `classes[first:last]`."""
        return class_rows(self.classes[first:last], self.config.margin.sub_centers)


@dataclass(eq=False)
class ScratchView:
    """A view of a scratch buffer, which is free again when the last reference to the view is gone."""

    values: Tensor


class ScratchBuffer:
    """One buffer that a head reuses in every step: fresh pages cost a CPU more than what is computed into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._view: Callable[[], ScratchView | None] = lambda: None

    def __reduce__(self) -> tuple[type[ScratchBuffer], tuple[()]]:
        """A copy of the head starts with an empty buffer of its own."""
        return ScratchBuffer, ()

    def acquire(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ScratchView | None:
        """A view with undefined content, or None while an earlier one is in use."""
        if self._view() is not None:
            return None
        size = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old buffer before the new one is allocated
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        view = ScratchView(self._buffer[:size].view(dtype).view(shape))
        self._view = weakref.ref(view)
        return view


@dataclass
class NegativeSums:
    """The result of the first pass.

    Attributes:
        sums: (G,) float64, this shard's part of Z exp(−shift).
        weighted_centers: (G, D) compute dtype, Σ_j weight_ij ŵ_j over this shard: the embeddings' gradient without its
            factor.
        conflicts: () float64, the number of negatives above the conflict threshold.
        kept: whatever the backend reuses in the second pass.
    """

    sums: Tensor
    weighted_centers: Tensor
    conflicts: Tensor
    kept: Any = None

    @staticmethod
    def zeros(embeddings: Tensor) -> NegativeSums:
        """Sums over no class; `embeddings` (G, D)."""
        return NegativeSums(
            sums=torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device),
            weighted_centers=torch.zeros_like(embeddings),
            conflicts=torch.zeros((), dtype=torch.float64, device=embeddings.device),
        )


class Backend(Protocol):
    """One implementation of the two passes over the sampled classes.

    Attributes:
        uses_thread_pool: whether tiles are spread over threads, each of whose operations must then be single-threaded.
        supports_padding: whether the first pass accepts padded classes and `fused_update` exists, so that a step needs
            no host read.
    """

    uses_thread_pool: ClassVar[bool]
    supports_padding: ClassVar[bool]

    def tile_classes(self, batch: ShardBatch) -> int:
        """The most classes in a tile."""

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        """First pass: the sums of the loss and the weighted centers.

        Args:
            centers: (L × K, D), not normalised.
            keep: store in `kept` what the second pass can reuse, within the scratch budget.
        """

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        """((last − first) × K, D): gradient of the rows of `classes[first:last]`; valid until this thread's next."""


def tile_bounds(backend: Backend, batch: ShardBatch) -> Iterator[tuple[int, int]]:
    """First and last class of each tile."""
    size = backend.tile_classes(batch)
    for first in range(0, len(batch.classes), size):
        yield first, min(first + size, len(batch.classes))


def for_each_tile(backend: Backend, work: Callable[[T], None], tiles: Iterable[T]) -> None:
    """Run `work` on each tile, in threads where the backend uses them."""
    if backend.uses_thread_pool:
        run_parallel(work, tiles)
        return
    for tile in tiles:
        work(tile)


RowVisitor = Callable[[Tensor, Tensor], None]  # rows (n,) int64, sorted and distinct, and their gradient (n, D)


@dataclass(frozen=True)
class CenterGradient:
    """The second pass before it is run: the gradient of the centers is computed tile by tile, now or in `step()`.

    Attributes:
        batch: the step.
        scaled_embeddings: (G, D) compute dtype, ê times the factor of its negatives.
        target_rows: (G,) int64, distinct local rows of the targets in order, padded with the number of rows.
        target_gradient: (G, D) compute dtype, the projected gradient of `target_rows`.
        backend: the backend that computes it.
        kept: `NegativeSums.kept` of the first pass.
    """

    batch: ShardBatch
    scaled_embeddings: Tensor
    target_rows: Tensor
    target_gradient: Tensor
    backend: Backend
    kept: Any

    def visit(self, centers: Tensor, visit: RowVisitor) -> None:
        """Compute the gradient tile by tile and pass each tile to `visit`, possibly in several threads at once.

        A tile depends on its own rows only, which the visitor may change.
        """

        def work(bounds: tuple[int, int]) -> None:
            visit(self.batch.rows(*bounds), self.backend.tile_gradient(self, centers, *bounds))

        for_each_tile(self.backend, work, tile_bounds(self.backend, self.batch))

    def without_padding(self) -> CenterGradient:
        """The same with exactly the sampled classes: a host read if they are padded."""
        if self.batch.count is None:
            return self
        classes = self.batch.classes[: int(self.batch.count)]
        return replace(self, batch=replace(self.batch, classes=classes, count=None))

    def divided_by(self, scale: Tensor) -> CenterGradient:
        """The same divided by the loss scale (), before the products, which the scale might make overflow."""
        scaled, target = self.scaled_embeddings / scale, self.target_gradient / scale
        return replace(self, scaled_embeddings=scaled, target_gradient=target)


@dataclass(frozen=True)
class SGDRule:
    """One step of SGD with momentum and weight decay on rows.

    Attributes:
        lr, momentum, weight_decay: as in torch.optim.SGD; lr may be () float32 on the device, for CUDA graphs.
        first_row: global number of the shard's first row.
        keys: (2,) int64 on the device, the keys with which centers and momentum are rounded to bfloat16.
        skip: (1,) integer on the device; nothing changes unless it is 0. None for never.
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float
    first_row: int
    keys: Tensor
    skip: Tensor | None = None
