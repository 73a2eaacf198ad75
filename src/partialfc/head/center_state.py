"""What a head shares with its optimizer, and what becomes of a gradient between backward and `step()`.

A loop may drop the gradient, change the centers by itself, or never step them. The head notices at its next forward
pass, so that negatives never repeat unnoticed and no deferred gradient outlives the loop's interest in it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partialfc.core.errors import InputError
from partialfc.core.threads import single_threaded_if
from partialfc.distributed.collectives import Shard
from partialfc.head.backends.base import CenterGradient, RowVisitor, for_each_tile
from partialfc.head.loss import class_rows

# PyTorch 2.11 warns even where check_invariants=False is given.
warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
_ROWS_AT_ONCE = 1 << 14
_REMEDY = "give head.parameters() to RowwiseSGD or RowwiseAdamW"


class CenterState:
    """Step counter, pending gradients and hooks that a head shares with its optimizer: `center_state` of the parameter.

    Attributes:
        optimizer_steps: steps of all optimizers of the process that are not row-wise.
        step: optimizer steps taken; it seeds the negatives of a step.
        deferred: gradients that backward left for `step()` to compute, one per micro-step (update="deferred").
        prepare: called with the rows (n,) that the head is about to read, if the optimizer needs it.
        flag: (1,) int64 on the device, not 0 if a batch was bad and nothing may be updated; None where a bad batch
            raises at once.
        has_optimizer: whether a row-wise optimizer holds the centers.
        seed, first_row: the head's seed and the global number of its first row: the keys of stochastic rounding.
        shard: the head's classes on this rank.
    """

    optimizer_steps: ClassVar[int] = 0

    def __init__(self, seed: int = 0, first_row: int = 0, shard: Shard | None = None) -> None:
        self.seed, self.first_row, self.shard = seed, first_row, shard
        self._step, self._counter = 0, torch.zeros((), dtype=torch.int64)
        self.flag: Tensor | None = None
        self._detach()

    def _detach(self) -> None:
        self.deferred: list[CenterGradient] = []
        self._staged: list[CenterGradient] = []
        self.prepare: Callable[[Tensor], None] | None = None
        self.has_optimizer = False
        self._attached: Callable[[], Tensor | None] = lambda: None
        # The gradient that stands in `centers.grad` for deferred ones, and its version.
        self._token: Tensor | None = None
        self._token_version = 0
        # Since the last step backward has left a gradient; the centers' version and `optimizer_steps` at that time.
        self._is_waiting = False
        self._centers_version = self._steps_before = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the head shares no optimizer with the original: neither pending gradients nor hooks."""
        names = ("seed", "first_row", "shard", "_step", "_counter", "flag")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._detach()

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._counter.fill_(value)
        self._is_waiting = False

    def advance(self) -> None:
        """Count a step, on the device too: a replayed CUDA graph counts there."""
        self._step += 1
        self._counter.add_(1)
        self._is_waiting = False

    def counter(self, device: torch.device) -> Tensor:
        """`step` as () int64 on `device`, the same tensor in every step."""
        if self._counter.device != device:
            self._counter = torch.full((), self._step, dtype=torch.int64, device=device)
        return self._counter

    def attach(self, centers: Tensor) -> None:
        """Make this the state of `centers`: a parameter that was copied or moved to another storage has none."""
        if self._attached() is centers:
            return
        centers.center_state = self  # type: ignore[attr-defined]
        if centers.is_leaf and centers.requires_grad:
            centers.register_post_accumulate_grad_hook(self._accumulated)
            self._attached = weakref.ref(centers)

    def flush(self, centers: Tensor) -> None:
        """Apply to all rows what the optimizer has put off (`RowwiseSGD(unsampled="lazy_dense")`)."""
        if self.prepare is not None:
            for rows in torch.arange(len(centers), device=centers.device).split(_ROWS_AT_ONCE):
                self.prepare(rows)

    def stage(self, gradient: CenterGradient, centers: Tensor, overflow: Tensor) -> Tensor:
        """Keep a deferred gradient for `step()`, and return a sparse one that stands for it in `centers.grad`.

        Its one row holds zeros, or infinity if `overflow` () bool is true, for a GradScaler to see. A loop that drops
        it drops the deferred one.
        """
        self._drop_unwanted(centers)
        self._staged.append(gradient)
        count = min(1, len(centers))
        values = centers.new_zeros(count, centers.shape[1]).masked_fill_(overflow, torch.inf)
        rows = torch.zeros(1, count, dtype=torch.int64, device=centers.device)
        return torch.sparse_coo_tensor(rows, values, centers.shape, check_invariants=False)

    def _accumulated(self, centers: Tensor) -> None:
        """Called by autograd when it has added a gradient to `centers.grad`."""
        self.deferred += self._staged
        self._staged = []
        if self.deferred:
            self._token = centers.grad
            self._token_version = self._token._version  # type: ignore[union-attr]
        self._is_waiting = True
        self._centers_version, self._steps_before = centers._version, CenterState.optimizer_steps

    def _drop_unwanted(self, centers: Tensor) -> None:
        """Forget deferred gradients if the loop has dropped the gradient that stands for them, or zeroed it."""
        gradient = centers.grad
        is_token = gradient is not None and gradient is self._token and gradient.is_sparse
        if gradient is None or (is_token and gradient._nnz() < min(1, len(centers))):
            self.deferred, self._token = [], None

    def before_forward(self, centers: Tensor, update: str) -> None:
        """Look for what happened since the last backward pass.

        Raises:
            InputError: no optimizer steps the centers, or a deferred gradient no longer fits them.
        """
        self.attach(centers)
        self._drop_unwanted(centers)
        self._is_waiting &= centers.requires_grad
        if not self._is_waiting:
            return
        is_deferred = update == "deferred"
        is_dropped = not self.deferred if is_deferred else centers.grad is None
        is_changed = centers._version != self._centers_version
        others_stepped = CenterState.optimizer_steps != self._steps_before
        if not (is_dropped or is_changed or others_stepped):
            return  # gradient accumulation
        if is_deferred and is_changed and not is_dropped:
            raise _changed_centers()
        if not self.has_optimizer and (is_deferred or (others_stepped and not is_changed)):
            raise InputError(
                f"no optimizer steps the centers of the head: {_REMEDY}, freeze them with head.requires_grad_(False), "
                "or count each step that your loop takes by itself with head.step += 1."
            )
        # With an optimizer, a step that the whole loop skipped is not counted.
        if others_stepped or not self.has_optimizer:
            self.advance()

    def has_pending(self, centers: Tensor) -> bool:
        """Whether `step()` has deferred gradients to apply.

        Raises:
            InputError: since backward the loop has changed the centers or `centers.grad`.
        """
        self._drop_unwanted(centers)
        if not self.deferred:
            return False
        gradient = centers.grad
        assert gradient is not None  # or there would be nothing deferred
        is_touched = gradient is not self._token or gradient._version != self._token_version
        most = len(self.deferred) if gradient.is_cuda else 1  # a sum of sparse tensors keeps the rows of both there
        if is_touched or not gradient.is_sparse or gradient._nnz() > most:
            raise InputError(
                "centers.grad was changed, or another loss added to it, but with update='deferred' the gradient exists "
                "in optimizer.step() only: build the head with update='sparse'."
            )
        if centers._version != self._centers_version:
            raise _changed_centers()
        return True

    def has_gradient(self, centers: Tensor) -> bool:
        """Whether `centers.grad` is a gradient, and does not merely stand for deferred ones."""
        return centers.grad is not None and centers.grad is not self._token

    def finish_step(self, centers: Tensor, *, counts: bool) -> None:
        """Forget pending gradients after the optimizer has applied or skipped them."""
        if self._token is not None and centers.grad is self._token:
            centers.grad = None
        self.deferred, self._token, self._is_waiting, self.has_optimizer = [], None, False, True
        if counts:
            self.advance()

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


def _changed_centers() -> InputError:
    return InputError(
        "the centers changed between backward and optimizer.step(), but update='deferred' computes their gradient in "
        f"step(): change them after it, and {_REMEDY}."
    )


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Count the step of an optimizer that is not row-wise, and refuse it if it holds the centers of a head.

    It would repeat the same negatives in every step. torch.optim.SGD's momentum would moreover become a sparse tensor
    that grows in every step, and most of torch's optimizers take no sparse gradient at all.
    """
    if torch.compiler.is_compiling():
        return
    if getattr(optimizer, "updates_rows", False):
        return
    CenterState.optimizer_steps += 1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and center_state_of(parameter) is not None:
                name = type(optimizer).__name__
                raise InputError(
                    f"{name} holds the centers of a PartialFC head, whose rows and steps it does not know: {_REMEDY}, "
                    f"and only the other parameters to {name}."
                )


register_optimizer_step_pre_hook(_before_step)
