"""From an empty environment to a decision on two pictures: each command, with its time.

    python benchmarks/first_decision.py DEMO [--write]

DEMO is the folder of `partialfc demo`, which docs/demo.md times. Everything else is done here: a new environment, the
installation from this checkout, thresholds for the demo's model, two pictures, and `verify`. --write puts the table
into docs/use.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from documents import DOCS, paragraph, write_between
from partialfc.bench.machine import describe

CHECKOUT = DOCS.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--write", action="store_true", help="write the table into docs/use.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        shutil.copytree(options.demo / "run" / "model" / "best", model)
        (model / "thresholds.json").unlink(missing_ok=True)
        python, partialfc = folder / "env" / "bin" / "python", folder / "env" / "bin" / "partialfc"
        pip, people = [python, "-m", "pip", "install", "-q"], folder / "people"
        few = ["--identities", "8", "--shots", "2", "--pairs", "20", "--image-size", "64"]
        commands = {
            "python -m venv env": [sys.executable, "-m", "venv", folder / "env"],
            "pip install": [*pip, "-c", CHECKOUT / "constraints.txt", f"{CHECKOUT}[cpu]"],
            "partialfc evaluate RUN --benchmark pairs.bin --write-thresholds": [
                *(partialfc, "evaluate", model, "--write-thresholds"),
                *("--benchmark", f"pairs={options.demo / 'data' / 'pairs.bin'}"),
            ],
            "two pictures: partialfc data faces": [
                *(partialfc, "data", "faces", "--out", people, "--layout", "folder", *few)
            ],
            "partialfc verify RUN a.jpg b.jpg --force": [partialfc, "verify", model],
        }
        lines = ["| command | seconds |", "|---|---|"]
        for name, command in commands.items():
            if "verify" in name:
                command = [*command, *sorted(people.rglob("*.jpg"))[:2], "--force"]
            started = time.monotonic()
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder)
            lines.append(f"| `{name}` | {time.monotonic() - started:.0f} |")
            if done.returncode > ("verify" in name):
                sys.exit(f"{name} failed: {done.stderr}")
            answer = done.stdout
    hardware = describe("cpu")
    table = [
        *paragraph(
            f"{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}, packages from a near "
            f"registry. The last one prints “{answer.splitlines()[0]}”."
        ),
        "",
        *lines,
    ]
    print("\n".join(table))
    if options.write:
        write_between("use.md", "benchmarks/first_decision.py", table)


if __name__ == "__main__":
    main()
