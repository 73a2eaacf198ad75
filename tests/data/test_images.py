from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from partialfc.data import images
from partialfc.data.images import UnreadableImage, decode_image, encode_jpeg, encode_png

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image: Image.Image, image_format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


def test_png_gives_the_pixels_back() -> None:
    assert np.array_equal(decode_image(encode_png(RGB)), RGB)


def test_an_encoder_takes_any_memory_order() -> None:
    assert np.array_equal(decode_image(encode_png(RGB[::-1, :, ::-1])), RGB[::-1, :, ::-1])


def test_jpeg_is_close_and_gets_closer_with_quality() -> None:
    smooth = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    errors = [np.abs(decode_image(encode_jpeg(smooth, q)).astype(int) - smooth).mean() for q in (50, 90)]
    assert errors[1] < errors[0] < 8


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_format_is_rgb(image_format: str) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 250
    decoded = decode_image(encoded(Image.fromarray(red), image_format))
    assert decoded.shape == (8, 8, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - red).max() <= 6


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")],
)
def test_other_colour_modes_are_converted(mode: str, image_format: str) -> None:
    white = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    decoded = decode_image(encoded(white, image_format))
    assert decoded.shape == (8, 8, 3)
    assert decoded.min() >= 250


def test_sixteen_bit_grey_is_refused_rather_than_clipped() -> None:
    deep = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    with pytest.raises(UnreadableImage, match="8 bits"):
        decode_image(encoded(deep, "PNG"))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_truncated_files_are_unreadable(image_format: str) -> None:
    whole = encoded(Image.fromarray(RGB), image_format)
    for length in range(0, len(whole) - 40, 7):
        with pytest.raises(UnreadableImage):
            decode_image(whole[:length])


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", bytes(1000)]
)
def test_other_bytes_are_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableImage, match="no image that Pillow knows"):
        decode_image(content)


def test_a_decompression_bomb_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 20 * 30 - 1)
    with pytest.raises(UnreadableImage, match="30 x 20"):
        decode_image(encode_png(RGB))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4)])
def test_encoders_refuse_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decoders_give_the_same_pixels_and_the_same_errors(
    mode: str, subsampling: int, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images.simplejpeg is not None, "the extra jpeg is part of dev"
    for width, height in ((112, 112), (17, 30), (113, 97)):
        stream = io.BytesIO()
        image = Image.fromarray(RGB).resize((width, height)).convert(mode)
        image.save(stream, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        whole = stream.getvalue()
        for encoded_image in (whole, whole[: len(whole) // 2], whole[:-2], whole[:300] + b"12345" + whole[305:]):
            outcomes = []
            for module in (images.simplejpeg, None):
                with monkeypatch.context() as patch:
                    patch.setattr(images, "simplejpeg", module)
                    try:
                        outcomes.append(decode_image(encoded_image).tolist())
                    except UnreadableImage as error:
                        outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("encode", [encode_jpeg, encode_png])
def test_an_image_is_decoded_in_place_where_that_saves_a_copy(encode: Callable[[np.ndarray], bytes]) -> None:
    encoded, out = encode(RGB), np.zeros((2, *RGB.shape), np.uint8)
    expected = decode_image(encoded)
    result = decode_image(encoded, out[1])
    assert np.array_equal(result, expected)
    assert (out[0] == 0).all()
    assert np.array_equal(out[1], expected) == (encode is encode_jpeg)
    assert np.array_equal(decode_image(encoded, np.zeros((5, 5, 3), np.uint8)), expected)
