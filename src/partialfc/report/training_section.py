"""The sections of a report about the training: what was trained, and the curves of the log."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from html import escape
from typing import Any

from partialfc.config.sample_rate import describe_rate
from partialfc.core.console import duration_words
from partialfc.core.errors import InputError
from partialfc.head.margins import MARGINS
from partialfc.pages.axes import value_format
from partialfc.pages.plots import Line, line_chart
from partialfc.pages.template import definition_list
from partialfc.training.run.read import RunData, as_number


@dataclass(frozen=True)
class _Curve:
    """A plot of one figure of the training lines."""

    key: str
    name: str
    hint: str
    percent: bool = False
    from_zero: bool = True
    may_log: bool = False


_CURVES = (
    _Curve("loss", "Loss", "Margin softmax of the step; falls as the network learns.", from_zero=False),
    _Curve(
        "target_cosine",
        "Target cosine",
        "Mean cosine of an image with the center of its own class; should rise.",
        from_zero=False,
    ),
    _Curve("lr", "Learning rate", "Of the backbone, and dashed of the head where it differs."),
    _Curve(
        "grad_norm", "Gradient norm", "Of the backbone, before clipping; spikes show an unsteady run.", may_log=True
    ),
    _Curve(
        "conflict_share", "Share of conflicts", "Sampled negatives left out as probably the same person.", percent=True
    ),
    _Curve("images_per_second", "Speed, images/s", "All processes together; evaluation and saving not counted."),
    _Curve("data_wait", "Waiting for data", "Part of the time in which training waited for images.", percent=True),
)


def trained_section(run: RunData) -> str:
    """The facts of one line each: network, data, head, length and speed."""
    facts = [(term, value) for term, value in _facts(run) if value]
    return f'<h2>What was trained</h2><div class="card">{definition_list(facts)}</div>' if facts else ""


def _facts(run: RunData) -> list[tuple[str, str]]:
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
        ("memory of a process, peak", f"{peak / 2**30:.1f} GiB" if peak else ""),
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
    if value is None and name in MARGINS:
        value = getattr(MARGINS[name](), "m", None)
    return " ".join(str(part) for part in (name, value) if part is not None)


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


def curves_section(run: RunData) -> str:
    """A plot for each figure in the log, and for the accuracy on each benchmark."""
    charts = [chart for curve in _CURVES if (chart := _chart(run, curve))]
    charts += [_accuracy_chart(run, name) for name in run.benchmarks]
    return f'<h2>How it went</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _chart(run: RunData, curve: _Curve) -> str:
    """The plot of a figure; empty if the log has no finite value of it, or it is switched off."""
    points = run.curve(curve.key)
    finite = [value for _, value in points if math.isfinite(value)]
    off = curve.key == "conflict_share" and run.setting("head.conflict_threshold") is None and not any(finite)
    if not finite or off:
        return ""
    lines = [Line(curve.name.lower(), points)]
    head = run.curve("lr_head")
    if curve.key == "lr" and head != points and any(math.isfinite(value) for _, value in head):
        lines.append(Line("of the head", head))
    svg = line_chart(
        lines,
        name=curve.name,
        last_step=run.steps,
        percent=curve.percent,
        from_zero=curve.from_zero,
        may_log=curve.may_log,
    )
    return _figure(curve.name, f"{finite[-1]:.2%}" if curve.percent else value_format(finite[-1]), svg, curve.hint)


def _accuracy_chart(run: RunData, benchmark: str) -> str:
    evaluations = [evaluation for evaluation in run.evaluations if evaluation.benchmark == benchmark]
    points = [(float(evaluation.step), evaluation["accuracy"] or 0.0) for evaluation in evaluations]
    spread = [evaluation["accuracy_std"] or 0.0 for evaluation in evaluations]
    name = f"Accuracy on {benchmark}"
    svg = line_chart([Line("accuracy", points)], name=name, last_step=run.steps, percent=True, spread=spread)
    return _figure(name, f"{points[-1][1]:.2%}", svg, "Mean of ten folds; the band is their standard deviation.")


def _figure(name: str, value: str, svg: str, hint: str) -> str:
    return (
        f'<figure class="card"><figcaption><b>{escape(name)}</b><span>last {escape(value)}</span></figcaption>'
        f'{svg}<div class="hint">{escape(hint)}</div></figure>'
    )
