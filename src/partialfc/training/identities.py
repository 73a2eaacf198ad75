"""Names of identities: which class of one run is which of another, and their place beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from partialfc.core.files import write_file

NAME = "identities.json"


def match_identities(
    old_names: list[str] | None, old_classes: int, new_names: list[str] | None, new_classes: int
) -> Tensor:
    """For each new class its old one, -1 if it is new: int64 (new_classes,).

    By name where both have names, else by number. Names that are plain numbers, as a set without names gets when
    identities are left out, also match the numbers of a side without names.
    """
    if old_names is None and _are_numbers(new_names):
        old_names = [str(number) for number in range(old_classes)]
    if new_names is None and _are_numbers(old_names):
        new_names = [str(number) for number in range(new_classes)]
    if old_names is None or new_names is None:
        numbers = torch.arange(new_classes)
        return torch.where(numbers < old_classes, numbers, -1)
    places = {name: number for number, name in enumerate(old_names[:old_classes])}
    result = torch.full((new_classes,), -1, dtype=torch.int64)
    found = [places.get(name, -1) for name in new_names[:new_classes]]
    result[: len(found)] = torch.tensor(found, dtype=torch.int64)
    return result


def _are_numbers(names: list[str] | None) -> bool:
    return names is not None and all(name.isdecimal() and str(int(name)) == name for name in names)


def write_identities(folder: Path, identities: list[str] | None) -> None:
    """Leave the names in class order beside a model, or remove old ones if there are none."""
    if identities is None:
        (folder / NAME).unlink(missing_ok=True)
        return
    write_file(folder / NAME, json.dumps(identities, indent=0, ensure_ascii=False))
