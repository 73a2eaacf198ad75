"""Small files of the formats of training sets, sound or with one fault."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
from pictures import picture

from partialfc.data.images import encode_png

REAL = Path(__file__).parents[1] / "fixtures"


def png(number: int) -> bytes:
    return encode_png(picture(number))


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(labels: Sequence[int], first: int = 0) -> list[tuple[str, bytes]]:
    """The members of numbered images with these labels."""
    members: list[tuple[str, bytes]] = []
    for number, label in enumerate(labels, first):
        members += [(f"{number:04d}.png", png(number)), (f"{number:04d}.cls", b"%d" % label)]
    return members


def table(labels: Sequence[Any], label_type: Any = None, **image: Any) -> pa.Table:
    """Rows of numbered images in the layout of Hugging Face; `image` replaces parts of the struct."""
    rows = [{"bytes": png(number), "path": f"{number}.png"} | image for number in range(len(labels))]
    return pa.table({"image": rows, "label": pa.array(labels, label_type or pa.int64())})


def write_parquet(path: Path, content: pa.Table) -> Path:
    pq.write_table(content, path, row_group_size=3)
    return path


def write_lmdb(path: Path, values: Mapping[bytes, bytes]) -> Path:
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return path


def records(labels: Sequence[Any]) -> dict[bytes, bytes]:
    """The keys and values of an LMDB of numbered images with these labels."""
    values = {b"%d" % n: msgpack.packb([png(n), label]) for n, label in enumerate(labels)}
    classes = 1 + max([label for label in labels if isinstance(label, int)], default=0)
    return values | {b"__len__": msgpack.packb(len(labels)), b"__classnum__": msgpack.packb(classes)}
