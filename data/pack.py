"""Rewrite a dataset as tar shards of smaller JPEGs: fewer files, fewer bytes, faster decoding.

    python data/pack.py --root /data/imagenet --out /data/imagenet-256 [--side 256] [--splits val]

Any layout that training reads (docs/data.md) -> <out>/<split>/<split>-000000.tar in WebDataset's
layout, and <out>/classes.txt. `--side` is the shorter side in pixels that larger images are resized
to (bicubic, JPEG quality 90); 0 keeps every file as it is. Images that cannot be read stop it.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from PIL import Image

from decoding import UnreadableError, rgb
from image_index import ImageIndex, Split
from image_reader import ImageReader, describe
from layouts import index_images

QUALITY = 90
SHARD_IMAGES = 2_000


def smaller(image: Image.Image, side: int) -> Image.Image:
    """Return the image with `side` pixels on its shorter side, itself if it has no more."""
    share = side / min(image.size)
    if share >= 1:
        return image
    width, height = (max(side, round(share * pixels)) for pixels in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoded(reader: ImageReader, image: int, side: int | None) -> bytes:
    """Return what goes into the shard for one image.

    Raises:
        ValueError: It cannot be read; the message names it.
    """
    try:
        source = reader(image)
        if side is None:
            return source.data
        sink = io.BytesIO()
        smaller(Image.fromarray(rgb(source)), side).save(sink, "JPEG", quality=QUALITY)
    except UnreadableError as error:
        raise ValueError(describe(reader.index, image, str(error))) from error
    return sink.getvalue()


def members(index: ImageIndex, images: range, side: int | None) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a shard's members: each image and, beside it, its class."""
    reader = ImageReader(index)
    for image in images:
        wnid = index.classes[index.labels[image]]
        stem = PurePosixPath(index.paths[image]).name.partition(".")[0]
        key = f"{wnid}/{image:08d}_{stem}"  # WebDataset's keys must differ within a shard
        yield f"{key}.jpg", encoded(reader, image, side)
        yield f"{key}.cls", str(index.labels[image]).encode()


def write_shard(path: Path, content: Iterator[tuple[str, bytes]]) -> None:
    """Write one shard; it has its name once it is complete."""
    staged = path.with_name(f".{path.name}.part")
    with tarfile.open(staged, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    staged.rename(path)


def pack(root: Path, out: Path, *, split: Split, side: int | None) -> int:
    """Write the shards of one split and the classes; return how many images there are.

    Raises:
        ValueError: An image cannot be read, or the classes differ from those of another split.
        FileExistsError: There are shards already.
    """
    index = index_images(root, split)
    folder = out / split
    if folder.is_dir() and any(folder.glob("*.tar")):
        raise FileExistsError(f"{folder}: has shards already; delete them or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    classes = "".join(f"{name}\n" for name in index.classes)
    if (out / "classes.txt").is_file() and (out / "classes.txt").read_text("utf-8") != classes:
        raise ValueError(f"{out / 'classes.txt'}: {root} has other classes in {split}")
    (out / "classes.txt").write_text(classes, "utf-8")
    for number, first in enumerate(range(0, len(index), SHARD_IMAGES)):
        images = range(first, min(first + SHARD_IMAGES, len(index)))
        write_shard(folder / f"{split}-{number:06d}.tar", members(index, images, side))
    return len(index)


def main() -> None:
    """Pack both splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["train", "val"])
    arguments = parser.parse_args()
    for split in arguments.splits:
        count = pack(arguments.root, arguments.out, split=split, side=arguments.side or None)
        print(f"{split}: {count} images in {arguments.out / split}")


if __name__ == "__main__":
    main()
