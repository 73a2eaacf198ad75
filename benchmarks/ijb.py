"""IJB 1:1 and 1:N at the size of IJB-C, from stored features to the table: seconds and peak memory.

    python benchmarks/ijb.py [--folder DIR] [--write]

The set has the numbers of IJB-C: 469,375 faces, 23,124 templates, 15,658,489 pairs of a gallery template and a probe.
Features are random vectors around a center for each person. It takes 1.3 GB in a temporary folder, or in DIR, where it
is kept and found again. Each measurement is a process of its own, so that its peak memory is its own. --write puts the
table into docs/results/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from documents import paragraph, write_between
from partialfc.bench.machine import describe
from partialfc.core.device import peak_bytes, timed
from partialfc.data.ijb_files import (
    read_faces,
    read_galleries,
    read_members,
    read_probes,
    read_template_pairs,
)
from partialfc.evaluation.identification import identify_templates
from partialfc.evaluation.statistics.figures import results_table
from partialfc.evaluation.templates import template_features, verify_templates

FACES, WIDTH = 469_375, 512
GALLERIES = {"G1": 1_772, "G2": 1_759}
PEOPLE, PROBES = 1_772 + 1_759, 19_593
GENUINE, IMPOSTORS = 19_557, 15_638_932
MEASUREMENTS = {
    "1:1": "1:1",
    "1:1-compat": "1:1 with `--compat insightface`",
    "1:n": "1:N, both galleries",
}


def write_meta(folder: Path) -> np.ndarray:
    """The meta files; returns the person of each face. Template t of a gallery is person t, the others are probes."""
    generator = np.random.default_rng(0)
    templates = PEOPLE + PROBES
    person = np.concatenate([np.arange(PEOPLE), np.arange(PROBES) % PEOPLE])
    of_face = np.sort(np.concatenate([np.arange(templates), generator.integers(0, templates, FACES - templates)]))
    media = generator.integers(0, 60_000, FACES)
    with (folder / "ijbc_face_tid_mid.txt").open("w") as file:
        rows = zip(of_face.tolist(), media.tolist(), strict=True)
        file.writelines(f"{face}.jpg {template} {of_media}\n" for face, (template, of_media) in enumerate(rows, 1))
    points = generator.uniform(20, 100, (FACES, 10)).round(3).astype(str).tolist()
    scores = generator.uniform(0.5, 1, FACES).round(6).tolist()
    with (folder / "ijbc_name_5pts_score.txt").open("w") as file:
        file.writelines(f"{face}.jpg {' '.join(points[face - 1])} {scores[face - 1]}\n" for face in range(1, FACES + 1))
    subjects = list(enumerate(person.tolist()))
    lists = {"gallery_G1": subjects[:1_772], "gallery_G2": subjects[1_772:PEOPLE], "probe_mixed": subjects[PEOPLE:]}
    for name, rows_of_list in lists.items():
        text = "".join(f"{template},{subject}\n" for template, subject in rows_of_list)
        (folder / f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + text)
    write_pairs(folder / "ijbc_template_pair_label.txt", person, generator)
    return person[of_face]


def write_pairs(path: Path, person: np.ndarray, generator: np.random.Generator) -> None:
    """Genuine pairs of a probe and the template of its person, and random impostors, mixed."""
    probe = np.concatenate([PEOPLE + np.arange(GENUINE), PEOPLE + generator.integers(0, PROBES, IMPOSTORS)])
    shift = np.concatenate([np.zeros(GENUINE, int), generator.integers(1, PEOPLE, IMPOSTORS)])
    enrolled = (person[probe] + shift) % PEOPLE
    order = generator.permutation(len(probe))
    with path.open("w") as file:
        for rows in np.array_split(order, 64):
            columns = (column[rows].tolist() for column in (enrolled, probe, shift == 0))
            file.writelines(f"{left} {right} {same:d}\n" for left, right, same in zip(*columns, strict=True))


def write_features(path: Path, person: np.ndarray) -> None:
    """float32 (N, D): a center for each person and noise, so that the figures lie between 0 and 1."""
    generator = np.random.default_rng(1)
    centers = generator.standard_normal((PEOPLE, WIDTH), np.float32)
    features = np.lib.format.open_memmap(path, "w+", np.float32, (len(person), WIDTH))
    for start in range(0, len(person), 1 << 14):
        rows = person[start : start + (1 << 14)]
        features[start : start + len(rows)] = centers[rows] + 8 * generator.standard_normal(
            (len(rows), WIDTH), np.float32
        )
    features.flush()


def measure(name: str, folder: Path) -> dict[str, object]:
    """One measurement in this process: seconds of each step, peak memory, and the table."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with timed(seconds, "faces"):
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
        faces = read_faces(folder)
        members = read_members(folder, faces)
    with timed(seconds, "templates"):
        templates, units = template_features(features, faces, members)
    if name == "1:n":
        with timed(seconds, "figures"):
            result = identify_templates(templates, units, read_galleries(folder), read_probes(folder))
    else:
        with timed(seconds, "pairs"):
            pairs = read_template_pairs(folder)
        with timed(seconds, "figures"):
            result = verify_templates(templates, units, pairs, compat=name == "1:1-compat")
    table = results_table({"random features": {"IJB-C": result}})
    total = time.perf_counter() - started
    return {"name": name, "total": total, "seconds": seconds, "bytes": peak_bytes(torch.device("cpu")), "table": table}


def lines_of(measured: list[dict[str, object]]) -> list[str]:
    """The table of the document."""
    facts = describe("cpu")
    steps = ["faces", "templates", "pairs", "figures"]
    rows = []
    for item in measured:
        seconds = item["seconds"]
        assert isinstance(seconds, dict)
        cells = [f"{seconds[step]:.1f} s" if step in seconds else "" for step in steps]
        total, peak = float(str(item["total"])), int(str(item["bytes"]))
        rows.append(
            f"| {MEASUREMENTS[str(item['name'])]} | {' | '.join(cells)} | {total:.1f} s | {peak / 2**30:.1f} GiB |"
        )
    return [
        *paragraph(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, NumPy {np.__version__}."),
        "",
        "| protocol | faces read | templates | pairs read | figures | in all | peak memory |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the set here")
    parser.add_argument("--write", action="store_true", help="write the table into the document")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "complete").exists():
            write_features(folder / "features.npy", write_meta(folder))
            (folder / "complete").touch()
        measured = []
        for name in MEASUREMENTS:
            command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
            measured.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(measured[-1]["table"], flush=True)
    lines = lines_of(measured)
    print("\n".join(lines))
    if options.write:
        write_between("results/benchmarks.md", "benchmarks/ijb.py", lines)


if __name__ == "__main__":
    main()
