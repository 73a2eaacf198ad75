"""metrics.jsonl: one JSON object a line, for whoever wants to plot or compare runs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from partialfc.core.errors import InputError, JobError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends lines to a metrics file, each there for others to read when it is written.

    JSON has no NaN and no infinities, and a log must show them: they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `read_metrics` turns back into numbers.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        evaluates_again: Collection[str] = (),
        patient: bool = False,
        enabled: bool = True,
    ) -> None:
        """Open the file, and remove what lies past the checkpoint that the run goes on from.

        Args:
            path: the file; made if missing, together with its folder.
            resume_step: optimizer steps done. An interrupted run may have written lines of later steps, which will be
                written again: those are removed, as is a last line that was cut off.
            evaluates_again: benchmarks that are run again after `resume_step`: its lines of them are removed too.
            patient: keep lines that cannot be written, as on a full disk, until they can.
            enabled: False on all ranks but the first, where nothing is read or written.

        Raises:
            InputError: the file holds something else than metrics.
            JobError: it cannot be written.
        """
        self.path, self.patient = path, patient
        self._file: io.FileIO | None = None
        self._waiting = b""
        if enabled:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _drop_lines_past(path, resume_step, evaluates_again)
                self._file = io.FileIO(path, "a")
            except OSError as error:
                raise self._unwritten(error) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. It needs a "step": optimizer steps done. Values are what JSON holds, and any float.

        Raises:
            JobError: it cannot be written, and the log is not patient. No part of the line stays.
        """
        if not isinstance(line.get("step"), int):
            raise ValueError(f"a line of metrics needs an integer step: {dict(line)}")
        if self._file is not None:
            self._waiting += (json.dumps(_encode(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
            try:
                _append(self._file, self._waiting)
            except OSError as error:
                if not self.patient:
                    self._waiting = b""
                    raise self._unwritten(error) from error
            else:
                self._waiting = b""

    def close(self) -> None:
        """Close the file; nothing can be written any more.

        Raises:
            JobError: lines that wait could not be written.
        """
        if self._file is None:
            return
        try:
            _append(self._file, self._waiting)
        except OSError as error:
            raise self._unwritten(error) from error
        finally:
            self._file.close()

    def _unwritten(self, error: OSError) -> JobError:
        return JobError(f"{self.path} cannot be written ({error.strerror}): make room, and go on with --resume.")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(JobError) if error is not None else contextlib.nullcontext():
            self.close()


def _append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content` at the end of a file, or none of it."""
    if not content:
        return
    size = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(content):
            written += os.write(file.fileno(), content[written:])
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that was cut off.

    Raises:
        InputError: there is no such file, or a line is no JSON object with a step.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): is this the folder of a run?") from error
    return [_decode(line) for line in _parse(path, content)]


def _parse(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The objects of all lines that have an end."""
    lines = []
    for number, encoded in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            line = json.loads(encoded)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise InputError(f"{path}, line {number}, is no line of metrics: remove it, or restore the file.")
        lines.append(line)
    return lines


def _drop_lines_past(path: Path, step: int, evaluates_again: Collection[str]) -> None:
    """Rewrite the file without what comes again and without a cut-off last line; not at all if it has neither."""

    def stays(line: Mapping[str, Any]) -> bool:
        comes_again = line.get("kind") == "evaluation" and line.get("benchmark") in evaluates_again
        return bool(line["step"] < step or (line["step"] == step and not comes_again))

    if not path.exists():
        return
    content = path.read_bytes()
    parsed = _parse(path, content)
    kept = b"".join(
        encoded + b"\n" for encoded, line in zip(content.split(b"\n")[:-1], parsed, strict=True) if stays(line)
    )
    if kept != content:
        beside = path.with_name(f".{path.name}.rewriting")
        with beside.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _encode(each) for key, each in value.items()}
    return [_encode(each) for each in value] if isinstance(value, list | tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(each) for key, each in value.items()}
    return [_decode(each) for each in value] if isinstance(value, list) else value
