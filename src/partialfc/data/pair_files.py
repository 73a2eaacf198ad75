"""Verification pairs: the `.bin` files of LFW, CFP-FP, AgeDB-30 and their like.

Such a file is a pickle of (images, is_same), and a pickle is a program. It is read by an unpickler that accepts only
harmless instructions and maps the few NumPy names of these files to constructors of this module, so that a malicious
file ends in an error message.
"""

from __future__ import annotations

import io
import lzma
import pickle
import pickletools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, output_errors
from partialfc.data.images import UnreadableImage, decode_image
from partialfc.data.sources.base import check_regular

_OPCODE_NAMES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE BUILD"
)
_OPCODES = {
    opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes if opcode.name in _OPCODE_NAMES.split()
}
_DTYPES = ("u1", "b1", "i4", "i8", "f4", "f8")
_XZ_MAGIC, _XZ_MEMORY = b"\xfd7zXZ\0", 1 << 28  # xz -9 takes 65 MiB to unpack
_MAX_UNPACKED = 20  # times the bytes of an .xz, or 1 GiB; encoded images hardly shrink
# Decoded images may take this many times the bytes of the file, or 1 GiB. A plain PNG reaches about 200.
_MAX_GROWTH, _ALWAYS_ALLOWED = 1000, 1 << 30


@dataclass(frozen=True)
class PairSet:
    """Pairs of faces; pair i is images 2i and 2i + 1.

    Attributes:
        images: uint8 (2P, H, W, 3), RGB.
        is_same: bool (P,), whether both images of a pair are of one identity.
    """

    images: np.ndarray
    is_same: np.ndarray


class _Refused(Exception):
    """The file is not one of verification pairs; the message says why."""


class _Dtype:
    """Replaces numpy.dtype while unpickling: u1, b1, i4, i8, f4, f8 and S only."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        text = _text(code).lstrip("|<=>")
        if text not in _DTYPES and not (text[:1] == "S" and text[1:].isdecimal()):
            raise _Refused(f"an array of dtype {text[:40]!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order: Any = _text(state[1])
        if order not in ("|", "<", ">", "=") or any(part is not None for part in state[2:5]):
            raise _Refused("an array of structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Replaces numpy.ndarray while unpickling."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _build_array(data, dtype, shape, "F" if fortran else "C")


def _build_array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """The array in `data`, which must have exactly the bytes that dtype and shape need."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise _Refused("an array without plain data")
    lengths = [int(length) for length in shape]
    return np.frombuffer(data, dtype.dtype).reshape(lengths, order="F" if order == "F" else "C")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Replaces numpy's _reconstruct (protocols 0 to 4): an array whose state follows."""
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Replaces numpy's _frombuffer (protocol 5)."""
    array = _Array()
    array.value = _build_array(data, dtype, shape, _text(order))
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    """Replaces numpy's scalar: one element."""
    return _build_array(data.encode("latin1") if isinstance(data, str) else data, dtype, (1,), "C")[0]


def _encode(text: Any, encoding: Any = "latin1", errors: Any = "strict") -> bytes:
    """Replaces _codecs.encode, with which protocols 0 to 2 write bytes in Python 3."""
    if _text(encoding) not in ("latin1", "latin-1"):
        raise _Refused(f"the encoding {encoding!r}")
    return _text(text).encode("latin1")


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise _Refused(f"{type(value).__name__} for a string")
    return value if isinstance(value, str) else value.decode("latin1")


_CONSTRUCTORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _CONSTRUCTORS[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _CONSTRUCTORS[f"{_core}.multiarray", "scalar"] = _scalar
    _CONSTRUCTORS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        constructor = _CONSTRUCTORS.get((module, name))
        if constructor is None:
            raise _Refused(f"it asks for {module}.{name}")
        return constructor


def _unpickle(content: bytes) -> Any:
    """Read a pickle that consists of lists, tuples, strings, numbers and plain arrays.

    A first pass refuses other instructions and every length that exceeds the file.
    """
    stream = io.BytesIO(content)
    name = ""
    while name != "STOP":
        code = stream.read(1)
        if code not in _OPCODES:
            raise _Refused(f"it holds the instruction {code!r}" if code else "it ends in the middle")
        opcode = _OPCODES[code]
        name = opcode.name
        argument: Any = None
        if name == "STRING":  # pickletools expects ASCII, but Python 2 wrote images with it
            stream.readline()
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        if name in ("PUT", "LONG_BINPUT") and int(argument) > len(content):
            raise _Refused("it numbers more objects than it has bytes")
    return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()


def read_pairs(path: str | Path) -> PairSet:
    """Read a verification `.bin` file, or the `.xz` of one, and decode its images.

    Args:
        path: a pickle, protocol 0 to 5, of (images, is_same) with len(images) = 2 len(is_same). An image is bytes (in
            Python 2: str), a uint8 vector (both an encoded image), or a uint8 array (H, W, 3) (its pixels).

    Raises:
        InputError: the file cannot be read, has another form, asks for other objects (none of its code is executed),
            or one of its images is damaged or of another size than the first.
    """
    [path] = check_regular([Path(path)])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; give a file of verification pairs.") from error
    if content.startswith(_XZ_MAGIC):
        content = _unpack_xz(content, path)
    try:
        images, is_same = _parse(content)
    except Exception as error:  # a damaged pickle can fail in any way that parsing can
        reason = str(error) if isinstance(error, _Refused) else "it is damaged or no pickle"
        raise InputError(f"{path} is no file of verification pairs: {reason}.") from error
    return PairSet(_decode_all(images, path, len(content)), is_same)


def _unpack_xz(content: bytes, path: Path) -> bytes:
    cap = max(_ALWAYS_ALLOWED, _MAX_UNPACKED * len(content))
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    try:
        unpacked = unpacker.decompress(content, cap)
    except lzma.LZMAError as error:
        raise InputError(f"{path} is no sound .xz file ({error}): get a fresh copy of it.") from error
    if not unpacker.eof:
        reason = "it is cut off" if len(unpacked) < cap else f"unpacked it takes over {cap >> 20} MiB"
        raise InputError(f"{path} is no sound .xz file ({reason}): get a fresh copy of it.")
    return unpacked


def _parse(content: bytes) -> tuple[Sequence[Any] | np.ndarray, np.ndarray]:
    """The images, not decoded yet, and is_same, bool (P,)."""
    loaded = _unpickle(content)
    if not isinstance(loaded, tuple | list) or len(loaded) != 2:
        raise _Refused("it must hold (images, is_same)")
    images, answers = _elements(loaded[0]), _elements(loaded[1])
    for number, answer in enumerate(answers):
        answers_as_numbers = bool | int | float | np.bool_ | np.integer | np.floating
        if not isinstance(answer, answers_as_numbers) or answer not in (0, 1):
            raise _Refused(f"answer {number} is neither true nor false")
    if len(images) != 2 * len(answers) or not len(answers):
        raise _Refused(f"it holds {len(images)} images and {len(answers)} answers, but every answer needs two images")
    return images, np.array([bool(answer) for answer in answers])


def _elements(value: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(value, _Array) and value.value is not None and value.value.ndim:
        return value.value
    if isinstance(value, list | tuple):
        return value
    raise _Refused("it must hold two lists, images and is_same")


def _decode_all(elements: Sequence[Any] | np.ndarray, path: Path, file_size: int) -> np.ndarray:
    images: np.ndarray = np.empty(0, np.uint8)
    for number, element in enumerate(elements):
        try:
            image = _pixels(element)
        except UnreadableImage as error:
            raise InputError(f"Image {number} of {path} cannot be read: {error}.") from error
        if number == 0:
            needed = image.size * len(elements)
            if needed > max(_ALWAYS_ALLOWED, _MAX_GROWTH * file_size):
                raise InputError(f"The images of {path} would take {needed >> 20} MiB: this is no sound file.")
            images = np.empty((len(elements), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"Image {number} of {path} is {image.shape[1]} x {image.shape[0]}, the first one "
                f"{images.shape[2]} x {images.shape[1]}: align all faces to one size first."
            )
        images[number] = image
    return images


def _pixels(element: Any) -> np.ndarray:
    """The image (H, W, 3) in an element of the list."""
    if isinstance(element, _Array):
        element = element.value
    if isinstance(element, bytes | bytearray):
        return decode_image(bytes(element))
    if not isinstance(element, np.ndarray) or element.dtype != np.uint8:
        raise UnreadableImage("it is neither bytes nor an array of uint8")
    if element.ndim == 1 or (element.ndim == 2 and 1 in element.shape):  # OpenCV 3 and 4.0 encode to a column
        return decode_image(element.tobytes())
    if element.ndim != 3 or element.shape[2] != 3 or not element.size:
        raise UnreadableImage(f"an array of shape {element.shape} is neither an encoded image nor height x width x 3")
    return element


def write_pairs(path: str | Path, encoded_images: Sequence[bytes], is_same: Sequence[bool]) -> None:
    """Write a verification `.bin` file: a protocol 2 pickle with Python 2 strings, as the published ones are.

    It is written instruction by instruction, because Python 3 would encode the strings as calls. The file appears
    complete or not at all.

    Args:
        path: the file to write; an existing one is replaced.
        encoded_images: two for each pair.
        is_same: one answer a pair.

    Raises:
        InputError: the counts do not fit each other, or the file cannot be written.
    """
    path = Path(path)
    if len(encoded_images) != 2 * len(is_same) or not is_same:
        raise InputError(f"{path}: {len(encoded_images)} images and {len(is_same)} answers are not pairs.")
    with output_errors(path), atomic_file(path) as file:
        file.write(pickle.PROTO + b"\x02" + pickle.EMPTY_LIST + pickle.MARK)
        for image in encoded_images:
            file.write(pickle.BINSTRING + struct.pack("<i", len(image)) + image)
        file.write(pickle.APPENDS + pickle.EMPTY_LIST + pickle.MARK)
        file.write(b"".join(pickle.NEWTRUE if same else pickle.NEWFALSE for same in is_same))
        file.write(pickle.APPENDS + pickle.TUPLE2 + pickle.STOP)
