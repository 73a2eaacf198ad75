"""Images a second that the loader reads and decodes from each format, beside bare decoding and the usual pipeline.

    python benchmarks/loader.py [--images 20000] [--size 112] [--rounds 3]

Every rate is the best of the rounds, in which all variants take turns. The files lie in the page cache, so this is
decoding and handing over, not the disk. Writes docs/results/data.md.
"""

from __future__ import annotations

import argparse
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
    yield "decode", lambda: decode_rate(rec)
    for name, source in sources.items():
        for workers in (1, 2):
            yield f"{name} {workers}", partial(images_a_second, loader_of(source, workers), len(source))
    ours = partial(images_a_second, loader_of(rec, 0), len(rec), lambda one, at: augment(one, at, 0))
    yield "ours", ours
    yield "usual", lambda: usual_rate(rec)
    yield "usual decode", lambda: with_pillow(lambda: decode_rate(rec))
    yield "ours by Pillow", lambda: with_pillow(ours)


def loader_of(source: Source, workers: int) -> Loader:
    return Loader(source, global_batch_size=BATCH, micro_batch_size=BATCH, seed=0, workers=workers)


def with_pillow(measure: Callable[[], float]) -> float:
    module, image_files.simplejpeg = image_files.simplejpeg, None
    try:
        return measure()
    finally:
        image_files.simplejpeg = module


def table(rates: dict[str, float], names: list[str], images: int, size: int) -> list[str]:
    hardware, bare = describe("cpu"), rates["decode"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, torch {hardware['torch']}; {images:,} images of "
        f"{size} × {size}, JPEG of quality 90.",
        "",
        f"Decoding alone, on one core: {bare:,.0f} images/s by simplejpeg, {rates['usual decode']:,.0f} by Pillow.",
        "",
        "| format | 1 worker, images/s | of decoding alone | 2 workers, images/s | of 1 worker |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        one, two = rates[f"{name} 1"], rates[f"{name} 2"]
        lines.append(f"| {name} | {one:,.0f} | {one / bare:.2f} | {two:,.0f} | {two / one:.2f} |")
    lines += ["", "| up to the float batch, RecordIO, one core | images/s | of the usual pipeline |", "|---|---|---|"]
    for name, key in (
        ("partialfc", "ours"),
        ("partialfc without simplejpeg", "ours by Pillow"),
        ("decode, mirror and float tensor image by image, as the published code", "usual"),
    ):
        lines.append(f"| {name} | {rates[key]:,.0f} | {rates[key] / rates['usual']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
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
        rates: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, measure in variants(sources):
                rates[name] = max(rates.get(name, 0.0), measure())
                print(f"{name}: {rates[name]:,.0f} images/s", flush=True)
    write_between("results/data.md", "benchmarks/loader.py", table(rates, list(sources), options.images, options.size))


if __name__ == "__main__":
    main()
