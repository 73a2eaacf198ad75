"""The metrics of a run: metrics.jsonl with one JSON object a line, and the trackers that receive the same lines."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from partialfc.bench.machine import provenance
from partialfc.config.options import OutputConfig, TrainConfig
from partialfc.core.console import counted
from partialfc.core.errors import InputError, JobError
from partialfc.core.files import NO_UTF8, write_file
from partialfc.core.schema import check_schema_version
from partialfc.distributed.collectives import local_world_size, rank_of

Tracker = Callable[[Mapping[str, Any]], None]
SCHEMA_VERSION = 1
_MUCH_WAIT = 0.3
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends lines to a metrics file, where each can be read as soon as it is written, and passes them to trackers.

    JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity", which
    `read_metrics` turns back into numbers.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        evaluates_again: Collection[str] = (),
        patient: bool = False,
        enabled: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the file, and remove the lines past the checkpoint that the run continues from.

        Args:
            path: the file; made if missing, together with its folder.
            resume_step: optimizer steps done. Lines of later steps, which an interrupted run may have written, are
                removed since they will be written again, and so is a last line that was cut off.
            evaluates_again: benchmarks that are run again after `resume_step`: their lines of this step are removed.
            patient: keep lines that cannot be written, as on a full disk, until they can.
            enabled: False on all ranks but the first, where nothing is read or written.
            trackers: called with each line, after it is written.

        Raises:
            InputError: the file holds something other than metrics.
            JobError: it cannot be written.
        """
        self.path, self.patient, self.trackers = path, patient, trackers
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
        """Append one line. It needs a "step": optimizer steps done. Values are those of JSON, and any float.

        Raises:
            JobError: it cannot be written, and the log is not patient. No part of the line stays.
        """
        if not isinstance(line.get("step"), int):
            raise ValueError(f"a line of metrics needs an integer step: {dict(line)}")
        if self._file is not None:
            content = {**_encode(line), "schema_version": SCHEMA_VERSION}
            text = json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
            self._waiting += text.encode("utf-8", NO_UTF8)
            try:
                _append(self._file, self._waiting)
            except OSError as error:
                if not self.patient:
                    self._waiting = b""
                    raise self._unwritten(error) from error
            else:
                self._waiting = b""
        for track in self.trackers:
            track(line)

    def close(self) -> None:
        """Close the file.

        Raises:
            JobError: lines that were kept could not be written.
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(JobError) if error is not None else contextlib.nullcontext():
            self.close()


def log_start(path: Path, step: int, device: torch.device) -> None:
    """Note on rank 0 that a run starts, or goes on, after `step` steps; a full disk leaves the note out."""
    if rank_of() == 0:
        with contextlib.suppress(JobError), MetricsLog(path, resume_step=step) as log:
            log.write({"step": step, **provenance(str(device))})


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
        InputError: there is no such file, or a line is no JSON object with a step or of a newer version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): is this the folder of a run?") from error
    # A look at the bytes spares the walk through each line of a long run.
    return [_decode(line) if b'NaN"' in text or b'Infinity"' in text else line for text, line in _parse(path, content)]


def _parse(path: Path, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines that end with a newline, each with its object."""
    lines = []
    for number, encoded in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            line = json.loads(encoded)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise InputError(f"{path}, line {number}, is no line of metrics: remove it, or restore the file.")
        check_schema_version(path, line, SCHEMA_VERSION)
        line.pop("schema_version", None)
        lines.append((encoded, line))
    return lines


def _drop_lines_past(path: Path, step: int, evaluates_again: Collection[str]) -> None:
    """Rewrite the file without what will be written again and without a cut-off last line, if it has either."""

    def stays(line: Mapping[str, Any]) -> bool:
        comes_again = line.get("kind") == "evaluation" and line.get("benchmark") in evaluates_again
        return bool(line["step"] < step or (line["step"] == step and not comes_again))

    if not path.exists():
        return
    content = path.read_bytes()
    remaining = b"".join(encoded + b"\n" for encoded, line in _parse(path, content) if stays(line))
    if remaining != content:
        write_file(path, remaining)


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return _map_items(_encode, value)


def _decode(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else _map_items(_decode, value)


def _map_items(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: convert(item) for key, item in value.items()}
    return [convert(item) for item in value] if isinstance(value, list | tuple) else value


class SlowData:
    """Notices when a training waits for its images, and says once what helps.

    Args:
        workers: processes that read for each training process.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._lines = workers, 0

    def hint(self, data_wait: float) -> str:
        """The sentence at the third line in a row of which much is spent waiting; else ""."""
        self._lines = self._lines + 1 if data_wait > _MUCH_WAIT or self._lines > 2 else 0
        if self._lines != 3:
            return ""
        cores = (os.cpu_count() or 1) // local_world_size()
        remedies = []
        if self._workers < cores:
            remedies.append(f"raise --workers, {self._workers} of {counted(cores, 'core')} now")
        if importlib.util.find_spec("simplejpeg") is None:
            remedies.append("decode faster with pip install 'partialfc[jpeg]'")
        remedy = ", or ".join(remedies) or "keep the data on a faster disk, or as images of the size that is trained on"
        return (
            f"reading images is slower than training, {data_wait:.0%} of the time is spent waiting for them: {remedy}"
        )


# -- trackers --------------------------------------------------------------------------------------------------------


def open_trackers(config: TrainConfig, folder: Path, resume_step: int, stack: contextlib.ExitStack) -> list[Tracker]:
    """The trackers that the configuration asks for, which write into `folder`, and which `stack` closes.

    In TensorBoard, a resumed run hides the events of the steps that it repeats. Weights & Biases uses the network in
    the mode "online" only.
    """
    trackers: list[Tracker] = []
    output = config.output
    if output.tensorboard:
        module = importlib.import_module("torch.utils.tensorboard")
        board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

        def write(line: Mapping[str, Any]) -> None:
            for name, value in _scalars(line):
                board.add_scalar(name, value, line["step"])

        trackers.append(write)
        stack.callback(board.close)
    if output.wandb != "off":
        run = importlib.import_module("wandb").init(
            project="partialfc",
            name=folder.name,
            dir=str(folder),
            config=config.to_dict(),
            mode=output.wandb,
            resume="allow",
        )
        trackers.append(lambda line: run.log({**dict(_scalars(line)), "step": line["step"]}))
        stack.callback(run.finish)
    return trackers


def check_trackers(output: OutputConfig) -> None:
    """Raise an InputError that says what to install, if a package that the trackers need is missing."""
    modules = {"tensorboard": "torch.utils.tensorboard"} if output.tensorboard else {}
    modules |= {"wandb": "wandb"} if output.wandb != "off" else {}
    for extra, module in modules.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                f"output.{extra} needs the package {extra}, which is not installed: pip install 'partialfc[{extra}]', "
                "or leave the option out."
            ) from error


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, under "train/" or the name of their benchmark."""
    prefix = line.get("benchmark") or line.get("kind", "train")
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)
