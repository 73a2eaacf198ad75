"""The sections of a report about training: what was trained, and the curves of the logs on common axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.config.sample_rate import describe_rate
from partialfc.core.console import duration_words
from partialfc.core.errors import InputError
from partialfc.head.margins import MARGINS
from partialfc.pages.plots import Line, Scale, chart
from partialfc.pages.tables import figure, legend
from partialfc.training.run.read import RunData, as_number

Floats = NDArray[np.float64]
# Of a run: x of its steps (N,); None if the log does not tell it.
Clock = Callable[[RunData, ArrayLike], Floats | None]


@dataclass(frozen=True)
class _Curve:
    """A plot of one figure of the training lines, divided by `unit`."""

    key: str
    name: str
    hint: str
    kind: Literal["number", "share"] = "number"
    from_zero: bool = True
    may_log: bool = False
    unit: float = 1.0


_PROGRESS = (
    _Curve("loss", "Loss", "Margin softmax of the step; falls as the network learns.", from_zero=False),
    _Curve(
        "target_cosine",
        "Target cosine",
        "Mean cosine of an image with the center of its own class; should rise.",
        from_zero=False,
    ),
    _Curve("lr", "Learning rate", "Of the backbone."),
    _Curve("lr_head", "Learning rate of the head", "Where it differs from that of the backbone."),
    _Curve(
        "grad_norm", "Gradient norm", "Of the backbone, before clipping; spikes show an unsteady run.", may_log=True
    ),
    _Curve("conflict_share", "Share of conflicts", "Sampled negatives left out as probably the same person.", "share"),
)
_LOAD = (
    _Curve("images_per_second", "Speed, images/s", "All processes together; evaluation and saving not counted."),
    _Curve("data_wait", "Waiting for data", "Part of the time in which training waited for images.", "share"),
    _Curve("peak_bytes", "Memory, GiB", "Of the first process, the most up to then.", unit=2.0**30),
    _Curve("gpu_peak_bytes", "Memory of the GPU, GiB", "Of the first process, the most up to then.", unit=2.0**30),
)


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """The facts of one line each: network, data, head, length and speed; "" for what is not known."""
    images, classes = run.images, as_number(run.counts.get("classes"))
    batch, epochs = run.batch, run.number("schedule.epochs")
    rate, seconds = _rate(run.setting("head.sample_rate")), run.seconds
    seen = run.steps * batch if batch else None
    peak, sampled = run.last("peak_bytes"), run.last("sampled_classes")
    side = run.model.image_size if run.model else as_number(run.counts.get("image_size"))
    backbone = _words(run.setting("backbone.name"), _labelled("embedding of", run.setting("backbone.embedding_dim")))
    return [
        ("Backbone", backbone),
        ("Input", f"{side:.0f} × {side:.0f} pixels" if side else ""),
        ("Training images", _count(images)),
        ("Identities", _count(classes)),
        ("Head", _words(_margin(run), _labelled("scale", run.setting("head.scale")))),
        (
            "Sample rate",
            _words(rate, f"{sampled:,.0f} classes a step" if sampled else None),
        ),
        ("Conflict threshold", _words(run.setting("head.conflict_threshold") or "none")),
        ("Optimizer", _words(run.setting("optimizer.name"), run.setting("schedule.kind"))),
        ("Steps", _count(run.steps) + (f" × {batch:,.0f} images" if batch and run.steps else "")),
        ("Images seen", _words(_count(seen), f"{seen / images:.3g} epochs" if seen and images else None)),
        ("Epochs planned", f"{epochs:g}" if epochs else ""),
        ("Speed", f"{seen / seconds:,.0f} images/s" if seen and seconds else ""),
        ("Time of the steps", "" if seconds is None else duration_words(seconds)),
        ("Memory of a process, peak", f"{peak / 2**30:.1f} GiB" if peak else ""),
        ("Seed", _words(run.setting("seed"))),
    ]


def _words(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part is not None and part != "")


def _labelled(label: str, value: object) -> str | None:
    if value is None:
        return None
    number = as_number(value)
    return f"{label} {value if number is None else f'{number:g}'}"


def _rate(sample_rate: Any) -> str:
    if sample_rate == 0:
        return "positives only"
    if as_number(sample_rate) is None and not isinstance(sample_rate, list):
        return ""
    with contextlib.suppress(InputError):  # a file of somebody's own
        return describe_rate(sample_rate)
    return ""


def _margin(run: RunData) -> str:
    """The margin by name and size; one that is not set has the size that the head gives it."""
    name, value = run.setting("head.margin"), run.setting("head.margin_value")
    if value is None and isinstance(name, str) and name in MARGINS:
        value = getattr(MARGINS[name](), "m", None)
    return " ".join(str(part) for part in (name, value) if part is not None)


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


def curves_section(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """A plot for each figure in the logs and for the accuracy on each benchmark, by step and by time.

    Args:
        runs: at least one.
        names: of the runs.
    """
    views = []
    for look, clock, scale in _clocks(runs):
        for title, curves in (("", _PROGRESS), ("Throughput and memory", _LOAD)):
            charts = [drawn for curve in curves if (drawn := _chart(runs, names, curve, clock, scale))]
            if curves is _PROGRESS:
                benchmarks = dict.fromkeys(name for run in runs for name in run.benchmarks)
                charts += [_accuracy_chart(runs, names, benchmark, clock, scale) for benchmark in benchmarks]
            heading = f"<h3>{title}</h3>" if title and charts else ""
            views.append((look, f'{heading}<div class="grid">{"".join(charts)}</div>' if charts else ""))
    content = "".join(f'<div class="{look}">{charts}</div>' for look, charts in views if charts)
    if not content:
        return ""
    choice = (
        "<legend>Curves</legend>"
        '<input type="radio" name="clock" id="by-step" checked><label for="by-step">by step</label>'
        '<input type="radio" name="clock" id="by-time"><label for="by-time">by time</label>'
    )
    choice = choice if "by-time" in dict(views) else ""
    return f"<h2>How it went</h2>{legend(names)}<fieldset>{choice}{content}</fieldset>"


def _clocks(runs: Sequence[RunData]) -> list[tuple[str, Clock, Scale]]:
    """The horizontal axes: class of the style sheet, x of steps, and scale; time only if a log has speeds."""
    clocks: list[tuple[str, Clock, Scale]] = [
        (
            "by-step",
            lambda _, steps: np.asarray(steps, np.float64),
            Scale("optimizer step", "step", (0,), "count", snug=True),
        )
    ]
    longest = max((seconds for run in runs if (seconds := run.seconds)), default=None)
    if longest is not None:
        unit, size = ("hour", 3600.0) if longest > 7200 else ("minute", 60.0)

        def elapsed(run: RunData, steps: ArrayLike) -> Floats | None:
            seconds = run.seconds_at(steps)
            return None if seconds is None else seconds / size

        clocks.append(("by-time", elapsed, Scale(f"{unit}s of training steps", unit, (0,), snug=True)))
    return clocks


def _chart(runs: Sequence[RunData], names: Sequence[str], curve: _Curve, clock: Clock, x: Scale) -> str:
    """The plot of a figure of the training lines, unless it is switched off or that of another plot."""
    columns = []
    for run in runs:
        steps, values = run.curve(curve.key)
        is_off = curve.key == "conflict_share" and run.setting("head.conflict_threshold") is None
        is_same = curve.key == "lr_head" and np.array_equal(values, run.curve("lr")[1], equal_nan=True)
        if is_same or (is_off and not np.nan_to_num(values).any()):
            steps, values = steps[:0], values[:0]
        columns.append((steps, values / curve.unit, None))
    y = Scale(curve.name, ends=(0,) if curve.from_zero else (), kind=curve.kind, log=None if curve.may_log else False)
    return _plot(runs, names, columns, curve.hint, clock, (x, y), with_skips=curve.key == "loss")


def _accuracy_chart(runs: Sequence[RunData], names: Sequence[str], benchmark: str, clock: Clock, x: Scale) -> str:
    columns = []
    for run in runs:
        found = [evaluation for evaluation in run.evaluations if evaluation.benchmark == benchmark]
        steps, values = ([line.step for line in found], [line["accuracy"] for line in found])
        std = np.array([line["accuracy_std"] or 0.0 for line in found])
        columns.append((np.array(steps, np.float64), np.array(values, np.float64), std))
    hint = "Mean of ten folds; the band is their standard deviation."
    return _plot(runs, names, columns, hint, clock, (x, Scale(f"Accuracy on {benchmark}", kind="share")))


def _plot(
    runs: Sequence[RunData],
    names: Sequence[str],
    columns: Sequence[tuple[Floats, Floats, Floats | None]],
    hint: str,
    clock: Clock,
    scales: tuple[Scale, Scale],
    *,
    with_skips: bool = False,
) -> str:
    """A line for each run, of steps, values and half the height of a band; empty if no value is finite."""
    (x, y), is_one, lines = scales, len(runs) == 1, []
    for run, name, (steps, values, std) in zip(runs, names, columns, strict=True):
        across = clock(run, steps)
        if across is None:
            across, values, std = steps[:0], values[:0], None
        band = (None, None) if std is None else (values - std, values + std)
        lines.append(Line(y.name.lower() if is_one else name, across, values, *band))
    finite = [values[np.isfinite(values)] for _, values in map(Line.columns, lines)]
    if not any(map(len, finite)):
        return ""
    skips = clock(runs[0], [line["step"] for line in runs[0].skipped]) if with_skips and is_one else None
    marks = [] if skips is None else skips.tolist()
    svg = chart(lines, name=y.name, x=x, y=y, marks=marks)
    last = f"last {y.words(float(finite[0][-1]))}" if is_one else ""
    return figure(y.name, svg, hint + (" Red ticks: skipped steps." if marks else ""), last)
