"""Bad input on a device that nobody waits for: a flag there, which stops every update and becomes an error later."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from partialfc.head.global_batch import bad_embeddings, bad_label

_LABEL, _EMBEDDINGS = 1, 2


class InputFlag:
    """`raise_bad_input` without a host read: the device remembers the first bad batch until somebody has read of it.

    The global batch is the same on all ranks, and so is the flag.

    Attributes:
        state: (3,) int64 on the device: not 0 if a batch was bad, the bad label, the step.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        self._on_cuda = device.type == "cuda"
        self._on_their_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()  # copies of the state, oldest first

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the head: what is on its way stays behind, since an event cannot be copied."""
        return self.__dict__ | {"_on_their_way": deque()}

    def record(self, embeddings: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        """Set it if the global batch, (G, D) and (G,), is bad, and send it to the host; () bool, whether it is set."""
        outside = (labels < 0) | (labels >= self._num_classes)
        finite = torch.isfinite(embeddings).all()
        kind = torch.where(outside.any(), _LABEL, torch.where(finite, 0, _EMBEDDINGS))
        place = outside.int().argmax(dim=0, keepdim=True)  # () would be an index that the host reads
        seen = torch.stack([kind, labels[place][0], step])
        self.state.copy_(torch.where(self.state[:1] == 0, seen, self.state))
        self._send()
        return self.state[0] != 0

    def _send(self) -> None:
        """Start a copy to the host, which nobody waits for."""
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            return  # what a graph replays is read by `check`
        # Page-locked, so that a copy to it waits for nothing.
        copy = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=self._on_cuda)
        copy.copy_(self.state, non_blocking=True)
        event = None
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
        self._on_their_way.append((copy, event))

    def look(self, alone: bool) -> None:
        """Raise what a batch before set, as `check` does, from the copies that were sent with each.

        Alone, a process looks only at those that have arrived, however far ahead of its device it is. Several wait for
        all, since they must raise in the same step: the last was sent a whole step ago, and their devices have that
        step's backward pass to go on with.
        """
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            return
        arrived: Tensor | None = None
        while self._on_their_way:
            copy, event = self._on_their_way[0]
            if event is not None:
                if alone and not event.query():
                    break
                event.synchronize()
            arrived = copy
            self._on_their_way.popleft()
        if arrived is not None:
            self._raise(arrived)

    def check(self) -> None:
        """Raise what any batch since the last error set, and forget it. A host read.

        Raises:
            InputError: a label was out of range.
            NonFiniteEmbeddings: NaN or infinity among the embeddings.
        """
        self._on_their_way.clear()
        self._raise(self.state)

    def _raise(self, state: Tensor) -> None:
        kind, label, step = state.tolist()
        if kind:
            self._on_their_way.clear()
            self.state.zero_()
            raise bad_label(label, self._num_classes) if kind == _LABEL else bad_embeddings(step)
