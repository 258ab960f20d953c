"""Read the bytes of image number i, wherever the index says that they are.

    ImageIndex -> ImageReader(i) -> Encoded; a file or a run of bytes in a shard

What cannot be read is an UnreadableError; `describe` names the image, its class and its number.
"""

import errno
import os
import time
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from images.decoding import Encoded, UnreadableError, read_header, rgb
from images.index import ImageIndex

MAX_IMAGE_BYTES = 256 << 20
OPEN_SHARDS = 64
# What a file system across a network says for a while; others are for good.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
RETRY_AFTER_S = (0.1, 1.0)


class ImageReader:
    """Returns image i of an index, its header read; keeps the shards last used open."""

    def __init__(
        self, index: ImageIndex, *, decoder: str = "pillow", is_scaled: bool = False
    ) -> None:
        self.index = index
        self.decoder = decoder
        self.is_scaled = is_scaled
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens its own

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __call__(self, image: int) -> Encoded:
        """Read the file and its header.

        Raises:
            UnreadableError: It is gone, has another size than indexed, or is no image.
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
            # One byte more than indexed: a file that has grown is noticed, and not read whole.
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
    """Return the line about an image that cannot be used: split, class, number, file, reason."""
    folder, _, name = index.paths[image].rpartition("/")
    place = f"{folder}/" if index.shards and folder else ""
    size = "" if reason.endswith("bytes)") else f" ({index.sizes[image]:,} bytes)"
    wnid = index.classes[index.labels[image]]
    return f"data {index.split}/{wnid} index {image}: {place}{name} {reason}{size}"


def decode_rgb(path: Path) -> Image.Image:
    """Decode a JPEG or PNG of any mode to 8-bit RGB.

    Raises:
        UnreadableError: It is neither, damaged, or too large.
    """
    return Image.fromarray(rgb(read_header(path.read_bytes())))


def read_image(path: Path, *, where: str) -> Image.Image:
    """Decode a file; a ValueError says where it was named and why it cannot be read."""
    try:
        return decode_rgb(path)
    except (UnreadableError, OSError) as err:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise ValueError(f"{where} {path} ({size}): cannot be read: {err}") from err
