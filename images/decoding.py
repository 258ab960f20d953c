"""From an image file's bytes to 8-bit RGB pixels, within limits.

    bytes -> read_header -> Encoded (size known, nothing decoded) -> rgb / rgb_of_box -> pixels_HWC

JPEGs go through Pillow or nvImageCodec, which give the same bits, as both have libjpeg-turbo;
whatever nvImageCodec refuses, Pillow judges. Alpha and EXIF rotation are ignored. Not here: where
bytes come from, resizing, torch.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from types import ModuleType

Box = tuple[int, int, int, int]  # top, left, height, width

# RGB pixels of this many take 192 MB; a PNG of 9000 x 9000 can be a file of 236 kB.
MAX_IMAGE_PIXELS = 64_000_000
SCALES = (8, 4, 2)  # libjpeg leaves out whole octaves of a block's frequencies
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8"
END_OF_IMAGE = b"\xff\xd9"
SEARCHED_BYTES = 1024
SHOWN_BYTES = 16
# What Pillow raises on damaged files; SyntaxError is its word for a broken PNG chunk.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
NVIMGCODEC, LIBJPEG_TURBO = "nvidia.nvimgcodec", "extensions/libjpeg_turbo_ext.so*"
EXTENSIONS, VERBOSITY = "NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY"
BITS = 8  # of a channel


class UnreadableError(ValueError):
    """Bytes that are no image, or not one that is decoded here; the message is the reason."""


class Stream(NamedTuple):
    """What nvImageCodec knows of a file, and the size of its image."""

    handle: Any
    width: int
    height: int


@dataclass(frozen=True)
class Encoded:
    """An image file's bytes with their header read: pixels are made when they are asked for.

    `stream` is what nvImageCodec made of them, None where Pillow decodes.
    """

    data: bytes
    width: int
    height: int
    is_scaled: bool = False
    stream: Stream | None = None


class NvImageCodec:
    """NVIDIA's nvImageCodec, of which only libjpeg-turbo on the CPU is used: it decodes a region.

    Rows and columns beside a region go through entropy decoding alone.
    """

    def __init__(self) -> None:
        codec = _import_without_gpu()
        self._codec = codec
        self._params = codec.DecodeParams(apply_exif_orientation=False)
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the caller's: loaders have processes
            backends=[codec.Backend(codec.CPU_ONLY)],
        )

    def stream(self, data: bytes) -> Stream | None:
        """Return the stream and size of a JPEG, None of what is none that it turns into RGB."""
        # Of a file cut short it would complain on stderr, without a name.
        if not data.startswith(JPEG_MAGIC) or END_OF_IMAGE not in data[-SEARCHED_BYTES:]:
            return None
        try:
            handle = self._codec.CodeStream(np.frombuffer(data, np.uint8))
            is_rgb = handle.num_channels in (1, 3) and handle.precision == BITS
            return Stream(handle, handle.width, handle.height) if is_rgb else None
        except RuntimeError:
            return None

    def pixels(self, stream: Stream, box: Box | None = None) -> np.ndarray | None:
        """Decode the pixels of a box, None of a damaged file."""
        handle = stream.handle
        if box is not None:
            top, left, height, width = box
            # One column alone would get another color at the left edge where chroma is subsampled.
            right = min(left + max(width, 2), stream.width)
            region = self._codec.Region(start=(top, left), end=(top + height, right))
            handle = handle.get_sub_code_stream(region=region)
        image = self._decoder.decode(handle, params=self._params)
        return None if image is None else np.asarray(image)[:, : box[3] if box else None]


def _import_without_gpu() -> ModuleType:
    """Import nvImageCodec with the one extension that is used.

    It would look for all others too, say on stderr, in every process, which libraries of CUDA they
    miss, and try another decoder on damaged files, which takes what Pillow refuses.
    """
    spec = importlib.util.find_spec(NVIMGCODEC)
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob(LIBJPEG_TURBO)]
    if not found:
        raise ImportError(f"{NVIMGCODEC} is not installed, or has no {LIBJPEG_TURBO}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / found[0].name).symlink_to(found[0])
        kept = {name: os.environ.get(name) for name in (EXTENSIONS, VERBOSITY)}
        os.environ.update({EXTENSIONS: folder, VERBOSITY: "0"})
        try:
            return importlib.import_module(NVIMGCODEC)
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _nvimgcodec(_process: int) -> NvImageCodec:
    return NvImageCodec()  # a forked process has its own


def pick_decoder(name: str) -> tuple[str, str]:
    """Return the decoder for `dataset.decoder=auto|pillow|nvimgcodec` and why it was taken.

    Raises:
        ValueError: It is asked for by name and not there.
    """
    if name == "pillow":
        return name, "asked for"
    try:
        _nvimgcodec(os.getpid())
    except (ImportError, RuntimeError, OSError, AttributeError) as err:
        if name == "auto":
            return "pillow", f"auto: no nvimgcodec ({err})"
        raise ValueError(
            f"config dataset.decoder={name}: cannot be loaded: {err} (pip install "
            "nvidia-nvimgcodec-cu13, or use pillow, which gives the same pixels)"
        ) from err
    return "nvimgcodec", "auto: installed" if name == "auto" else "asked for"


def read_header(data: bytes, *, decoder: str = "pillow", is_scaled: bool = False) -> Encoded:
    """Return `data` with its size; `is_scaled` lets a JPEG be decoded no larger than is needed.

    Raises:
        UnreadableError: They are not a JPEG or PNG, or have too many pixels.
    """
    if not data:
        raise UnreadableError("empty")
    found = _nvimgcodec(os.getpid()).stream(data) if decoder == "nvimgcodec" else None
    width, height = found[1:] if found else _image_size(data)
    if width * height > MAX_IMAGE_PIXELS:  # known before a pixel is decoded
        raise UnreadableError(f"has {width}x{height} pixels, at most {MAX_IMAGE_PIXELS:,}")
    is_scaled = is_scaled and data.startswith(JPEG_MAGIC)
    return Encoded(data, width, height, is_scaled, found)


def _image_size(data: bytes) -> tuple[int, int]:
    if data.startswith(PNG_MAGIC) and len(data) > 24:  # before Pillow warns of a large one
        return struct.unpack(">II", data[16:24])
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return image.size
    except Image.DecompressionBombError as err:
        raise UnreadableError(f"has too many pixels, at most {MAX_IMAGE_PIXELS:,}") from err
    except DAMAGED as err:
        raise UnreadableError(_reason(data, err)) from err


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not a JPEG or PNG, begins with {data[:SHOWN_BYTES]!r}"
    return "truncated" if "truncated" in str(error) else f"damaged: {error}"


def rgb(source: Encoded) -> np.ndarray:
    """Decode all pixels, uint8 [height, width, 3].

    Raises:
        UnreadableError: The file is damaged.
    """
    if source.stream is not None:
        pixels_HWC = _nvimgcodec(os.getpid()).pixels(source.stream)
        if pixels_HWC is not None:
            return pixels_HWC
    return _decode_by_pillow(source.data)


def rgb_of_box(source: Encoded, box: Box, *, at_least: tuple[int, int]) -> np.ndarray:
    """Decode the pixels of a box; a scaled source as few of them as are `at_least` (h, w).

    Shapes: box (top, left, height, width) of the full image -> uint8 [height', width', 3].
    Numerics: Without scaling these are the pixels of the whole image, bit for bit.

    Raises:
        UnreadableError: The file is damaged.
    """
    top, left, height, width = box
    scale = _scale(source, box, at_least=at_least)
    if source.stream is not None and scale == 1:
        pixels_HWC = _nvimgcodec(os.getpid()).pixels(source.stream, box)
        if pixels_HWC is not None:
            return pixels_HWC
    rows = slice(top // scale, -(-(top + height) // scale))
    columns = slice(left // scale, -(-(left + width) // scale))
    return _decode_by_pillow(source.data, scale=scale)[rows, columns]


def _scale(source: Encoded, box: Box, *, at_least: tuple[int, int]) -> int:
    fits = (s for s in SCALES if box[2] >= s * at_least[0] and box[3] >= s * at_least[1])
    return next(fits, 1) if source.is_scaled else 1


def _decode_by_pillow(data: bytes, *, scale: int = 1) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if scale > 1:  # nvImageCodec has no scaled decode
                image.draft("RGB", (image.width // scale, image.height // scale))
            if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, convert would clip
                grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return np.array(grey.convert("RGB"))
            return np.array(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as err:
        raise UnreadableError(_reason(data, err)) from err
