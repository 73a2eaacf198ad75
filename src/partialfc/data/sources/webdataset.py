"""WebDataset: `.tar` files, read in place through an index of where their members begin.

Files of one key, which is the path up to the first dot of the file's name, are a sample: an image `x.jpg`, its class id
in `x.cls` or `x.json`, and whatever else, which is ignored.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.console import Progress
from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import NoTrainingSet, Sample, check_regular
from partialfc.data.sources.derived import derived_rows
from partialfc.data.sources.folder import IMAGE_SUFFIXES
from partialfc.data.sources.names import read_classes
from partialfc.data.sources.tar_members import DamagedTar, Member, members

COMPRESSED = (".tar.gz", ".tgz")
_LABELS = ("cls", "json")
_OPEN_SHARDS = 64
_LABEL_BYTES = 1 << 16  # of a .cls or .json


def open_webdataset(path: Path, num_classes: int | None) -> WebDatasetSource | None:
    """The `.tar` file at `path`, or those in the folder `path`; None without any.

    Raises:
        InputError: a shard is compressed, damaged, or one of its samples is incomplete.
        OSError: the folder cannot be listed.
    """
    shards = tar_files(path, (".tar",))
    if not shards and path.is_file():
        refuse_compressed(path)
    return WebDatasetSource(path, shards, num_classes) if shards else None


def refuse_compressed(path: Path) -> None:
    """Say how to read `.tar.gz` files, if `path` is one or holds some, in a NoTrainingSet."""
    if tar_files(path, COMPRESSED):
        raise NoTrainingSet(
            f"{path} is compressed, so that its images cannot be read in any order: unpack it by "
            f"`partialfc data convert {path} --out DIR --to webdataset`."
        )


def tar_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path`, or the files in the folder `path` by name, if they end in one of the suffixes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return check_regular(
        file for file in files if file.name.lower().endswith(suffixes) and not file.name.startswith(".")
    )


class WebDatasetSource:
    """The samples of `.tar` files, in the order of the files' names and then of their members."""

    format = "webdataset"

    def __init__(self, path: Path, shards: list[Path], num_classes: int | None = None) -> None:
        self.path = path
        self._shards, self._given = shards, num_classes
        index = shards[0].with_name(f".{'webdataset' if len(shards) > 1 else shards[0].stem}.npy")
        self._rows = derived_rows(shards, index, partial(build_index, shards))
        self._sizes = [shard.stat().st_size for shard in shards]
        self._open = lru_cache(_OPEN_SHARDS)(_OpenFile)
        counted, names = read_classes(shards[0].parent)
        self.num_classes: int = num_classes or counted or int(self._rows["label"].max()) + 1
        self.identities = names if names and len(names) == self.num_classes else None

    def __reduce__(self) -> tuple[Any, ...]:
        return WebDatasetSource, (self.path, self._shards, self._given)

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        return np.ascontiguousarray(self._rows["label"])

    def name(self, index: int) -> str:
        """As `Source.name`: the member and its shard."""
        return f"{self.file_name(index)} in {self._shards[self._rows[index]['shard']]}"

    def file_name(self, index: int) -> str:
        """The name of the image in its shard."""
        return os.fsdecode(bytes(self._rows[index]["name"]))

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        offset, size, label, shard, member = self._rows[index].item()
        name = f"{os.fsdecode(member)} in {self._shards[shard]}"
        fits = offset + size <= self._sizes[shard]  # otherwise not even the memory is allocated
        try:
            encoded = self._open(self._shards[shard]).read(offset, size) if fits else b""
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error
        if len(encoded) < size:
            raise UnreadableImage(f"{name}: it runs past the end of the file")
        return Sample(encoded, label, name)


class _OpenFile:
    """A file for several threads that closes when the last of them has left `read`."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


# -- the index ---------------------------------------------------------------------------------------------------------


def build_index(shards: Sequence[Path]) -> np.ndarray:
    """Where the image of each sample stands, by a walk through all shards.

    Returns:
        A structured array (N,) of offset, size, label (int64 each), shard (int32) and name (bytes).

    Raises:
        InputError: a shard is damaged or empty, or a sample is incomplete; the message names shard and key.
    """
    parts: list[np.ndarray] = []
    sizes = [shard.stat().st_size for shard in shards]
    with Progress(f"indexing {len(shards)} .tar file{'s' * (len(shards) > 1)}", sum(sizes) >> 20, unit="MiB") as bar:
        for number, shard in enumerate(shards):
            parts.append(_index_shard(number, shard, bar, sum(sizes[:number])))
            bar.update(sum(sizes[: number + 1]) >> 20)
    width = max(part.dtype["name"].itemsize for part in parts)
    return np.concatenate([part.astype(_row_dtype(width)) for part in parts])


def _row_dtype(width: int) -> np.dtype[Any]:
    whole = [(name, "<i8") for name in ("offset", "size", "label")]
    return np.dtype([*whole, ("shard", "<i4"), ("name", f"S{width}")])


def _index_shard(number: int, shard: Path, bar: Progress, done: int) -> np.ndarray:
    numbers, names, keys = array("q"), [], []
    incomplete: dict[bytes, str] = {}
    if not shard.stat().st_size:
        raise InputError(f"{shard} is empty: get a fresh copy of it, or remove it.")
    try:
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for key, files in groupby(_visible(data), key=lambda member: _split(member.name)[0]):
                keys.append(key)
                try:
                    image, label = _sample(list(files), data)
                except ValueError as error:
                    # Not raised yet: if the key occurs again, the cause is that its files are not adjacent.
                    incomplete.setdefault(key, str(error))
                    continue
                numbers.extend((image.offset, image.size, label))
                names.append(image.name)
                if len(names) % 4096 == 0:
                    bar.update((done + image.offset) >> 20)
    except DamagedTar as error:
        raise InputError(f"{shard} is no sound tar file: {error}: get a fresh copy of it.") from error
    if len(set(keys)) < len(keys):
        ordered = sorted(keys)
        key = next(first for first, second in pairwise(ordered) if first == second)
        raise InputError(
            f"The files of sample {os.fsdecode(key)} in {shard} are not adjacent: pack it again, sorted by name."
        )
    for key, problem in incomplete.items():
        raise InputError(f"Sample {os.fsdecode(key)} in {shard} {problem}.")
    if not names:
        raise InputError(f"{shard} holds no samples: get a fresh copy of it, or remove it.")
    rows = np.empty(len(names), _row_dtype(max(map(len, names))))
    table = np.frombuffer(numbers, np.int64).reshape(-1, 3)
    rows["offset"], rows["size"], rows["label"] = table.T
    rows["shard"], rows["name"] = number, names
    return rows


def _visible(data: mmap.mmap) -> Iterator[Member]:
    """The members that belong to samples: neither hidden files nor the format's own, such as `__meta__`."""
    for member in members(data):
        file = member.name.rpartition(b"/")[2]
        if not file.startswith(b".") and not (file.startswith(b"__") and file.endswith(b"__")):
            yield member


def _split(name: bytes) -> tuple[bytes, str]:
    """The key and the suffix, in small letters, of a member."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, suffix = file.partition(b".")
    return folder + slash + stem, suffix.lower().decode(errors="replace")


def _sample(files: list[Member], data: mmap.mmap) -> tuple[Member, int]:
    """The image and the class id of a sample. A ValueError says what is wrong with it."""
    by_suffix = {_split(file.name)[1]: file for file in files}
    if len(by_suffix) < len(files):
        raise ValueError("has two files with one suffix: give each sample its own key")
    kinds = {suffix: suffix.rpartition(".")[2] for suffix in by_suffix}
    images = [suffix for suffix, kind in kinds.items() if f".{kind}" in IMAGE_SUFFIXES]
    found = ", ".join(f".{suffix}" for suffix in by_suffix)
    if len(images) != 1:
        raise ValueError(f"has {len(images)} images among its files {found}: give it one of {' '.join(IMAGE_SUFFIXES)}")
    label = next((suffix for kind in _LABELS for suffix in kinds if kinds[suffix] == kind), None)
    if label is None:
        raise ValueError(f"has no label among its files {found}: add its class id as .cls or .json")
    file = by_suffix[label]
    text = data[file.offset : file.offset + min(file.size, _LABEL_BYTES)]
    return by_suffix[images[0]], _class_id(text, kinds[label])


def _class_id(text: bytes, kind: str) -> int:
    value: Any = None
    if kind == "cls":
        value = int(text) if text.strip().isdigit() and len(text) < 32 else None
    else:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        value = value.get("label") if isinstance(value, dict) else value
    if type(value) is not int or not 0 <= value < 1 << 62:
        shown = text[:40].decode(errors="replace")
        raise ValueError(f"has the label {shown!r}, but a class id is a whole number from 0: correct its .{kind}")
    return value
