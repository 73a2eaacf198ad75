"""Bad input on a device that nobody waits for: a flag there, which stops every update and becomes an error later."""

from __future__ import annotations

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
        self._arrived: Tensor | None = None  # page-locked, so that a copy to it waits for nothing
        self._event: torch.cuda.Event | None = None
        self._sent = False

    def take_in(self, embeddings: Tensor, labels: Tensor, step: Tensor) -> Tensor:
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
        if self._arrived is None:
            self._arrived = torch.zeros(3, dtype=torch.int64, pin_memory=self._on_cuda)
        self._arrived.copy_(self.state, non_blocking=True)
        if self._on_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._sent = True

    def look(self, alone: bool) -> None:
        """Raise what the batch before set, as `check` does, from the copy that was sent with it.

        Alone, a process looks only whether the copy has arrived. Several wait for it, since they must raise in the same
        step: it was sent a whole step ago, and their devices have that step's backward pass to go on with.
        """
        if self._arrived is None or not self._sent or (self._on_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._event is not None:
            if alone and not self._event.query():
                return
            self._event.synchronize()
        self._raise(self._arrived)

    def check(self) -> None:
        """Raise what any batch since the last error set, and forget it. A host read.

        Raises:
            InputError: a label was out of range.
            NonFiniteEmbeddings: NaN or infinity among the embeddings.
        """
        self._raise(self.state)

    def _raise(self, state: Tensor) -> None:
        kind, label, step = state.tolist()
        self._sent = False
        if kind:
            self.state.zero_()
            raise bad_label(label, self._num_classes) if kind == _LABEL else bad_embeddings(step)
