"""Files that are hashed block by block as they are written, and verified block by block as they are read.

The tensor files are plain safetensors, which any reader of that format opens. They are written here and not by the
safetensors library because this way the SHA-256 of each block is computed from the bytes in memory, in the same pass
that writes them, and a tensor on a GPU passes through the host in pieces instead of as a whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from partialfc.checkpoint.format import (
    DamagedCheckpoint,
    FileRecord,
    Manifest,
    TensorLayout,
    encode_header,
    parse_header,
)
from partialfc.distributed.activity import report_progress
from partialfc.distributed.collectives import split_evenly

BLOCK_BYTES = 16 * 2**20
"""The unit of verification: a reader hashes whole blocks, so that this is also the least that it reads."""


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview], block_bytes: int = BLOCK_BYTES) -> FileRecord:
    """Write a new file of `pieces`, hash its blocks on the way, and flush it to the storage."""
    blocks, size = [], 0
    with path.open("xb") as file:
        for piece in pieces:
            rest = memoryview(piece)
            while len(rest):
                if size % block_bytes == 0:
                    report_progress()
                    blocks.append(hashlib.sha256())
                room = block_bytes - size % block_bytes
                part, rest = rest[:room], rest[room:]
                blocks[-1].update(part)
                file.write(part)
                size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, [block.hexdigest() for block in blocks])


def safetensors_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of `tensors` (any device, strides and shapes), piece by piece."""
    header, ordered = encode_header(tensors, metadata)
    yield header
    for tensor in ordered:
        for piece in tensor.detach().reshape(-1).split(max(1, BLOCK_BYTES // tensor.element_size())):
            if len(piece):
                yield _bytes_of(piece.cpu())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read or to fill."""
    # view(-1) would keep the stride of a tensor of one element, which may be anything.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


class VerifiedFiles:
    """Reads byte ranges and tensors of a checkpoint's files, and verifies every byte that it returns.

    It keeps the last block, since neighbouring tensors share blocks, and leaves no file open.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.records = manifest.files
        self.block_bytes = manifest.block_bytes
        self._last: tuple[str, int, bytes] | None = None
        self._layouts: dict[str, dict[str, TensorLayout]] = {}

    def check_sizes(self) -> None:
        """Raise DamagedCheckpoint if a file is missing or has another size than its record says."""
        for name, record in self.records.items():
            try:
                size = (self.folder / name).stat().st_size
            except OSError as error:
                raise self._damaged(name, f"cannot be read ({error.strerror})") from error
            if size != record.size:
                raise self._damaged(name, f"has {size:,} bytes where {record.size:,} were written")

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every block of every file, or one of `parts` even parts of all blocks, and compare it with its hash.

        Raises:
            DamagedCheckpoint: naming the first file and block that differ.
        """
        self.check_sizes()
        blocks = [(name, number) for name, record in self.records.items() for number in range(len(record.sha256))]
        start, stop = split_evenly(len(blocks), parts, part)
        for name, number in blocks[start:stop]:
            self._block(name, number)

    def read(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of file `name` from `start` on.

        Reads and checks the blocks that cover them, and no others.

        Raises:
            DamagedCheckpoint: a block differs from what was written, or cannot be read.
        """
        position, stop = start, start + len(target)
        while position < stop:
            number, offset = divmod(position, self.block_bytes)
            part = memoryview(self._block(name, number))[offset : offset + stop - position]
            target[position - start : position - start + len(part)] = part
            position += len(part)

    def content(self, name: str) -> bytes:
        """All of file `name`."""
        return self._bytes(name, 0, self.records[name].size)

    def layout(self, name: str) -> dict[str, TensorLayout]:
        """The tensors of safetensors file `name`, in the order in which it holds them."""
        if name not in self._layouts:
            length = int.from_bytes(self._bytes(name, 0, 8), "little")
            header = self._bytes(name, 8, 8 + length)
            try:
                self._layouts[name] = parse_header(header, 8 + length, self.records[name].size)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._damaged(name, f"has a header that is no safetensors header ({error})") from error
        return self._layouts[name]

    def tensor(self, name: str, key: str) -> Tensor:
        """Tensor `key` of safetensors file `name`."""
        layout = self._find(name, key)
        result = torch.empty(layout.shape, dtype=layout.dtype)
        self.read(name, layout.start, _bytes_of(result))
        return result

    def fill(self, target: Tensor, name: str, key: str, first: int) -> None:
        """Fill `target`, on any device, with the rows of tensor `key` of file `name` from row `first` on."""
        layout = self._find(name, key)
        fits = (layout.dtype, layout.shape[1:]) == (target.dtype, target.shape[1:])
        if not fits or first + len(target) > layout.shape[0]:
            raise self._damaged(name, f"holds {key} as {layout.dtype} {layout.shape}, against its manifest")
        row_bytes = prod(layout.shape[1:]) * layout.dtype.itemsize
        position = layout.start + first * row_bytes
        is_direct = target.device.type == "cpu" and target.is_contiguous()
        for piece in target.split(max(1, BLOCK_BYTES // max(1, row_bytes))):
            staged = piece if is_direct else torch.empty(piece.shape, dtype=piece.dtype)
            self.read(name, position, _bytes_of(staged))
            if not is_direct:
                piece.copy_(staged)
            position += staged.nbytes

    def _find(self, name: str, key: str) -> TensorLayout:
        layouts = self.layout(name)
        if key not in layouts:
            raise self._damaged(name, f"holds no tensor {key}")
        return layouts[key]

    def _bytes(self, name: str, start: int, stop: int) -> bytes:
        if stop > self.records[name].size:
            raise self._damaged(name, f"is too short for bytes {start:,} to {stop:,}")
        result = bytearray(stop - start)
        self.read(name, start, memoryview(result))
        return bytes(result)

    def _block(self, name: str, number: int) -> bytes:
        if self._last is not None and self._last[:2] == (name, number):
            return self._last[2]
        record = self.records[name]
        start = number * self.block_bytes
        stop = min(start + self.block_bytes, record.size)
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                block = file.read(stop - start)
        except OSError as error:
            raise self._damaged(name, f"cannot be read at bytes {start:,} to {stop:,} ({error.strerror})") from error
        if hashlib.sha256(block).hexdigest() != record.sha256[number]:
            raise self._damaged(name, f"differs from what was written in block {number} (bytes {start:,} to {stop:,})")
        self._last = (name, number, block)
        report_progress()
        return block

    def _damaged(self, name: str, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(self.folder / name, what)
