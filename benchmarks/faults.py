"""The table of faults: each is injected into real training processes, and their end is checked.

    python benchmarks/faults.py --out runs/faults

Results are kept in the folder, and a second call repeats only what is missing or failed. When all rows are done, the
table is written between the markers in docs/results/reliability.md. The exit status is 1 if any injection ended
otherwise than its row says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before NumPy is imported: its threads do not fork

from documents import write_between
from fault_rows import damaged, killed, others, stopped, storage
from fault_rows.bench import Bench, Injection, Outcome, Row
from fault_rows.launch import warm_up
from partialfc.bench.machine import describe
from partialfc.core.console import Progress

ROWS: list[Row] = [*killed.ROWS, *damaged.ROWS, *stopped.ROWS, *storage.ROWS, *others.ROWS]

Done = dict[tuple[str, str], Outcome]


def read_results(path: Path) -> Done:
    """The outcomes of earlier calls; the last one of an injection counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(entry["row"], entry["injection"]): Outcome(**entry["outcome"]) for entry in entries}


def run_one(row: Row, injection: Injection, folder: Path, results: Path) -> Outcome:
    """Inject one fault in a fresh folder, which stays if the run ended otherwise than expected; note the outcome."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        outcome = injection.inject(folder)
    except Exception as error:
        outcome = Outcome(problem=f"{type(error).__name__}: {error}")
    if outcome.problem is None:
        shutil.rmtree(folder)
    with results.open("a") as file:
        file.write(json.dumps({"row": row.key, "injection": injection.name, "outcome": asdict(outcome)}) + "\n")
    return outcome


def table(rows: list[Row], done: Done) -> list[str]:
    """The table in Markdown."""
    lines = ["| fault | injected | outcome | steps done again: mean, most |", "|---|---:|---|---|"]
    for row in rows:
        outcomes = [outcome for (key, _), outcome in done.items() if key == row.key]
        if not outcomes:
            continue
        count = sum(outcome.count for outcome in outcomes)
        failed = sum(outcome.problem is not None for outcome in outcomes)
        lost = [outcome.lost for outcome in outcomes if outcome.lost is not None]
        steps = f"{statistics.mean(lost):.1f}, {max(lost)}" if lost else "–"
        ended = f"**{failed} did otherwise**" if failed else row.outcome
        lines.append(f"| {row.fault} | {count:,} | {ended} | {steps} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="folder of runs and results")
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS], help="only these; no docs are written")
    parser.add_argument("--short", action="store_true", help="a few injections of each row; no docs are written")
    options = parser.parse_args(arguments)
    warm_up()
    rows = [row for row in ROWS if options.rows is None or row.key in options.rows]
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results, bench = out / "results.jsonl", Bench(out)
    planned = [(row, injection) for row in rows for injection in row.injections(bench, options.short)]
    earlier = read_results(results)
    done: Done = {}
    with Progress("injecting", len(planned), unit="fault") as progress:
        for number, (row, injection) in enumerate(planned):
            outcome = earlier.get((row.key, injection.name))
            if outcome is None or outcome.problem is not None:
                started = time.monotonic()
                outcome = run_one(row, injection, out / "work" / f"{row.key}-{number}", results)
                if outcome.problem is not None:
                    print(f"{row.key}, {injection.name}: {outcome.problem}", file=sys.stderr)
                elif time.monotonic() - started > 30:
                    print(f"{row.key}, {injection.name}: took {time.monotonic() - started:.0f} s", file=sys.stderr)
            done[row.key, injection.name] = outcome
            progress.update(number + 1)
    lines = table(rows, done)
    print("\n".join(lines))
    if options.rows is None and not options.short:
        machine = describe("cpu")
        words = f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}."
        write_between("results/reliability.md", "benchmarks/faults.py", [*lines, "", words])
    return int(any(outcome.problem is not None for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
