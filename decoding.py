"""From an image file's bytes to 8-bit RGB pixels, within limits.

    bytes -> read_header -> Encoded (size known, nothing decoded) -> rgb / rgb_of_box -> pixels_HWC

JPEGs go through Pillow or simplejpeg, which give the same bits; whatever simplejpeg refuses, Pillow
judges. Alpha and EXIF rotation are ignored. Not here: where bytes come from, resizing, torch.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

Box = tuple[int, int, int, int]  # top, left, height, width

# RGB pixels of this many take 192 MB; a PNG of 9000 x 9000 can be a file of 236 kB.
MAX_IMAGE_PIXELS = 64_000_000
DECODERS = ("pillow", "simplejpeg")
SCALES = (8, 4, 2)  # libjpeg leaves out whole octaves of a block's frequencies
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8"
END_OF_IMAGE = b"\xff\xd9"
SEQUENTIAL, OTHER_FRAMES, START_OF_SCAN = (
    (0xC0, 0xC1),
    {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC},
    0xDA,
)
MARGIN_ROWS = 4  # chroma is interpolated from one of its own rows below, which is up to 4 of these
SEARCHED_BYTES = 1024
SHOWN_BYTES = 16
# What Pillow raises on damaged files; SyntaxError is its word for a broken PNG chunk.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


class UnreadableError(ValueError):
    """Bytes that are no image, or not one that is decoded here; the message is the reason."""


@dataclass(frozen=True)
class Encoded:
    """An image file's bytes with their header read: pixels are made when they are asked for."""

    data: bytes | bytearray
    width: int
    height: int
    is_scaled: bool = False
    by_simplejpeg: bool = False
    is_shortened: bool = False


def pick_decoder(name: str) -> tuple[str, str]:
    """Return the decoder for `dataset.decoder=auto|pillow|simplejpeg` and why it was taken.

    Raises:
        ValueError: It is asked for by name and not installed.
    """
    has_simplejpeg = importlib.util.find_spec("simplejpeg") is not None
    if name == "simplejpeg" and not has_simplejpeg:
        raise ValueError(
            "config dataset.decoder=simplejpeg: is not installed (pip install simplejpeg, or use "
            "pillow, which gives the same pixels)"
        )
    if name != "auto":
        return name, "asked for"
    if has_simplejpeg:
        return "simplejpeg", "auto: installed"
    return "pillow", "auto: simplejpeg is not installed"


def read_header(
    data: bytes | bytearray, *, decoder: str = "pillow", is_scaled: bool = False
) -> Encoded:
    """Return `data` with its size; `is_scaled` lets a JPEG be decoded no larger than is needed.

    Raises:
        UnreadableError: They are not a JPEG or PNG, or have too many pixels.
    """
    if not data:
        raise UnreadableError("empty")
    found = _jpeg_size(data) if decoder == "simplejpeg" else None
    width, height = found or _image_size(data)
    if width * height > MAX_IMAGE_PIXELS:  # known before a pixel is decoded
        raise UnreadableError(f"has {width}x{height} pixels, at most {MAX_IMAGE_PIXELS:,}")
    is_scaled = is_scaled and data.startswith(JPEG_MAGIC)
    return Encoded(data, width, height, is_scaled, by_simplejpeg=found is not None)


def _jpeg_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return width and height of a JPEG that simplejpeg turns into RGB, None of any other."""
    import simplejpeg  # noqa: PLC0415 - optional

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colors in ("YCbCr", "Gray", "RGB") else None


def _image_size(data: bytes | bytearray) -> tuple[int, int]:
    if data.startswith(PNG_MAGIC) and len(data) > 24:  # before Pillow warns of a large one
        return struct.unpack(">II", data[16:24])
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return image.size
    except Image.DecompressionBombError as err:
        raise UnreadableError(f"has too many pixels, at most {MAX_IMAGE_PIXELS:,}") from err
    except DAMAGED as err:
        raise UnreadableError(_reason(data, err)) from err


def _reason(data: bytes | bytearray, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not a JPEG or PNG, begins with {bytes(data[:SHOWN_BYTES])!r}"
    return "truncated" if "truncated" in str(error) else f"damaged: {error}"


def rgb(source: Encoded) -> np.ndarray:
    """Decode all pixels, uint8 [height, width, 3].

    Raises:
        UnreadableError: The file is damaged.
    """
    return _decode(source, scale=1)


def rgb_of_box(
    source: Encoded, box: Box, *, at_least: tuple[int, int], scratch: bytearray | None = None
) -> np.ndarray:
    """Decode the pixels of a box; a scaled source as few of them as are `at_least` (h, w).

    With `scratch` they may lie in it, where it is large enough, until it is used again.

    Shapes: box (top, left, height, width) of the full image -> uint8 [height', width', 3].
    Numerics: Without scaling these are the pixels of the whole image, bit for bit.

    Raises:
        UnreadableError: The file is damaged.
    """
    top, left, height, width = box
    scale = _scale(source, box, at_least=at_least)
    shortened = without_rows_below(source, top + height, scale=scale)
    pixels_HWC = _decode(shortened, scale=scale, scratch=scratch)
    rows = slice(top // scale, -(-(top + height) // scale))
    columns = slice(left // scale, -(-(left + width) // scale))
    return pixels_HWC[rows, columns]


def without_rows_below(source: Encoded, row: int, *, scale: int = 1) -> Encoded:
    """Return a JPEG that says it ends soon after `row`, so that the rest is not decoded.

    Rows lie one after the other in a sequential JPEG, so a smaller height in its header is all it
    takes. Any other file is returned as it is.
    """
    height = row + MARGIN_ROWS * scale
    place = _height_place(source.data) if height < source.height else None
    # A decoder that stops early does not see a truncated end.
    if place is None or END_OF_IMAGE not in source.data[-SEARCHED_BYTES:]:
        return source
    data = b"".join((source.data[:place], struct.pack(">H", height), source.data[place + 2 :]))
    return replace(source, data=data, height=height, is_shortened=True)


def _height_place(data: bytes | bytearray) -> int | None:
    """Return where a sequential JPEG's header has its height, None in any other file."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 9 <= len(data):
        marker, size = struct.unpack_from(">BH", data, place + 1)
        if marker in SEQUENTIAL:
            return place + 5 if data.startswith(JPEG_MAGIC) else None
        if marker in OTHER_FRAMES or marker == START_OF_SCAN:
            return None
        place += 2 + size
    return None


def _scale(source: Encoded, box: Box, *, at_least: tuple[int, int]) -> int:
    fits = (s for s in SCALES if box[2] >= s * at_least[0] and box[3] >= s * at_least[1])
    return next(fits, 1) if source.is_scaled else 1


def _decode(source: Encoded, *, scale: int, scratch: bytearray | None = None) -> np.ndarray:
    if source.by_simplejpeg:
        import simplejpeg  # noqa: PLC0415 - optional

        size = -(-source.height // scale), -(-source.width // scale)
        fits = scratch is not None and len(scratch) >= 3 * size[0] * size[1]
        try:
            return simplejpeg.decode_jpeg(
                source.data,
                min_height=size[0],
                min_width=size[1],
                min_factor=scale,
                buffer=scratch if fits else None,
                strict=not source.is_shortened,  # it would stumble over the rows left out
            )
        except ValueError:  # also of files that are only odd: Pillow, which is lenient, decides
            return _decode_by_pillow(source.data, scale=scale)
    return _decode_by_pillow(source.data, scale=scale)


def _decode_by_pillow(data: bytes | bytearray, *, scale: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if scale > 1:
                image.draft("RGB", (image.width // scale, image.height // scale))
            if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, convert would clip
                grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return np.array(grey.convert("RGB"))
            return np.array(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as err:
        raise UnreadableError(_reason(data, err)) from err
