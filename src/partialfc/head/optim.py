"""Optimizers that read and write exactly the sampled rows of the centers.

A row that was not sampled rests: neither its value nor its state changes, weight decay and momentum included
(arXiv 2203.15565; docs/head.md). With sample rate 1 both optimizers are torch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.errors import InputError
from partialfc.head.compiled import compiled_for
from partialfc.head.softmax import CenterGradient, RowVisitor, class_rows
from partialfc.head.threads import alone_if, run_parallel

_NUMBERS_IN_CACHE = 1 << 18  # of a sparse gradient at once: their temporaries stay in a core's cache
_NUMBERS_ON_GPU = 1 << 26


class RowGradients:
    """The link between a head's centers and their optimizer, hung on the parameter as `row_gradients`.

    Attributes:
        step: optimizer steps taken; the negatives of a step are drawn from it.
        deferred: what backward left for `step()` to compute, one entry a micro-step (update="deferred").
    """

    def __init__(self) -> None:
        self.step = 0
        self.deferred: list[CenterGradient] = []

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


class _RowwiseOptimizer(Optimizer, ABC):
    """What the two optimizers share: where the rows and their gradients come from, and when a step is skipped."""

    # torch.amp.GradScaler then calls step() itself and leaves its findings in the attributes `grad_scale` and
    # `found_inf`, which must not exist otherwise: it multiplies what it finds and deletes them after the step.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient.

        Raises:
            InputError: a parameter has a dense gradient, or a GradScaler unscaled gradients that do not exist yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        overflowed = bool(getattr(self, "found_inf", False))
        for group in self.param_groups:
            for parameter in group["params"]:
                link = row_gradients_of(parameter)
                # A rank whose shard has no sampled class counts the step like the others: they draw from its number.
                happens = not overflowed and (parameter.grad is not None or (link is not None and bool(link.deferred)))
                if happens:
                    self._update_parameter(parameter, link, group)
                if link is not None:
                    link.deferred.clear()
                    link.step += happens
        return loss

    def _update_parameter(self, parameter: Tensor, link: RowGradients | None, group: dict[str, Any]) -> None:
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if link is not None and link.deferred and hasattr(self, "found_inf") and grad_scale is None:
            raise InputError(
                "GradScaler.unscale_ cannot reach the gradient of update='deferred', which step() computes: leave it "
                "out for the head's optimizer, since scaler.step unscales by itself."
            )
        self.row_state(parameter)  # before threads may want to create it

        def update(rows: Tensor, gradient: Tensor) -> None:
            gradient = gradient.to(_update_dtype(parameter))
            if grad_scale is not None:
                gradient = gradient / grad_scale
            self._update_rows(parameter, rows, gradient, group)

        _visit_sparse(parameter, update)
        if link is not None:
            link.visit(parameter, update)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that a deferred update has not computed yet included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                link = row_gradients_of(parameter)
                if link is not None:
                    link.deferred.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, on the device of the parameters.

        Raises:
            InputError: the state belongs to other rows than the parameters have.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for parameter, number in zip(group["params"], saved["params"], strict=False):
                for name, value in state_dict["state"].get(number, {}).items():
                    if len(value) != len(parameter):
                        raise InputError(
                            f"The optimizer's {name} has {len(value)} rows, but its centers {len(parameter)}: it was "
                            "saved for another number of classes or processes."
                        )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state.update({name: value.to(parameter.device) for name, value in state.items()})

    def row_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state tensors of `parameter`, one row a row of it; created if it has none yet."""
        state = self.state[parameter]
        if not state:
            state.update(self._initial_state(parameter))
        return state

    @abstractmethod
    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State tensors with a row for each row of `parameter`, as before the first step."""

    @abstractmethod
    def _update_rows(self, parameter: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Change `rows` (n,) of `parameter` and of its state by their gradient (n, D), float32 or wider."""


def _update_dtype(parameter: Tensor) -> torch.dtype:
    """Updates are computed in float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _visit_sparse(parameter: Tensor, visit: RowVisitor) -> None:
    """Show `visit` the rows and values of the parameter's sparse gradient, if it has one, some at a time."""
    gradient = parameter.grad
    if gradient is None:
        return
    if not gradient.is_sparse:
        raise InputError(
            f"A parameter of shape {tuple(parameter.shape)} has a dense gradient, but row-wise optimizers update "
            "sparse rows: give it to an optimizer of torch.optim and only the head's parameters to this one."
        )
    rows, values = gradient._indices()[0], gradient._values()
    # Autograd forgets that one backward's rows are sorted and distinct; only a sum of several is coalesced.
    if bool((rows.diff() <= 0).any()):
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    on_cpu = parameter.device.type == "cpu"
    size = max(1, (_NUMBERS_IN_CACHE if on_cpu else _NUMBERS_ON_GPU) // max(1, parameter.shape[1]))
    tiles = zip(rows.split(size), values.split(size), strict=True)
    if on_cpu:
        run_parallel(lambda tile: visit(*tile), tiles)
    else:
        for tile in tiles:
            visit(*tile)


class RowwiseSGD(_RowwiseOptimizer):
    """SGD with momentum and weight decay on the sampled rows; the rule of torch.optim.SGD for each of them.

    Args:
        params: the head's parameters.
        lr, momentum, weight_decay: as in torch.optim.SGD.

    Raises:
        InputError: a value is out of its range.
    """

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise InputError(
                "RowwiseSGD needs lr >= 0, momentum in [0, 1) and weight_decay >= 0, "
                f"not {lr}, {momentum}, {weight_decay}."
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def _update_rows(self, parameter: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.row_state(parameter)["momentum_buffer"]
        loops = compiled_for(parameter, buffer, gradient)
        if loops is not None:
            numbers = (np.float32(group[name]) for name in ("lr", "momentum", "weight_decay"))
            loops.sgd_rows(parameter.detach().numpy(), buffer.numpy(), rows.numpy(), gradient.numpy(), *numbers)
            return
        values = parameter[rows].to(gradient.dtype)
        velocity = buffer[rows].to(gradient.dtype)
        gradient = gradient.add(values, alpha=group["weight_decay"])
        velocity.mul_(group["momentum"]).add_(gradient)
        values.add_(velocity, alpha=-group["lr"])
        buffer[rows] = velocity.to(buffer.dtype)
        parameter[rows] = values.to(parameter.dtype)


class RowwiseAdamW(_RowwiseOptimizer):
    """AdamW on the sampled rows (Loshchilov and Hutter, ICLR 2019, algorithm 2).

    Each row counts its own steps for the bias correction, since rows are sampled unequally often.

    Args:
        params: the head's parameters.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.

    Raises:
        InputError: a value is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if not (lr >= 0 and all(0 <= beta < 1 for beta in betas) and eps >= 0 and weight_decay >= 0):
            raise InputError(
                "RowwiseAdamW needs lr >= 0, betas in [0, 1), eps >= 0 and weight_decay >= 0, "
                f"not {lr}, {betas}, {eps}, {weight_decay}."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def _update_rows(self, parameter: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.row_state(parameter)
        beta1, beta2 = group["betas"]
        state["step"][rows] += 1
        steps = state["step"][rows].double()[:, None]
        mean = state["exp_avg"][rows].to(gradient.dtype).lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"][rows].to(gradient.dtype).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = (group["lr"] / (1 - beta1**steps)).to(gradient.dtype)
        root_correction = (1 - beta2**steps).sqrt().to(gradient.dtype)
        values = parameter[rows].to(gradient.dtype).mul_(1 - group["lr"] * group["weight_decay"])
        values -= step_size * mean / (square.sqrt() / root_correction + group["eps"])
        state["exp_avg"][rows] = mean.to(state["exp_avg"].dtype)
        state["exp_avg_sq"][rows] = square.to(state["exp_avg_sq"].dtype)
        parameter[rows] = values.to(parameter.dtype)
