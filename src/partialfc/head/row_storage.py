"""Where and how rows of centers and of their optimizer's state are kept: rounded to bfloat16, in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import InputError, JobError
from partialfc.head.rows import CenterState

_REGISTERED_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class StateStorage:
    """How an optimizer keeps the state of rows.

    Attributes:
        dtype: of momentum and averages; None for that of the parameter. bfloat16 is rounded stochastically.
        on_host: keep them in page-locked host memory, which a GPU reads and writes over its bus: the number of
            identities is then bounded by host memory. For parameters on a CPU it changes nothing.

    Raises:
        InputError: a dtype that holds no fractions.
    """

    dtype: torch.dtype | None = None
    on_host: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InputError(f"state_dtype is {self.dtype}; it is floating point, such as torch.bfloat16.")

    def zeros_like(self, parameter: Tensor) -> Tensor:
        """State of zeros for each element of `parameter`."""
        dtype = parameter.dtype if self.dtype is None else self.dtype
        if not (self.on_host and parameter.is_cuda):
            return torch.zeros_like(parameter, dtype=dtype)
        table = torch.zeros(parameter.shape, dtype=dtype, device="cpu")
        _lock_pages(table)
        return table


def _lock_pages(table: Tensor) -> None:
    """Let the GPU reach a host tensor, piece by piece: pin_memory would round one block up to a power of two."""
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
    """Some rows of a head in one step: reads and writes them in tables kept in any dtype, on the host or not.

    Attributes:
        numbers: (n,) int64 local row numbers, on the device that computes.
        dtype: what is computed in, float32 or wider.
        link: the head's seed, step and first row; None outside a head.
    """

    numbers: Tensor
    dtype: torch.dtype
    link: CenterState | None

    def read(self, table: Tensor) -> Tensor:
        """The rows of `table` (L, …), a copy."""
        if table.device == self.numbers.device:
            return table[self.numbers].to(self.dtype)
        return table[self.numbers.to(table.device)].to(self.numbers.device).to(self.dtype)  # widened past the bus

    def write(self, table: Tensor, name: str, values: Tensor) -> None:
        """Put values (n, …) into the rows of `table`; bfloat16 is rounded stochastically, keyed by `name`."""
        if table.dtype == torch.bfloat16:
            (key,) = rounding_keys(self.link, (name,), values.device)
            values = round_stochastically(values.float(), key, self.global_numbers())
        numbers = self.numbers.to(table.device)
        table[numbers] = values.to(table.device, table.dtype)

    def global_numbers(self) -> Tensor:
        """(n,) row numbers that do not depend on how the rows are sharded."""
        return self.numbers + (self.link.first_row if self.link else 0)


def rounding_keys(link: CenterState | None, names: Sequence[str], device: torch.device) -> Tensor:
    """A key for the stochastic rounding of each table in the present step: int64 on `device`."""
    link = link or CenterState()
    keys = [keyed_random.derive_key(link.seed, "rounding", name) for name in names]
    return keyed_random.keys_at(keys, link.counter(device))


def round_stochastically(values: Tensor, key: int | Tensor, rows: Tensor) -> Tensor:
    """(n, D) bfloat16: one of the two neighbours of each of values (n, D) float32, whose expectation is the value.

    Rounded to nearest, an update smaller than half a unit in the last place would be lost every time. The draw is a
    function of (key, row, column): 16 bits, four columns from one draw. Infinity and NaN stay what they are.

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
