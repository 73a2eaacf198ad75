"""Fixtures of the tests of data: files of real writers, and small generated sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import picture

from partialfc.data.images import encode_jpeg, encode_png
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image
from partialfc.data.sources.recordio import RecordWriter

REAL = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def with_header() -> Path:
    """48 images of 8 identities, written by mxnet in the layout with header record."""
    return REAL / "insightface"


@pytest.fixture
def im2rec() -> Path:
    """The same images written by mxnet's im2rec, one record of them in three parts."""
    return REAL / "im2rec"


@pytest.fixture
def real_webdataset() -> Path:
    """The same images in two shards, written by webdataset."""
    return REAL / "webdataset"


@pytest.fixture
def real_parquet() -> Path:
    """The same images in two files, written by pyarrow."""
    return REAL / "parquet"


@pytest.fixture
def real_lmdb() -> Path:
    """The same images, written by lmdb and msgpack."""
    return REAL / "lmdb"


@pytest.fixture
def pair_files() -> list[Path]:
    return [REAL / "verification" / name for name in ("lfw.bin", "cfp_fp.bin")]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder of test files, so that the copy may be damaged."""

    def copy(folder: Path) -> Path:
        target = tmp_path / folder.name
        shutil.copytree(folder, target, copy_function=shutil.copyfile)
        return target

    return copy


@pytest.fixture
def unpacked(im2rec: Path, tmp_path: Path) -> Path:
    """The real images as a folder of PNG files."""
    source = open_source(im2rec)
    for index in range(len(source)):
        sample, image = read_image(source, index)
        folder = tmp_path / "unpacked" / f"{sample.label:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(encode_png(image))
    return tmp_path / "unpacked"


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[..., Path]:
    """Writes a `.rec` of numbered PNG images, `each` per identity; the `broken` ones are no images."""

    def write(images: int, each: int = 2, broken: tuple[int, ...] = (), size: int = 16) -> Path:
        folder = tmp_path / f"numbered{images}"
        folder.mkdir()
        with RecordWriter(folder / "train.rec") as writer:
            for number in range(images):
                encoded = b"no image" if number in broken else encode_png(picture(number, size))
                writer.write(encoded, number // each)
        return folder

    return write


@pytest.fixture
def jpeg() -> bytes:
    return encode_jpeg(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
