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
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from sets import DATA, ON_A_CPU, ON_A_GPU, Prepared, Values

from partialfc.bench.machine import describe
from partialfc.config.options import OutputConfig, TrainConfig
from partialfc.core.console import counted, duration_words, say
from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.data.sources.derived import locked
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, open_benchmarks
from partialfc.model.files import load_model
from partialfc.pages.axes import linear_axis, number_format
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "studies" / "results", ROOT / "docs" / "studies"
RULE = """
Figures are mean ± standard deviation over the seeds, in per cent unless counted. A seed decides where the
network and the centers start, the order of the images and the sampled classes; the set, its damage and the
test are the same for all. A difference is paired by seed. Its interval is Student's at 97.5 %, because
what three seeds do not resolve is looked at again with five: both looks together err in 5 % at most. A
claim counts as confirmed if the whole interval lies on its side, as not confirmed if all of it lies on
the other, which speaks against it, and as not resolvable if it lies across.

The network is the demo's (1.08 million parameters) unless another is named. It is trained as the demo
is, in batches of 128 by AdamW, with CosFace at scale 24 and margin 0.2; the paper trains larger networks
by SGD at scale 64 and margin 0.4.
"""
NOT_DONE = 75
COLORS = {"confirmed": "#2a9d5c", "not confirmed": "#d1495b", "not resolvable": "#8a8a8a"}
# Two-sided 97.5 % quantiles of Student's t by degrees of freedom.
_T = {1: 25.452, 2: 6.205, 3: 4.177, 4: 3.495, 5: 3.163, 6: 2.969, 7: 2.841, 8: 2.752, 9: 2.685}
MOST_SEEDS = 1 + max(_T)


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        values: of the configuration that it changes.
        damage: arguments of `corrupt` for the training set.
    """

    values: Values
    damage: Values | None = None


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
        claims: for every data set.
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
    anew: bool = False,
) -> int:
    """Train and measure what is missing. Returns an exit status.

    Arms that a claim needs come first, and all of a seed before the next seed, so that a verdict comes early. Runs of
    two studies that are alike are trained once. Another process may run another data set of the study at the same time.

    Args:
        only, arms: the data sets, and the arms; all arms if none is named.
        seeds: how many; those of the study by default.
        anew: replace results of another set or setting.

    Raises:
        InputError: such results are there and `anew` was not given.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    prepared = {
        data: make(work / "small" / data if small else work / data, small)
        for data, make in study.data.items()
        if data in only
    }
    claimed = {arm for claim in study.claims for arm in (claim.better, claim.than)}
    numbers = range(1 if small else seeds or study.seeds)
    keys = [(data, arm, seed) for data in prepared for seed in numbers for arm in arms or study.arms]
    keys.sort(key=lambda key: key[1] not in claimed)
    epochs = 0.5 if small else study.epochs
    configs = {key: _config(prepared[key[0]], study.arms[key[1]], key[2], epochs) for key in keys}
    settings = {key: _setting(configs[key], prepared[key[0]]) for key in keys}
    done = {_key(row): row["setting"] for row in _content(study, results)["runs"]}
    other = [key for key in keys if done.get(key, settings[key]) != settings[key]]
    if other and not anew:
        raise InputError(
            f"{results} has {counted(len(other), 'run')} on another set or in another setting "
            f"({', '.join(map(str, other[0]))}): move the file away, or replace them with --anew."
        )
    todo = [key for key in keys if done.get(key) != settings[key]]
    started, durations = time.monotonic(), []
    for number, key in enumerate(todo):
        if time.monotonic() - started > 60 * minutes:
            say(f"{counted(len(todo) - number, 'run')} of {study.name} left: run it again")
            return NOT_DONE
        began = time.monotonic()
        data, arm, seed = key
        # What is kept decides no result, but which checkpoints can be measured.
        folder = work / "runs" / f"{settings[key]}-{configs[key].output.keep}"
        row = _row(study, prepared[data], arm, configs[key], folder)
        durations.append(time.monotonic() - began)
        with locked(results.parent):
            content = _content(study, results)
            content["facts"][data] = prepared[data].facts
            content["runs"] = [other for other in content["runs"] if _key(other) != key]
            content["runs"].append({"data": data, "arm": arm, "seed": seed, "setting": settings[key], **row})
            write_file(results, json.dumps(content, indent=1) + "\n")
        left = statistics.mean(durations) * (len(todo) - number - 1)
        shown = ", ".join(f"{name} {row['figures'][name]:.3f}" for name in study.figures if name in row["figures"])
        say(f"{data}, {arm}, seed {seed}: {shown}; {len(todo) - number - 1} runs and {duration_words(left)} left")
    return 0


def _key(row: Row) -> tuple[str, str, int]:
    return row["data"], row["arm"], row["seed"]


def _content(study: Study, results: Path) -> dict[str, Any]:
    """Of the file of results, or of an empty one."""
    if not results.exists():
        return {"schema_version": 1, "study": study.name, "facts": {}, "runs": []}
    content: dict[str, Any] = json.loads(results.read_text())
    return content


def _config(prepared: Prepared, arm: Arm, seed: int, epochs: float) -> TrainConfig:
    epochs *= prepared.length
    overlay = {} if arm.damage is None else {"data.overlay": str(prepared.damaged(arm.damage) / "data.overlay")}
    schedule = {"schedule.epochs": epochs, "schedule.warmup_epochs": epochs / 15}
    return prepared.config.with_values({**schedule, **overlay, **arm.values, "seed": seed})


def _setting(config: TrainConfig, prepared: Prepared) -> str:
    """A name for all that decides a result: the configuration, without places and output, and the bytes of the data."""
    overlay = b"" if config.data.overlay is None else Path(config.data.overlay).read_bytes()
    placeless = replace(config, data=replace(config.data, path="", overlay=None), output=OutputConfig())
    return hashlib.blake2b(f"{placeless}{prepared.digest}".encode() + overlay, digest_size=8).hexdigest()


def _row(study: Study, prepared: Prepared, arm: str, config: TrainConfig, folder: Path) -> Row:
    """The figures of one run."""
    path = folder / "row.json"
    if not path.exists():
        write_file(path, json.dumps(_train(config, prepared, folder)))
    row: Row = json.loads(path.read_text())
    return row | {"figures": row["figures"] | study.measure(folder, prepared, study.arms[arm])}


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
    # The log has all starts of a run, the result the last one.
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    seconds = sum(config.output.log_every * config.data.global_batch_size / line["images_per_second"] for line in lines)
    return {"figures": figures, "steps": result.steps, "seconds": seconds, "machine": machine}


# -- the page ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The arms of a claim, paired by seed, in points.

    Attributes:
        seeds: that both arms have; three at least for a verdict.
        least: what the claim says that the difference is above.
        mean, half: the difference, and half of its interval.
    """

    seeds: int
    least: float
    mean: float = math.nan
    half: float = math.nan

    @property
    def difference(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}" if self.seeds >= 3 else "–"

    @property
    def verdict(self) -> str:
        if self.seeds < 3:
            return "not run in full" if self.seeds else "not run"
        if abs(self.mean - self.least) <= self.half:
            return "not resolvable"
        return "confirmed" if self.mean > self.least else "not confirmed"


def compare(rows: Sequence[Row], data: str, claim: Claim) -> Comparison:
    """The difference of the arms of a claim on a data set."""
    sides = [
        {row["seed"]: row["figures"][claim.figure] for row in rows if (row["data"], row["arm"]) == (data, arm)}
        for arm in (claim.better, claim.than)
    ]
    differences = [100 * (sides[0][seed] - sides[1][seed]) for seed in sides[0].keys() & sides[1].keys()]
    if (seeds := len(differences)) < 3:
        return Comparison(seeds, 100 * claim.by)
    half = _T[seeds - 1] * statistics.stdev(differences) / math.sqrt(seeds)
    return Comparison(seeds, 100 * claim.by, statistics.mean(differences), half)


def page(study: Study, results: Path, folder: Path) -> None:
    """Write the page and its plots from the results."""
    content = json.loads(results.read_text())
    rows: list[Row] = content["runs"]
    lines = [f"# {study.title}", "", f"Written by `python studies/{study.name}.py page` from the results.", ""]
    lines += ["## Plan", "", *_paragraphs(study.plan), *_paragraphs(RULE)]
    lines += ["## Reading", "", *_paragraphs(study.reading)] * bool(study.reading)
    lines += [f"![The claims: differences with intervals]({study.name}.svg)", ""]
    folder.mkdir(parents=True, exist_ok=True)
    for data in study.data:
        own = [row for row in rows if row["data"] == data]
        if not own:
            why = "Not run: it needs a GPU." if data == ON_A_GPU else "Not run."
            lines += [f"## {data.capitalize()}", "", why, ""]
            continue
        hours = sum(row["seconds"] for row in own) / 3600
        machines = "; ".join(sorted({row["machine"] for row in own}))
        about = (
            f"{content['facts'][data]} {len(own)} runs of {own[0]['steps']:,} steps, {hours:.1f} hours ({machines})."
        )
        lines += [f"## {data.capitalize()}", "", *textwrap.wrap(about, 100)]
        lines += ["", *_table(study, own), "", *_verdicts(study, own, data), ""]
    (folder / f"{study.name}.svg").write_text(_plot(study, rows), encoding="utf-8")
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
    lines = ["| claim | measured in | seeds | difference, points | verdict |", "|---|---|---|---|---|"]
    for claim in study.claims:
        found = compare(rows, data, claim)
        cells = claim.text, study.figures[claim.figure], str(found.seeds), found.difference, found.verdict
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plot(study: Study, rows: Sequence[Row]) -> str:
    """The claims, with a row for each data set: the difference, its interval, and a tick that it should be above."""
    found = {(claim.text, data): compare(rows, data, claim) for claim in study.claims for data in study.data}
    shown = {key: one for key, one in found.items() if one.seeds >= 3}
    ends = [end for one in shown.values() for end in (one.mean - one.half, one.least, one.mean + one.half)]
    axis = linear_axis(min([0.0, *ends]), max([1.0, *ends]), 130, 620)
    parts, y, last = [], 0, ""
    for (text, data), one in shown.items():
        y += 22 if text == last else 46
        if text != last:
            parts.append(f'<text x="10" y="{y - 18}">{escape(text)}</text>')
        last = text
        left, middle, right, least = map(axis.place, (one.mean - one.half, one.mean, one.mean + one.half, one.least))
        color = COLORS[one.verdict]
        parts.append(f'<text x="118" y="{y + 4}" text-anchor="end">{escape(data)}</text>')
        parts.append(f'<path d="M{least:.1f} {y - 8}v16" stroke="#808080"/>')
        parts.append(f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{middle:.1f}" cy="{y}" r="4" fill="{color}"/>')
    bottom = y + 16
    words = number_format(axis.ticks[1] - axis.ticks[0])
    for tick in axis.ticks:
        x = axis.place(tick)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{words(tick)}</text>')
    parts.append(f'<text x="375" y="{bottom + 34}" text-anchor="middle">difference in points (hundredths)</text>')
    for number, (verdict, color) in enumerate(COLORS.items()):
        x = 130 + 150 * number
        parts.append(f'<circle cx="{x}" cy="{bottom + 50}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 10}" y="{bottom + 54}">{verdict}</text>')
    style = "text{font:12px sans-serif;fill:#808080}"
    size = f'viewBox="0 0 640 {bottom + 62}" width="640" role="img" aria-label="{escape(study.title)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.title)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and measure what is missing; exit status 75 if time ran out")
    command.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    command.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    command.add_argument(
        "--data", nargs="+", choices=study.data, default=[data for data in study.data if data in ON_A_CPU]
    )
    command.add_argument("--arms", nargs="+", choices=study.arms, default=[], metavar="NAME", help="all by default")
    command.add_argument("--seeds", type=int, help=f"of each arm; {study.seeds} by default")
    command.add_argument("--anew", action="store_true", help="replace results of another set or setting")
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
        chosen = {"only": options.data, "arms": options.arms, "seeds": options.seeds, "anew": options.anew}
        status = run(study, options.work, results, small=options.small, minutes=options.minutes, **chosen)
        if options.small:
            page(study, results, options.work)
        sys.exit(status)
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
