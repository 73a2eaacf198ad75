"""Decoding images to RGB pixels and encoding them, by Pillow; JPEG by simplejpeg where it is installed.

simplejpeg (extra `jpeg`) binds libjpeg-turbo, which Pillow uses too: the pixels are the same, in less time.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Pillow opens more formats than these; some of them start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 1 << 26  # 64 megapixels; a larger image is a decompression bomb, not a face
_PICTURE_SIZE = 112  # the longer side of a picture in a page, at most
_TOO_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to 8 bits silently


class UnreadableImage(Exception):
    """The bytes are no image or a damaged one. The message says what is wrong, and with which image if known."""


def decode_image(encoded: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image to RGB.

    Grey, palette and CMYK images are converted, transparency is dropped. The EXIF orientation is ignored, because
    aligned faces are stored upright.

    Args:
        encoded: the image file.
        out: uint8, contiguous; what the decoder can put there without a copy is put there, and `out` is returned. It
            may also be overwritten where something else is returned or raised.

    Returns:
        uint8 (H, W, 3), red first.

    Raises:
        UnreadableImage: Pillow refuses the bytes (truncated files included), or the image is larger than
            64 megapixels or deeper than 8 bits a channel in grey.
    """
    if simplejpeg is not None and encoded[:2] == b"\xff\xd8" and (pixels := _decode_jpeg(encoded, out)) is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"the image claims {width} x {height} pixels")
            if image.mode in _TOO_DEEP:
                raise UnreadableImage(f"the image has more than 8 bits a channel (Pillow mode {image.mode})")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(reason or type(error).__name__) from error


def _decode_jpeg(encoded: bytes, out: np.ndarray | None) -> np.ndarray | None:
    """The pixels of a flawless grey or YCbCr JPEG; None leaves the rest, and the words for what is wrong, to Pillow."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
        if height * width > MAX_PIXELS or colors not in ("YCbCr", "Gray"):
            return None
        if out is not None and out.shape == (height, width, 3):
            simplejpeg.decode_jpeg(encoded, buffer=out)
            return out
        pixels: np.ndarray = simplejpeg.decode_jpeg(encoded)
        return pixels
    except ValueError:  # also for what libjpeg only warns of
        return None


def encode_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """Encode uint8 (H, W, 3) RGB as JPEG (with loss), `quality` from 1 to 95."""
    return _encode(image, "JPEG", quality=quality)


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) RGB as PNG (without loss)."""
    return _encode(image, "PNG")


def _encode(image: np.ndarray, image_format: str, **options: int) -> bytes:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 (H, W, 3), not {image.dtype} {image.shape}")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, image_format, **options)
    return stream.getvalue()


def data_uri(image: np.ndarray) -> str:
    """A picture, uint8 (H, W, 3), as a data URI: JPEG, its longer side at most 112 pixels."""
    if max(image.shape[:2]) > _PICTURE_SIZE:
        small = Image.fromarray(image)
        small.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
        image = np.asarray(small)
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image, quality=85)).decode('ascii')}"
