"""The report of runs and results: one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.config.options import flatten
from partialfc.core.errors import InputError
from partialfc.core.files import output_errors, write_file
from partialfc.model.embed import Images
from partialfc.pages.tables import bullets, folded, table
from partialfc.pages.template import definition_list, is_page, render_page
from partialfc.report.benchmark import benchmark_section
from partialfc.report.headline import comparison_warnings, headline, published_table, scores_table
from partialfc.report.runs import changed_settings
from partialfc.report.subjects import Subject, provenance_facts
from partialfc.report.training_section import curves_section, run_facts
from partialfc.training.run.read import RunData

FILE_NAME = "report.html"
_FACES = "This page shows pictures of faces: pass it on only to those who may see them, or write it with --no-pictures."
_MOST_SKIPPED = 200  # lines of the table of skipped steps


def write_report(
    subjects: Sequence[Subject],
    *,
    out: Path | None = None,
    pictures: Mapping[str, Images] | None = None,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML page about runs, finished or not, and results, and return its path.

    The page fetches nothing. It is a function of the arguments and the files: the dates on it are those of the runs.

    Args:
        subjects: at least one.
        out: the file to write, or a folder for `report.html`; by default the folder of the first subject.
        pictures: images of benchmarks, by name, to show the hardest pairs.
        baselines: accuracies of other methods by name, shown beside a single subject.
        title: of the page.
        notes: sentences below the headline.

    Raises:
        InputError: pictures do not belong to the results, or `out` is a file that is no report, which would be lost.
    """
    pictures, is_one = pictures or {}, len(subjects) == 1
    benchmarks = dict.fromkeys(name for subject in subjects for name in subject.results)
    for name in pictures:
        if name not in benchmarks:
            raise InputError(f"There are pictures for {name} but no result: give the result of the same benchmark.")
    path = _choose_path(subjects[0].path, out)
    runs = [subject.run for subject in subjects if subject.run]
    names = [subject.name for subject in subjects if subject.run]
    top = headline(subjects[0], baselines or {}) if is_one else _differences(subjects) + scores_table(subjects)
    warnings = [*notes, *comparison_warnings(subjects)]
    for subject in subjects:
        warnings += [f"{'' if is_one else f'{subject.name}: '}{line}" for line in _warnings(subject.run)]
    sections = [
        benchmark_section(
            name, {one.name: one.results[name] for one in subjects if name in one.results}, pictures.get(name)
        )
        for name in benchmarks
    ]
    body = [
        top,
        f"<h2>Notes</h2>{bullets(warnings)}" if warnings else "",
        published_table(subjects),
        _made(subjects) if is_one else "",
        curves_section(runs, names) if runs else "",
        *sections,
        "" if is_one else _made(subjects),
        _details(subjects),
    ]
    page = render_page(
        title or f"{'Training' if runs else 'Evaluation'} report: {', '.join(one.name for one in subjects)}",
        "; ".join(_progress(subject) for subject in subjects),
        "\n".join(part for part in body if part),
        "Written by partialfc report from files. The page is complete in itself and loads nothing.",
        _FACES if any("<img" in section for section in sections) else "",
    )
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode("utf-8", "replace"))  # JSON can hold halves of characters: they become "?"
    return path


def _progress(subject: Subject) -> str:
    """The steps done and planned, in words."""
    run = subject.run
    if run is None:
        return f"{subject.name}: results of {', '.join(subject.results)}"
    if not run.steps:
        return f"{subject.name}: no step has been logged yet"
    total = run.total_steps
    if total is None:
        return f"{subject.name}: {run.steps:,} steps logged"
    if run.steps >= total:
        return f"{subject.name}: finished, {run.steps:,} steps"
    return f"{subject.name}: step {run.steps:,} of {total:,} ({run.steps / total:.0%}), not finished"


def _warnings(run: RunData | None) -> list[str]:
    """Sentences about what went wrong, by the log."""
    if run is None:
        return []
    warnings = []
    skipped, unreadable = run.last("skipped_steps") or len(run.skipped), run.last("unreadable")
    if skipped:
        many = "A step was" if skipped == 1 else f"{skipped:,.0f} steps were"
        warnings.append(f"{many} skipped because of gradients that were not finite.")
    if unreadable:
        warnings.append(f"{unreadable:,.0f} records could not be read and were skipped.")
    holes = int(np.isnan(run.curve("loss")[1]).sum())
    if holes:
        warnings.append(f"The loss of {holes:,} logged steps is no finite number; the curve has a gap there.")
    if not run.lines:
        warnings.append("The run has not logged a training step, so there are no curves.")
    return warnings


def _differences(subjects: Sequence[Subject]) -> str:
    """The settings in which the runs differ, a column a run."""
    settings = {subject.name: flatten(subject.run.settings) for subject in subjects if subject.run}
    keys = sorted({key for changed in changed_settings(list(settings.values())) for key in changed})
    if len(settings) < 2:
        return ""
    if not keys:
        return "<h2>What differs</h2><p>The runs have the same configuration.</p>"
    rows = [[key, *(_text(one.get(key)) for one in settings.values())] for key in keys]
    return f"<h2>What differs</h2>{table('Settings in which the runs differ', ['setting', *settings], rows)}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _made(subjects: Sequence[Subject]) -> str:
    """What was run: one subject as a list, several as a table."""
    facts = [
        {term: value for term, value in [*(run_facts(one.run) if one.run else []), *provenance_facts(one)] if value}
        for one in subjects
    ]
    if not any(facts):
        return ""
    if len(subjects) == 1:
        return f'<h2>What was run</h2><div class="card">{definition_list(facts[0].items())}</div>'
    terms = dict.fromkeys(term for one in facts for term in one)
    rows = [[term, *(one.get(term, "") for one in facts)] for term in terms]
    return f"<h2>What was run</h2>{table('What was run', ['fact', *(one.name for one in subjects)], rows)}"


def _details(subjects: Sequence[Subject]) -> str:
    parts = []
    for subject in subjects:
        run, of = subject.run, "" if len(subjects) == 1 else f" of {subject.name}"
        if run is None:
            continue
        if run.evaluations:
            parts.append(folded(f"All evaluations{of}", _evaluations(run, f"Evaluations{of}")))
        if run.skipped:
            rows = [
                [f"{line['step']:,}", str(line.get("where", "")), _listed(line.get("samples"))]
                for line in run.skipped[:_MOST_SKIPPED]
            ]
            more = len(run.skipped) - len(rows)
            rest = f'<p class="hint">And {more:,} more: metrics.jsonl has them.</p>' if more else ""
            shown = table(f"Skipped steps{of}", ["step", "not finite", "images"], rows)
            parts.append(folded(f"Skipped steps{of}", shown + rest))
        if run.settings_text:
            parts.append(folded(f"Configuration{of}", f"<pre>{escape(run.settings_text)}</pre>"))
    return f"<h2>Details</h2>{''.join(parts)}" if parts else ""


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else ""


def _evaluations(run: RunData, caption: str) -> str:
    head = ["step", "benchmark", "accuracy", "±", "EER", "AUC", "threshold"]
    rows = []
    for line in run.evaluations:
        values = [line[name] for name in ("accuracy", "accuracy_std", "equal_error_rate", "auc", "cosine_threshold")]
        texts = ["" if value is None else f"{value:.2%}" for value in values[:3]]
        texts += ["" if value is None else f"{value:.4f}" for value in values[3:]]
        rows.append([f"{line.step:,}", line.benchmark, *texts])
    return table(caption, head, rows)


def _choose_path(subject: Path, out: Path | None) -> Path:
    """The file to write; an existing file is only replaced if it is a report."""
    path = (subject.parent if subject.is_file() else subject) if out is None else out
    path = path / FILE_NAME if path.is_dir() else path
    if path.is_dir():
        raise InputError(f"{path} is a folder: give another file for the report.")
    if path.exists() and not is_page(path):
        raise InputError(f"{path} exists and is no report: give another file for the report.")
    return path
