"""Read image number i of an index and decode it to 8-bit RGB pixels, within limits.

    ImageIndex -> ImageReader(i) -> Encoded (size known, nothing decoded)
    Encoded -> rgb | rgb_of_box -> pixels_HWC

JPEGs go through Pillow or nvImageCodec, which give the same bits, since both use libjpeg-turbo;
Pillow has the last word on whatever nvImageCodec refuses, and decodes the other formats. Alpha and
EXIF rotation are ignored, and so are all pages or frames but the first. An image that cannot be
read is an UnreadableError; `describe` names the image, its class and number.
Not here: resizing, torch.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import os
import struct
import tempfile
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError, features

from images.index import ImageIndex

if TYPE_CHECKING:
    from types import ModuleType

Box = tuple[int, int, int, int]  # top, left, height, width

# RGB pixels of this many take 192 MB; a PNG of 9000 x 9000 can be a file of 236 kB.
MAX_IMAGE_PIXELS = 64_000_000
SCALES = (8, 4, 2)  # libjpeg can leave out whole octaves of a block's frequencies
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
}
FORMATS = tuple(SUFFIXES)
IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
# Text and labels beside images, which nobody expects to be read as images.
SIDE_SUFFIXES = (*".txt .csv .tsv .json .xml .yaml .yml .md .html .log .mat .cls .npy".split(),)
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF tags
# Others are decoded to RGB by clipping them: 32 bits and floating point have no range of their own.
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8"
END_OF_IMAGE = b"\xff\xd9"
SEARCHED_BYTES = 1024
SHOWN_BYTES = 16
# What Pillow raises for damaged files; SyntaxError stands for a broken PNG chunk.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError),
    *(TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
)
NVIMGCODEC, LIBJPEG_TURBO = "nvidia.nvimgcodec", "extensions/libjpeg_turbo_ext.so*"
EXTENSIONS, VERBOSITY = "NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY"
BITS = 8  # of a channel
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # loaders already have a process per core
MAX_IMAGE_BYTES = 256 << 20
OPEN_SHARDS = 64
# Errors of a network file system that may pass; all others are final.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
RETRY_AFTER_S = (0.1, 1.0)


class UnreadableError(ValueError):
    """The bytes are not an image that is decoded here; the message is the reason."""


class Stream(NamedTuple):
    """A file that nvImageCodec has parsed, and the size of its image."""

    handle: Any
    width: int
    height: int


@dataclass(frozen=True)
class Encoded:
    """An image file's bytes and what its header says; pixels are decoded on request.

    Its size is enough to draw a crop, and then only the rows and columns of the crop are decoded.
    `stream` is None where Pillow decodes.
    """

    data: bytes
    width: int
    height: int
    is_scaled: bool = False
    stream: Stream | None = None


class NvImageCodec:
    """NVIDIA's nvImageCodec, used for one thing: libjpeg-turbo on the CPU, decoding a region.

    Rows and columns outside the region only go through entropy decoding.
    """

    def __init__(self) -> None:
        codec = _import_without_gpu()
        self._codec = codec
        self._params = codec.DecodeParams(apply_exif_orientation=False)
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the caller's own: loaders already have a process per core
            backends=[codec.Backend(codec.CPU_ONLY)],
        )

    def stream(self, data: bytes) -> Stream | None:
        """Return the stream and size of a JPEG, None for anything that Pillow has to judge."""
        # A truncated file would make it complain on stderr without saying which file.
        if not data.startswith(JPEG_MAGIC) or END_OF_IMAGE not in data[-SEARCHED_BYTES:]:
            return None
        try:
            handle = self._codec.CodeStream(np.frombuffer(data, np.uint8))
            is_rgb = handle.num_channels in (1, 3) and handle.precision == BITS
            return Stream(handle, handle.width, handle.height) if is_rgb else None
        except RuntimeError:
            return None

    def pixels(self, stream: Stream, box: Box | None = None) -> np.ndarray | None:
        """Decode the pixels of a box, None for a damaged file."""
        handle = stream.handle
        if box is not None:
            top, left, height, width = box
            # With subsampled chroma, a single column at the left edge would get another color.
            right = min(left + max(width, 2), stream.width)
            region = self._codec.Region(start=(top, left), end=(top + height, right))
            handle = handle.get_sub_code_stream(region=region)
        image = self._decoder.decode(handle, params=self._params)
        return None if image is None else np.asarray(image)[:, : box[3] if box else None]


def _import_without_gpu() -> ModuleType:
    """Import nvImageCodec with the one extension that is used.

    It would load all the others too: every process would report on stderr which CUDA libraries they
    miss, and another decoder would accept damaged files that Pillow refuses.
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
    return NvImageCodec()  # keyed by process: a decoder does not survive a fork


def pick_decoder(name: str) -> tuple[str, str]:
    """Return the decoder for `dataset.decoder=auto|pillow|nvimgcodec` and why it was chosen.

    Raises:
        ValueError: nvimgcodec was asked for by name and cannot be loaded.
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
    """Return `data` with its size; `is_scaled` allows decoding a JPEG at a fraction of its size.

    Raises:
        UnreadableError: It is of no known format, or has too many pixels.
    """
    if not data:
        raise UnreadableError("empty")
    found = _nvimgcodec(os.getpid()).stream(data) if decoder == "nvimgcodec" else None
    width, height = found[1:] if found else _image_size(data)
    if width * height > MAX_IMAGE_PIXELS:  # before anything is decoded, or memory taken for it
        raise UnreadableError(f"has {width}x{height} pixels, at most {MAX_IMAGE_PIXELS:,}")
    is_scaled = is_scaled and data.startswith(JPEG_MAGIC)
    return Encoded(data, width, height, is_scaled, found)


def _image_size(data: bytes) -> tuple[int, int]:
    if data.startswith(PNG_MAGIC) and len(data) > 24:  # Pillow would warn about a large one
        return struct.unpack(">II", data[16:24])
    try:
        with _open(data) as image:
            return image.size
    except UnreadableError:
        raise
    except Image.DecompressionBombError as err:
        raise UnreadableError(f"has too many pixels, at most {MAX_IMAGE_PIXELS:,}") from err
    except DAMAGED as err:
        raise UnreadableError(_reason(data, err)) from err


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not a {' or '.join(FORMATS)}, begins with {data[:SHOWN_BYTES]!r}"
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
    """Decode a box of an image; one that may be scaled gets no smaller than `at_least` (h, w).

    Shapes: box (top, left, height, width) of the full image -> uint8 [height', width', 3].
    Numerics: Unscaled pixels are those of the fully decoded image, bit for bit.

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
        with _open(data) as image:
            if scale > 1:  # nvImageCodec has no scaled decode
                image.draft("RGB", (image.width // scale, image.height // scale))
            if image.mode.startswith("I;16"):  # grey: convert() would clip, not scale
                grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return np.array(grey.convert("RGB"))
            if image.mode not in MODES:
                raise UnreadableError(
                    f"has pixels of mode {image.mode}, which are not 8-bit color or grey"
                )
            return np.array(image.convert("RGB"))
    except UnreadableError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as err:
        raise UnreadableError(_reason(data, err)) from err


def _open(data: bytes | bytearray) -> Image.Image:
    """Open an image; nothing is decoded yet.

    Raises:
        UnreadableError: A tile is larger than an image may be, and would be decoded as a whole.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    if tile > MAX_IMAGE_PIXELS:
        raise UnreadableError(f"has tiles of {tile:,} pixels, at most {MAX_IMAGE_PIXELS:,}")
    return image


def suffix_of_content(data: bytes | bytearray) -> str:
    """Return the suffix, with its dot, of an image that `read_header` has read."""
    with _open(data) as image:
        return SUFFIXES.get(image.format or "", SUFFIXES["JPEG"])[0]  # MPO is a JPEG, too


class ImageReader:
    """Returns image i of an index with its header read; keeps recently used shards open."""

    def __init__(
        self, index: ImageIndex, *, decoder: str = "pillow", is_scaled: bool = False
    ) -> None:
        self.index = index
        self.decoder = decoder
        self.is_scaled = is_scaled
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors mean nothing elsewhere

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __call__(self, image: int) -> Encoded:
        """Read the file and its header.

        Raises:
            UnreadableError: It is missing, is not an image, or its size is not the indexed one.
        """
        try:
            data = self._read_patiently(image)
        except OSError as err:
            raise UnreadableError(f"cannot be read: {err.strerror or err}") from err
        if len(data) != self.index.sizes[image]:
            what = "truncated" if len(data) < self.index.sizes[image] else "has changed"
            raise UnreadableError(f"{what} ({len(data):,} of {self.index.sizes[image]:,} bytes)")
        return read_header(data, decoder=self.decoder, is_scaled=self.is_scaled)

    def _read_patiently(self, image: int) -> bytes:
        for wait_s in RETRY_AFTER_S:
            try:
                return self._read(image)
            except OSError as err:
                if err.errno not in PASSING:
                    raise
            self._close(image)
            time.sleep(wait_s)
        return self._read(image)

    def _read(self, image: int) -> bytes:
        if self.index.sizes[image] > MAX_IMAGE_BYTES:
            raise UnreadableError(f"has more than {MAX_IMAGE_BYTES:,} bytes")
        if self.index.shards:
            file = self._shard(self.index.shard_of[image])
            return os.pread(file, self.index.sizes[image], self.index.offsets[image])
        file = os.open(f"{self.index.root}/{self.index.paths[image]}", os.O_RDONLY)
        try:
            # One byte more than indexed shows that a file has grown, without reading all of it.
            return os.pread(file, self.index.sizes[image] + 1, 0)
        finally:
            os.close(file)

    def _shard(self, number: int) -> int:
        if number not in self._open:
            path = self.index.root / self.index.shards[number]
            self._open[number] = os.open(path, os.O_RDONLY)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return self._open[number]

    def _close(self, image: int) -> None:
        if self.index.shards and self.index.shard_of[image] in self._open:
            os.close(self._open.pop(self.index.shard_of[image]))


def describe(index: ImageIndex, image: int, reason: str) -> str:
    """Return the message about an unusable image: split, class, number, file, reason."""
    folder, _, name = index.paths[image].rpartition("/")
    place = f"{folder}/" if index.shards and folder else ""
    size = "" if reason.endswith("bytes)") else f" ({index.sizes[image]:,} bytes)"
    wnid = index.classes[index.labels[image]]
    return f"data {index.split}/{wnid} index {image}: {place}{name} {reason}{size}"


def decode_rgb(path: Path) -> Image.Image:
    """Decode an image file of any known format to 8-bit RGB.

    Raises:
        UnreadableError: It is of no known format, is damaged, or is too large.
    """
    return Image.fromarray(rgb(read_header(path.read_bytes())))


def read_image(path: Path, *, where: str) -> Image.Image:
    """Decode a file; the ValueError for a bad one begins with `where` the user named it."""
    try:
        return decode_rgb(path)
    except (UnreadableError, OSError) as err:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise ValueError(f"{where} {path} ({size}): cannot be read: {err}") from err
