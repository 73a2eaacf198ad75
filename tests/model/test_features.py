"""Feature files: what is written is read, and a file that is wrong, or of another model, is refused in a sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.model import features
from partialfc.model.contract import variant_of
from partialfc.model.features import read_features, sidecar_path, write_features

CONTRACT, OTHER = "a" * 64, "b" * 64
ROWS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


def write(path: Path, contract: str = CONTRACT, rows: np.ndarray = ROWS, **options: Any) -> Path:
    write_features(path, rows, contract, **{"mirrored": True, **options})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    names = [f"é/{number}\udcff" for number in range(7)]
    write(tmp_path / "a.npy", mirrored=False, source="a set", failed=[2, 5], names=names)
    result = read_features(tmp_path / "a.npy", CONTRACT)
    np.testing.assert_array_equal(result.embeddings, ROWS)
    np.testing.assert_array_equal(result.failed, [False, False, True, False, False, True, False])
    assert (result.contract, result.mirrored, result.source, result.names) == (CONTRACT, False, "a set", names)
    assert isinstance(result.embeddings.base, np.memmap)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.json"]
    assert json.loads((tmp_path / "a.npy.json").read_text())["schema_version"] == 1
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), ROWS)


def test_features_without_a_sidecar_are_taken_as_unverified(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    result = read_features(tmp_path / "a.npy", CONTRACT)
    np.testing.assert_array_equal(result.embeddings, ROWS)
    assert (result.contract, result.mirrored, result.names) == (None, None, None)
    assert not result.failed.any()


def test_features_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    with pytest.raises(
        InputError, match=r"features of another model \(contract aaaaaaaaaaaa…, expected bbbb"
    ) as caught:
        read_features(path, OTHER)
    assert "\n" not in str(caught.value)
    assert read_features(path).contract == CONTRACT
    assert read_features(path, variant_of(CONTRACT, "onnx-float16")).contract == CONTRACT
    write(path, variant_of(OTHER, "bfloat16"))
    assert read_features(path, OTHER).contract == f"{OTHER}:bfloat16"
    with pytest.raises(InputError, match="another model"):
        read_features(path, CONTRACT)


@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.float64, ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_floating_point_numbers_become_float32(tmp_path: Path, dtype: str, order: Any) -> None:
    np.save(tmp_path / "a.npy", np.asarray(ROWS.astype(dtype), order=order))
    result = read_features(tmp_path / "a.npy").embeddings
    assert result.dtype == np.float32
    assert result.dtype.isnative
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, ROWS.astype(dtype).astype(np.float32))


def with_value(value: float) -> np.ndarray:
    rows = np.zeros((100, 4))
    rows[70, 1] = value
    return rows


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (with_value(np.nan).astype(np.float32), "NaN or infinity in row 70"),
        (with_value(-np.inf).astype(np.float16), "NaN or infinity in row 70"),
        (with_value(1e39), "NaN or infinity in row 70"),  # no float32
        (ROWS[0], r"shape \(4,\): features are \(N, D\)"),
        (ROWS[None], r"shape \(1, 7, 4\)"),
        (ROWS[:0], r"shape \(0, 4\)"),
        (ROWS[:, :0], r"shape \(7, 0\)"),
        (ROWS.astype(np.int64), "holds int64: save the features as float32"),
        (ROWS.astype(np.complex64), "holds complex64"),
        (np.array([["a"]]), "holds <U1"),
        (np.array([[object()]]), "no whole .npy file"),
    ],
)
def test_arrays_that_are_no_features_are_refused(
    array: np.ndarray, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_ROWS_AT_ONCE", 64)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message) as caught:
        read_features(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with pytest.raises(InputError, match=r"a.npy cannot be read \(No such file"):
        read_features(path)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        read_features(tmp_path)
    np.save(path, ROWS)
    content = path.read_bytes()
    for damaged in (b"", b"text", b"PK\x03\x04 no archive", content[:-1], content[:100], content[:20]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"no whole \.npy file"):
            read_features(path)
    path.write_bytes(content + b"x")
    with pytest.raises(InputError, match="longer than its header says"):
        read_features(path)
    np.savez(tmp_path / "a.npz", a=ROWS)
    with pytest.raises(InputError, match=r"a.npz is no whole \.npy file of numbers"):
        read_features(tmp_path / "a.npz")


@settings(deadline=None)
@given(st.integers(0, 127), st.integers(0, 255))
def test_any_byte_of_the_header_may_be_damaged(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    np.save(path, ROWS)
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert read_features(path).embeddings.size == ROWS.size


def change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {**values, **changes}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(schema_version=2), "schema_version 2, and this partialfc reads them up to 1: install a newer one"),
        (change(schema_version="1"), "schema_version '1', which is none"),
        (change(schema_version=True), "schema_version True, which is none"),
        (lambda values: [], r"describes no features \(it has no schema_version\)"),
        (change(count=8), "has 7 rows of 4 numbers, but a.npy.json describes 8 of 4"),
        (change(width=5), "describes 7 of 5"),
        (change(contract=None), "damaged .contract is None"),
        (change(mirrored="yes"), "damaged .mirrored is 'yes'"),
        (change(failed=[7]), "damaged .failed has other things than rows from 0 to 6"),
        (change(failed=[-1]), "damaged .failed has other things"),
        (change(failed=[True]), "damaged .failed has other things"),
        (change(names=["a"]), "damaged .there are 1 names for 7 rows"),
        (change(names="abcdefg"), "damaged .names is no list of text"),
        (change(names=[1] * 7), "damaged .names is no list of text"),
    ],
)
def test_a_wrong_sidecar_is_refused(edit: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    values = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(edit(values)))
    with pytest.raises(InputError, match=message) as caught:
        read_features(path, CONTRACT)
    assert "\n" not in str(caught.value)


def test_a_sidecar_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    for content in (b"", b"{", b"\xff"):
        sidecar_path(path).write_bytes(content)
        with pytest.raises(InputError, match="is not JSON"):
            read_features(path)
    sidecar_path(path).unlink()
    sidecar_path(path).mkdir()
    with pytest.raises(InputError, match=r"a.npy.json cannot be read \(Is a directory"):
        read_features(path)


def test_what_cannot_be_described_is_not_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy")
    for rows, options, message in (
        (ROWS.astype(np.float64), {}, "float32"),
        (ROWS[0], {}, "float32"),
        (ROWS, {"names": ["a"]}, "1 names for 7 rows"),
        (ROWS, {"failed": [7]}, "rows from 0 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            write(path, OTHER, rows, **options)
    assert read_features(path, CONTRACT).contract == CONTRACT
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.npy", "a.npy.json"]


def test_an_interrupted_write_never_pairs_features_with_a_wrong_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write is interrupted at each of its operations: afterwards the file is the old one, the new one, or gone."""
    path, new = tmp_path / "a.npy", ROWS + 1
    done, failing = 0, -1

    def stop_at(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == failing:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(owner, name, operation)

    for owner, name in ((np, "save"), (features.os, "fsync"), (Path, "replace"), (Path, "unlink")):
        stop_at(owner, name)
    write(path)
    done = 0
    write(path)
    total, outcomes = done, []
    assert total >= 7
    for number in range(1, total + 1):
        write(path)
        done, failing = 0, number
        with pytest.raises(KeyboardInterrupt):
            write(path, OTHER, new)
        failing = -1
        if path.exists():
            result = read_features(path)
            np.testing.assert_array_equal(result.embeddings, new if result.contract == OTHER else ROWS)
        outcomes.append(result.contract if path.exists() else "gone")
    assert set(outcomes) == {CONTRACT, "gone", OTHER}
