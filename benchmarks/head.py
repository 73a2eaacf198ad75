"""Measure the head beside the dense one and write the table of docs/performance.md.

    python benchmarks/head.py [--steps 7] [--device cpu] [--only 0]

Each configuration is one alternating run; its JSON lines go to standard output, so that a table can be made again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from partialfc.bench.head import bench_head

CONFIGURATIONS = [
    {"num_classes": 100_000, "sample_rate": 0.1, "batch_size": 128},
    {"num_classes": 360_000, "sample_rate": 0.1, "batch_size": 512},
]
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/head.py begin -->", "<!-- benchmarks/head.py end -->"
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", type=int, help="number of the one configuration to measure; writes no table")
    options = parser.parse_args()
    chosen = CONFIGURATIONS if options.only is None else [CONFIGURATIONS[options.only]]
    results = []
    for configuration in chosen:
        found = list(bench_head(**configuration, steps=options.steps, baseline=True, device=options.device))  # type: ignore[arg-type]
        for result in found:
            print(json.dumps(result), flush=True)
        results.append(found)
    if options.only is None:
        write_table(results)


def write_table(results: list[list[dict[str, Any]]]) -> None:
    """Put the table between the two marks of the document."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def table(results: list[list[dict[str, Any]]]) -> str:
    """Markdown: a line a variant, times and memory beside the dense head's of the same run."""
    hardware = results[0][0]["hardware"]
    lines = [
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores, {hardware['threads']} threads, "
        f"torch {hardware['torch']}, load average {os.getloadavg()[0]:.1f}; D = 512, float32.",
        "",
        "| classes | rate | batch | head | best step | median | sampling, forward, backward, optimizer | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        dense = found[-1]
        for result in found:
            sizes = result["configuration"]
            faster = dense["step_ms_min"] / result["step_ms_min"]
            leaner = result["peak_bytes"] / dense["peak_bytes"]
            phases = " / ".join(f"{value:.0f}" for value in result["phases_ms"].values())
            lines.append(
                f"| {sizes['num_classes']:,} | {sizes['sample_rate']} | {sizes['batch_size']} | {result['variant']} | "
                f"{result['step_ms_min']:.0f} ms ({faster:.1f} ×) | {result['step_ms_median']:.0f} ms | {phases} ms | "
                f"{result['peak_bytes'] / _MIB:.0f} MiB ({leaner:.2f} ×) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
