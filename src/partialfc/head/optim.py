"""Optimizers that read and write exactly the sampled rows of the centers.

By default a row that is not sampled stays as it is: neither its value nor its state changes, weight decay and momentum
included (arXiv 2203.15565; docs/head.md). With sample rate 1 both optimizers equal torch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.core.errors import InputError
from partialfc.core.threads import run_parallel
from partialfc.head.backends.base import RowVisitor, SGDRule
from partialfc.head.backends.select import numba_kernels_for
from partialfc.head.lazy_sgd import MissedSteps
from partialfc.head.rows import CenterState, Rows, center_state_of, rounding_keys, zero_state

# Elements of a sparse gradient that are updated at once; on a CPU their temporaries stay in a core's cache.
CPU_UPDATE_ELEMENTS = 1 << 18
GPU_UPDATE_ELEMENTS = 1 << 26

Unsampled = Literal["freeze", "lazy_dense"]


class _RowwiseOptimizer(Optimizer, ABC):
    """The common part of both optimizers: where rows and gradients come from, and when a step is skipped."""

    # torch.amp.GradScaler then calls step() itself and passes its results as the attributes `grad_scale` and
    # `found_inf`, which must not exist otherwise: it multiplies existing ones, and deletes them after the step.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], state_dtype: torch.dtype | None, state_on_host: bool
    ) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise InputError(f"state_dtype is {state_dtype}; it is floating point, such as torch.bfloat16.")
        self._state_dtype, self._state_on_host = state_dtype, state_on_host
        super().__init__(params, defaults)

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
        for group, parameter, state in self._parameters():
            # Ranks without sampled classes must also advance the step: it seeds the next sample.
            has_gradient = parameter.grad is not None or (state is not None and bool(state.deferred))
            updates = has_gradient and not self._is_skipped(parameter, state)
            if updates:
                self._refuse_unscaled(state)
                # Autocast would round the products of a deferred gradient. Triton launches its kernels on the current
                # device, which need not be the parameter's.
                with torch.autocast(parameter.device.type, enabled=False), torch.cuda.device_of(parameter):
                    self._update_parameter(parameter, state, group)
            if state is not None:
                state.deferred.clear()
                if updates:
                    state.advance()
        return loss

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor, CenterState | None]]:
        """Each parameter with its group and the state that its head attached."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter, center_state_of(parameter)

    def _is_skipped(self, parameter: Tensor, center_state: CenterState | None) -> bool:
        """Whether this step changes nothing, as far as the host must know."""
        if center_state is None:
            return bool(getattr(self, "found_inf", False))
        if center_state.flag is not None and bool(center_state.flag):
            return True
        # A GradScaler does not see a deferred gradient.
        overflow = hasattr(self, "found_inf") and any(bool(g.overflowed()) for g in center_state.deferred)
        return overflow or bool(getattr(self, "found_inf", False))

    def _update_parameter(self, parameter: Tensor, center_state: CenterState | None, group: dict[str, Any]) -> None:
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        self.row_state(parameter)  # created here, since threads would race to create it

        def update(rows: Tensor, gradient: Tensor, scale: Tensor | None = None) -> None:
            gradient = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
            if scale is not None:
                gradient = gradient / scale
            self._update_rows(parameter, Rows(rows, gradient.dtype, center_state), gradient, group)

        _visit_sparse(parameter, lambda rows, gradient: update(rows, gradient, grad_scale))
        if center_state is not None:
            if grad_scale is not None:
                center_state.deferred = [gradient.divided_by(grad_scale) for gradient in center_state.deferred]
            center_state.visit(parameter, update)

    def _refuse_unscaled(self, center_state: CenterState | None) -> None:
        unscaled = hasattr(self, "found_inf") and self.grad_scale is None  # type: ignore[attr-defined]
        if unscaled and center_state is not None and center_state.deferred:
            raise InputError(
                "GradScaler.unscale_ cannot reach the gradient of update='deferred', which step() computes: leave it "
                "out for the head's optimizer, since scaler.step unscales by itself."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, including those that a deferred update has not computed yet."""
        super().zero_grad(set_to_none)
        for _, _, center_state in self._parameters():
            if center_state is not None:
                center_state.deferred.clear()

    def flush(self) -> None:
        """Apply all pending lazy updates and wait for asynchronous host writes.

        Call it before anything but the head reads the centers, or anything reads state in host memory, which a GPU
        writes some time after `step` has returned.
        """
        for parameter, state in self.state.items():
            if any(tensor.device != parameter.device for tensor in state.values()):
                torch.cuda.synchronize(parameter.device)

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state to the devices on which this optimizer keeps its own.

        Raises:
            InputError: the state belongs to other rows than the parameters have.
        """
        loaded = [
            (parameter, state_dict["state"].get(number, {}))
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for parameter, number in zip(group["params"], saved["params"], strict=False)
        ]
        for parameter, state in loaded:
            for name, value in state.items():
                if len(value) != len(parameter):
                    raise InputError(
                        f"The optimizer's {name} has {len(value)} rows, but its centers {len(parameter)}: it was "
                        "saved for another number of classes or processes."
                    )
        _RowwiseOptimizer.flush(self)  # no write to the host is pending afterwards
        # torch would cast the state to the parameter's dtype and move it to its device.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, state in loaded:
            for name, value in state.items():
                self.row_state(parameter)[name].copy_(value)

    def row_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state tensors of `parameter`, with a row for each of its rows; created if there are none yet."""
        state = self.state[parameter]
        if not state:
            state.update(self._initial_state(parameter))
        return state

    def _zeros(self, parameter: Tensor) -> Tensor:
        return zero_state(parameter, self._state_dtype, self._state_on_host)

    @abstractmethod
    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step: tensors with a row for each row of `parameter`."""

    @abstractmethod
    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update `rows` of `parameter` and of its state with their gradient (n, D), float32 or wider."""


def _visit_sparse(parameter: Tensor, visit: RowVisitor) -> None:
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


class RowwiseSGD(_RowwiseOptimizer):
    """SGD with momentum and weight decay on the sampled rows; the rule of torch.optim.SGD for each of them.

    Args:
        params: the head's parameters.
        lr, momentum, weight_decay: as in torch.optim.SGD; lr may be () on the device, which a replayed CUDA graph
            reads anew.
        unsampled: the update of a row that a step does not sample. "freeze", the paper's rule: none. "lazy_dense": that
            of torch.optim.SGD with a gradient of zero, applied when the row is next sampled; call `flush` before
            reading centers.
        state_dtype: of the momentum; None for that of the centers. bfloat16 is rounded stochastically.
        state_on_host: keep the momentum of centers on a GPU in page-locked host memory, which the GPU accesses over its
            bus: host memory then bounds the number of identities.

    Raises:
        InputError: a value is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        unsampled: Unsampled = "freeze",
        state_dtype: torch.dtype | None = None,
        state_on_host: bool = False,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise InputError(
                "RowwiseSGD needs lr >= 0, momentum in [0, 1) and weight_decay >= 0, "
                f"not {lr}, {momentum}, {weight_decay}."
            )
        if unsampled not in ("freeze", "lazy_dense"):
            raise InputError(f"unsampled is {unsampled!r}; it is 'freeze' or 'lazy_dense'.")
        self._unsampled = unsampled
        self._missed: dict[Tensor, MissedSteps] = {}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, state_dtype, state_on_host)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": self._zeros(parameter)}

    def _update_parameter(self, parameter: Tensor, center_state: CenterState | None, group: dict[str, Any]) -> None:
        if self._unsampled == "lazy_dense":
            self._track_missed(parameter, center_state)
        if center_state is None or not self._can_fuse(parameter, center_state):
            super()._update_parameter(parameter, center_state, group)
        else:
            self._fused_update(parameter, center_state, group)
        if parameter in self._missed:
            self._missed[parameter].finish_step(group["lr"], group["momentum"], group["weight_decay"])

    def _is_skipped(self, parameter: Tensor, center_state: CenterState | None) -> bool:
        if center_state is not None and self._can_fuse(parameter, center_state):
            # The fused update reads the flags on the device; a GradScaler that saw no gradient sets a plain number.
            found_inf = getattr(self, "found_inf", False)
            return not isinstance(found_inf, Tensor) and bool(found_inf)
        return super()._is_skipped(parameter, center_state)

    def _can_fuse(self, parameter: Tensor, center_state: CenterState) -> bool:
        """Whether the backend updates the rows itself, without storing a gradient and without a host read."""
        alone = len(center_state.deferred) == 1 and parameter.grad is None and self._unsampled == "freeze"
        return alone and center_state.deferred[0].backend.supports_padding

    def _fused_update(self, parameter: Tensor, center_state: CenterState, group: dict[str, Any]) -> None:
        (gradient,) = center_state.deferred
        skip, grad_scale = center_state.flag, getattr(self, "grad_scale", None)
        if hasattr(self, "found_inf"):
            overflow = (gradient.overflowed() | (self.found_inf != 0)).long().view(1)
            skip = overflow if skip is None else skip + overflow
        if grad_scale is not None:
            gradient = gradient.divided_by(grad_scale)
        lr = group["lr"]
        if isinstance(lr, Tensor):  # a kernel reads float32 on its own device
            lr = lr.float() if lr.device == parameter.device else float(lr)
        keys = rounding_keys(center_state, ("centers", "momentum_buffer"), parameter.device)
        rule = SGDRule(lr, group["momentum"], group["weight_decay"], center_state.first_row, keys, skip)
        buffer = self.row_state(parameter)["momentum_buffer"]
        gradient.backend.fused_update(gradient, parameter, buffer, rule)  # type: ignore[attr-defined]

    def _track_missed(self, parameter: Tensor, center_state: CenterState | None) -> None:
        """From now on, apply the missed steps of rows that the head is about to read."""
        if center_state is None:
            raise InputError("unsampled='lazy_dense' needs the parameters of a PartialFC head.")
        if parameter in self._missed:
            return
        missed = self._missed[parameter] = MissedSteps(len(parameter), parameter.device, center_state)
        # The buffer is looked up in each call, since `load_state_dict` replaces it.
        center_state.prepare = lambda rows: missed.apply_missed(
            parameter, self.row_state(parameter)["momentum_buffer"], rows
        )

    @torch.no_grad()
    def flush(self) -> None:
        for parameter, missed in self._missed.items():
            missed.apply_missed_to_all(parameter, self.row_state(parameter)["momentum_buffer"])
        super().flush()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for missed in self._missed.values():
            missed.reset()

    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.row_state(parameter)["momentum_buffer"]
        if parameter in self._missed:
            self._missed[parameter].mark(rows.numbers)
        kernels = numba_kernels_for(parameter, buffer, gradient)
        if kernels is not None:
            constants = (np.float32(group[name]) for name in ("lr", "momentum", "weight_decay"))
            arrays = parameter.detach().numpy(), buffer.numpy(), rows.numbers.numpy(), gradient.numpy()
            kernels.sgd_rows(*arrays, *constants)
            return
        values = rows.read(parameter)
        gradient = gradient.add(values, alpha=group["weight_decay"])
        velocity = rows.read(buffer).mul_(group["momentum"]).add_(gradient)
        rows.write(buffer, "momentum_buffer", velocity)
        rows.write(parameter, "centers", values.add_(velocity, alpha=-float(group["lr"])))


class RowwiseAdamW(_RowwiseOptimizer):
    """AdamW on the sampled rows (Loshchilov and Hutter, ICLR 2019, algorithm 2).

    Each row counts its own steps for the bias correction, since rows are sampled unequally often.

    Args:
        params: the head's parameters.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        state_dtype, state_on_host: as in `RowwiseSGD`, for both averages.

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
        *,
        state_dtype: torch.dtype | None = None,
        state_on_host: bool = False,
    ) -> None:
        if not (lr >= 0 and all(0 <= beta < 1 for beta in betas) and eps >= 0 and weight_decay >= 0):
            raise InputError(
                "RowwiseAdamW needs lr >= 0, betas in [0, 1), eps >= 0 and weight_decay >= 0, "
                f"not {lr}, {betas}, {eps}, {weight_decay}."
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, state_dtype, state_on_host)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device),
            "exp_avg": self._zeros(parameter),
            "exp_avg_sq": self._zeros(parameter),
        }

    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.row_state(parameter)
        beta1, beta2 = group["betas"]
        state["step"][rows.numbers] += 1
        steps = state["step"][rows.numbers].double()[:, None]
        mean = rows.read(state["exp_avg"]).lerp_(gradient, 1 - beta1)
        square = rows.read(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = (group["lr"] / (1 - beta1**steps)).to(gradient.dtype)
        root_correction = (1 - beta2**steps).sqrt().to(gradient.dtype)
        values = rows.read(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        values -= step_size * mean / (square.sqrt() / root_correction + group["eps"])
        rows.write(state["exp_avg"], "exp_avg", mean)
        rows.write(state["exp_avg_sq"], "exp_avg_sq", square)
        rows.write(parameter, "centers", values)
