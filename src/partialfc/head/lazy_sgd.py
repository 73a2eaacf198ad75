"""Dense SGD at sparse cost: the steps that a row was not sampled in, made up for when it is needed again.

Without a gradient, a step of SGD with momentum μ and weight decay λ at learning rate η is linear in a row c and its
momentum v: v' = μ v + λ c and c' = c − η v', that is (c', v') = A (c, v) with A = [[1 − ηλ, −ημ], [λ, μ]]. Missed steps
are one product of such matrices, so that a row costs the same after one missed step as after a thousand.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from partialfc.head.backends.compiled import numba_kernels_for
from partialfc.head.row_storage import Rows
from partialfc.head.rows import CenterState

_ROWS_AT_ONCE = 1 << 14


class CatchUp:
    """Which steps each row of one parameter (L, D) has taken part in, as dense SGD would have done.

    Args:
        rows, device: L, and where the parameter is.
        link: of the parameter's head.
    """

    def __init__(self, rows: int, device: torch.device, link: CenterState) -> None:
        self._link = link
        self._done = torch.zeros(rows, dtype=torch.int64, device=device)
        self.forget()

    def forget(self) -> None:
        """No row is behind."""
        self._done.zero_()
        self._steps = 0
        self._history = array("d")  # learning rate, momentum and weight decay of each step

    def mark(self, rows: Tensor) -> None:
        """`rows` (n,) take part in the step that `finish_step` is about to record."""
        self._done[rows] = self._steps + 1

    def finish_step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """All other rows are a step further behind."""
        self._history.extend((lr, momentum, weight_decay))
        self._steps += 1

    def apply_missed(self, centers: Tensor, momentum_buffer: Tensor, rows: Tensor) -> None:
        """Apply to `rows` (n,) of both (L, D) the steps that they have missed."""
        missed = self._steps - self._done[rows]
        if not bool(missed.any()):
            return
        powers = torch.from_numpy(self._products(int(missed.max())))
        self._done[rows] = self._steps
        # Not `detach`, which would void a backward pass to come: that reads rows that are up to date already.
        centers = centers.data
        loops = numba_kernels_for(centers, momentum_buffer)
        if loops is not None:
            loops.transform_rows(
                centers.numpy(), momentum_buffer.numpy(), rows.numpy(), missed.numpy(), powers.float().numpy()
            )
            return
        behind = Rows(rows, torch.promote_types(centers.dtype, torch.float32), self._link)
        values, velocity = behind.read(centers), behind.read(momentum_buffer)
        factors = powers.to(values.device, values.dtype)[missed]
        behind.write(centers, "missed centers", factors[:, :1] * values + factors[:, 1:2] * velocity)
        behind.write(momentum_buffer, "missed momentum", factors[:, 2:3] * values + factors[:, 3:] * velocity)

    def apply_missed_to_all(self, centers: Tensor, momentum_buffer: Tensor) -> None:
        """Leave no row behind."""
        for rows in torch.arange(len(centers), device=centers.device).split(_ROWS_AT_ONCE):
            self.apply_missed(centers, momentum_buffer, rows)
        self.forget()

    def _products(self, longest: int) -> np.ndarray:
        """(longest + 1, 4) float64: row k is the product of the last k steps' matrices, row by row."""
        products = np.empty((longest + 1, 4))
        a, b, c, d = products[0] = 1.0, 0.0, 0.0, 1.0
        for k in range(1, longest + 1):
            place = 3 * (self._steps - k)
            lr, momentum, weight_decay = self._history[place : place + 3]
            top_left, top_right = 1.0 - lr * weight_decay, -lr * momentum
            a, b = a * top_left + b * weight_decay, a * top_right + b * momentum
            c, d = c * top_left + d * weight_decay, c * top_right + d * momentum
            products[k] = a, b, c, d
        return products
