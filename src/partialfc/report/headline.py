"""The headline of a report: what each benchmark comes to, beside baselines and what was published."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from partialfc.config.recipes import SCORES
from partialfc.evaluation.statistics.figures import Figure, Result, figure_text
from partialfc.pages.tables import Bar, bars, table
from partialfc.report.subjects import Subject
from partialfc.training.run.read import as_number

# In this order the first figure that a benchmark has is its headline.
_MAIN = ("accuracy", "tar@far=1e-4", "tar@far=1e-6", "rank-1", "tar@far=1e-3", "tar@far=0.01", "tar@far=0.1")

# Title, names of the benchmark in small letters without signs, and figure.
_COLUMNS = (
    ("MFR-ALL", ("mfr", "mfrall"), "tar@far=1e-6"),
    ("IJB-C 1e-4", ("ijbc",), "tar@far=1e-4"),
    ("IJB-C 1e-5", ("ijbc",), "tar@far=1e-5"),
    ("IJB-B 1e-4", ("ijbb",), "tar@far=1e-4"),
    ("AgeDB-30", ("agedb", "agedb30"), "accuracy"),
    ("CFP-FP", ("cfp", "cfpfp"), "accuracy"),
    ("MFR-MASK", ("mfr", "mfrall"), "mask/tar@far=1e-4"),
    ("African", ("mfr", "mfrall"), "african/tar@far=1e-6"),
    ("Caucasian", ("mfr", "mfrall"), "caucasian/tar@far=1e-6"),
    ("South Asian", ("mfr", "mfrall"), "south-asian/tar@far=1e-6"),
    ("East Asian", ("mfr", "mfrall"), "east-asian/tar@far=1e-6"),
)
# An et al., CVPR 2022 (arXiv 2203.15565), and the logs beside its code; in percent, beyond `SCORES`.
_MORE = {
    "wf42m-r200": {"IJB-B 1e-4": 96.71, "AgeDB-30": 98.70, "CFP-FP": 99.51},
    "wf42m-vit_l": {
        "MFR-MASK": 90.88, "African": 98.07, "Caucasian": 98.81, "South Asian": 98.66, "East Asian": 89.97,
    },
}  # fmt: skip


class Score(NamedTuple):
    """The main figure of a benchmark, with remarks in words."""

    name: str
    figure: str
    value: float
    low: float | None
    high: float | None
    remarks: list[str]


def main_scores(subject: Subject) -> list[Score]:
    """From the results, and for other benchmarks from the evaluations at the best step, whose model is kept."""
    scores = []
    for name, result in subject.results.items():
        known = [
            figure for figure in (*_MAIN, *result.figures) if result.figures.get(figure, Figure(None)).value is not None
        ]
        if known:
            figure = result.figures[known[0]]
            assert figure.value is not None
            scores.append(
                Score(
                    name, known[0], figure.value, figure.low, figure.high, [known[0], *_counts(result), "95% interval"]
                )
            )
    run = subject.run
    for line in run.evaluations if run else ():
        if run and line.step == run.best_step and line.benchmark not in subject.results:
            accuracy, std, pairs = line["accuracy"] or 0.0, line["accuracy_std"], line["pairs"]
            counted = "accuracy" if pairs is None else f"accuracy on {pairs:,.0f} pairs, ten folds"
            low, high = (None, None) if std is None else (accuracy - std, accuracy + std)
            remarks = [counted, f"best model, after step {line.step:,}", "deviation over the folds"]
            scores.append(Score(line.benchmark, "accuracy", accuracy, low, high, remarks))
    return scores


def _counts(result: Result) -> list[str]:
    genuine, impostor = (as_number(result.facts.get(f"{kind}_pairs")) for kind in ("genuine", "impostor"))
    if not genuine or not impostor:
        return []
    guessing = f", guessing gives {max(genuine, impostor) / (genuine + impostor):.0%}"
    return [f"{genuine + impostor:,.0f} pairs{guessing if 'accuracy' in result.figures else ''}"]


def headline(subject: Subject, baselines: Mapping[str, float]) -> str:
    """The main figures of one subject as large numbers, and as bars if there is something to compare."""
    scores = main_scores(subject)
    if not scores:
        return '<section class="card headline"><p>No benchmark has been run on this model yet.</p></section>'
    tiles = []
    for score in scores:
        reach = (
            "" if score.low is None or score.high is None else f" <small>{score.low:.2%} to {score.high:.2%}</small>"
        )
        tiles.append(
            f'<div class="tile"><div class="name">{escape(score.name)}</div>'
            f'<div class="figure">{score.value:.2%}{reach}</div>'
            f'<div class="hint">{escape("; ".join(score.remarks))}</div></div>'
        )
    drawn = _accuracy_bars(scores, baselines) if baselines or len(scores) > 1 else ""
    return f'<section class="card headline"><div class="tiles">{"".join(tiles)}</div>{drawn}</section>'


def _accuracy_bars(scores: Sequence[Score], baselines: Mapping[str, float]) -> str:
    """Bars from guessing to perfect, with the interval as a whisker."""
    rows = [
        Bar(f"model on {score.name}" if len(scores) > 1 else "trained model", score.value, score.low, score.high)
        for score in scores
    ]
    numbers = {name: as_number(value) for name, value in baselines.items()}
    rows += [Bar(name, value, is_main=False) for name, value in numbers.items() if value is not None]
    is_accuracy = all(score.figure == "accuracy" for score in scores)
    low = 0.5 if is_accuracy and all(row.value >= 0.5 for row in rows) else 0.0
    hint = "The bars begin at 50%, which guessing reaches on as many pairs of each kind."
    return bars(rows, low, 1.0, "{:.2%}".format) + (f'<div class="hint">{hint}</div>' if low else "")


def published_table(subjects: Sequence[Subject]) -> str:
    """Our figures beside those of the paper; nothing if no benchmark bears the name of one of the paper's."""
    published: dict[str, dict[str, float]] = {
        name: dict(zip(("MFR-ALL", "IJB-C 1e-4", "IJB-C 1e-5"), scores, strict=True)) | _MORE.get(name, {})
        for name, scores in SCORES.items()
    }
    own = {subject.name: _own_figures(subject) for subject in subjects}
    titles = [title for title, _, _ in _COLUMNS if any(title in figures for figures in own.values())]
    if not titles:
        return ""
    rows = [[name, *(figures.get(title, "") for title in titles)] for name, figures in own.items() if figures]
    for name, scores in published.items():
        if any(title in scores for title in titles):
            rows.append(
                [f"published: {name}", *(f"{scores[title]:.2f}%" if title in scores else "" for title in titles)]
            )
    source = (
        "Published: An et al., Killing Two Birds with One Stone, CVPR 2022 (arXiv 2203.15565), and its logs, by the "
        "recipe of this name; on the real benchmarks. A benchmark of ours is set beside them by its name: one of "
        "procedural faces or of other people does not compare."
    )
    return (
        f"<h2>Beside published results</h2>{table('Results beside published ones', ['training', *titles], rows)}"
        f'<p class="hint">{escape(source)}</p>'
    )


def _own_figures(subject: Subject) -> dict[str, str]:
    """By the title of the column."""
    found = {}
    for title, names, figure in _COLUMNS:
        for name, result in subject.results.items():
            if figure in result.figures and re.sub(r"[^a-z0-9]", "", name.lower()) in names:
                found[title] = figure_text(figure, result.figures[figure])
    return found


def scores_table(subjects: Sequence[Subject]) -> str:
    """The main figure of each benchmark, a column a subject."""
    by_subject = [{score.name: score for score in main_scores(subject)} for subject in subjects]
    names = dict.fromkeys(name for scores in by_subject for name in scores)
    rows = []
    for name in names:
        found = [scores.get(name) for scores in by_subject]
        cells = ["" if one is None else figure_text(one.figure, Figure(one.value, one.low, one.high)) for one in found]
        figures = dict.fromkeys(one.figure for one in found if one is not None)
        rows.append([f"{name}, {' or '.join(figures)}", *cells])
    if not rows:
        return "<h2>Results</h2><p>No benchmark has been run on these models yet.</p>"
    head = ["benchmark", *(subject.name for subject in subjects)]
    return f"<h2>Results</h2>{table('Main figure of each benchmark', head, rows)}"


def comparison_warnings(subjects: Sequence[Subject]) -> list[str]:
    """Sentences on benchmarks that not all have, and on those that are not the same under one name."""
    warnings = []
    for name in dict.fromkeys(name for subject in subjects for name in subject.results):
        having = {subject.name: subject.results[name] for subject in subjects if name in subject.results}
        lacking = [subject.name for subject in subjects if subject.name not in having]
        if lacking:
            warnings.append(f"{name} has no results of {', '.join(lacking)}.")
        sizes = {one: (result.kind, *_counts(result), result.facts.get("images")) for one, result in having.items()}
        if len(set(sizes.values())) > 1:
            warnings.append(
                f"{name} is not the same benchmark in all results, by protocol, pairs or images: its figures do not "
                "compare."
            )
    return warnings
