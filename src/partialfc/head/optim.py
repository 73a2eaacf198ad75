"""Optimizers that read and write exactly the sampled rows of the centers.

A row that was not sampled rests: neither its value nor its state changes, weight decay and momentum included
(arXiv 2203.15565; docs/head.md). With sample rate 1 both optimizers are torch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.core.errors import InputError
from partialfc.head.backends.compiled import numba_kernels_for
from partialfc.head.backends.threads import run_parallel
from partialfc.head.lazy_sgd import CatchUp
from partialfc.head.loss import RowVisitor, SGDRule
from partialfc.head.row_storage import Rows, StateStorage, rounding_keys
from partialfc.head.rows import CenterState, center_state_of

# Elements of a sparse gradient that are updated at once; on a CPU their temporaries stay in a core's cache.
CPU_UPDATE_ELEMENTS = 1 << 18
GPU_UPDATE_ELEMENTS = 1 << 26

Unsampled = Literal["freeze", "lazy_dense"]


class _RowwiseOptimizer(Optimizer, ABC):
    """What the two optimizers share: where the rows and their gradients come from, and when a step is skipped."""

    # torch.amp.GradScaler then calls step() itself and leaves its findings in the attributes `grad_scale` and
    # `found_inf`, which must not exist otherwise: it multiplies what it finds and deletes them after the step.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], storage: StateStorage) -> None:
        self._storage = storage
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
        for group in self.param_groups:
            for parameter in group["params"]:
                link = center_state_of(parameter)
                # A rank whose shard has no sampled class counts the step like the others: they draw from its number.
                pending = parameter.grad is not None or (link is not None and bool(link.deferred))
                happens = pending and not self._is_skipped(parameter, link)
                if happens:
                    # A deferred gradient has products, which autocast would round. Triton launches its kernels on the
                    # present device, which need not be the parameter's.
                    with torch.autocast(parameter.device.type, enabled=False), torch.cuda.device_of(parameter):
                        self._update_parameter(parameter, link, group)
                if link is not None:
                    link.deferred.clear()
                    if happens:
                        link.advance()
        return loss

    def _is_skipped(self, parameter: Tensor, link: CenterState | None) -> bool:
        """Whether this step changes nothing, as far as the host has to know."""
        if link is not None and link.flag is not None and bool(link.flag):
            return True
        # A GradScaler sees no gradient that is not there yet.
        overflow = link is not None and hasattr(self, "found_inf") and any(bool(g.overflowed()) for g in link.deferred)
        return overflow or bool(getattr(self, "found_inf", False))

    def _update_parameter(self, parameter: Tensor, link: CenterState | None, group: dict[str, Any]) -> None:
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        self._refuse_unscaled(link)
        self.row_state(parameter)  # before threads may want to create it

        def update(rows: Tensor, gradient: Tensor, scale: Tensor | None = None) -> None:
            gradient = gradient.to(_update_dtype(parameter))
            if scale is not None:
                gradient = gradient / scale
            self._update_rows(parameter, Rows(rows, gradient.dtype, link), gradient, group)

        _visit_sparse(parameter, lambda rows, gradient: update(rows, gradient, grad_scale))
        if link is not None:
            if grad_scale is not None:
                link.deferred = [gradient.over(grad_scale) for gradient in link.deferred]
            link.visit(parameter, update)

    def _refuse_unscaled(self, link: CenterState | None) -> None:
        if link is not None and link.deferred and hasattr(self, "found_inf") and self.grad_scale is None:  # type: ignore[attr-defined]
            raise InputError(
                "GradScaler.unscale_ cannot reach the gradient of update='deferred', which step() computes: leave it "
                "out for the head's optimizer, since scaler.step unscales by itself."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that a deferred update has not computed yet included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                link = center_state_of(parameter)
                if link is not None:
                    link.deferred.clear()

    def flush(self) -> None:
        """Make up for everything that was put off, as before rows are read by anything but their head.

        State in host memory is complete afterwards: a GPU writes it some time after `step` has returned.
        """
        for parameter, state in self.state.items():
            if any(tensor.device != parameter.device for tensor in state.values()):
                torch.cuda.synchronize(parameter.device)

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return super().state_dict()

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
        _RowwiseOptimizer.flush(self)  # nothing writes to it any more
        # torch would cast the state to the parameter's dtype and device, where it need not live.
        super().load_state_dict({**state_dict, "state": {}})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    self.row_state(parameter)[name].copy_(value)

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
    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        """Change `rows` of `parameter` and of its state by their gradient (n, D), float32 or wider."""


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
        lr, momentum, weight_decay: as in torch.optim.SGD; lr may be () on the device, which a replayed CUDA graph reads
            anew.
        unsampled: what happens to a row that a step does not sample. "freeze", the paper's rule: nothing. "lazy_dense":
            what torch.optim.SGD would do to it for a gradient of zero, made up for when it is sampled next; call
            `flush` before reading centers.
        state_dtype: of the momentum; None for that of the centers. bfloat16 is rounded stochastically.
        state_on_host: keep the momentum of centers on a GPU in page-locked host memory.

    Raises:
        InputError: a value is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
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
        self._behind: dict[Tensor, CatchUp] = {}
        storage = StateStorage(state_dtype, state_on_host)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, storage)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": self._storage.zeros_like(parameter)}

    def _update_parameter(self, parameter: Tensor, link: CenterState | None, group: dict[str, Any]) -> None:
        if self._unsampled == "lazy_dense":
            self._follow(parameter, link)
        if link is None or not self._is_on_device(parameter, link):
            super()._update_parameter(parameter, link, group)
        else:
            self._update_on_device(parameter, link, group)
        behind = self._behind.get(parameter)
        if behind is not None:
            behind.finish_step(group["lr"], group["momentum"], group["weight_decay"])

    def _is_skipped(self, parameter: Tensor, link: CenterState | None) -> bool:
        if link is not None and self._is_on_device(parameter, link):
            # There the update looks by itself; a number is what a GradScaler leaves that has found no gradient.
            found_inf = getattr(self, "found_inf", False)
            return not isinstance(found_inf, Tensor) and bool(found_inf)
        return super()._is_skipped(parameter, link)

    def _is_on_device(self, parameter: Tensor, link: CenterState) -> bool:
        """Whether the path of a deferred gradient updates the rows, storing none of it and reading nothing back."""
        alone = len(link.deferred) == 1 and parameter.grad is None and self._unsampled == "freeze"
        return alone and link.deferred[0].path.supports_padding

    def _update_on_device(self, parameter: Tensor, link: CenterState, group: dict[str, Any]) -> None:
        (gradient,) = link.deferred
        self._refuse_unscaled(link)
        skip, grad_scale = link.flag, getattr(self, "grad_scale", None)
        if hasattr(self, "found_inf"):
            overflow = (gradient.overflowed() | (self.found_inf != 0)).long().view(1)
            skip = overflow if skip is None else skip + overflow
        if grad_scale is not None:
            gradient = gradient.over(grad_scale)
        lr = group["lr"]
        if isinstance(lr, Tensor):  # a kernel reads float32 on its own device
            lr = lr.float() if lr.device == parameter.device else float(lr)
        keys = rounding_keys(link, ("centers", "momentum_buffer"), parameter.device)
        rule = SGDRule(lr, group["momentum"], group["weight_decay"], link.first_row, keys, skip)
        gradient.path.update(gradient, parameter, self.row_state(parameter)["momentum_buffer"], rule)

    def _follow(self, parameter: Tensor, link: CenterState | None) -> None:
        """From now on, bring rows up to date when the head is about to read them."""
        if link is None:
            raise InputError("unsampled='lazy_dense' needs the parameters of a PartialFC head.")
        if parameter in self._behind:
            return
        behind = self._behind[parameter] = CatchUp(len(parameter), parameter.device, link)
        # The buffer is looked up each time, since `load_state_dict` makes another.
        link.prepare = lambda rows: behind.apply_missed(parameter, self.row_state(parameter)["momentum_buffer"], rows)

    @torch.no_grad()
    def flush(self) -> None:
        for parameter, behind in self._behind.items():
            behind.apply_missed_to_all(parameter, self.row_state(parameter)["momentum_buffer"])
        super().flush()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for behind in self._behind.values():
            behind.forget()

    def _update_rows(self, parameter: Tensor, rows: Rows, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.row_state(parameter)["momentum_buffer"]
        behind = self._behind.get(parameter)
        if behind is not None:
            behind.mark(rows.numbers)
        loops = numba_kernels_for(parameter, buffer, gradient)
        if loops is not None:
            numbers = (np.float32(group[name]) for name in ("lr", "momentum", "weight_decay"))
            arrays = parameter.detach().numpy(), buffer.numpy(), rows.numbers.numpy(), gradient.numpy()
            loops.sgd_rows(*arrays, *numbers)
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
        storage = StateStorage(state_dtype, state_on_host)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}, storage)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device),
            "exp_avg": self._storage.zeros_like(parameter),
            "exp_avg_sq": self._storage.zeros_like(parameter),
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
