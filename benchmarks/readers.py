"""Writes a training set in every format and reads it with the packages that others use: webdataset, pyarrow, mxnet.

    python benchmarks/readers.py [--mxnet-python PYTHON]

`webdataset` and `pyarrow` are read in this process, and `datasets` where it is installed. mxnet 1.9.1 needs NumPy 1.23,
and so an environment of its own, whose Python is given. Prints a line of JSON for each reader; exit status 1 if one of
them does not find the images and labels that were written.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from partialfc.data.convert import convert
from partialfc.data.images import encode_jpeg
from partialfc.data.sources.recordio import RecordWriter

Images = Iterable[tuple[bytes, int]]

MXNET = """
import hashlib, json, sys
import mxnet as mx
records = mx.recordio.MXIndexedRecordIO(sys.argv[1][:-3] + "idx", sys.argv[1], "r")
header, _ = mx.recordio.unpack(records.read_idx(0))
assert header.flag == 2
images = []
for key in range(1, int(header.label[0])):
    head, image = mx.recordio.unpack(records.read_idx(key))
    images.append([hashlib.sha256(image).hexdigest(), int(head.label)])
for key in range(int(header.label[0]), int(header.label[1])):
    head, _ = mx.recordio.unpack(records.read_idx(key))
    assert all(0 < edge <= header.label[0] for edge in head.label)
print(json.dumps(sorted(images)))
"""


def hashes(images: Images) -> list[list[str | int]]:
    """SHA-256 of each encoded image and its label, sorted."""
    return sorted([hashlib.sha256(encoded).hexdigest(), int(label)] for encoded, label in images)


def read_webdataset(folder: Path) -> list[list[str | int]]:
    """By the package webdataset, as its users stream shards."""
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    return hashes((sample["jpg"], int(sample["cls"])) for sample in dataset)


def read_parquet(folder: Path) -> list[list[str | int]]:
    """By pyarrow, all files as one data set."""
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(sorted(map(str, folder.glob("*.parquet")))).to_table()
    return hashes((row["image"]["bytes"], row["label"]) for row in rows.to_pylist())


def read_datasets(folder: Path) -> list[list[str | int]]:
    """By the package datasets of Hugging Face, which also decodes the class names."""
    import datasets

    files = sorted(map(str, folder.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    assert isinstance(dataset.features["image"], datasets.Image)
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return hashes((row["image"]["bytes"], row["label"]) for row in dataset)


def read_mxnet(folder: Path, python: str) -> list[list[str | int]]:
    """By mxnet in another environment."""
    command = [python, "-c", MXNET, str(folder / "train.rec")]
    found: list[list[str | int]] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def write_images(path: Path, images: int) -> list[tuple[bytes, int]]:
    """A `.rec` of random JPEGs, five for each identity, and what is in it."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (images, 32, 32, 3), np.uint8)
    written = [(encode_jpeg(image), number // 5) for number, image in enumerate(pixels)]
    with RecordWriter(path, header=False) as writer:
        for encoded, label in written:
            writer.write(encoded, label)
    return written


def check(folder: Path, images: int, mxnet_python: str | None) -> list[dict[str, str | int | bool]]:
    """Write the formats below `folder` and read them; a line for each reader."""
    expected = hashes(write_images(folder / "source.rec", images))
    readers: list[tuple[str, str, Callable[[Path], list[list[str | int]]]]] = [
        ("webdataset", "webdataset", read_webdataset),
        ("parquet", "pyarrow", read_parquet),
        ("parquet", "datasets", read_datasets),
    ]
    readers = [reader for reader in readers if importlib.util.find_spec(reader[1])]
    if mxnet_python is not None:
        readers.append(("recordio", "mxnet", lambda path: read_mxnet(path, mxnet_python)))
    lines: list[dict[str, str | int | bool]] = []
    for form, package, read in readers:
        out = folder / form
        if not out.exists():
            convert(folder / "source.rec", out, form)  # type: ignore[arg-type]
        lines.append({"format": form, "reader": package, "images": images, "equal": read(out) == expected})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--mxnet-python", metavar="PYTHON", help="a Python that has mxnet 1.9.1 and numpy 1.23")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = check(Path(folder), options.images, options.mxnet_python)
    for line in lines:
        print(json.dumps(line))
    sys.exit(0 if all(line["equal"] for line in lines) else 1)


if __name__ == "__main__":
    main()
