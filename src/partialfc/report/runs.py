"""The runs below a folder: how far each is, how good, and in what its configuration differs from the others."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partialfc.config.options import flatten
from partialfc.core.errors import InputError
from partialfc.training.run.read import RunData, RunFolder, as_number, read_run

_QUIET = 120.0  # seconds without a line in the log after which a run of unknown speed counts as stopped


def list_runs(root: Path) -> list[dict[str, Any]]:
    """The runs in `root` and below, by name.

    Returns:
        For each: "run" (path below `root`), "state" ("finished", "running", "stopped", "not begun" or "unreadable"),
        "step" and "steps" (done, and planned or None), "accuracy" (the mean over the benchmarks at the best step, in
        [0, 1], or None), "benchmarks", "changed" (settings that most of the runs have otherwise, by dotted key), "age"
        (seconds since it last logged) and, of an unreadable one, "reason".

    Raises:
        InputError: `root` is no folder.
    """
    if not root.is_dir():
        raise InputError(f"There is no folder {root}: give one with runs in it or below.")
    found: dict[Path, RunData | str] = {}
    for folder in _folders(root):
        try:
            found[folder] = read_run(folder)
        except InputError as error:
            found[folder] = str(error)
    settings = {folder: flatten(run.settings) for folder, run in found.items() if isinstance(run, RunData)}
    changed = dict(zip(settings, changed_settings(list(settings.values())), strict=True))
    rows: list[dict[str, Any]] = []
    for folder, run in found.items():
        age = round(time.time() - _last_change(folder), 1)
        row = {"run": os.path.relpath(folder, root), "age": age}
        if isinstance(run, str):
            rows.append(row | {"state": "unreadable", "reason": run})
        else:
            rows.append(row | _progress(run, age) | {"changed": changed[folder]})
    return rows


def changed_settings(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of each run, by dotted key, that most of the runs have otherwise, or of several the first."""
    texts = {key: [str(one.get(key)) for one in settings] for one in settings for key in one}
    usual = {key: Counter(values).most_common(1)[0][0] for key, values in texts.items()}
    return [{key: value for key, value in sorted(one.items()) if str(value) != usual[key]} for one in settings]


def _folders(root: Path) -> Iterator[Path]:
    """The folders with a run, by name; what lies within a run is its own."""
    for folder, below, files in os.walk(root):
        if "metrics.jsonl" in files or ("config.yaml" in files and "checkpoints" in below):
            below.clear()
            yield Path(folder)
        below.sort()


def _last_change(folder: Path) -> float:
    paths = (RunFolder(folder).metrics, RunFolder(folder).config, folder)
    return next(path.stat().st_mtime for path in paths if path.exists())


def _progress(run: RunData, age: float) -> dict[str, Any]:
    done, total = run.steps, run.total_steps
    if total is not None and done >= total:
        state = "finished"
    elif age < max(_QUIET, 3 * _seconds_between_lines(run)):
        state = "running"
    else:
        state = "stopped" if done else "not begun"
    best = [one["accuracy"] or 0.0 for one in run.evaluations if one.step == run.best_step]
    return {
        "state": state,
        "step": done,
        "steps": total,
        "accuracy": sum(best) / len(best) if best else None,
        "benchmarks": run.benchmarks,
    }


def _seconds_between_lines(run: RunData) -> float:
    if len(run.lines) < 2 or not run.batch:
        return 0.0
    speed = as_number(run.lines[-1].get("images_per_second"))
    return (run.lines[-1]["step"] - run.lines[-2]["step"]) * run.batch / speed if speed else 0.0
