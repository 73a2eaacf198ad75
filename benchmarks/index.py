"""Opens an index as long as WebFace42M's, and an overlay of a million changes on it: seconds and memory.

    python benchmarks/index.py [--records 42474557] [--classes 2059906] [--changes 1000000]

Prints one JSON object a line. The `.rec` is sparse: only a few thousand records are in it, and each begins a page.
The index takes 0.7 GB of disk. Each line is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.overlay import DROPPED, Decisions, fingerprint, write_overlay
from partialfc.data.sources.recordio import build_payload, build_record

SPACING = 4096  # bytes from record to record, a page: a real file has no holes that reading would have to fill
RANDOM_READS = 1000
_LINES = 1 << 20


def write_set(folder: Path, records: int, classes: int) -> None:
    """Write the index, the class count, and the records that are read: those of probes, overlay and random reads."""
    with (folder / "train.idx").open("wb") as file:
        for start in range(0, records, _LINES):
            keys = range(start, min(start + _LINES, records))
            file.write("".join(f"{key}\t{key * SPACING}\n" for key in keys).encode())
    (folder / "property").write_text(f"{classes},112,112\n")
    random = np.random.default_rng(0).integers(0, records, RANDOM_READS)
    spread = [np.linspace(0, records - 1, count, dtype=np.int64) for count in (16, 256)]
    with (folder / "train.rec").open("wb") as file:
        for key in np.unique(np.concatenate([random, *spread])).tolist():
            file.seek(key * SPACING)
            label = float(key * classes // records)
            file.write(build_record(build_payload(label, key, b"image %d" % key)))
        file.truncate(records * SPACING)


def write_changes(folder: Path, records: int, classes: int, changes: int) -> None:
    """Write an overlay of which a third each drops records, gives them another label, and a new class."""
    rows = np.sort(np.random.default_rng(1).permutation(records)[:changes])
    labels = rows * 7 % classes
    labels[::3] = DROPPED
    new = len(labels[1::3])
    labels[1::3] = classes + np.arange(new)
    merges = np.stack([np.arange(0, classes - 1, 100), np.full(len(range(0, classes - 1, 100)), classes - 1)], axis=1)
    labels[np.isin(labels, merges[:, 0])] = classes - 1
    source = open_source(folder)
    write_overlay(
        folder / "a.overlay",
        Decisions(records, classes, fingerprint(source), rows, labels, merges, merges[:, 0].copy(), np.full(new, -1)),
    )


def measure(folder: Path, what: str) -> dict[str, float | int | str]:
    """Open the set, with or without overlay, and read 1,000 random records, which an overlay shifts into holes."""
    start, cpu_start = time.perf_counter(), time.process_time()
    source = open_source(folder, overlay=folder / "a.overlay" if what == "overlay" else None)
    opened, cpu_opened = time.perf_counter(), time.process_time()
    keys = np.random.default_rng(0).integers(0, len(source), RANDOM_READS)
    first = time.perf_counter()
    for index in keys.tolist():
        with contextlib.suppress(UnreadableImage):  # a hole of the sparse file
            source.read(index)
    return {
        "variant": what,
        "images": len(source),
        "classes": source.num_classes,
        "open_seconds": round(opened - start, 2),
        "open_cpu_seconds": round(cpu_opened - cpu_start, 2),
        "random_reads_ms": round(1e3 * (time.perf_counter() - first), 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=42_474_557)
    parser.add_argument("--classes", type=int, default=2_059_906)
    parser.add_argument("--changes", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WHAT"), help="what the processes are started with")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, options.records, options.classes)
        write_changes(folder, options.records, options.classes, options.changes)
        print(json.dumps({"variant": "file", "overlay_bytes": (folder / "a.overlay").stat().st_size}), flush=True)
        for what in ("index", "overlay"):
            subprocess.run([sys.executable, __file__, "--measure", name, what], check=True)


if __name__ == "__main__":
    main()
