"""The report of a run: one HTML file, made from the run folder and, if given, the results of its model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.core.files import output_errors, write_file
from partialfc.data.pair_files import PairSet
from partialfc.evaluation.pairs import PairResult
from partialfc.pages.template import is_page, render_page
from partialfc.report.benchmark import benchmark_section
from partialfc.report.headline import headline
from partialfc.report.training_section import curves_section, trained_section
from partialfc.training.run.read import RunData, read_run

FILE_NAME = "report.html"


def write_report(
    run: Path,
    *,
    out: Path | None = None,
    results: Mapping[str, PairResult] | None = None,
    pairs: Mapping[str, PairSet] | None = None,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML page about a run, finished or not, and return its path.

    The page loads and executes nothing. It is a function of the arguments and the folder: no date, no machine.

    Args:
        run: the folder of a training run.
        out: the file to write, or a folder for `report.html`; the run folder by default.
        results: of the model on benchmarks, by name, for the headline; without them, it shows the best step of the log.
        pairs: pictures of benchmarks among `results`, by name, to show the hardest pairs.
        baselines: accuracies of other methods by name, shown beside the model.
        title: of the page.
        notes: sentences below the headline.

    Raises:
        InputError: `run` holds no run, its files are damaged, the pictures do not belong to the results, or `out` is a
            file that is no report, which would be lost.
    """
    results, pairs = results or {}, pairs or {}
    for name in pairs:
        if name not in results:
            raise InputError(f"There are pictures for {name} but no result: give the result of the same benchmark.")
    data = read_run(run)
    path = _choose_path(run, out)
    body = [
        headline(data, results, baselines or {}),
        _notes([*notes, *_warnings(data)]),
        trained_section(data),
        curves_section(data),
        *[benchmark_section(name, result, pairs.get(name)) for name, result in results.items()],
        _details(data),
    ]
    page = render_page(
        title or f"Training report: {data.name}",
        _progress(data),
        "\n".join(part for part in body if part),
        "Written by partialfc report from the files of the run. The page is complete in itself and loads nothing.",
    )
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode("utf-8", "replace"))  # JSON can hold halves of characters: they become "?"
    return path


def _progress(run: RunData) -> str:
    """The steps done and planned, in words."""
    if not run.steps:
        return f"{run.name}: no step has been logged yet"
    total = run.total_steps
    if total is None:
        return f"{run.name}: {run.steps:,} steps logged"
    if run.steps >= total:
        return f"{run.name}: finished, {run.steps:,} steps"
    return f"{run.name}: step {run.steps:,} of {total:,} ({run.steps / total:.0%}), not finished"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Notes</h2><ul class="card notes">{items}</ul>'


def _warnings(run: RunData) -> list[str]:
    """Sentences about what went wrong, by the log."""
    warnings = []
    skipped, unreadable = run.last("skipped_steps"), run.last("unreadable")
    if skipped:
        warnings.append(f"{skipped:,.0f} steps were skipped because their gradients were not finite.")
    if unreadable:
        warnings.append(f"{unreadable:,.0f} records could not be read and were skipped.")
    holes = sum(math.isnan(value) for _, value in run.curve("loss"))
    if holes:
        warnings.append(f"The loss of {holes:,} logged steps is no finite number; the curve has a gap there.")
    return warnings


# -- details and file ------------------------------------------------------------------------------------------------


def _details(run: RunData) -> str:
    parts = []
    if run.evaluations:
        names = ("accuracy", "accuracy_std", "equal_error_rate", "auc", "cosine_threshold")
        head = "".join(
            f"<th>{words}</th>" for words in ("benchmark", "step", "accuracy", "±", "EER", "AUC", "threshold")
        )
        rows = []
        for evaluation in run.evaluations:
            values = [evaluation[name] for name in names]
            texts = [f"{v:.2%}" if v is not None else "" for v in values[:3]]
            texts += [f"{v:.4f}" if v is not None else "" for v in values[3:]]
            texts = [escape(evaluation.benchmark), f"{evaluation.step:,}", *texts]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f"<tr>{cells}</tr>")
        parts.append(
            '<details class="card"><summary>All evaluations</summary><div class="scroll"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    if run.settings_text:
        parts.append(
            f'<details class="card"><summary>Configuration</summary><pre>{escape(run.settings_text)}</pre></details>'
        )
    return "<h2>Details</h2>" + "".join(parts) if parts else ""


def _choose_path(run: Path, out: Path | None) -> Path:
    """The file to write; an existing file is only replaced if it is a report."""
    path = run if out is None else out
    path = path / FILE_NAME if path.is_dir() else path
    if path.is_dir():
        raise InputError(f"{path} is a folder: give another file for the report.")
    if path.exists() and not is_page(path):
        raise InputError(f"{path} exists and is no report: give another file for the report.")
    return path
