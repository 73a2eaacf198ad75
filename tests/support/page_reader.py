"""Reading a report as a browser would: its elements, whether all are closed, and its curves back as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np

_NEVER_CLOSED = {"meta", "img", "br"}


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


def figure(page: Element, name: str) -> Element:
    """The plot with a caption."""
    return next(each for each in page.find_all("figure") if each.find_all("b") and each.find_all("b")[0].text == name)


def curve(figure: Element, css_class: str = "s1", *, log_y: bool = False) -> np.ndarray:
    """The (x, y) of a path in the units of the axes, which are read off the labels of the ticks."""
    path = next(each for each in figure.find_all("path", "line") if css_class in each.attributes["class"].split())
    return to_values(figure, path.attributes["d"], log_y=log_y)


def to_values(figure: Element, drawn: str, *, log_y: bool = False) -> np.ndarray:
    pixels = np.array(re.findall(r"[ML](\S+) ([^MLZ]+)", drawn), dtype=float)
    x = _axis(figure.find_all("text", "x-tick"), figure.find_all("line", "tick"), "x1")
    y = _axis(figure.find_all("text", "y-tick"), figure.find_all("line", "grid-line"), "y1", log=log_y)
    values = np.stack([np.polyval(x, pixels[:, 0]), np.polyval(y, pixels[:, 1])], axis=1)
    if log_y:
        values[:, 1] = 10 ** values[:, 1]
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
