"""Features as a Parquet file: a row an image, with the same description as the sidecar of a `.npy`, in its schema.

Columns: `name` (text), `label` (int64) and `identity` (text), null where the images have none; `embedding`
(fixed_size_list of float32, not normalised); `quality` (float32), the norm of the embedding; `score` (float32) of the
detector, of crops that `align` has made, else null; `failed` (bool), an image that could not be read, with zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file
from partialfc.data.sources.parquet import import_pyarrow

SUFFIX = ".parquet"
_KEY = b"partialfc"  # of the description in the metadata of the schema
_ROWS = 8192  # of a row group


def write_table(
    path: Path,
    embeddings: NDArray[np.float32],
    failed: NDArray[np.bool_],
    facts: dict[str, Any],
    *,
    names: Sequence[str],
    labels: NDArray[np.int64] | None = None,
    identities: Sequence[str] | None = None,
    scores: Sequence[float | None] | None = None,
) -> None:
    """Write a table of features, replacing that at `path`.

    Args:
        embeddings: float32 (N, D).
        failed: bool (N,).
        facts: their description (`model.features.describe`).
        names: of the images.
        labels: int64 (N,), the class of each image, -1 if unknown.
        identities: the name of each class.
        scores: the detector's, None where it is not known.

    Raises:
        OSError: it cannot be written.
        InputError: pyarrow is not installed.
    """
    pa = import_pyarrow()
    width = embeddings.shape[1]
    columns = {
        "name": pa.string(),
        "label": pa.int64(),
        "identity": pa.string(),
        "embedding": pa.list_(pa.float32(), width),
        "quality": pa.float32(),
        "score": pa.float32(),
        "failed": pa.bool_(),
    }
    schema = pa.schema(list(columns.items()), metadata={_KEY: json.dumps(facts).encode()})
    with atomic_file(path) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(embeddings), _ROWS):
            rows = slice(start, start + _ROWS)
            part = np.ascontiguousarray(embeddings[rows])
            known = np.full(len(part), -1) if labels is None else labels[rows]
            own = [None if label < 0 else int(label) for label in known]
            people = [None if label is None or identities is None else storable(identities[label]) for label in own]
            values = [
                [storable(name) for name in names[rows]],
                own,
                people,
                pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width),
                np.linalg.norm(part.astype(np.float64), axis=1).astype(np.float32),
                [None] * len(part) if scores is None else scores[rows],
                failed[rows],
            ]
            arrays = [
                value if isinstance(value, pa.Array) else pa.array(value, type=kind)
                for value, kind in zip(values, columns.values(), strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def storable(name: str) -> str:
    """A name as a table holds it: bytes of a file's name that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_table(path: Path) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The description of a table of features, with `names` and `failed` rows, and its embeddings, float32 (N, D).

    Raises:
        InputError: it is none, or pyarrow is not installed.
    """
    pa = import_pyarrow()
    try:
        table = pa.parquet.read_table(path, columns=["name", "embedding", "failed"])
        facts = dict(json.loads((table.schema.metadata or {})[_KEY]))
        column = table.column("embedding").combine_chunks()
        embeddings = np.asarray(column.flatten()).reshape(-1, column.type.list_size)
        facts["failed"] = np.flatnonzero(np.asarray(table.column("failed"))).tolist()
        facts["names"] = table.column("name").to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no whole table of features ({error}): embed the images again.") from error
    return facts, embeddings
