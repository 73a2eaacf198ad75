"""All studies: at toy size, to see that they run; and their pages with an index.

python studies/all.py small --work runs/studies-small
python studies/all.py pages
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import conflicts
import cost
import flips
import longer
import natural
import networks
import rates
import tails
from sets import DATA, ON_A_CPU, ON_A_GPU
from study import PAGES, RESULTS, ROOT, Row, Study, compare, page, run

from partialfc.core.console import say
from partialfc.core.errors import InputError

STUDIES = (rates.STUDY, longer.STUDY, conflicts.STUDY, natural.STUDY, flips.STUDY, tails.STUDY, networks.STUDY)

README = ROOT / "README.md"
BEGIN, END = "<!-- studies/all.py begin -->", "<!-- studies/all.py end -->"
HEAD = r"""
# Studies: the claims of the paper, tested

Each study says what is varied and what would count as confirmed; this is written before its first
run, and what was added later says so. Programs, results and pages are in the repository, and anyone
can repeat them on two cores. The data are characters in fonts (`examples/characters`), real images
with real conflicts, and [procedural faces](../procedural-faces.md), where everything is under
control. The network is small, and so are the sets.

*All classes* is the usual softmax. *PFC 0.1* is Partial FC with a tenth of the classes in a step,
and *PFC\** also leaves out negatives whose cosine is above 0.4. *Rank-1* is that of people or
characters that the training has not seen.

A cell below is a verdict and what it rests on: the difference of two heads in points of rank-1, or
of what the claim names, over three or five seeds, with an interval. **Confirmed**: the whole
interval lies on the side of the claim. **Not confirmed**: all of it lies on the other, so that the
claim is false here. **Not resolvable**: it lies across.
"""
IN_SHORT = """
- **Cost**: from 100,000 identities on, a step of the head with a tenth of the classes takes a
  third of the time of all classes or less, and less memory.
- **Conflicts that were made**: on characters PFC is 8 points of rank-1 better than all classes,
  and PFC* 17. On faces, with three images a label, all classes are better by 4.
- **Conflicts as they come**, one shape under two labels in Unicode: PFC keeps the two centers
  closer than all classes do, and hardly any others; PFC* keeps all look-alikes closer.
- **Sample rates**: with 15,000 characters a rate of 0.3 loses less than a point of rank-1. With
  3,000 faces every rate below 1 loses more, also in a training three times as long. The paper's
  sets have 200,000 identities and more, so this says little about them.
- **Wrong labels**: undecided, but for one case in which all classes are better than PFC.
- **CNN and ViT**: they agree, in the gains on characters with cut identities and in the losses
  elsewhere.
- **Long tails**: all classes are better than a tenth of them. Nearly every rare training image
  finds its own center as it is, so there is little to protect.
"""
NO_GPU = f"""
The same programs run with 100,000 procedural identities and an IResNet-50 on a GPU
(`--data {ON_A_GPU}`). That has not been done.
"""


def _rows(study: Study, results: Path) -> list[Row]:
    path = results / f"{study.name}.json"
    rows: list[Row] = json.loads(path.read_text())["runs"] if path.exists() else []
    return rows


def _shown(studies: Sequence[Study], results: Path) -> list[str]:
    """The data sets with a column: what needs a GPU has one if it has run."""
    ran = {row["data"] for study in studies for row in _rows(study, results)}
    return [data for data in DATA if data in ran or data in ON_A_CPU]


def index(studies: Sequence[Study], results: Path) -> str:
    """The page with all claims and verdicts."""
    shown = _shown(studies, results)
    lines = [*HEAD.strip().splitlines(), "", "In short:", "", *IN_SHORT.strip().splitlines(), ""]
    lines += [*([] if ON_A_GPU in shown else [*NO_GPU.strip().splitlines(), ""])]
    for study in studies:
        rows = _rows(study, results)
        lines += [f"## [{study.title}]({study.name}.md)" if rows else f"## {study.title}", ""]
        lines += [f"| claim | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
        for claim in study.claims:
            cells = []
            for data in shown:
                found = compare(rows, data, claim)
                shown_verdict = found.verdict if found.difference == "–" else f"{found.verdict} ({found.difference})"
                cells.append(shown_verdict if data in study.data else "–")
            lines.append(f"| {claim.text} | {' | '.join(cells)} |")
        lines.append("")
        lines += [f"![{study.title}]({study.name}.svg)", ""] * bool(rows)
    measured = json.loads((results / "cost.json").read_text())["rows"] if (results / "cost.json").exists() else []
    lines += [f"## [{cost.TITLE}](cost.md)" if measured else f"## {cost.TITLE}", ""]
    lines += [
        f"A tenth of the classes takes a third of the time or less, and less memory: {cost.verdict(measured)}.",
        "",
    ]
    lines += ["![Images a second against identities](cost.svg)", ""] * bool(measured)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("small", help="one seed of each study as a toy")
    small.add_argument("--work", type=Path, required=True, help="folder of data, runs and pages")
    small.add_argument("--data", nargs="+", choices=DATA, default=ON_A_CPU)
    commands.add_parser("pages", help="write docs/studies from the results")
    options = parser.parse_args()
    status = 0
    if options.command == "pages":
        results, pages = RESULTS, PAGES
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        README.write_text(f"{before}{BEGIN}{IN_SHORT}{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        results = pages = options.work
        for study in STUDIES:
            path = results / f"{study.name}.json"
            status = max(status, run(study, options.work, path, small=True, minutes=15, only=options.data))
        cost.run(results / "cost.json", cost.CLASSES[:1])
    for study in STUDIES:
        if (results / f"{study.name}.json").exists():
            page(study, results / f"{study.name}.json", pages)
    pages.mkdir(parents=True, exist_ok=True)
    if (results / "cost.json").exists():
        cost.page(results / "cost.json", pages)
    (pages / "index.md").write_text(index(STUDIES, results), encoding="utf-8")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
