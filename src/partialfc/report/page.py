"""The report of a run: one HTML file that needs nothing but a browser, from a run folder and, if given, its results."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.pair_files import PairSet
from partialfc.evaluation.pairs import PairResult
from partialfc.pages.template import MARKER, render_page
from partialfc.report.benchmark import benchmark_section
from partialfc.report.course import curves_section, trained_section
from partialfc.report.facts import RunFacts, read_run
from partialfc.report.headline import headline_scores, verdict

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
        results: of the model on benchmarks, by name: the headline. Without them, that is what the log says of the best.
        pairs: pictures of benchmarks among `results`, by name, to show those that are hardest.
        baselines: accuracies of other methods by name, shown beside the model.
        title: of the page.
        notes: sentences to show below the headline.

    Raises:
        InputError: `run` holds no run, its files are damaged, the pictures do not belong to the results, or `out` is a
            file that is no report, which would be lost.
    """
    results, pairs = results or {}, pairs or {}
    for name in pairs:
        if name not in results:
            raise InputError(f"There are pictures for {name} but no result: give the result of the same benchmark.")
    facts = read_run(run)
    path = _choose_path(run, out)
    body = [
        verdict(headline_scores(facts, results), baselines or {}),
        _notes([*notes, *_warnings(facts)]),
        trained_section(facts),
        curves_section(facts),
        *[benchmark_section(name, result, pairs.get(name)) for name, result in results.items()],
        _details(facts),
    ]
    page = render_page(
        title or f"Training report: {facts.name}",
        _progress(facts),
        "\n".join(part for part in body if part),
        "Written by partialfc report from the files of the run. The page is complete in itself and loads nothing.",
    )
    _write(path, page)
    return path


def _progress(facts: RunFacts) -> str:
    """How far the run came, in words."""
    if not facts.steps:
        return f"{facts.name}: no step has been logged yet"
    total = facts.total_steps
    if total is None:
        return f"{facts.name}: {facts.steps:,} steps logged"
    if facts.steps >= total:
        return f"{facts.name}: finished, {facts.steps:,} steps"
    return f"{facts.name}: step {facts.steps:,} of {total:,} ({facts.steps / total:.0%}), not finished"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Notes</h2><ul class="card notes">{items}</ul>'


def _warnings(facts: RunFacts) -> list[str]:
    """What the log says went wrong."""
    warnings = []
    skipped, unreadable = facts.last("skipped_steps"), facts.last("unreadable")
    if skipped:
        warnings.append(f"{skipped:,.0f} steps were skipped because their gradients were not finite.")
    if unreadable:
        warnings.append(f"{unreadable:,.0f} records could not be read and were skipped.")
    holes = sum(math.isnan(value) for _, value in facts.curve("loss"))
    if holes:
        warnings.append(f"The loss of {holes:,} logged steps is no finite number; the curve has a gap there.")
    return warnings


# -- details and file ------------------------------------------------------------------------------------------------


def _details(facts: RunFacts) -> str:
    parts = []
    if facts.evaluations:
        names = ("accuracy", "accuracy_std", "equal_error_rate", "auc", "cosine_threshold")
        head = "".join(
            f"<th>{words}</th>" for words in ("benchmark", "step", "accuracy", "±", "EER", "AUC", "threshold")
        )
        rows = []
        for each in facts.evaluations:
            values = [each[name] for name in names]
            texts = [f"{v:.2%}" if v is not None else "" for v in values[:3]]
            texts += [f"{v:.4f}" if v is not None else "" for v in values[3:]]
            cells = "".join(f"<td>{text}</td>" for text in [escape(each.benchmark), f"{each.step:,}", *texts])
            rows.append(f"<tr>{cells}</tr>")
        parts.append(
            '<details class="card"><summary>All evaluations</summary><div class="scroll"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    if facts.settings_text:
        parts.append(
            f'<details class="card"><summary>Configuration</summary><pre>{escape(facts.settings_text)}</pre></details>'
        )
    return "<h2>Details</h2>" + "".join(parts) if parts else ""


def _choose_path(run: Path, out: Path | None) -> Path:
    """Where the page goes; an existing file is replaced only by its successor."""
    path = run if out is None else out
    path = path / FILE_NAME if path.is_dir() else path
    if path.is_dir():
        raise InputError(f"{path} is a folder: give another file for the report.")
    if path.exists() and not _is_report(path):
        raise InputError(f"{path} exists and is no report: give another file for the report.")
    return path


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARKER.encode() in file.read(4096)
    except OSError:
        return False


def _write(path: Path, page: str) -> None:
    """The page appears whole or not at all. Halves of characters, which JSON can hold, become question marks."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(page.encode("utf-8", "replace"))
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
