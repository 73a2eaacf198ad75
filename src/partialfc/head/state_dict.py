"""What a `state_dict` of a head or of its optimizer belongs to: step, seed and classes, which loading compares."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Shard
from partialfc.head.center_state import CenterState, center_state_of

_EXTRA_BYTES = 256  # of one size, whatever the step: readers that load in place need that


class ShardStateDict(nn.Module):
    """The part of `PartialFC` behind `state_dict` and `load_state_dict`, which concern this rank's rows only.

    A state_dict is loaded into a head with the same classes and seed. One without step and seed, as version 0.1 made
    it, is loaded where one process holds all classes, and leaves the step as it is.
    """

    centers: nn.Parameter
    center_state: CenterState
    shard: Shard
    seed: int
    step: int

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.shard.world_size > 1:
            warnings.warn(
                f"state_dict() of a head holds only classes {self.shard.start} to {self.shard.stop} of "
                f"{self.shard.total}: save it on every rank, or the whole head with partialfc.save_head.",
                stacklevel=2,
            )
        return super().state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """(256,) uint8: JSON, padded with spaces; a tensor, as readers of weights alone expect."""
        extra = {"step": self.steps_taken(), **self._identity()}
        return torch.frombuffer(bytearray(json.dumps(extra).ljust(_EXTRA_BYTES).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = _decode(state)["step"]

    def steps_taken(self) -> int:
        """`step` as the device counts it: a replayed CUDA graph advances it there alone. A host read."""
        counter = self.center_state.counter(self.centers.device)
        return self.step if counter.is_meta else int(counter)

    def _identity(self) -> dict[str, Any]:
        return {"num_classes": self.shard.total, "classes": [self.shard.start, self.shard.stop], "seed": self.seed}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        key, is_old = f"{prefix}_extra_state", f"{prefix}centers" in state_dict
        if key in state_dict:
            is_old, saved = False, _decode(state_dict[key])
            for name, value in self._identity().items():
                if saved[name] != value:
                    raise InputError(
                        f"The state_dict is of a head with {name} {saved[name]}, and this one has {name} {value}: load "
                        "it into a head built alike, or use save_head and load_head, which serve any number of ranks."
                    )
        elif is_old and self.shard.world_size > 1:
            raise InputError(
                "The state_dict does not say which classes its centers belong to: load it in one process, write the "
                "head with save_head, and read that on all ranks with load_head."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        if is_old and key in missing:
            missing.remove(key)


def _decode(state: Tensor) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(bytes(state.cpu().numpy()))
    return decoded


def first_rows(optimizer: Optimizer) -> list[int]:
    """The global number of the first row of each parameter; 0 where no head holds it."""
    states = [center_state_of(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return [0 if state is None else state.first_row for state in states]


def check_first_rows(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise InputError if a state_dict of the optimizer was made on another rank."""
    saved, own = state_dict.get("first_rows"), first_rows(optimizer)
    if saved not in (None, own):
        raise InputError(
            f"The state_dict belongs to rows from {saved} on, and these begin at {own}: save and load head and "
            "optimizer with save_head and load_head, which serve any number of ranks."
        )
