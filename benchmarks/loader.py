"""Images a second that the loader reads and decodes, with 0, 1 and 2 workers, from a generated `.rec`.

    python benchmarks/loader.py [--images 4000] [--size 112] [--batch 128] [--workers 0 1 2]

Prints one JSON object a line. The file lies in the page cache, so this is decoding and handing over, not the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from partialfc.data.augment import augment
from partialfc.data.images import encode_jpeg
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source
from partialfc.data.sources.recordio import RecordReader, RecordWriter


def write_images(path: Path, images: int, size: int) -> None:
    """Write smooth random images as JPEGs of quality 90, about as long as those of faces."""
    generator = np.random.default_rng(0)
    with RecordWriter(path) as writer:
        for number in range(images):
            coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, size // 4, size // 4)))
            smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0].permute(1, 2, 0)
            writer.write(encode_jpeg(smooth.numpy().astype(np.uint8)), number // 10)


def measure(source: Source, batch: int, workers: int) -> dict[str, float | int | str]:
    """One epoch; the time to the first batch, in which workers start, is reported apart."""
    loader = Loader(source, global_batch_size=batch, micro_batch_size=batch, seed=0, workers=workers)
    steps = max(2, len(source) // batch)
    batches = loader.batches(0, steps)
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    images = sum(len(read.labels) for read in batches)
    stop = time.perf_counter()
    return {
        "variant": "loader",
        "workers": workers,
        "images_per_second": round(images / (stop - first), 1),
        "first_batch_ms": round(1e3 * (first - start), 1),
    }


def measure_reads(path: Path) -> dict[str, float | int | str]:
    """Random reads without decoding."""
    reader = RecordReader(path)
    order = np.random.default_rng(0).permutation(len(reader)).tolist()
    start = time.perf_counter()
    for index in order:
        reader.read(index)
    return {"variant": "read", "microseconds": round(1e6 * (time.perf_counter() - start) / len(order), 2)}


def measure_augment(size: int, batch: int) -> dict[str, float | int | str]:
    """Flip and normalise on one core."""
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    positions = torch.arange(batch)
    augment(images, positions, 0)
    start = time.perf_counter()
    for _ in range(10):
        augment(images, positions, 0)
    return {"variant": "augment", "images_per_second": round(10 * batch / (time.perf_counter() - start), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.rec"
        write_images(path, options.images, options.size)
        print(json.dumps({"variant": "data", "images": options.images, "bytes": path.stat().st_size}))
        print(json.dumps(measure_reads(path)))
        print(json.dumps(measure_augment(options.size, options.batch)))
        source = open_source(path)
        for workers in options.workers:
            print(json.dumps(measure(source, options.batch, workers)), flush=True)


if __name__ == "__main__":
    main()
