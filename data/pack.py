"""Rewrite a dataset as tar shards of smaller JPEGs: fewer files, fewer bytes, faster decoding.

    python data/pack.py --root /data/imagenet --out /data/imagenet-256 [--side 256] [--splits val]

Any layout that training reads (docs/data.md) -> <out>/<split>/<split>-000000.tar in WebDataset's
layout, and <out>/classes.txt. `--side` is the shorter side in pixels that larger images are resized
to (bicubic, JPEG quality 90); smaller ones, and all with 0, are kept as they are. A split gets its
name once it is complete; the same command run again continues an interrupted one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from PIL import Image
from tqdm import tqdm

from images.cache import index_images
from images.index import ImageIndex, Split
from images.reading import ImageReader, UnreadableError, describe, rgb, suffix_of_content
from images.shards import ambiguous_line
from options.command_line import Parser
from parallel.terminal import show_result, warn

QUALITY = 90
SHARD_IMAGES = 2_000
MAX_WORKERS = 1024
STEM_LENGTH = 60  # a tar's old and plain kind of header has room for 100 characters


def smaller(image: Image.Image, side: int) -> Image.Image:
    """Return a larger image with `side` pixels on its shorter side."""
    share = side / min(image.size)
    width, height = (max(side, round(share * pixels)) for pixels in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoded(reader: ImageReader, image: int, side: int | None) -> bytes | bytearray:
    """Return what goes into the shard for one image.

    Raises:
        UnreadableError: It cannot be read or, where `side` limits its size, cannot be decoded.
    """
    source = reader(image)
    if side is None:
        return source.data
    pixels_HWC = rgb(source)
    if min(source.width, source.height) <= side:
        return source.data
    sink = io.BytesIO()
    smaller(Image.fromarray(pixels_HWC), side).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


@dataclass(frozen=True)
class Packer:
    """Writes shards of an index; a shard is made in one process, all of it again or not at all."""

    index: ImageIndex
    folder: Path
    side: int | None
    is_skipping: bool

    @property
    def numbers(self) -> range:
        """The numbers of the shards that there will be."""
        return range(-(-len(self.index) // SHARD_IMAGES))

    def path(self, number: int) -> Path:
        """Return where a shard is."""
        return self.folder / f"{self.index.split}-{number:06d}.tar"

    def note(self, number: int) -> Path:
        """Return where it is written down what a shard was made of and which images it lacks."""
        return self.folder / f".{self.path(number).stem}.txt"

    def images(self, number: int) -> range:
        """Return the images of a shard."""
        first = number * SHARD_IMAGES
        return range(first, min(first + SHARD_IMAGES, len(self.index)))

    def made_of(self, number: int) -> str:
        """Return a digest of what a shard is made of."""
        index = self.index
        parts = [
            f"{index.paths[image]}\t{index.labels[image]}\t{index.sizes[image]}"
            for image in self.images(number)
        ]
        text = "\n".join([f"{self.side} {QUALITY}", *parts])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def find(self, number: int) -> list[str] | None:
        """Return the bad images that a shard of an earlier run lacks, None if there is none."""
        if not (self.path(number).is_file() and self.note(number).is_file()):
            return None
        made_of, *skipped = self.note(number).read_text("utf-8").splitlines() or [""]
        if made_of != self.made_of(number) or (skipped and not self.is_skipping):
            return None
        return skipped

    def write(self, number: int) -> list[str]:
        """Write a shard unless it is there already; return a line for each image it lacks.

        Raises:
            ValueError: An image cannot be read and none may be skipped.
        """
        if (kept := self.find(number)) is not None:
            return kept
        skipped: list[str] = []
        # The process is named: workers of a killed run may not have ended yet.
        staged = self.folder / f".{self.path(number).name}.{os.getpid()}.part"
        with tarfile.open(staged, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in self._members(number, skipped):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        self.path(number).unlink(missing_ok=True)  # of another source: it must not have this note
        self.note(number).write_text("\n".join([self.made_of(number), *skipped]), "utf-8")
        staged.rename(self.path(number))
        return skipped

    def _members(self, number: int, skipped: list[str]) -> Iterator[tuple[str, bytes | bytearray]]:
        """Yield name and content of a shard's members: each image and, beside it, its class."""
        index, reader = self.index, ImageReader(self.index)
        for image in self.images(number):
            try:
                data = encoded(reader, image, self.side)
            except UnreadableError as error:
                line = describe(index, image, str(error))
                if not self.is_skipping:
                    raise ValueError(line) from error
                skipped.append(line)
                continue
            stem = _plain(PurePosixPath(index.paths[image]).name.partition(".")[0])
            wnid = _plain(index.classes[index.labels[image]])
            key = f"{wnid}/{image:08d}_{stem}"  # WebDataset's keys must differ within a shard
            yield f"{key}{suffix_of_content(data)}", data
            if ambiguous_line(index.classes) is None:  # else the folder alone is the class
                yield f"{key}.cls", str(index.labels[image]).encode()


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:STEM_LENGTH]


def write_classes(out: Path, index: ImageIndex) -> None:
    """Write the classes in order of their labels.

    Raises:
        ValueError: Others are there.
    """
    file, classes = out / "classes.txt", "".join(f"{name}\n" for name in index.classes)
    if file.is_file() and file.read_text("utf-8") != classes:
        raise ValueError(f"{file}: {index.root} has other classes in {index.split}")
    file.write_text(classes, "utf-8")


def pack(
    root: Path,
    out: Path,
    *,
    split: Split,
    side: int | None,
    workers: int = 1,
    max_bad: int | None = None,
) -> tuple[int, int]:
    """Write the shards of one split and the classes; return how many images are in and left out.

    `max_bad` is how many unreadable images may be left out, None to stop at the first.

    Raises:
        ValueError: Images cannot be read, or the classes differ from those of another split.
        FileExistsError: The split is there already.
    """
    done = out / split
    if done.exists() and not (done.is_dir() and not any(done.iterdir())):
        other = "val" if split == "train" else "train"
        raise FileExistsError(
            f"{done}: is there already; delete it or name another folder (if it is complete and "
            f"{other} is not: --splits {other})"
        )
    index = index_images(root, split)
    for note in index.notes:
        warn(f"{split}: {index.root}: {note}")
    folder = out / f".{split}.part"
    folder.mkdir(parents=True, exist_ok=True)
    write_classes(out, index)
    packer = Packer(index, folder, side, is_skipping=max_bad is not None)
    known = {path for n in packer.numbers for path in (packer.path(n), packer.note(n))}
    for path in set(folder.iterdir()) - known:
        path.unlink()  # of a run that was killed, or of a larger dataset
    skipped = _write_all(packer, workers=workers, max_bad=max_bad or 0)
    folder.rename(done)
    for number in packer.numbers:
        (done / packer.note(number).name).unlink()
    return len(index) - skipped, skipped


def _write_all(packer: Packer, *, workers: int, max_bad: int) -> int:
    """Write all shards; return how many images were left out."""
    if workers == 1:
        return _count(packer, map(packer.write, packer.numbers), max_bad=max_bad)
    with ProcessPoolExecutor(
        min(workers, len(packer.numbers)), initializer=_take, initargs=(packer,)
    ) as pool:
        try:
            return _count(packer, pool.map(_write, packer.numbers), max_bad=max_bad)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_packers: list[Packer] = []  # of a worker process: one, which is not sent with every shard


def _take(packer: Packer) -> None:
    _packers[:] = [packer]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed: it would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write(number: int) -> list[str]:
    return _packers[0].write(number)


def _count(packer: Packer, shards: Iterator[list[str]], *, max_bad: int) -> int:
    """Wait for all shards; return how many images were left out, each of which is named."""
    split, count = packer.index.split, 0
    for skipped in tqdm(shards, split, len(packer.numbers), unit="shard", disable=None):
        for line in skipped:
            count += 1
            warn(f"{line}; skipped {count} of at most {max_bad}")
        if count > max_bad:
            raise ValueError(f"--max-bad {max_bad}: {count} images cannot be used")
    return count


def main(argv: list[str]) -> int:
    """Pack the splits; return the exit code and print one line for what cannot be done."""
    parser = Parser(
        prog="pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["train", "val"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop")
    parser.add_argument("--max-bad", type=int, help="images of a split to skip, at most; 128")
    arguments = parser.parse_args(argv)
    max_bad = 128 if arguments.max_bad is None else arguments.max_bad
    if arguments.side < 0 or not 1 <= arguments.workers <= MAX_WORKERS or max_bad < 0:
        parser.error(f"--side and --max-bad must be at least 0, --workers 1 to {MAX_WORKERS}")
    if arguments.on_error == "stop" and arguments.max_bad is not None:
        parser.error(f"--max-bad {max_bad}: has no effect without --on-error skip")
    try:
        for split in arguments.splits:
            count, skipped = pack(
                arguments.root,
                arguments.out,
                split=split,
                side=arguments.side or None,
                workers=arguments.workers,
                max_bad=max_bad if arguments.on_error == "skip" else None,
            )
            where = arguments.out / split
            show_result(f"{split}: {count} images in {where}, {skipped} skipped")
    except (ValueError, OSError, BrokenExecutor) as error:
        warn(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
