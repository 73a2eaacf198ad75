"""One run at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
from pathlib import Path
from types import TracebackType

from partialfc.core.errors import InputError

LOCK = ".lock"


class FolderLock:
    """Held from its making until `close`, or the end of this process, however that comes.

    It is a record lock of the operating system on the file `.lock`, which names host and process. Network file systems
    keep such locks too, and the processes that read the data, which may live a moment longer, do not inherit them. On
    storage that knows no locks it holds nothing: training is not refused there. The process that holds it must not open
    the file a second time: closing that would let go of the lock.

    Attributes:
        content: of the file, never the same twice.

    Raises:
        InputError: another process holds it; the message names that.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._file = path.open("a+b")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            holder = _describe(self._file.read())
            self._file.close()
            raise InputError(
                f"{folder} is in use by another run ({holder}): wait for it or stop it, or give another folder "
                "with --out."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        own = {"host": socket.gethostname(), "pid": os.getpid(), "word": secrets.token_hex(8)}
        self.content = json.dumps(own)
        self._file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk the lock has no name, and what comes next says why
            os.write(self._file.fileno(), self.content.encode())
            os.fsync(self._file.fileno())  # other hosts look for it

    def close(self) -> None:
        """Let others in."""
        self._file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not given its name"
