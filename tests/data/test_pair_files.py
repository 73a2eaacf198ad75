from __future__ import annotations

import contextlib
import io
import lzma
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import number_of, picture

from partialfc.core.errors import InputError
from partialfc.data import pair_files
from partialfc.data.images import encode_jpeg, encode_png
from partialfc.data.pair_files import read_pairs, write_pairs

ENCODED = [encode_png(picture(number)) for number in range(4)]
ANSWERS = [True, False]


def written(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def vector(encoded: bytes) -> np.ndarray:
    return np.frombuffer(encoded, np.uint8)


class TestRealFiles:
    def test_python_2_strings_and_arrays(self, pair_files: list[Path]) -> None:
        for path in pair_files:
            pairs = read_pairs(path)
            assert pairs.images.shape == (80, 112, 112, 3)
            assert pairs.images.dtype == np.uint8
            assert pairs.is_same.dtype == bool
            assert pairs.is_same.tolist() == [True, False] * 20

    def test_they_look_like_pairs(self, pair_files: list[Path]) -> None:
        """The drawings of one identity are closer to each other than those of two."""
        for path in pair_files:
            pairs = read_pairs(path)
            images = pairs.images.astype(np.float64)
            distance = np.abs(images[::2] - images[1::2]).mean((1, 2, 3))
            assert distance[pairs.is_same].mean() < distance[~pairs.is_same].mean()


class TestForms:
    """Every form of element in every protocol; the bytes differ much, the pairs must not."""

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize(
        "images",
        [
            ENCODED,
            tuple(ENCODED),
            [vector(encoded) for encoded in ENCODED],
            [vector(encoded).copy() for encoded in ENCODED],
            [vector(encoded).reshape(-1, 1) for encoded in ENCODED],
            [vector(encoded).reshape(1, -1) for encoded in ENCODED],
            [picture(number) for number in range(4)],
            [np.asfortranarray(picture(number)) for number in range(4)],
            [np.bytes_(encoded) for encoded in ENCODED],
            np.array(ENCODED),
            np.stack([picture(number) for number in range(4)]),
        ],
        ids=[
            "bytes",
            "tuple",
            "frozen",
            "vectors",
            "column",
            "row",
            "pixels",
            "fortran",
            "scalars",
            "S-array",
            "pixel-array",
        ],
    )
    def test_images(self, tmp_path: Path, images: Any, protocol: int) -> None:
        pairs = read_pairs(written(tmp_path / "a.bin", (images, ANSWERS), protocol))
        assert [number_of(image) for image in pairs.images] == [0, 1, 2, 3]
        assert pairs.is_same.tolist() == ANSWERS

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize(
        "answers",
        [
            [1, 0],
            (True, False),
            np.array([True, False]),
            np.array([1, 0]),
            np.array([1, 0], ">i4"),
            np.array([1, 0], np.uint8),
            [np.bool_(True), np.bool_(False)],
            [np.int64(1), np.int64(0)],
            [1.0, 0.0],
            np.array([1, 0], np.float32),
            [np.float64(1), np.float64(0)],
        ],
        ids=str,
    )
    def test_answers(self, tmp_path: Path, answers: Any, protocol: int) -> None:
        assert read_pairs(written(tmp_path / "a.bin", (ENCODED, answers), protocol)).is_same.tolist() == ANSWERS

    @pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
    def test_old_and_new_names_of_numpy(self, tmp_path: Path, core: str) -> None:
        content = pickle.dumps(([vector(encoded).copy() for encoded in ENCODED], ANSWERS), 2)
        content = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core.encode() + b".")
        assert core.encode() in content
        assert len(read_pairs(written(tmp_path / "a.bin", content)).images) == 4

    def test_bytearrays(self, tmp_path: Path) -> None:
        assert len(read_pairs(written(tmp_path / "a.bin", ([*map(bytearray, ENCODED)], ANSWERS), 5)).images) == 4

    def test_arrays_of_python_2(self, tmp_path: Path) -> None:
        """There, what names a dtype is a string of bytes."""
        content = pickle.dumps(([vector(encoded).copy() for encoded in ENCODED], np.array(ANSWERS)), 2)
        for text in (b"u1", b"b1", b"|"):
            as_text = b"X" + struct.pack("<I", len(text)) + text
            assert as_text in content
            content = content.replace(as_text, b"U" + bytes([len(text)]) + text)
        pairs = read_pairs(written(tmp_path / "a.bin", content))
        assert [number_of(image) for image in pairs.images] == [0, 1, 2, 3]
        assert pairs.is_same.tolist() == ANSWERS

    def test_python_2_text_protocol(self, tmp_path: Path) -> None:
        strings = b"".join(b"S" + repr(encoded)[1:].encode() + b"\np0\na" for encoded in ENCODED)
        content = b"((lp1\n" + strings + b"(lp2\nI01\naI00\nat."
        assert len(read_pairs(written(tmp_path / "a.bin", content)).images) == 4


class Attack:
    """A class whose pickle runs a command when it is read."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


class TestMalice:
    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("hidden", [False, True])
    def test_nothing_is_executed(self, tmp_path: Path, protocol: int, hidden: bool) -> None:
        target = tmp_path / "executed"
        attack = Attack(os.mkdir, str(target))
        content = (ENCODED, [*ANSWERS, attack]) if hidden else attack
        with pytest.raises(InputError, match=r"it asks for posix\.mkdir"):
            read_pairs(written(tmp_path / "a.bin", content, protocol))
        assert not target.exists()

    @pytest.mark.parametrize("call", [eval, getattr, print, np.frombuffer, np.fromfile, np.lib.format.open_memmap])
    def test_no_function_is_reached(self, tmp_path: Path, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(InputError, match="it asks for"):
            read_pairs(written(tmp_path / "a.bin", Attack(call, "print('executed')")))
        assert capsys.readouterr().out == ""

    def test_names_with_dots_lead_nowhere(self, tmp_path: Path) -> None:
        content = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93)R."
        with pytest.raises(InputError, match=r"numpy\.ndarray\.__class__"):
            read_pairs(written(tmp_path / "a.bin", content))

    @pytest.mark.parametrize(
        "content",
        [
            b"cos\nsystem\n(S'true'\ntR.",
            b"(S'true'\nios\nsystem\n.",
            b"(cos\nsystem\nS'true'\no.",
            b"\x80\x02cnumpy\nndarray\n)\x81.",
            b"\x80\x02\x82\x01.",
            b"\x80\x02P1\n.",
            b"\x80\x02}.",
            b"\x80\x04\x8f.",
        ],
        ids=["global", "inst", "obj", "newobj", "extension", "persistent", "dict", "set"],
    )
    def test_instructions_without_use_are_refused(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(InputError, match=r"it holds the instruction|it asks for os\.system|damaged"):
            read_pairs(written(tmp_path / "a.bin", content))

    @pytest.mark.parametrize(
        "content",
        [
            b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
            b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
            b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
            b"\x80\x02T\xff\xff\xff\x7f.",
            b"\x80\x02Nr\xff\xff\xff\xff.",
            b"Np4000000000\n.",
        ],
        ids=["bytes", "bytearray", "frame", "string", "memo", "text-memo"],
    )
    def test_declared_sizes_reserve_no_memory(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(InputError, match="no file of verification pairs"):
            read_pairs(written(tmp_path / "a.bin", content))

    def test_one_image_a_million_times(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pair_files, "_ALWAYS_ALLOWED", 1 << 20)
        monkeypatch.setattr(pair_files, "_MAX_GROWTH", 10)
        content = ([encode_png(picture(1, 200))] * 1000, [True] * 500)
        with pytest.raises(InputError, match="would take 114 MiB"):
            read_pairs(written(tmp_path / "a.bin", content))

    @pytest.mark.parametrize(
        "array",
        [
            np.array([{"a": 1}, None], object),
            np.array([1.5, 2.5], np.float16),
            np.array(["a", "b"]),
            np.zeros(2, [("a", "u1")]),
            np.array(["2020-01-01"], "M8[D]"),
        ],
        ids=["object", "float", "unicode", "record", "date"],
    )
    @pytest.mark.parametrize("protocol", [0, 2, 5])
    def test_other_arrays_are_refused(self, tmp_path: Path, array: np.ndarray, protocol: int) -> None:
        with pytest.raises(InputError, match=r"an array of|without plain data|it asks for|it holds the instruction"):
            read_pairs(written(tmp_path / "a.bin", (ENCODED, array), protocol))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"cnumpy\ndtype\n(Vu1\nI00\nI01\ntR(I3\nV!\nNNNtb.", "structured dtype"),
            (b"cnumpy\ndtype\n(I1\nI00\nI01\ntR.", "int for a string"),
            (b"cnumpy\nndarray\n(tR(I1\n(I4\ntNI00\nNtb.", "without plain data"),
            (b"(cnumpy\nndarray\n(tR(I1\nI0\ntt.", "two lists"),
        ],
    )
    def test_half_built_arrays(self, tmp_path: Path, content: bytes, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            read_pairs(written(tmp_path / "a.bin", content))

    def test_text_in_another_encoding(self, tmp_path: Path) -> None:
        content = b"c_codecs\nencode\n(Vx\nVrot13\ntR."
        with pytest.raises(InputError, match="the encoding 'rot13'"):
            read_pairs(written(tmp_path / "a.bin", content))

    @given(st.data())
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_damaged_files_raise_nothing_else(self, tmp_path: Path, data: st.DataObject) -> None:
        arrays = [vector(encoded).copy() for encoded in ENCODED]
        content = bytearray(pickle.dumps((arrays, np.array(ANSWERS)), data.draw(st.integers(0, 5))))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(InputError):
            assert read_pairs(written(tmp_path / "a.bin", bytes(content))).images.dtype == np.uint8


class TestXz:
    def test_the_same_pairs(self, tmp_path: Path, pair_files: list[Path]) -> None:
        for path in pair_files:
            packed = written(tmp_path / f"{path.name}.xz", lzma.compress(path.read_bytes()))
            pairs, expected = read_pairs(packed), read_pairs(path)
            assert (pairs.images == expected.images).all()
            assert (pairs.is_same == expected.is_same).all()

    def test_more_than_the_cap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pair_files, "_ALWAYS_ALLOWED", 1 << 20)
        bomb = written(tmp_path / "a.xz", lzma.compress(bytes(1 << 24)))
        assert bomb.stat().st_size < 10_000
        with pytest.raises(InputError, match=r"a\.xz is no sound \.xz file \(unpacked it takes over 1 MiB\)"):
            read_pairs(bomb)

    def test_memory_that_the_file_asks_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pair_files, "_XZ_MEMORY", 1 << 20)
        path = written(tmp_path / "a.xz", lzma.compress(b"x"))
        with pytest.raises(InputError, match=r"a\.xz is no sound \.xz file \(Memory usage limit"):
            read_pairs(path)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_damage(self, tmp_path: Path, data: st.DataObject) -> None:
        content = bytearray(lzma.compress(pickle.dumps((ENCODED, ANSWERS), 2)))
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path = written(tmp_path / "a.xz", bytes(content[: data.draw(st.integers(6, len(content)))]))
        try:
            assert read_pairs(path).is_same.tolist() == ANSWERS
        except InputError as error:
            assert "a.xz" in str(error)  # noqa: PT017


class TestNoPairs:
    @pytest.mark.parametrize("content", [b"", b"no pickle", ENCODED[0], b"\x80\x02]", pickle.dumps(7)])
    def test_other_files(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(InputError, match=r"a\.bin is no file of verification pairs"):
            read_pairs(written(tmp_path / "a.bin", content))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ((ENCODED, [True]), "4 images and 1 answers"),
            ((ENCODED[:3], [True]), "3 images and 1 answers"),
            (([], []), "0 images"),
            ((ENCODED, 5), "two lists"),
            ((ENCODED, [True, 2]), "answer 1 is neither"),
            ((ENCODED, [True, b"x"]), "answer 1 is neither"),
            ((ENCODED, [1.0, 0.5]), "answer 1 is neither"),
            ((ENCODED, np.array([float("nan"), 1.0])), "answer 0 is neither"),
            (([*ENCODED[:3], b"broken"], ANSWERS), "Image 3 of .* cannot be read"),
            (([*ENCODED[:3], encode_png(picture(1))[:40]], ANSWERS), "Image 3 of .* cannot be read"),
            (([*ENCODED[:3], 5], ANSWERS), "Image 3 of .* neither bytes nor"),
            (([*ENCODED[:3], np.zeros((4, 4), np.uint8)], ANSWERS), r"Image 3 of .* shape \(4, 4\)"),
            (([*ENCODED[:3], np.zeros(4, np.int64)], ANSWERS), "Image 3 of .* neither bytes nor"),
            (([*ENCODED[:3], encode_png(picture(1, 18))], ANSWERS), "Image 3 of .* is 18 x 18, the first one 16 x 16"),
        ],
    )
    def test_wrong_contents(self, tmp_path: Path, content: Any, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            read_pairs(written(tmp_path / "a.bin", content))

    def test_a_pipe_is_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.bin")
        with pytest.raises(InputError, match=r"a.bin is no regular file"):
            read_pairs(tmp_path / "a.bin")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="No such file"):
            read_pairs(tmp_path / "a.bin")


class TestWriting:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_pairs(tmp_path / "a.bin", ENCODED, ANSWERS)
        pairs = read_pairs(tmp_path / "a.bin")
        assert [number_of(image) for image in pairs.images] == [0, 1, 2, 3]
        assert pairs.is_same.tolist() == ANSWERS
        assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]

    def test_a_plain_unpickler_gets_the_same_as_from_the_published_files(self, tmp_path: Path) -> None:
        write_pairs(tmp_path / "a.bin", ENCODED, ANSWERS)
        with (tmp_path / "a.bin").open("rb") as file:
            images, answers = pickle.load(file, encoding="bytes")  # noqa: S301  (written three lines above)
        assert (images, answers) == (ENCODED, ANSWERS)

    def test_the_real_file_byte_for_byte(self, pair_files: list[Path], tmp_path: Path) -> None:
        """But for the memo marks, which pickletools takes out of both."""
        content = pair_files[0].read_bytes()
        images = [
            str(argument).encode("latin1") for opcode, argument, _ in pickletools.genops(content) if opcode.code == "T"
        ]
        write_pairs(tmp_path / "a.bin", images, [True, False] * 20)
        assert pickletools.optimize((tmp_path / "a.bin").read_bytes()) == pickletools.optimize(content)

    def test_jpeg_of_more_than_255_bytes(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        write_pairs(tmp_path / "a.bin", [encode_jpeg(noise)] * 2, [True])
        assert read_pairs(tmp_path / "a.bin").images.shape == (2, 64, 64, 3)

    @pytest.mark.parametrize("answers", [[True], []])
    def test_counts_must_fit(self, tmp_path: Path, answers: list[bool]) -> None:
        with pytest.raises(InputError, match="are not pairs"):
            write_pairs(tmp_path / "a.bin", ENCODED, answers)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Cannot write"):
            write_pairs(tmp_path / "nowhere" / "a.bin", ENCODED, ANSWERS)


def test_the_scan_stops_where_the_unpickler_stops(tmp_path: Path) -> None:
    """What follows STOP is never looked at."""
    stream = io.BytesIO()
    pickle.dump((ENCODED, ANSWERS), stream, 2)
    assert len(read_pairs(written(tmp_path / "a.bin", stream.getvalue() + b"cos\nsystem\n.")).images) == 4
