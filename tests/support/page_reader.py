"""Reading a report as a browser would: its elements, whether all are closed, and its curves back as numbers."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np

_NEVER_CLOSED = {"meta", "img", "br", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find_all(self, tag: str, css_class: str | None = None) -> list[Element]:
        """Elements below this one, in the order of the page."""
        found = []
        for child in self.children:
            if child.tag == tag and (css_class is None or css_class in child.attributes.get("class", "").split()):
                found.append(child)
            found += child.find_all(tag, css_class)
        return found

    def words(self) -> str:
        """All text in this element."""
        return self.text + " ".join(child.words() for child in self.children)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _NEVER_CLOSED:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def read_page(text: str) -> Element:
    """The document; fails unless every element is closed in its turn."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def check_page(text: str) -> Element:
    """The document, checked for what must hold of every page, in structure and for assistive technology."""
    page = read_page(text)
    assert not any(page.find_all(tag) for tag in ("link", "iframe", "object", "form"))
    [script] = page.find_all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = next(each.attributes["content"] for each in page.find_all("meta") if "http-equiv" in each.attributes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert page.find_all("html")[0].attributes["lang"] == "en"
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for image in page.find_all("img"):
        assert image.attributes["src"].startswith("data:image/jpeg;base64,")
        assert image.attributes["alt"]
    for plot in page.find_all("svg"):
        assert plot.attributes.get("aria-hidden") == "true" or (
            plot.attributes["role"] == "img" and plot.attributes["aria-label"]
        )
    links = page.find_all("a")
    for each in page.find_all("table"):
        [caption] = each.find_all("caption")
        assert caption.text
        assert all(head.attributes["scope"] in ("col", "row") and head.words().strip() for head in each.find_all("th"))
    assert len(links) == len(page.find_all("table"))
    for link in links:
        assert link.attributes["href"].startswith("data:text/csv;charset=utf-8;base64,")
    for choice in page.find_all("input"):
        assert choice.attributes["id"] in {label.attributes["for"] for label in page.find_all("label")}
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    return page


def csv_rows(link: Element) -> list[list[str]]:
    """The rows behind a link to a table."""
    content = base64.b64decode(link.attributes["href"].partition(",")[2]).decode()
    return list(csv.reader(io.StringIO(content)))


def figure(page: Element, name: str) -> Element:
    """The plot with a caption."""
    return next(each for each in page.find_all("figure") if each.find_all("b") and each.find_all("b")[0].text == name)


def curve(figure: Element, css_class: str = "s1", *, log_x: bool = False, log_y: bool = False) -> np.ndarray:
    """The (x, y) of a path in the units of the axes, which are read off the labels of the ticks."""
    path = next(each for each in figure.find_all("path", "line") if css_class in each.attributes["class"].split())
    return to_values(figure, path.attributes["d"], log_x=log_x, log_y=log_y)


def to_values(figure: Element, drawn: str, *, log_x: bool = False, log_y: bool = False) -> np.ndarray:
    pixels = np.array(re.findall(r"[ML](\S+) ([^MLZ]+)", drawn), dtype=float)
    x = _axis(figure.find_all("text", "x-tick"), figure.find_all("line", "tick"), "x1", log=log_x)
    y = _axis(figure.find_all("text", "y-tick"), figure.find_all("line", "grid-line"), "y1", log=log_y)
    values = np.stack([np.polyval(x, pixels[:, 0]), np.polyval(y, pixels[:, 1])], axis=1)
    for column, log in enumerate((log_x, log_y)):
        if log:
            values[:, column] = 10 ** values[:, column]
    return values


def _axis(labels: list[Element], marks: list[Element], coordinate: str, *, log: bool = False) -> np.ndarray:
    """The straight line from pixels to values, on which all labels must lie."""
    values = np.array([_number(label.text) for label in labels])
    values = np.log10(values) if log else values
    pixels = [float(mark.attributes[coordinate]) for mark in marks]
    assert len(pixels) == len(values) > 1
    line = np.polyfit(pixels, values, 1)
    assert np.allclose(np.polyval(line, pixels), values, rtol=0, atol=0.02 * abs(line[0]))
    return line


def _number(text: str) -> float:
    text = text.replace(",", "")
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text[:-1]) * 1e6 if text.endswith("M") else float(text)
