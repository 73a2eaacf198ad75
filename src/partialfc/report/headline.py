"""The headline of a report: accuracy by benchmark, beside that of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from partialfc.evaluation.pairs import PairResult
from partialfc.training.run.read import RunData, as_number


class Score(NamedTuple):
    """The result on one benchmark, with remarks in words."""

    name: str
    accuracy: float
    std: float | None
    remarks: list[str]


def _scores(run: RunData, results: Mapping[str, PairResult]) -> list[Score]:
    """From the results, or else from the evaluations at the best step, whose model is kept."""
    scores = []
    for name, result in results.items():
        share = float(np.mean(result.is_same))
        guessing = f"guessing gives {max(share, 1 - share):.0%}"  # the more frequent answer alone
        scores.append(Score(name, result.accuracy, result.accuracy_std, [_count(len(result.is_same)), guessing]))
    best_step = run.best_step
    for line in () if results else run.evaluations:
        if line.step == best_step:
            counted = [] if line["pairs"] is None else [_count(line["pairs"])]
            remarks = [*counted, f"best model, after step {line.step:,}"]
            scores.append(Score(line.benchmark, line["accuracy"] or 0.0, line["accuracy_std"], remarks))
    return scores


def _count(pairs: float) -> str:
    return f"accuracy on {pairs:,.0f} pairs, ten folds"


def headline(run: RunData, results: Mapping[str, PairResult], baselines: Mapping[str, float]) -> str:
    """The accuracies as large numbers, and as bars if there is something to compare."""
    scores = _scores(run, results)
    if not scores:
        return '<section class="card headline"><p>No benchmark has been run on this model yet.</p></section>'
    tiles = []
    for score in scores:
        spread = "" if score.std is None else f" <small>± {score.std:.2%}</small>"
        tiles.append(
            f'<div class="tile"><div class="name">{escape(score.name)}</div>'
            f'<div class="figure">{score.accuracy:.2%}{spread}</div>'
            f'<div class="hint">{escape("; ".join(score.remarks))}</div></div>'
        )
    bars = _bars(scores, baselines) if baselines or len(scores) > 1 else ""
    return f'<section class="card headline"><div class="tiles">{"".join(tiles)}</div>{bars}</section>'


def _bars(scores: Sequence[Score], baselines: Mapping[str, float]) -> str:
    """Bars of the accuracies from guessing to perfect, with the deviation over the folds as a whisker."""
    rows = [
        (f"model on {score.name}" if len(scores) > 1 else "trained model", score.accuracy, score.std, " model")
        for score in scores
    ]
    rows += [(name, number, None, "") for name, value in baselines.items() if (number := as_number(value)) is not None]
    low = 0.5 if all(value >= 0.5 for _, value, _, _ in rows) else 0.0

    def place(value: float) -> float:
        return 100 * min(max((value - low) / (1 - low), 0.0), 1.0)

    parts = ['<div class="bars">']
    for name, value, std, css_class in rows:
        whisker, words = "", f"{value:.2%}"
        if std is not None:
            left, right = place(value - std), place(value + std)
            whisker = f'<span class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
        parts.append(
            f'<div class="row{css_class}"><span>{escape(name)}</span><span class="track" title="{words}">'
            f'<span class="fill" style="width:{place(value):.2f}%"></span>{whisker}</span>'
            f'<span class="value">{words}</span></div>'
        )
    parts.append(f'<span></span><span class="ends"><span>{low:.0%}</span><span>100%</span></span><span></span></div>')
    if low:
        parts.append(
            '<div class="hint">The bars begin at 50%, which guessing reaches on as many pairs of each kind.</div>'
        )
    return "".join(parts)
