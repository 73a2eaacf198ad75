from __future__ import annotations

from typing import Any

import pytest

from partialfc.core.errors import InputError
from partialfc.core.schema import check_schema_version


@pytest.mark.parametrize("content", [{}, {"schema_version": 1}, {"schema_version": 2}])
def test_own_and_older_versions(content: dict[str, Any]) -> None:
    check_schema_version("a.json", content, 2)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "a.json has schema_version 3, and this partialfc reads them up to 2: install a newer one."),
        (0, "schema_version 0, which is none: restore the file from a copy"),
        ("1", "schema_version '1', which is none"),
        (True, "schema_version True, which is none"),
        (None, "schema_version None, which is none"),
    ],
)
def test_newer_and_impossible_ones(version: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_schema_version("a.json", {"schema_version": version}, 2)
