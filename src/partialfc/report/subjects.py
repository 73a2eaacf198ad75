"""What a report is about: runs, results of evaluations, or both of one model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from partialfc.core.console import duration_words
from partialfc.core.errors import InputError
from partialfc.evaluation.run import RESULTS, read_results
from partialfc.evaluation.statistics.figures import Result
from partialfc.training.run.read import RunData, has_run, read_run


@dataclass(frozen=True)
class Subject:
    """A run, results of its model, or results alone.

    Attributes:
        name: on the page.
        path: the folder of the run, or of the results.
        run: None for results alone.
        results: by the name of the benchmark.
        made: how the results were made: date, command, versions, machine and seconds; {} where that is not known.
    """

    name: str
    path: Path
    run: RunData | None = None
    results: dict[str, Result] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    def with_results(self, results: Mapping[str, Result], made: Mapping[str, Any]) -> Subject:
        """With more results of the same model."""
        for name in results:
            if name in self.results:
                raise InputError(f"There are two results of {name} for {self.path}: give one of them.")
        return replace(self, results=self.results | dict(results), made=made)


def read_subjects(paths: Sequence[Path]) -> list[Subject]:
    """The runs and results at `paths`, in this order; results of the model of a run that is given join it.

    Raises:
        InputError: a path holds neither, is given twice, or what is there is damaged or of a newer version.
    """
    given = {path.resolve().parent if path.name == RESULTS else path.resolve() for path in paths}
    if len(given) < len(paths):
        raise InputError("A path is given twice: give each run and each file of results once.")
    subjects = [Subject(str(path), path, read_run(path)) for path in paths if not _has_results(path) or has_run(path)]
    for path in filter(_has_results, paths):
        folder = path.parent if path.is_file() else path
        found = read_results(path)
        for name, (facts, results) in found.items():
            model = Path(str(facts.get("model", path))).resolve()
            places = [
                place for place, one in enumerate(subjects) if one.run and model.is_relative_to(one.path.resolve())
            ]
            if places:
                subjects[places[0]] = subjects[places[0]].with_results(results, facts["made"])
            else:
                own = str(folder if path.name == RESULTS else path)
                subjects.append(Subject(name if len(found) > 1 else own, folder, None, results, facts["made"]))
    return _named(subjects)


def _named(subjects: Sequence[Subject]) -> list[Subject]:
    """With the shortest names that tell them apart: the last part of a path, the path, or the path and its place."""
    choices = [(Path(one.name).resolve().name, one.name, f"{one.name} in {one.path}") for one in subjects]
    counts = Counter(itertools.chain(*map(set, choices)))
    return [
        replace(one, name=next((name for name in names if counts[name] == 1), names[-1]))
        for one, names in zip(subjects, choices, strict=True)
    ]


def _has_results(path: Path) -> bool:
    return path.is_file() or (path / RESULTS).is_file()


def provenance_facts(subject: Subject) -> list[tuple[str, str]]:
    """When, how and on what the run and the evaluation were made, in words; "" for what is not known."""
    starts = subject.run.starts if subject.run else []
    first: Mapping[str, Any] = starts[0] if starts else {}
    steps = [f"{line['step']:,}" for line in starts[1:]]
    made = subject.made
    seconds = made.get("seconds")
    return [
        ("Started", _date(first)),
        ("Continued", f"{len(steps)} times, after step {', '.join(steps)}" if steps else ""),
        ("Command", str(first.get("command", ""))),
        ("Trained on", _machine(first)),
        ("Versions", _versions(first)),
        ("Evaluated", _date(made)),
        ("Command of the evaluation", str(made.get("command", ""))),
        ("Evaluated on", _machine(made)),
        ("Versions of the evaluation", _versions(made)),
        ("Time of the evaluation", duration_words(seconds) if isinstance(seconds, int | float) else ""),
    ]


def _date(facts: Mapping[str, Any]) -> str:
    return str(facts.get("date", "")).replace("T", " ").replace("+00:00", " UTC")


def _machine(facts: Mapping[str, Any]) -> str:
    processes = facts.get("processes", 1)
    count = f"{processes} processes" if processes != 1 else ""
    cores = f"{facts['cores']} cores" if "cores" in facts else ""
    return ", ".join(str(part) for part in (facts.get("gpu"), facts.get("cpu"), cores, count) if part)


def _versions(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in ("partialfc", "torch", "python") if name in facts)
