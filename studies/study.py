"""The frame of a study: runs of every arm, data set and seed, their figures, and a page with a verdict on each claim.

A study says before its first run what is varied and what would count as confirmed. `run` trains what is missing and
goes on where it was interrupted; `page` writes docs/studies from the results alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from sets import DATA, ON_A_CPU, ON_A_GPU, Prepared, Values

from partialfc.bench.machine import describe
from partialfc.config.options import TrainConfig
from partialfc.core.console import counted, duration_words, say
from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.data.sources.derived import locked
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, open_benchmarks
from partialfc.model.files import load_model
from partialfc.pages.axes import Axis, linear_axis, number_format
from partialfc.training.loop import train

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "studies" / "results", ROOT / "docs" / "studies"
RULE = """
Figures are mean ± standard deviation over the seeds, in per cent unless counted. A difference is paired by seed and
has its 95 % interval (Student's t). A claim counts as confirmed if the whole interval lies on its
side, as not confirmed if it lies on the other, and as not resolvable otherwise; its arms are then due
five seeds, which not all have had yet.
"""
NOT_DONE = 75
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MOST_SEEDS = 1 + max(_T95)


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        values: of the configuration that it changes.
        damage: arguments of `corrupt` for the training set.
        length: of a run of it, as a multiple of the epochs of the study.
    """

    values: Values
    damage: Values | None = None
    length: float = 1.0


@dataclass(frozen=True)
class Claim:
    """A sentence that the study tests: in `figure`, arm `better` is above arm `than` by more than `by`.

    A negative `by` is a margin: "loses nothing" means "is not below by as much as that".
    """

    text: str
    better: str
    than: str
    figure: str
    by: float = 0.0


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name, title: of files, and of the page.
        plan: paragraphs of Markdown, written before the first run: what is varied, and what would count.
        arms: by name, in the order of the table.
        figures: the columns of the table: the name of a figure, and its heading.
        claims: for every data set; the figure of the first is plotted.
        seeds: of each arm.
        counts: the figures that are numbers, not shares.
        epochs: of a run; 0.5 of a toy.
        measure: figures beside those of the benchmarks, from the folder of a run.
        beside: cells of further columns for an arm, by heading, from other results.
        data: the sets, as `sets.DATA`.
        reading: paragraphs of Markdown on what the figures mean, written after them.
    """

    name: str
    title: str
    plan: str
    arms: Mapping[str, Arm]
    figures: Mapping[str, str]
    claims: Sequence[Claim]
    counts: frozenset[str] = frozenset()
    seeds: int = 3
    epochs: float = 10
    measure: Callable[[Path, Prepared, Arm], dict[str, float]] = lambda run, prepared, arm: {}
    beside: Callable[[str], Mapping[str, str]] = lambda arm: {}
    data: Mapping[str, Callable[[Path, bool], Prepared]] = field(default_factory=lambda: DATA)
    reading: str = ""


Row = dict[str, Any]


def run(
    study: Study,
    work: Path,
    results: Path,
    *,
    small: bool,
    minutes: float,
    only: Sequence[str],
    arms: Sequence[str] = (),
    seeds: int | None = None,
) -> int:
    """Train and measure what is missing. Returns an exit status.

    Arms that a claim needs come first, and all of a seed before the next seed, so that a verdict comes early. Runs of
    two studies that are alike are trained once. Another process may run another data set of the study at the same time.

    Args:
        only, arms: the data sets, and the arms; all arms if none is named.
        seeds: how many; those of the study by default.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["data"], row["arm"], row["seed"]) for row in _content(study, results)["runs"]}
    numbers = range(1 if small else seeds or study.seeds)
    claimed = {arm for claim in study.claims for arm in (claim.better, claim.than)}
    todo = [
        key
        for data in study.data
        if data in only
        for seed in numbers
        for arm in arms or study.arms
        if (key := (data, arm, seed)) not in done
    ]
    todo.sort(key=lambda key: key[1] not in claimed)
    prepared: dict[str, Prepared] = {}
    started, durations = time.monotonic(), []
    for number, (data, name, seed) in enumerate(todo):
        if time.monotonic() - started > 60 * minutes:
            return NOT_DONE
        if data not in prepared:
            prepared[data] = study.data[data](work / data, small)
        began = time.monotonic()
        row = _row(study, prepared[data], name, seed, work / "runs", 0.5 if small else study.epochs)
        durations.append(time.monotonic() - began)
        with locked(results.parent):  # another data set may run beside this one
            content = _content(study, results)
            content["facts"].setdefault(data, prepared[data].facts)
            content["runs"].append({"data": data, "arm": name, "seed": seed, **row})
            write_file(results, json.dumps(content, indent=1) + "\n")
        left = statistics.mean(durations) * (len(todo) - number - 1)
        shown = ", ".join(f"{key} {row['figures'][key]:.3f}" for key in study.figures if key in row["figures"])
        say(f"{data}, {name}, seed {seed}: {shown}; {len(todo) - number - 1} runs and {duration_words(left)} left")
    return 0


def _content(study: Study, results: Path) -> dict[str, Any]:
    """Of the file of results, or of an empty one."""
    if not results.exists():
        return {"schema_version": 1, "study": study.name, "facts": {}, "runs": []}
    content: dict[str, Any] = json.loads(results.read_text())
    return content


def _row(study: Study, prepared: Prepared, name: str, seed: int, runs: Path, epochs: float) -> Row:
    """The figures of one run, in a folder that is named after all that decides it."""
    arm = study.arms[name]
    epochs *= prepared.length * arm.length
    overlay = {} if arm.damage is None else {"data.overlay": str(prepared.damaged(arm.damage) / "data.overlay")}
    schedule = {"schedule.epochs": epochs, "schedule.warmup_epochs": epochs / 15}
    config = prepared.config.with_values({**schedule, **overlay, **arm.values, "seed": seed})
    folder = runs / hashlib.blake2b(repr(config).encode(), digest_size=8).hexdigest()
    path = folder / "row.json"
    if not path.exists():
        write_file(path, json.dumps(_train(config, prepared, folder)))
    row: Row = json.loads(path.read_text())
    return row | {"figures": row["figures"] | study.measure(folder, prepared, arm)}


def _train(config: TrainConfig, prepared: Prepared, folder: Path) -> Row:
    """Train one run, or go on with it, and evaluate it."""
    result = train(config, folder, resume=True, quiet=True)
    model = load_model(folder)
    benchmarks = open_benchmarks(prepared.benchmarks, model.config.image_size)
    with tempfile.TemporaryDirectory() as temporary:
        features = embed_benchmarks(model, benchmarks, Path(temporary) / "features.npy", quiet=True, workers=0)
    figures = {
        f"{benchmark} {figure}": value.value
        for benchmark, content in benchmarks.items()
        for figure, value in evaluate_features(benchmark, content, features[benchmark]).figures.items()
        if figure in ("accuracy", "rank-1") and value.value is not None
    }
    hardware = describe("cpu")
    machine = f"{hardware['cpu']}, torch {hardware['torch']}, {config.precision}"
    return {"figures": figures, "steps": result.steps, "seconds": result.seconds, "machine": machine}


# -- the page ----------------------------------------------------------------------------------------------------------


def compare(rows: Sequence[Row], data: str, claim: Claim) -> tuple[str, str]:
    """The difference of a claim's arms, paired by seed, as words; and the verdict."""
    sides = [
        {row["seed"]: row["figures"][claim.figure] for row in rows if (row["data"], row["arm"]) == (data, arm)}
        for arm in (claim.better, claim.than)
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if len(seeds) < 3:
        return counted(len(seeds), "seed"), "not run in full"
    differences = [100 * (sides[0][seed] - sides[1][seed]) for seed in seeds]
    mean = statistics.mean(differences)
    half = _T95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
    least = 100 * claim.by
    verdict = "confirmed" if mean - half > least else "not confirmed" if mean + half < least else "not resolvable"
    return f"{mean:+.1f} ± {half:.1f}", verdict


def page(study: Study, results: Path, folder: Path) -> None:
    """Write the page and its plots from the results."""
    content = json.loads(results.read_text())
    rows: list[Row] = content["runs"]
    lines = [f"# {study.title}", "", f"Written by `python studies/{study.name}.py page` from the results.", ""]
    lines += ["## Plan", "", *_paragraphs(study.plan), *_paragraphs(RULE)]
    lines += ["## Reading", "", *_paragraphs(study.reading)] * bool(study.reading)
    folder.mkdir(parents=True, exist_ok=True)
    for data in study.data:
        own = [row for row in rows if row["data"] == data]
        if not own:
            why = "Not run: it needs a GPU." if data == ON_A_GPU else "Not run."
            lines += [f"## {data.capitalize()}", "", why, ""]
            continue
        hours = sum(row["seconds"] for row in own) / 3600
        machines = "; ".join(sorted({row["machine"] for row in own}))
        about = f"{content['facts'][data]} {len(own)} runs, {hours:.1f} hours ({machines})."
        lines += [f"## {data.capitalize()}", "", *textwrap.wrap(about, 100)]
        lines += ["", *_table(study, own), "", *_verdicts(study, own, data), ""]
        figure = study.claims[0].figure
        plot = folder / f"{study.name}-{data}.svg"
        plot.write_text(_plot(study, own, figure), encoding="utf-8")
        lines += [f"![{study.figures[figure]} of each arm, {data}]({plot.name})", ""]
    (folder / f"{study.name}.md").write_text("\n".join(lines), encoding="utf-8")


def _paragraphs(text: str) -> list[str]:
    """Paragraphs in lines that fit the documents, with a blank line behind each."""
    parts = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return [line for part in parts for line in (*textwrap.wrap(part, 100, break_on_hyphens=False), "")]


def _table(study: Study, rows: Sequence[Row]) -> list[str]:
    headings = [*study.figures.values(), *study.beside(next(iter(study.arms)))]
    lines = [f"| arm | seeds | {' | '.join(headings)} |", "|---|---|" + "---|" * len(headings)]
    for arm in study.arms:
        own = [row["figures"] for row in rows if row["arm"] == arm]
        if own:
            cells = [
                _mean([figures[name] for figures in own if name in figures], 1 if name in study.counts else 100)
                for name in study.figures
            ]
            lines.append(f"| {arm} | {len(own)} | {' | '.join([*cells, *study.beside(arm).values()])} |")
    return lines


def _mean(values: Sequence[float], scale: int) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{spread}"


def _verdicts(study: Study, rows: Sequence[Row], data: str) -> list[str]:
    lines = ["| claim | measured in | difference, points | verdict |", "|---|---|---|---|"]
    for claim in study.claims:
        difference, verdict = compare(rows, data, claim)
        lines.append(f"| {claim.text} | {study.figures[claim.figure]} | {difference} | {verdict} |")
    return lines


def _plot(study: Study, rows: Sequence[Row], figure: str) -> str:
    """Mean and range of one figure for each arm, an arm a row."""
    arms = {arm: [100 * row["figures"][figure] for row in rows if row["arm"] == arm] for arm in study.arms}
    arms = {arm: values for arm, values in arms.items() if values}
    every = [value for values in arms.values() for value in values]
    axis = linear_axis(min(every), max(every), 190, 620)
    bottom = 20 + 26 * len(arms)
    parts = [_ticks(axis, bottom)]
    for number, (arm, values) in enumerate(arms.items()):
        y = 24 + 26 * number
        parts.append(f'<text x="180" y="{y + 4}" text-anchor="end">{escape(arm)}</text>')
        ends = axis.place(min(values)), axis.place(max(values))
        parts.append(f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}" stroke-width="2"/>')
        parts += [f'<circle cx="{axis.place(value):.1f}" cy="{y}" r="2" opacity="0.5"/>' for value in values]
        parts.append(f'<circle cx="{axis.place(statistics.mean(values)):.1f}" cy="{y}" r="4"/>')
    label = f"{study.figures[figure]} in per cent: mean and range over seeds"
    parts.append(f'<text x="405" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>')
    style = "text{font:12px sans-serif;fill:#808080}line{stroke:#3b7dd8}circle{fill:#3b7dd8}.grid{stroke:#80808055}"
    size = f'viewBox="0 0 640 {bottom + 42}" width="640" role="img" aria-label="{escape(label)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def _ticks(axis: Axis, bottom: int) -> str:
    words = number_format(axis.ticks[1] - axis.ticks[0])
    return "".join(
        f'<line class="grid" x1="{axis.place(tick):.1f}" x2="{axis.place(tick):.1f}" y1="10" y2="{bottom}"/>'
        f'<text x="{axis.place(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{words(tick)}</text>'
        for tick in axis.ticks
    )


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.title)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and measure what is missing; exit status 75 if time ran out")
    command.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    command.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    command.add_argument("--data", nargs="+", choices=DATA, default=ON_A_CPU)
    command.add_argument("--arms", nargs="+", choices=study.arms, default=[], metavar="NAME", help="all by default")
    command.add_argument("--seeds", type=int, help=f"of each arm; {study.seeds} by default")
    command.add_argument("--small", action="store_true", help="one seed of a toy; results stay in the folder")
    commands.add_parser("page", help="write docs/studies from the results")
    options = parser.parse_args()
    results = RESULTS / f"{study.name}.json"
    try:
        if options.command == "page":
            if not results.exists():
                raise InputError(f"{results} is not there: `run` the study first.")
            page(study, results, PAGES)
            return
        if options.small:
            results = options.work / f"{study.name}.json"
        options.work.mkdir(parents=True, exist_ok=True)
        if options.seeds is not None and not 1 <= options.seeds <= MOST_SEEDS:
            raise InputError(f"--seeds {options.seeds}: give a number from 1 to {MOST_SEEDS}.")
        limits = {"minutes": options.minutes, "only": options.data, "arms": options.arms, "seeds": options.seeds}
        status = run(study, options.work, results, small=options.small, **limits)
        if options.small:
            page(study, results, options.work)
        sys.exit(status)
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
