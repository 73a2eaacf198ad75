"""A timeline: what is drawn where, and a plot as a file of its own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from timeline import Row, standalone_svg, timeline


def bars(svg: str) -> list[tuple[float, float]]:
    """(left, width) of each bar."""
    return [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)]


def test_bars_lie_on_the_scale_and_neighbours_are_one() -> None:
    close = [(0.0, 1.0), (1.01, 2.0), (60.0, 80.0), (95.0, 130.0)]
    svg = timeline([Row("work & more", close), Row("talk", [(50.0, 100.0)])], name="a step", stop=100.0)
    first, second, third, talk = bars(svg)
    per_millisecond = talk[1] / 50
    assert abs(first[0] - talk[0] + 50 * per_millisecond) < 0.02
    assert abs(first[1] - 2 * per_millisecond) < 0.02
    assert abs(second[1] - 20 * per_millisecond) < 0.02
    assert abs(third[0] + third[1] - talk[0] - talk[1]) < 0.02  # cut at the end of the scale
    assert "work &amp; more: 60.0 to 80.0 ms" in svg


def test_a_plot_stands_alone() -> None:
    svg = standalone_svg(timeline([Row("work", [(0.0, 1.0)])], name="a step", stop=1.0))
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    used = set(re.findall(r"var\(--(\w+)\)", svg.split("</style>")[1]))
    assert used
    assert all(f"--{name}:" in (style.text or "") for name in used)
