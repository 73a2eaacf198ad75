"""The version that every file of ours carries, so that a program meets a newer form with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialfc.core.errors import InputError


def check_schema_version(path: str | Path, content: Mapping[str, Any], newest: int) -> None:
    """Refuse a file of a newer version than this program reads; without `schema_version` it is of the first.

    Args:
        path: of the file, for the message.
        content: what it holds.
        newest: the version that the program writes.

    Raises:
        InputError: it is newer, or its version is no whole number from 1.
    """
    version = content.get("schema_version", 1)
    if type(version) is not int or version < 1:
        raise InputError(f"{path} has schema_version {version!r}, which is none: restore the file from a copy.")
    if version > newest:
        raise InputError(
            f"{path} has schema_version {version}, and this partialfc reads them up to {newest}: install a newer one."
        )
