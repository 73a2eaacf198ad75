"""Images a second that the loader reads and decodes from each format, beside bare decoding and the usual pipeline.

    python benchmarks/loader.py [--images 8000] [--size 112] [--rounds 5]

Rates are medians of the rounds. What a ratio compares is measured one right after the other, and the ratio is the
median of those of the rounds, since the speed of a shared machine changes within minutes. The files lie in the page
cache, so this is decoding and handing over, not the disk. Writes docs/results/data.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.data import images as image_files
from partialfc.data.augment import augment
from partialfc.data.convert import convert
from partialfc.data.images import decode_image, encode_jpeg
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source
from partialfc.data.sources.recordio import RecordWriter

BATCH = 128


def write_images(path: Path, images: int, size: int) -> None:
    """Write smooth random images as JPEGs of quality 90, about as long as those of faces."""
    generator = np.random.default_rng(0)
    with RecordWriter(path) as writer:
        for number in range(images):
            coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, size // 4, size // 4)))
            smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0].permute(1, 2, 0)
            writer.write(encode_jpeg(smooth.numpy().astype(np.uint8)), number // 10)


def write_lmdb(path: Path, source: Source) -> None:
    """Write a source as synthetic face sets are shipped."""
    import lmdb
    import msgpack

    with lmdb.open(str(path), map_size=1 << 34) as environment, environment.begin(write=True) as transaction:
        keys = [str(number).encode() for number in range(len(source))]
        for index, key in enumerate(keys):
            sample = source.read(index)
            transaction.put(key, msgpack.packb((sample.encoded, sample.label)))
        for key, value in ((b"__len__", len(keys)), (b"__keys__", keys), (b"__classnum__", source.num_classes)):
            transaction.put(key, msgpack.packb(value))


def images_a_second(loader: Loader, images: int, then: Callable[[Tensor, Tensor], object] | None = None) -> float:
    """The rate over an epoch after the first batches, in which workers start; `then` takes each batch."""
    warm, steps = 8, images // BATCH
    batches = loader.batches(0, steps)
    start = 0.0
    for number, batch in enumerate(batches):
        if then is not None:
            then(batch.images, batch.positions)
        if number == warm - 1:
            start = time.perf_counter()
    return (steps - warm) * BATCH / (time.perf_counter() - start)


class UsualImages(Dataset[tuple[Tensor, int]]):
    """Pillow, a random mirror image and a float tensor for each image, as the published code loads them."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import io

        sample = self.source.read(index)
        image = Image.open(io.BytesIO(sample.encoded)).convert("RGB")
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        mean = deviation = torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)
        return pixels.sub(mean).div(deviation), sample.label


def usual_rate(source: Source) -> float:
    start, images = time.perf_counter(), 0
    for pixels, _ in DataLoader(UsualImages(source), batch_size=BATCH, shuffle=True):
        images += len(pixels)
    return images / (time.perf_counter() - start)


def decode_rate(source: Source) -> float:
    encoded = [source.read(index).encoded for index in range(len(source))]
    start = time.perf_counter()
    for one in encoded:
        decode_image(one)
    return len(encoded) / (time.perf_counter() - start)


def variants(sources: dict[str, Source]) -> Iterator[tuple[str, Callable[[], float]]]:
    """The name of each rate, and the function that measures it once."""
    rec = sources["recordio"]
    for name, source in sources.items():
        yield f"{name} decode", lambda: decode_rate(rec)
        for workers in (1, 2):
            yield f"{name} {workers}", partial(images_a_second, loader_of(source, workers), len(source))
    ours = partial(images_a_second, loader_of(rec, 0), len(rec), lambda one, at: augment(one, at, 0))
    yield "ours", ours
    yield "usual", lambda: usual_rate(rec)
    yield "ours by Pillow", lambda: with_pillow(ours)
    yield "usual decode", lambda: with_pillow(lambda: decode_rate(rec))


def loader_of(source: Source, workers: int) -> Loader:
    return Loader(source, global_batch_size=BATCH, micro_batch_size=BATCH, seed=0, workers=workers)


def with_pillow(measure: Callable[[], float]) -> float:
    module, image_files.simplejpeg = image_files.simplejpeg, None
    try:
        return measure()
    finally:
        image_files.simplejpeg = module


def table(rates: dict[str, list[float]], names: list[str], images: int, size: int) -> list[str]:
    def rate(name: str) -> str:
        return f"{statistics.median(rates[name]):,.0f}"

    def ratio(name: str, to: str) -> str:
        return f"{statistics.median(one / other for one, other in zip(rates[name], rates[to], strict=True)):.2f}"

    hardware = describe("cpu")
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, torch {hardware['torch']}; {images:,} images of "
        f"{size} × {size}, JPEG of quality 90; decoding alone by Pillow: {rate('usual decode')} images/s.",
        "",
        "| format | decoding alone, images/s | 1 worker | of decoding alone | 2 workers | of 1 worker |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        alone, one, two = (f"{name} {what}" for what in ("decode", "1", "2"))
        lines.append(
            f"| {name} | {rate(alone)} | {rate(one)} | {ratio(one, alone)} | {rate(two)} | {ratio(two, one)} |"
        )
    lines += ["", "| up to the float batch, RecordIO, one core | images/s | of the usual pipeline |", "|---|---|---|"]
    for name, key in (
        ("partialfc", "ours"),
        ("partialfc without simplejpeg", "ours by Pillow"),
        ("decode, mirror and float tensor image by image, as the published code", "usual"),
    ):
        lines.append(f"| {name} | {rate(key)} | {ratio(key, 'usual')} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_images(path / "train.rec", options.images, options.size)
        source = open_source(path / "train.rec")
        for to in ("webdataset", "parquet", "folder"):
            convert(path / "train.rec", path / to, to)
        write_lmdb(path / "train.lmdb", source)
        places = {
            "recordio": "train.rec", "webdataset": "webdataset", "parquet": "parquet", "lmdb": "train.lmdb",
            "folder": "folder",
        }  # fmt: skip
        sources = {name: open_source(path / place) for name, place in places.items()}
        rates: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, measure in variants(sources):
                rates.setdefault(name, []).append(measure())
                print(f"{name}: {rates[name][-1]:,.0f} images/s", flush=True)
    write_between("results/data.md", "benchmarks/loader.py", table(rates, list(sources), options.images, options.size))


if __name__ == "__main__":
    main()
