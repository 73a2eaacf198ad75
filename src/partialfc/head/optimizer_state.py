"""A state_dict on its way into a row-wise optimizer: its own, or that of torch.optim's optimizer of the same rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.center_state import center_state_of

# Options of torch.optim's groups that say how a step is computed, not what.
_NEUTRAL = {"params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}


def first_rows(optimizer: Any) -> list[int]:
    """The global number of the first row of each parameter; 0 where no head holds it."""
    states = [center_state_of(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return [state.first_row if state is not None else 0 for state in states]


def loaded_state(
    optimizer: Any, state_dict: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[tuple[Tensor, dict[str, Tensor]]]]:
    """The groups of `state_dict`, and each parameter of `optimizer` with its saved state.

    Raises:
        InputError: the state belongs to another optimizer, or to other rows than the parameters have.
    """
    own = first_rows(optimizer)
    if state_dict.get("first_rows", own) != own:
        raise InputError(
            f"the state_dict belongs to rows from {state_dict['first_rows']} on, and these begin at {own}: save and "
            "load head and optimizer with save_head and load_head, which serve any number of ranks."
        )
    groups = [_own_options(optimizer, group) for group in state_dict["param_groups"]]
    loaded = []
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        for parameter, number in zip(group["params"], saved["params"], strict=False):
            state = state_dict["state"].get(number, {})
            loaded.append((parameter, _own_tensors(optimizer, state, parameter)))
    return groups, loaded


def _own_options(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved group that this optimizer has; those of a schedule stay."""
    name = type(optimizer).__name__
    missing = sorted(optimizer.defaults.keys() - group.keys() - {"differentiable"})
    if missing or group.get("decoupled_weight_decay") is False:
        what = f"has no {', '.join(missing)}" if missing else "couples its weight decay, as torch.optim.Adam does"
        raise InputError(f"the state_dict for {name} {what}: it was saved by another optimizer.")
    others = {option for option in group if option not in optimizer.defaults and not option.startswith("initial_")}
    unknown = sorted(option for option in others - _NEUTRAL if group[option])
    if unknown:
        raise InputError(
            f"the state_dict for {name} was saved with {', '.join(f'{option}={group[option]}' for option in unknown)}, "
            f"which {name} does not have: continue with the optimizer that saved it, or begin with a new state."
        )
    return {option: value for option, value in group.items() if option not in others or option == "params"}


def _own_tensors(optimizer: Any, state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """The saved state with a row for each row of `parameter`."""
    state = {name: value for name, value in state.items() if value is not None}
    unknown = sorted(state.keys() - set(optimizer.state_names))
    if unknown:
        raise InputError(
            f"the state_dict holds {', '.join(unknown)}, which {type(optimizer).__name__} does not have: it was saved "
            "by another optimizer."
        )
    for name, value in state.items():
        if name == "step" and torch.as_tensor(value).ndim == 0:
            state[name] = torch.full((len(parameter),), int(value), dtype=torch.int32)
        elif value.is_sparse:
            raise InputError(f"the state_dict's {name} is sparse: it was saved by another optimizer.")
        elif len(value) != len(parameter):
            raise InputError(
                f"The optimizer's {name} has {len(value)} rows, but its centers {len(parameter)}: it was "
                "saved for another number of classes or processes."
            )
    return state
