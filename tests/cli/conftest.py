"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import INSIGHTFACE

from partialfc.data.images import encode_png
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image


@pytest.fixture
def folder_of_pngs(tmp_path: Path) -> Path:
    """The fixture's images unpacked, a folder an identity."""
    source = open_source(INSIGHTFACE)
    root = tmp_path / "unpacked"
    for index in range(len(source)):
        sample, image = read_image(source, index)
        home = root / f"{sample.label:04d}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{index:04d}.png").write_bytes(encode_png(image))
    return root
