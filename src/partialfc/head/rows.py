"""Rows of centers between a head and its optimizer: the state they share, and how rows are read, rounded and stored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import JobError
from partialfc.core.threads import single_threaded_if
from partialfc.head.backends.base import CenterGradient, RowVisitor, for_each_tile
from partialfc.head.loss import class_rows

_REGISTERED_AT_ONCE = 1 << 30


class CenterState:
    """Step counter, pending gradients and hooks that a head shares with its optimizer: `center_state` of the parameter.

    Attributes:
        step: optimizer steps taken; it seeds the negatives of a step.
        deferred: gradients that backward left for `step()` to compute, one per micro-step (update="deferred").
        prepare: called with the rows (n,) that the head is about to read, if the optimizer needs it.
        flag: (1,) int64 on the device, not 0 if a batch was bad and nothing may be updated; None where a bad batch
            raises at once.
        seed, first_row: the head's seed and the global number of its first row: the keys of stochastic rounding.
    """

    def __init__(self, seed: int = 0, first_row: int = 0) -> None:
        self.seed, self.first_row = seed, first_row
        self._step, self._counter = 0, torch.zeros((), dtype=torch.int64)
        self.flag: Tensor | None = None
        self.deferred: list[CenterGradient] = []
        self.prepare: Callable[[Tensor], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the head shares no optimizer with the original: neither pending gradients nor the hook."""
        return self.__dict__ | {"deferred": [], "prepare": None}

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._counter.fill_(value)

    def advance(self) -> None:
        """Count a step, on the device too: a replayed CUDA graph counts there."""
        self._step += 1
        self._counter.add_(1)

    def counter(self, device: torch.device) -> Tensor:
        """`step` as () int64 on `device`, the same tensor in every step."""
        if self._counter.device != device:
            self._counter = torch.full((), self._step, dtype=torch.int64, device=device)
        return self._counter

    def visit(self, centers: Tensor, visit: RowVisitor) -> None:
        """Pass all rows with a deferred gradient to `visit`, each once, by tiles, possibly in several threads at once.

        A tile is computed from its own rows only, which the visitor may change.
        """
        if not self.deferred:
            return
        self.deferred = [gradient.without_padding() for gradient in self.deferred]
        with single_threaded_if(self.deferred[0].backend.uses_thread_pool):
            if len(self.deferred) == 1:
                self.deferred[0].visit(centers, visit)
            else:
                self._visit_merged(centers, visit)

    def _visit_merged(self, centers: Tensor, visit: RowVisitor) -> None:
        """The same over the union of several micro-steps' classes."""
        parts = self.deferred
        backend, sub_centers = parts[0].backend, parts[0].batch.config.margin.sub_centers

        def work(classes: Tensor) -> None:
            rows = class_rows(classes, sub_centers)
            gradient = parts[0].scaled_embeddings.new_zeros((len(rows), centers.shape[1]))
            for part in parts:
                ends = torch.stack([classes[0], classes[-1] + 1])
                first, last = torch.searchsorted(part.batch.classes, ends).tolist()
                if first < last:
                    positions = torch.searchsorted(rows, part.batch.rows(first, last))
                    gradient.index_add_(0, positions, backend.tile_gradient(part, centers, first, last))
            visit(rows, gradient)

        classes = torch.cat([part.batch.classes for part in parts]).unique()
        for_each_tile(backend, work, classes.split(min(backend.tile_classes(part.batch) for part in parts)))


def center_state_of(parameter: Tensor) -> CenterState | None:
    """The state that a head attached to its centers, None for any other parameter."""
    return getattr(parameter, "center_state", None)


def zero_state(parameter: Tensor, dtype: torch.dtype | None, on_host: bool) -> Tensor:
    """Zeros like `parameter`, of its dtype if None; for a GPU, in page-locked host memory if `on_host`."""
    dtype = parameter.dtype if dtype is None else dtype
    if not (on_host and parameter.is_cuda):
        return torch.zeros_like(parameter, dtype=dtype)
    table = torch.zeros(parameter.shape, dtype=dtype, device="cpu")
    _lock_pages(table)
    return table


def _lock_pages(table: Tensor) -> None:
    """Let the GPU access a host tensor, piece by piece: pin_memory would round its size up to a power of two."""
    start, size = table.data_ptr(), table.numel() * table.element_size()
    runtime = torch.cuda.cudart()
    locked: list[int] = []
    weakref.finalize(table, lambda: [runtime.cudaHostUnregister(piece) for piece in locked])
    for offset in range(0, size, _REGISTERED_AT_ONCE):
        piece = start + offset
        error = runtime.cudaHostRegister(piece, min(_REGISTERED_AT_ONCE, size - offset), 0)
        if int(error) != 0:
            raise JobError(
                f"Only {offset >> 20} of {size >> 20} MiB of host memory could be locked for the GPU: raise the limit "
                "of locked memory (ulimit -l), or keep the head's state on the GPU."
            )
        locked.append(piece)


@dataclass(frozen=True)
class Rows:
    """Some rows of a head in one step: reads and writes them in tables of any dtype, on the device or the host.

    Attributes:
        numbers: (n,) int64 local row numbers, on the device that computes.
        dtype: the dtype of the computation, float32 or wider.
        center_state: the head's seed, step and first row; None outside a head.
    """

    numbers: Tensor
    dtype: torch.dtype
    center_state: CenterState | None

    def read(self, table: Tensor) -> Tensor:
        """A copy of the rows of `table` (L, …)."""
        if table.device == self.numbers.device:
            return table[self.numbers].to(self.dtype)
        return table[self.numbers.to(table.device)].to(self.numbers.device).to(self.dtype)  # widened after the transfer

    def write(self, table: Tensor, name: str, values: Tensor) -> None:
        """Store values (n, …) in the rows of `table`; bfloat16 is rounded stochastically, with a key for `name`."""
        if table.dtype == torch.bfloat16:
            (key,) = rounding_keys(self.center_state, (name,), values.device)
            values = round_stochastically(values.float(), key, self.global_numbers())
        numbers = self.numbers.to(table.device)
        table[numbers] = values.to(table.device, table.dtype)

    def global_numbers(self) -> Tensor:
        """(n,) row numbers that do not depend on how the rows are sharded."""
        return self.numbers + (self.center_state.first_row if self.center_state else 0)


def rounding_keys(center_state: CenterState | None, names: Sequence[str], device: torch.device) -> Tensor:
    """A key for the stochastic rounding of each table in the current step: int64 on `device`."""
    center_state = center_state or CenterState()
    keys = [keyed_random.derive_key(center_state.seed, "rounding", name) for name in names]
    return keyed_random.keys_at(keys, center_state.counter(device))


def round_stochastically(values: Tensor, key: int | Tensor, rows: Tensor) -> Tensor:
    """(n, D) bfloat16: one of the two neighbours of each of values (n, D) float32, whose expectation is the value.

    Rounding to nearest would lose every update smaller than half a unit in the last place. The random bits are a
    function of (key, row, column): 16 bits each, so that one draw serves four columns. Infinity and NaN are kept.

    Args:
        rows: (n,) int64, global row numbers.
    """
    width = values.shape[1]
    quarters = (width + 3) // 4
    draws = keyed_random.bits(key, rows[:, None] * quarters + torch.arange(quarters, device=rows.device))
    shifts = torch.arange(0, 64, 16, device=rows.device)
    noise = ((draws[:, :, None] >> shifts) & 0xFFFF).flatten(1)[:, :width].to(torch.int32)
    rounded = (values.contiguous().view(torch.int32) + noise) & -0x10000
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).bfloat16()
