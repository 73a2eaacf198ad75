"""The version that every file of ours carries, so that a program meets a newer form with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialfc.core.errors import InputError


def check_schema_version(path: str | Path, content: Mapping[str, Any], newest: int) -> None:
    """Refuse a file of a version past `newest`, with an InputError; without `schema_version` it is of the first."""
    version = content.get("schema_version", 1)
    if type(version) is not int or version < 1:
        raise InputError(f"{path} has schema_version {version!r}, which is none: restore the file from a copy.")
    if version > newest:
        raise InputError(
            f"{path} has schema_version {version}, and this partialfc reads them up to {newest}: install a newer one."
        )
