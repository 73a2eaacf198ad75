"""What an evaluation yields: named figures with their 95 % intervals, and a table of them for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partialfc.evaluation.statistics.metrics import Scores

COLUMNS = 80
_GAP = 2
# Figures that are not rates.
_PLAIN = {"auc", "cllr", "min-cllr", "fmr-max-min", "fmr-max-mean", "fnmr-max-min", "fnmr-max-mean", "fdr", "garbe"}


@dataclass(frozen=True)
class Figure:
    """One value with its 95 % interval.

    Attributes:
        value: None where it cannot be resolved.
        low, high: the ends of the interval; None where it is not known.
        reason: why the value is None, or why an end of the interval is only a bound.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `reason` only where there is one."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return values if self.reason is None else {**values, "reason": self.reason}


@dataclass(frozen=True)
class Result:
    """The result of one benchmark.

    Attributes:
        kind: the protocol: "pairs", "ijb-1:1", "ijb-1:n", "all-pairs" or "1:n".
        figures: by name: accuracy, tar@far=1e-4, fnmr@fmr=1e-3, eer, auc, rank-1, tpir@fpir=0.01, cllr, min-cllr; a
            part of the benchmark is a prefix, such as "mask/tar@far=1e-4".
        facts: counts, values that JSON can hold; the sentences in `notes` also stand below the table.
        scores: of 1:1, by part of the benchmark, "" for all of it; not part of `to_dict`.
    """

    kind: str
    figures: dict[str, Figure]
    facts: dict[str, Any]
    scores: dict[str, Scores] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: the kind, the figures, and every fact under its own name."""
        figures = {name: figure.to_dict() for name, figure in self.figures.items()}
        return {"kind": self.kind, "figures": figures, **self.facts}


def result_from(values: Mapping[str, Any]) -> Result:
    """The result of which `to_dict` gave these values, without its scores; KeyError or TypeError for others."""
    figures = {str(name): Figure(**figure) for name, figure in values["figures"].items()}
    for figure in figures.values():
        if not all(
            value is None or isinstance(value, int | float) for value in (figure.value, figure.low, figure.high)
        ):
            raise TypeError(f"{figure} is no number")
    return Result(str(values["kind"]), figures, {key: values[key] for key in values if key not in ("kind", "figures")})


def rate_name(rate: float) -> str:
    """A rate as it stands in the name of a figure: 0.1, 0.01, 1e-3, 2.5e-4."""
    if rate >= 0.01 or rate == 0:
        return f"{rate:g}"
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def results_table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """The figures of one or several models as text of at most 80 columns, unless a name is longer.

    A benchmark has a line a figure and a column a model; models that do not fit beside each other follow below. Rates
    are percentages. The reasons of what is not resolvable and the notes stand below the table, each once.

    Args:
        results: by the name of the model, then by the name of the benchmark.
    """
    benchmarks: dict[str, dict[str, Result]] = {}
    for model, of_model in results.items():
        for name, result in of_model.items():
            benchmarks.setdefault(name, {})[model] = result
    return "\n\n".join(_benchmark_table(name, by_model) for name, by_model in benchmarks.items())


def _benchmark_table(benchmark: str, results: Mapping[str, Result]) -> str:
    rows = list(dict.fromkeys(name for result in results.values() for name in result.figures))
    cells = {model: [figure_text(name, result.figures.get(name)) for name in rows] for model, result in results.items()}
    first = max(map(len, rows), default=0)
    widths = {model: max(len(model), *map(len, texts), 0) for model, texts in cells.items()}
    lines = [f"{benchmark} ({next(iter(results.values())).kind})"]
    for block in _blocks(widths, COLUMNS - 2 - first):
        header = "".join(" " * _GAP + model.ljust(widths[model]) for model in block)
        lines.append(("  " + " " * first + header).rstrip())
        for row, name in enumerate(rows):
            values = "".join(" " * _GAP + cells[model][row].ljust(widths[model]) for model in block)
            lines.append(f"  {name.ljust(first)}{values}".rstrip())
    found = [figure.reason for result in results.values() for figure in result.figures.values()]
    for model, result in results.items():
        notes: list[str] = result.facts.get("notes", [])
        found += notes if len(results) == 1 else [f"{model}: {note}" for note in notes]
    for sentence in dict.fromkeys(sentence for sentence in found if sentence is not None):
        lines += textwrap.wrap(sentence, COLUMNS, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _blocks(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """The models, in groups that fit beside each other, at least one in each."""
    blocks: list[list[str]] = []
    left = 0
    for model, width in widths.items():
        if not blocks or left < width + _GAP:
            blocks.append([])
            left = room
        blocks[-1].append(model)
        left -= width + _GAP
    return blocks


def figure_text(name: str, figure: Figure | None) -> str:
    """A figure with its interval as it stands in a table; rates are percentages."""
    if figure is None:
        return "-"
    if figure.value is None:
        return "not resolvable"
    factor, unit = (1, "") if name.rpartition("/")[2] in _PLAIN else (100, "%")
    digits = 4 if factor == 1 else 2 if factor * figure.value >= 0.1 or not figure.value else 4
    text = f"{factor * figure.value:.{digits}f}{unit}"
    ends = ["?" if end is None else f"{factor * end:.{digits}f}" for end in (figure.low, figure.high)]
    return text if figure.low is figure.high is None else f"{text} [{', '.join(ends)}]"
