"""The members of a `.tar` file: where their contents stand, without unpacking them, and the heads of new ones.

Heads are read as ustar, GNU and pax write them (POSIX.1-2001, "pax Interchange Format").
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_MAX_EXTENSION = 1 << 20  # bytes of a long name, or of the extended head of a member
_NUL = bytes(BLOCK)


class DamagedTar(Exception):
    """The file is no tar file, or its end is missing; the message says where."""


class Member(NamedTuple):
    """A regular file in a tar file: its name, and where its content begins and how long it is, in bytes."""

    name: bytes
    offset: int
    size: int


def members(data: bytes | mmap.mmap) -> Iterator[Member]:
    """The regular files of a tar file, in order.

    Raises:
        DamagedTar: a head is damaged, or a member runs past the end.
    """
    offset, last = 0, b""
    long_name = b""
    extended: dict[bytes, bytes] = {}
    common: dict[bytes, bytes] = {}  # by a pax head for all following members
    while offset + BLOCK <= len(data):
        head = data[offset : offset + BLOCK]
        if head == _NUL:
            return
        size, kind = _check_head(head, offset, last), head[156:157]
        start = offset + BLOCK
        if kind in b"xgLK" and size > _MAX_EXTENSION:
            raise DamagedTar(f"the head at byte {offset} takes {size} bytes more")
        name = long_name or extended.get(b"path") or common.get(b"path") or _plain_name(head)
        if kind not in b"xgLK" and b"size" in extended:
            size = _number(extended[b"size"], offset)
        if start + size > len(data):
            raise DamagedTar(f"it ends inside {name.decode(errors='replace')}")
        offset = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind == b"L":
            long_name = data[start : start + size].rstrip(b"\0")
        elif kind == b"x":
            extended = _pax_records(data[start : start + size], start)
        elif kind == b"g":
            common |= _pax_records(data[start : start + size], start)
        elif kind != b"K":
            if kind in (b"0", b"\0", b"7") and not name.endswith(b"/"):
                yield Member(name, start, size)
            long_name, extended, last = b"", {}, name
    raise DamagedTar(
        f"it ends after {last.decode(errors='replace') or 'nothing'}, without the blocks of zeros of an end"
    )


def _check_head(head: bytes, offset: int, last: bytes) -> int:
    """The size that a head gives; DamagedTar if its checksum is wrong."""
    field = head[124:136]
    try:
        stored = int(head[148:156].rstrip(b"\0 ") or b"-1", 8)
        # Sizes from 8 GiB on are not in octal digits, in GNU's form.
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        stored, size = -1, -1
    if size < 0 or sum(head[:148]) + 8 * 32 + sum(head[156:]) != stored:
        after = f", after {last.decode(errors='replace')}" if last else ""
        raise DamagedTar(f"no head of a member stands at byte {offset}{after}")
    return size


def _plain_name(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """The records `length keyword=value` of an extended head."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data) and data[start : start + 1] != b"\0":
        space = data.find(b" ", start, start + 20)
        length = _number(data[start:space], offset) if space > start else 0
        record = data[space + 1 : start + length - 1]
        keyword, equals, value = record.partition(b"=")
        if length <= max(space - start + 1, 0) or not equals or start + length > len(data):
            raise DamagedTar(f"the extended head at byte {offset} is damaged")
        records[keyword] = value
        start += length
    return records


def _number(text: bytes, offset: int) -> int:
    if not (text.isdigit() and len(text) < 20):
        raise DamagedTar(f"the extended head at byte {offset} is damaged")
    return int(text)


def member_head(name: str, size: int) -> bytes:
    """The head of a regular file, as ustar where that can hold the name, else as pax."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
