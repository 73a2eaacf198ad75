"""Files that `data convert` writes are read by the packages that others use."""

from __future__ import annotations

from pathlib import Path

import pytest

import readers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages
def test_the_usual_packages_read_our_files(tmp_path: Path) -> None:
    lines = readers.check(tmp_path, 60, None)
    assert [line["equal"] for line in lines] == [True] * len(lines)
    assert {line["reader"] for line in lines} >= {"pyarrow"}
