"""Files of embeddings: a `.npy` of float32 (N, D) and, beside it, a JSON sidecar that says what it holds.

The sidecar of `FEATURES.npy` is `FEATURES.npy.json`. Both become visible in one instant: an old `.npy` is removed, the
sidecar is put into its place, and then the new `.npy` is renamed, so that no sidecar ever describes other features.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, fsync, temporary_name, write_file
from partialfc.core.schema import check_schema_version
from partialfc.model.contract import same_source
from partialfc.model.feature_table import SUFFIX, read_table

SCHEMA_VERSION = 1
_ROWS_AT_ONCE = 65536
_SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Features:
    """The content of a feature file.

    Attributes:
        embeddings: float32 (N, D), not normalised; mapped into memory where the file is float32.
        failed: bool (N,), the images that could not be read: failures to enrol, whose rows are zero.
        contract: of the model, or a variant of it; None without a sidecar, and then the features are unverified.
        mirrored: whether the embeddings of mirrored images were added; None if unknown.
        source: what was embedded, in words.
        names: the name of each row, None if they have none.
    """

    embeddings: NDArray[np.float32]
    failed: NDArray[np.bool_]
    contract: str | None = None
    mirrored: bool | None = None
    source: str = ""
    names: list[str] | None = None

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Those of some rows."""
        names = None if self.names is None else [self.names[row] for row in rows]
        return replace(self, embeddings=self.embeddings[rows], failed=self.failed[rows], names=names)

    def norms(self) -> NDArray[np.float64]:
        """float64 (N,), the lengths of the embeddings."""
        result = np.empty(len(self.embeddings))
        for start in range(0, len(result), _ROWS_AT_ONCE):
            rows = self.embeddings[start : start + _ROWS_AT_ONCE].astype(np.float64)
            result[start : start + _ROWS_AT_ONCE] = np.linalg.norm(rows, axis=1)
        return result

    def units(self) -> NDArray[np.float32]:
        """float32 (N, D): the embeddings scaled to length 1, in float64; rows of zeros stay."""
        result = np.empty(self.embeddings.shape, np.float32)
        for start in range(0, len(result), _ROWS_AT_ONCE):
            rows = self.embeddings[start : start + _ROWS_AT_ONCE].astype(np.float64)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            result[start : start + _ROWS_AT_ONCE] = rows / np.where(norms > 0, norms, 1.0)
        return result


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a feature file stands."""
    return path.with_name(f"{path.name}.json")


def write_features(
    path: str | Path,
    embeddings: NDArray[np.float32],
    contract: str,
    *,
    mirrored: bool,
    source: str = "",
    failed: Iterable[int] = (),
    names: list[str] | None = None,
) -> None:
    """Write a feature file and its sidecar, replacing those that are there.

    Args:
        path: the `.npy` file.
        embeddings: float32 (N, D), not normalised.
        failed: the rows of images that could not be read.
        contract, mirrored, source, names: as in `Features`.

    Raises:
        ValueError: the embeddings are not float32 (N, D), or the rows or names do not fit them.
        OSError: the files cannot be written.
    """
    path = Path(path)
    if embeddings.dtype != np.float32 or embeddings.ndim != 2:
        raise ValueError(f"features are float32 (N, D), not {embeddings.dtype} {embeddings.shape}")
    facts = describe(embeddings.shape, contract, mirrored=mirrored, source=source)
    part = temporary_name(path)
    try:
        with part.open("wb") as file:
            np.save(file, embeddings, allow_pickle=False)
        publish(part, path, facts, list(failed), names)
    finally:
        part.unlink(missing_ok=True)


def describe(shape: tuple[int, ...], contract: str, *, mirrored: bool, source: str) -> dict[str, Any]:
    """What the sidecar of an array of this shape says, without failed rows and names."""
    facts = {"contract": contract, "count": shape[0], "width": shape[1], "mirrored": mirrored, "source": source}
    return {"schema_version": SCHEMA_VERSION, **facts}


class FeatureWriter:
    """Appends the rows of a feature file, so that another process can go on if this one is killed.

    The rows are in `.NAME.part`, and `.NAME.progress.json` says every few seconds how many of them are on the
    storage. They are written and not mapped into memory: a full disk is then an ordinary error.

    Attributes:
        rows: rows so far, also those of an interrupted process that had the same description and work.
        failed: rows among them without an embedding.

    Args:
        path: the `.npy` file.
        facts: its description (`describe`).
        work: what else must be the same to go on, in JSON values.

    Raises:
        OSError: of every method, if a file cannot be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any], work: dict[str, Any]) -> None:
        self._path, self._facts, self._work = path, facts, {**facts, **work}
        self._part, self._progress = (path.with_name(f".{path.name}.{end}") for end in ("part", "progress.json"))
        state = self._read_progress() if self._part.is_file() else {}
        if not state:
            self._progress.unlink(missing_ok=True)  # before the rows that it counts are overwritten
        self.rows, self.failed = int(state.get("rows", 0)), list[int](state.get("failed", []))
        self._file = self._part.open("r+b" if state else "wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": (facts["count"], facts["width"])}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._file.seek(self._file.tell() + 4 * facts["width"] * self.rows)
        self._file.truncate()
        self._saved_at = time.monotonic()

    def _read_progress(self) -> dict[str, Any]:
        """What a process with the same work has saved; empty if there was none."""
        try:
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            return dict(state) if state["work"] == self._work else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def append(self, embeddings: NDArray[np.float32], failed: list[int]) -> None:
        """Append rows (n, D), and the numbers of those among them that have no embedding."""
        self._file.write(embeddings.astype("<f4", copy=False).tobytes())
        self.failed += [self.rows + row for row in failed]
        self.rows += len(embeddings)
        if time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_SAVES:
            self._file.flush()
            os.fsync(self._file.fileno())
            write_file(self._progress, json.dumps({"work": self._work, "rows": self.rows, "failed": self.failed}))
            self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close the file; what is saved stays for another process."""
        self._file.close()

    def publish(self, names: list[str] | None) -> None:
        """Let the file, which has all rows, take its place, with its sidecar. Raises as `publish`."""
        self._file.close()
        publish(self._part, self._path, self._facts, self.failed, names)
        self._progress.unlink(missing_ok=True)


def publish(part: Path, path: Path, facts: dict[str, Any], failed: list[int], names: list[str] | None) -> None:
    """Let a complete array that stands at `part` become the feature file `path`, described by `facts` (`describe`).

    Raises:
        ValueError: the rows or names do not fit the array.
        OSError: the sidecar cannot be written, or the files cannot be renamed.
    """
    values = {**facts, "failed": failed, "names": names}
    if reason := _contradiction(values):
        raise ValueError(f"the features cannot be described: {reason}")
    fsync(part)
    with atomic_file(sidecar_path(path)) as file:
        file.write(json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())  # whatever may fail for lack of room comes before the old features go
        path.unlink(missing_ok=True)
    part.replace(path)
    fsync(path.parent)


def read_features(path: str | Path, expected_contract: str | None = None) -> Features:
    """Read a feature file.

    float32 is mapped into memory; float16 is widened and float64 narrowed to float32 in memory.

    Args:
        path: the `.npy` file, or a `.parquet` of `model.feature_table`.
        expected_contract: of the model whose embeddings they must be, or of an export of it. Features without a sidecar
            are taken, and the caller reports them as unverified.

    Raises:
        InputError: the file is no `.npy` of finite numbers (N, D), its sidecar is damaged, newer, or of another shape,
            or the features are those of another model.
    """
    path = Path(path)
    if path.suffix == SUFFIX:
        facts, embeddings = read_table(path)
        values: dict[str, Any] | None = _check_description(facts, path)
    else:
        embeddings = _read_array(path)
        values = _read_sidecar(path)
    failed = np.zeros(len(embeddings), dtype=bool)
    if values is None:
        _check_finite(embeddings, path)
        return Features(embeddings, failed)
    if (values["count"], values["width"]) != embeddings.shape:
        raise InputError(
            f"{path} has {embeddings.shape[0]} rows of {embeddings.shape[1]} numbers, but {sidecar_path(path).name} "
            f"describes {values['count']} of {values['width']}: write the features again, or remove the .json."
        )
    contract = values["contract"]
    if expected_contract is not None and not same_source(contract, expected_contract):
        raise InputError(
            f"{path} holds the features of another model (contract {contract[:12]}…, expected "
            f"{expected_contract[:12]}…): embed the images with this model, or give the model that made them."
        )
    _check_finite(embeddings, path)
    failed[values["failed"]] = True
    return Features(embeddings, failed, *(values[name] for name in ("contract", "mirrored", "source", "names")))


def _read_array(path: Path) -> NDArray[np.float32]:
    """The array of a feature file, float32 (N, D)."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses objects
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): give a .npy file.") from error
    except Exception as error:  # for a file of another kind, NumPy's reader raises anything
        raise InputError(f"{path} is no whole .npy file of numbers: write it again, with numpy.save.") from error
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{path} has the shape {array.shape}: features are (N, D), one row an image.")
    if path.stat().st_size != array.offset + array.nbytes:
        raise InputError(f"{path} is longer than its header says: write it again, with numpy.save.")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise InputError(f"{path} holds {array.dtype}: save the features as float32.")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, which is refused
        return np.asarray(array, dtype=np.float32, order="C")


def _check_finite(embeddings: NDArray[np.float32], path: Path) -> None:
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        finite = np.isfinite(embeddings[start : start + _ROWS_AT_ONCE]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise InputError(
                f"{path} has NaN or infinity in row {row}: embed that image again, or give it a row of zeros and name "
                "it in the sidecar as failed."
            )


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    """The values of the sidecar of a feature file, None if there is none."""
    sidecar = sidecar_path(path)
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{sidecar} cannot be read ({error.strerror or error}): make it readable.") from error
    except ValueError as error:
        raise InputError(f"{sidecar} is not JSON ({error}): write the features again, or remove it.") from error
    return _check_description(values, sidecar)


def _check_description(values: Any, path: Path) -> dict[str, Any]:
    """The description of features, which `path` holds; an InputError if it is none."""
    if not isinstance(values, dict) or "schema_version" not in values:
        raise InputError(f"{path} describes no features (it has no schema_version): write the features again.")
    check_schema_version(path, values, SCHEMA_VERSION)
    if reason := _contradiction(values):
        raise InputError(f"{path} is damaged ({reason}): write the features again, or remove it.")
    return {"names": None, **values}


def _contradiction(values: dict[str, Any]) -> str:
    """What is wrong with the values of a sidecar, "" if nothing is."""
    kinds = {"contract": str, "count": int, "width": int, "mirrored": bool, "source": str, "failed": list}
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:
            return f"{name} is {values.get(name)!r}"
    count, names = values["count"], values.get("names")
    if not all(type(row) is int and 0 <= row < count for row in values["failed"]):
        return f"failed has other things than rows from 0 to {count - 1}"
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "names is no list of text"
    if names is not None and len(names) != count:
        return f"there are {len(names)} names for {count} rows"
    return ""
