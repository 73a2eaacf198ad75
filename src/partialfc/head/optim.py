"""Optimizers that read and write exactly the sampled rows of the centers.

By default a row that is not sampled stays as it is: neither its value nor its state changes, weight decay and momentum
included (arXiv 2203.15565; docs/head.md). With sample rate 1 both optimizers equal torch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import all_reduce
from partialfc.head.backends.base import SGDRule
from partialfc.head.backends.select import numba_kernels_for
from partialfc.head.center_state import CenterState, center_state_of
from partialfc.head.lazy_sgd import MissedSteps
from partialfc.head.rows import Rows, rounding_keys, visit_sparse, zero_state
from partialfc.head.state_dict import check_first_rows, first_rows

Unsampled = Literal["freeze", "lazy_dense"]


class _RowwiseOptimizer(Optimizer, ABC):
    """The common part of both optimizers: where rows and gradients come from, and when a step is skipped."""

    # torch.amp.GradScaler then calls step() itself and passes its results as the attributes `grad_scale` and
    # `found_inf`, which must not exist otherwise: it multiplies existing ones, and deletes them after the step.
    _step_supports_amp_scaling = True
    updates_rows: ClassVar[bool] = True  # the head refuses other optimizers
    state_names: ClassVar[tuple[str, ...]]

    def __init__(
        self, params: Any, defaults: dict[str, Any], state_dtype: torch.dtype | None, state_on_host: bool
    ) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise InputError(f"state_dtype is {state_dtype}; it is floating point, such as torch.bfloat16.")
        self._state_dtype, self._state_on_host = state_dtype, state_on_host
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for _, _, state in self._parameters():
            if state is not None:
                state.has_optimizer = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle keeps the options of this class beside what torch keeps of any optimizer."""
        self.flush()
        return super().__getstate__() | {"_state_dtype": self._state_dtype, "_state_on_host": self._state_on_host}

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient.

        Raises:
            InputError: a parameter has a dense gradient; or, with update="deferred", a GradScaler unscaled gradients
                that do not exist yet, or the centers or `centers.grad` changed after backward.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parameter, state in self._parameters():
            if state is not None:
                self._share_found_inf(parameter, state)
                # Ranks without sampled classes must also advance the step: it seeds the next sample.
                has_gradient = state.has_pending(parameter) or state.has_gradient(parameter)
            else:
                has_gradient = parameter.grad is not None
            updates = has_gradient and not self._is_skipped(parameter, state)
            if updates:
                self._refuse_unscaled(state)
                # Autocast would round the products of a deferred gradient. Triton launches its kernels on the current
                # device, which need not be the parameter's.
                with torch.autocast(parameter.device.type, enabled=False), torch.cuda.device_of(parameter):
                    self._update_parameter(parameter, state, group)
                # Compiled loops write past autograd, which would not refuse a backward pass through the old centers.
                torch.autograd.graph.increment_version(parameter)
            if state is not None:
                state.finish_step(parameter, counts=updates)
        return loss

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor, CenterState | None]]:
        """Each parameter with its group and the state that its head attached."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter, center_state_of(parameter)

    def _share_found_inf(self, parameter: Tensor, center_state: CenterState) -> None:
        """Skip a step on all ranks or on none, though a GradScaler sees one rank's rows: one collective with it."""
        shard, found_inf = center_state.shard, getattr(self, "found_inf", None)
        if found_inf is not None and shard is not None and shard.world_size > 1:
            own = torch.as_tensor(found_inf, dtype=torch.float32, device=parameter.device).clone()
            self.found_inf = all_reduce(own, "max", shard.group)

    def _is_skipped(self, parameter: Tensor, center_state: CenterState | None) -> bool:
        """Whether this step changes nothing, as far as the host must know."""
        if center_state is not None and center_state.flag is not None and bool(center_state.flag):
            return True
        return bool(getattr(self, "found_inf", False))

    def _update_parameter(self, parameter: Tensor, center_state: CenterState | None, group: dict[str, Any]) -> None:
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        self.row_state(parameter)  # created here, since threads would race to create it

        def update(rows: Tensor, gradient: Tensor, scale: Tensor | None = None) -> None:
            gradient = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
            if scale is not None:
                gradient = gradient / scale
            self._update_rows(parameter, Rows(rows, gradient.dtype, center_state), gradient, group)

        if center_state is None or center_state.has_gradient(parameter):
            visit_sparse(parameter, lambda rows, gradient: update(rows, gradient, grad_scale))
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
        return {**super().state_dict(), "first_rows": first_rows(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state to the devices on which this optimizer keeps its own.

        That of torch.optim's optimizer of the same name is taken too; its steps are those of all rows.

        Raises:
            InputError: the state belongs to another optimizer, or to other rows than the parameters have.
        """
        check_first_rows(self, state_dict)
        loaded = [
            (parameter, self._checked(parameter, saved, state_dict["state"].get(number, {})))
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for parameter, number in zip(group["params"], saved["params"], strict=False)
        ]
        _RowwiseOptimizer.flush(self)  # no write to the host is pending afterwards
        # torch would cast the state to the parameter's dtype and move it to its device.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, state in loaded:
            for name, value in state.items():
                own = self.row_state(parameter)
                if name not in own:  # the momentum of a step without it
                    own[name] = self._zeros(parameter)
                own[name].copy_(value)

    def _checked(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
        """The saved state of a parameter of the saved `group`, with a value for each row."""
        unknown = {name for name, value in state.items() if value is not None} - set(self.state_names)
        unknown |= {name for name in ("nesterov", "dampening", "maximize", "amsgrad") if group.get(name)}
        missing = self.defaults.keys() - group.keys() - {"differentiable"}
        if unknown or missing or group.get("decoupled_weight_decay") is False:  # as in torch.optim.Adam
            differences = [f"has {name}" for name in sorted(unknown)] + [f"lacks {name}" for name in sorted(missing)]
            raise InputError(
                f"the state_dict was saved by another optimizer than {type(self).__name__}: it "
                f"{', '.join(differences) or 'couples its weight decay'}; begin with a new state instead."
            )
        values = {name: torch.as_tensor(value) for name, value in state.items() if value is not None}
        for name, value in values.items():
            if value.ndim and len(value) != len(parameter):
                raise InputError(
                    f"The optimizer's {name} has {len(value)} rows, but its centers {len(parameter)}: it was saved for "
                    "another number of classes or processes."
                )
        return values

    def row_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state tensors of `parameter`, with a row for each of its rows; created if they do not exist yet."""
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
                f"RowwiseSGD needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0, not {lr}, {momentum}, {weight_decay}."
            )
        if unsampled not in ("freeze", "lazy_dense"):
            raise InputError(f"unsampled is {unsampled!r}; it is 'freeze' or 'lazy_dense'.")
        self._unsampled = unsampled
        self._missed: dict[Tensor, MissedSteps] = {}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, state_dtype, state_on_host)

    state_names = ("momentum_buffer",)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        momentum = next(group["momentum"] for group, one, _ in self._parameters() if one is parameter)
        return {"momentum_buffer": self._zeros(parameter)} if momentum else {}

    def __getstate__(self) -> dict[str, Any]:
        # `flush` has applied what rows missed; the copy's first step attaches it to a head again.
        return super().__getstate__() | {"_unsampled": self._unsampled, "_missed": {}}

    def _update_parameter(self, parameter: Tensor, center_state: CenterState | None, group: dict[str, Any]) -> None:
        if self._unsampled == "lazy_dense":
            self._track_missed(parameter, center_state)
        if center_state is None or not self._can_fuse(parameter, center_state):
            super()._update_parameter(parameter, center_state, group)
        else:
            self._fused_update(parameter, center_state, group)
        if parameter in self._missed:
            missed = self._missed[parameter]
            missed.finish_step(float(group["lr"]), group["momentum"], group["weight_decay"])
            if missed.is_full:
                missed.apply_missed_to_all(parameter, self.row_state(parameter).get("momentum_buffer"))

    def _is_skipped(self, parameter: Tensor, center_state: CenterState | None) -> bool:
        if center_state is not None and self._can_fuse(parameter, center_state):
            # The fused update reads the flags on the device; a GradScaler that saw no gradient sets a plain number.
            found_inf = getattr(self, "found_inf", False)
            return not isinstance(found_inf, Tensor) and bool(found_inf)
        return super()._is_skipped(parameter, center_state)

    def _can_fuse(self, parameter: Tensor, center_state: CenterState) -> bool:
        """Whether the backend updates the rows itself, without storing a gradient and without a host read."""
        alone = len(center_state.deferred) == 1 and self._unsampled == "freeze"
        return alone and center_state.deferred[0].backend.supports_padding

    def _fused_update(self, parameter: Tensor, center_state: CenterState, group: dict[str, Any]) -> None:
        (gradient,) = center_state.deferred
        skip, grad_scale = center_state.flag, getattr(self, "grad_scale", None)
        if isinstance(getattr(self, "found_inf", None), Tensor):
            overflow = (self.found_inf != 0).long().view(1)
            skip = overflow if skip is None else skip + overflow
        if grad_scale is not None:
            gradient = gradient.divided_by(grad_scale)
        lr = group["lr"]
        if isinstance(lr, Tensor):  # a kernel reads float32 on its own device
            lr = lr.float() if lr.device == parameter.device else float(lr)
        keys = rounding_keys(center_state, ("centers", "momentum_buffer"), parameter.device)
        rule = SGDRule(lr, group["momentum"], group["weight_decay"], center_state.first_row, keys, skip)
        buffer = self.row_state(parameter).get("momentum_buffer")
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
            parameter, self.row_state(parameter).get("momentum_buffer"), rows
        )

    @torch.no_grad()
    def flush(self) -> None:
        for parameter, missed in self._missed.items():
            missed.apply_missed_to_all(parameter, self.row_state(parameter).get("momentum_buffer"))
        super().flush()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for missed in self._missed.values():
            missed.reset()

    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.row_state(parameter).get("momentum_buffer")
        if parameter in self._missed:
            self._missed[parameter].mark(rows.numbers)
        kernels = numba_kernels_for(parameter, gradient, *(() if buffer is None else (buffer,)))
        if kernels is not None:
            constants = (np.float32(group[name]) for name in ("lr", "momentum", "weight_decay"))
            momentum = None if buffer is None else buffer.numpy()
            kernels.sgd_rows(parameter.detach().numpy(), momentum, rows.numbers.numpy(), gradient.numpy(), *constants)
            return
        values = rows.read(parameter)
        velocity = gradient.add(values, alpha=group["weight_decay"])
        if buffer is not None:
            velocity = rows.read(buffer).mul_(group["momentum"]).add_(velocity)
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

    state_names = ("step", "exp_avg", "exp_avg_sq")

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
