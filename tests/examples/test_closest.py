"""The picture of the closest centers."""

from __future__ import annotations

from pathlib import Path

import closest
import pytest
import torch
from characters import name_of
from PIL import Image
from small_runs import tiny_config, write_images

from partialfc.core.errors import InputError
from partialfc.training.loop import train


def test_the_closest_pairs_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closest, "_ROWS", 7)
    centers = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    units = torch.nn.functional.normalize(centers, dim=1)
    every = sorted(((float(units[a] @ units[b]), a, b) for a in range(40) for b in range(a + 1, 40)), reverse=True)
    found = closest.closest_pairs(centers, 25)
    assert [pair[1:] for pair in found] == [pair[1:] for pair in every[:25]]
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in every[:25]], abs=1e-6)


def test_equal_characters_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [0x8C48, 0xF900, 0x66F4]  # F900 is 8C48 under another label
    data = write_images(tmp_path / "data", map(name_of, codes))
    train(tiny_config(data, device="cpu"), tmp_path / "run", quiet=True)
    closest.draw(tmp_path / "run", data, 3, tmp_path / "closest.png")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 3
    assert [set(line.split()[1:3]) for line in lines if "one character" in line] == [{"U+8C48", "U+F900"}]
    assert "1 of the 3 closest pairs" in captured.err
    with Image.open(tmp_path / "closest.png") as sheet:
        assert sheet.size == (12 * 36, 52)
    with pytest.raises(InputError, match="give its training set"):
        closest.draw(tmp_path / "run", write_images(tmp_path / "other", ["U+4E00", "U+4E01"]), 3, tmp_path / "no.png")
    with pytest.raises(InputError, match="no checkpoint"):
        closest.draw(tmp_path / "none", data, 3, tmp_path / "no.png")
