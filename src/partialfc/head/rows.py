"""Rows of centers in an optimizer: how they are read, rounded and stored, and those of a sparse gradient."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import InputError, JobError
from partialfc.core.threads import run_parallel
from partialfc.head.backends.base import RowVisitor
from partialfc.head.center_state import CenterState

# Elements of a sparse gradient that are updated at once; on a CPU their temporaries stay in a core's cache.
CPU_UPDATE_ELEMENTS = 1 << 18
GPU_UPDATE_ELEMENTS = 1 << 26
_REGISTERED_AT_ONCE = 1 << 30


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


def visit_sparse(parameter: Tensor, visit: RowVisitor) -> None:
    """Pass rows and values of the parameter's sparse gradient, if it has one, to `visit`, a part at a time."""
    gradient = parameter.grad
    if gradient is None:
        return
    if not gradient.is_sparse:
        raise InputError(
            f"A parameter of shape {tuple(parameter.shape)} has a dense gradient, but row-wise optimizers update "
            "sparse rows: give it to an optimizer of torch.optim and only the head's parameters to this one."
        )
    rows, values = gradient._indices()[0], gradient._values()
    # Autograd loses the fact that the rows of one backward are sorted and distinct; only a sum of several needs this.
    if bool((rows.diff() <= 0).any()):
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    on_cpu = parameter.device.type == "cpu"
    size = max(1, (CPU_UPDATE_ELEMENTS if on_cpu else GPU_UPDATE_ELEMENTS) // max(1, parameter.shape[1]))
    tiles = zip(rows.split(size), values.split(size), strict=True)
    if on_cpu:
        run_parallel(lambda tile: visit(*tile), tiles)
    else:
        for tile in tiles:
            visit(*tile)
