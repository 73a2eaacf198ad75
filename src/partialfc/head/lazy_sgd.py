"""Lazy dense SGD: momentum and decay steps that a row missed are applied in closed form when it is next sampled.

Without a gradient, a step of SGD with momentum μ and weight decay λ at learning rate η is linear in a row c and its
momentum v: v' = μ v + λ c and c' = c − η v', that is (c', v') = A (c, v) with A = [[1 − ηλ, −ημ], [λ, μ]]. The missed
steps of a row are one product of such matrices, so a thousand of them cost the same as one.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from partialfc.head.backends.select import numba_kernels_for
from partialfc.head.center_state import CenterState
from partialfc.head.rows import Rows

_ROWS_AT_ONCE = 1 << 14
_MOST_STEPS = 1 << 12


class MissedSteps:
    """Which steps each row of one parameter (L, D) has missed, compared with dense SGD.

    Args:
        rows, device: L, and the device of the parameter.
        center_state: the state of the parameter's head.
    """

    def __init__(self, rows: int, device: torch.device, center_state: CenterState) -> None:
        self._center_state = center_state
        self._done = torch.zeros(rows, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget all steps: no row has missed any."""
        self._done.zero_()
        self._steps = 0
        self._history = array("d")  # learning rate, momentum and weight decay of each step

    def mark(self, rows: Tensor) -> None:
        """`rows` (n,) take part in the step that `finish_step` is about to record."""
        self._done[rows] = self._steps + 1

    def finish_step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Record a step, which all rows that are not marked have missed."""
        self._history.extend((lr, momentum, weight_decay))
        self._steps += 1

    @property
    def is_full(self) -> bool:
        """Whether all rows should be brought up to date: the products cost as much as the longest miss has steps."""
        return self._steps >= _MOST_STEPS

    def apply_missed(self, centers: Tensor, momentum_buffer: Tensor | None, rows: Tensor) -> None:
        """Apply to `rows` (n,) of both (L, D) the steps that they have missed; there may be no momentum."""
        missed = self._steps - self._done[rows]
        if not bool(missed.any()):
            return
        products = torch.from_numpy(self._products(int(missed.max())))
        self._done[rows] = self._steps
        # Not `detach`, which would invalidate a pending backward pass: it reads only rows that are up to date already.
        centers = centers.data
        late = Rows(rows, torch.promote_types(centers.dtype, torch.float32), self._center_state)
        if momentum_buffer is None:
            factors = products.to(centers.device, late.dtype)[missed]
            late.write(centers, "missed centers", factors[:, :1] * late.read(centers))
            return
        kernels = numba_kernels_for(centers, momentum_buffer)
        if kernels is not None:
            kernels.transform_rows(
                centers.numpy(), momentum_buffer.numpy(), rows.numpy(), missed.numpy(), products.float().numpy()
            )
            return
        values, velocity = late.read(centers), late.read(momentum_buffer)
        factors = products.to(values.device, values.dtype)[missed]
        late.write(centers, "missed centers", factors[:, :1] * values + factors[:, 1:2] * velocity)
        late.write(momentum_buffer, "missed momentum", factors[:, 2:3] * values + factors[:, 3:] * velocity)

    def apply_missed_to_all(self, centers: Tensor, momentum_buffer: Tensor | None) -> None:
        """Apply all missed steps to all rows."""
        for rows in torch.arange(len(centers), device=centers.device).split(_ROWS_AT_ONCE):
            self.apply_missed(centers, momentum_buffer, rows)
        self.reset()

    def _products(self, longest: int) -> np.ndarray:
        """(longest + 1, 4) float64: row k is the product of the last k steps' matrices, in row-major order."""
        products = np.empty((longest + 1, 4))
        a, b, c, d = products[0] = 1.0, 0.0, 0.0, 1.0
        for k in range(1, longest + 1):
            start = 3 * (self._steps - k)
            lr, momentum, weight_decay = self._history[start : start + 3]
            top_left, top_right = 1.0 - lr * weight_decay, -lr * momentum
            a, b = a * top_left + b * weight_decay, a * top_right + b * momentum
            c, d = c * top_left + d * weight_decay, c * top_right + d * momentum
            products[k] = a, b, c, d
        return products
