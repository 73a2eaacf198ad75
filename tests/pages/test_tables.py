"""Tables and their CSV, bars, and the colours of the style sheet."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from page_reader import csv_rows, read_page

from partialfc.pages import template
from partialfc.pages.tables import Bar, bars, legend, table
from partialfc.pages.template import STYLE


def test_a_table_and_its_csv_hold_the_same_and_no_formula() -> None:
    rows = [["a<b", "1,000", "-0.5"], ["=SUM(A1)", "+cmd", 'a "quoted", word\nand more']]
    page = read_page(table("Rows & <b>", ["name", "=one", "two"], rows))
    shown = [[cell.text for cell in row.children] for row in page.find_all("tr")]
    assert shown == [["name", "=one", "two"], *rows]
    [link] = page.find_all("a")
    assert link.attributes["download"] == "rows-b.csv"
    assert csv_rows(link) == [["name", "'=one", "two"], rows[0], ["'=SUM(A1)", "'+cmd", rows[1][2]]]
    assert [head.attributes["scope"] for head in page.find_all("th")] == ["col"] * 3 + ["row"] * 2


def test_bars_stand_where_their_values_are() -> None:
    page = read_page(bars([Bar("x<y", 0.75, 0.6, 2.0), Bar("none", 0.0, is_main=False)], 0.5, 1.0, "{:.0%}".format))
    assert [each.attributes["style"] for each in page.find_all("span", "fill")] == ["width:50.00%", "width:0.00%"]
    assert page.find_all("span", "whisker")[0].attributes["style"] == "left:20.00%;width:80.00%"
    assert len(page.find_all("div", "model")) == 1
    assert legend(["one"]) == ""


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(theme: int) -> None:
    block = re.findall(r":root \{([^}]*)\}", STYLE)[theme]
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block))
    assert len(colours) == 16
    texts, lines = (
        ("ink", "soft", "faint", "link", "wrong"),
        ("blue", "orange", "green", "purple", "cyan", "pink", "plain"),
    )
    for names, least in ((texts, 4.5), (lines, 3.0)):
        for name in names:
            for ground in ("paper", "card"):
                low, high = sorted(_luminance(colours[one]) for one in (name, ground))
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript() -> None:
    script = Path(template.__file__).with_name("page.js")
    subprocess.run(["node", "--check", str(script)], check=True, timeout=60)
    assert "</" not in script.read_text(encoding="utf-8")
