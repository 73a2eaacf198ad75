"""The headline of a report: accuracy by benchmark, beside that of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from partialfc.evaluation.pairs import PairResult
from partialfc.training.run.read import RunData, as_number


@dataclass(frozen=True)
class Score:
    """The result on one benchmark; `guessing` is the accuracy of the more frequent answer alone."""

    name: str
    accuracy: float
    std: float | None
    pairs: float | None
    step: int | None = None
    guessing: float | None = None


def headline_scores(run: RunData, results: Mapping[str, PairResult]) -> list[Score]:
    """From the results, or else from the evaluations at the best step, whose model is kept."""
    if results:
        return [_score(name, result) for name, result in results.items()]
    best_step = run.best_step
    return [
        Score(line.benchmark, line["accuracy"] or 0.0, line["accuracy_std"], line["pairs"], line.step)
        for line in run.evaluations
        if line.step == best_step
    ]


def _score(name: str, result: PairResult) -> Score:
    share = float(np.mean(result.is_same))
    return Score(name, result.accuracy, result.accuracy_std, len(result.is_same), guessing=max(share, 1 - share))


def headline(scores: Sequence[Score], baselines: Mapping[str, float]) -> str:
    """The accuracies as large numbers, and as bars if there is something to compare."""
    if not scores:
        return '<section class="card headline"><p>No benchmark has been run on this model yet.</p></section>'
    tiles = []
    for score in scores:
        spread = "" if score.std is None else f" <small>± {score.std:.2%}</small>"
        below = [] if score.pairs is None else [f"accuracy on {score.pairs:,.0f} pairs, ten folds"]
        below += [] if score.step is None else [f"best model, after step {score.step:,}"]
        below += [] if score.guessing is None else [f"guessing gives {score.guessing:.0%}"]
        tiles.append(
            f'<div class="tile"><div class="name">{escape(score.name)}</div>'
            f'<div class="figure">{score.accuracy:.2%}{spread}</div>'
            f'<div class="hint">{escape("; ".join(below))}</div></div>'
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
