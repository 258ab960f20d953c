"""Render the bundled five-class data set, byte for byte the same from the same seed.

    python data/make_tiny_imagenet_5.py            # rewrite the archive beside this file
    python data/make_tiny_imagenet_5.py --check    # render again, compare, exit 1 on a difference
    python data/make_tiny_imagenet_5.py --contact-sheet data/contact_sheet.png

ImageNet's own pictures may not be passed on, so these are drawings that use five of its class ids,
in the folder layout of Tiny-ImageNet. Every picture has its own generator, keyed by (seed, split,
class, index): to add, drop or reorder pictures leaves the others as they were.
"""

import argparse
import gzip
import io
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from indoors import draw_comic_book, draw_fur_coat
from outdoors import draw_alp, draw_pole, draw_umbrella
from PIL import Image, ImageDraw
from PIL import __version__ as pillow_version
from scene import IMAGE_PX, Box, Palette, draw_palette, encode, photograph

ARCHIVE = Path(__file__).with_name("tiny-imagenet-5.tar.gz")
TOP = "tiny-imagenet-5"
SEED = 2026
NUM_TRAIN = 400  # per class
NUM_VAL = 100  # per class
LIMIT_BYTES = (1650, 2150)  # of one JPEG, drawn per picture
PILLOW_VERSION = "13.0.0"  # another version may encode or resample to other bytes
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Category:
    """One ImageNet class and the function that draws it."""

    wnid: str
    words: str
    draw: Callable[[np.random.Generator, Palette], Image.Image]


CATEGORIES = (
    Category("n03404251", "fur coat", draw_fur_coat),
    Category("n03976657", "pole", draw_pole),
    Category("n04507155", "umbrella", draw_umbrella),
    Category("n06596364", "comic book", draw_comic_book),
    Category("n09193705", "alp", draw_alp),
)


def render(seed: int, split: str, *, label: int, index: int) -> tuple[Image.Image, Box, int]:
    """Return one picture before JPEG, the box around its subject, and its size limit in bytes."""
    rng = np.random.default_rng([seed, SPLITS.index(split), label, index])
    limit_bytes = int(rng.integers(*LIMIT_BYTES))
    palette = draw_palette(rng)
    image, box = photograph(rng, CATEGORIES[label].draw(rng, palette), palette)
    return image, box, limit_bytes


def render_jpeg(seed: int, split: str, *, label: int, index: int) -> tuple[bytes, Box]:
    """Return one picture as JPEG bytes and the box around its subject."""
    image, box, limit_bytes = render(seed, split, label=label, index=index)
    return encode(image, limit_bytes=limit_bytes), box


def train_files(seed: int, *, num: int) -> dict[str, bytes]:
    """Return path -> content for train/."""
    files = {}
    for label, category in enumerate(CATEGORIES):
        folder, rows = f"train/{category.wnid}", []
        for index in range(num):
            name = f"{category.wnid}_{index}.JPEG"
            files[f"{folder}/images/{name}"], box = render_jpeg(
                seed, "train", label=label, index=index
            )
            rows.append("\t".join([name, *map(str, box)]))
        files[f"{folder}/{category.wnid}_boxes.txt"] = "".join(f"{row}\n" for row in rows).encode()
    return files


def val_files(seed: int, *, num: int) -> dict[str, bytes]:
    """Return path -> content for val/; file numbers are shuffled over the classes."""
    keys = [(label, index) for label in range(len(CATEGORIES)) for index in range(num)]
    order = np.random.default_rng([seed, len(SPLITS)]).permutation(len(keys))
    files, rows = {}, []
    for position, key in enumerate(order.tolist()):
        label, index = keys[key]
        name = f"val_{position}.JPEG"
        files[f"val/images/{name}"], box = render_jpeg(seed, "val", label=label, index=index)
        rows.append("\t".join([name, CATEGORIES[label].wnid, *map(str, box)]))
    files["val/val_annotations.txt"] = "".join(f"{row}\n" for row in rows).encode()
    return files


def all_files(seed: int, *, num_train: int, num_val: int) -> dict[str, bytes]:
    """Return path -> content of the whole data set, below its top folder."""
    files = train_files(seed, num=num_train) | val_files(seed, num=num_val)
    files["wnids.txt"] = "".join(f"{category.wnid}\n" for category in CATEGORIES).encode()
    lines = [f"{category.wnid}\t{category.words}\n" for category in CATEGORIES]
    files["words.txt"] = "".join(lines).encode()
    return files


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """Return an uncompressed tar of files and folders, sorted, without owner or time."""
    folders = {TOP} | {
        f"{TOP}/{parent}" for path in files for parent in Path(path).parents if parent != Path()
    }
    entries: dict[str, bytes | None] = {folder: None for folder in folders}
    entries |= {f"{TOP}/{path}": content for path, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(entries):
            content = entries[path]
            member = tarfile.TarInfo(path)  # mtime, uid and gid are 0, owner names empty
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            else:
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def gzip_bytes(content: bytes) -> bytes:
    """Return gzip bytes without file name or time; they may differ between zlib builds."""
    return gzip.compress(content, compresslevel=9, mtime=0)


def build(seed: int) -> bytes:
    """Return the uncompressed tar of the data set at its bundled size."""
    return tar_bytes(all_files(seed, num_train=NUM_TRAIN, num_val=NUM_VAL))


def members(tar: bytes) -> dict[str, bytes]:
    """Return path -> content of the regular files in an uncompressed tar."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        readers = {entry.name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        return {name: reader.read() for name, reader in readers.items() if reader is not None}


def differences(first: bytes, other: bytes) -> list[str]:
    """Return one line for every member that two tar streams do not share."""
    if first == other:
        return []
    left, right = members(first), members(other)
    names = sorted(left.keys() | right.keys())
    changed = [name for name in names if left.get(name) != right.get(name)]
    return changed or ["the members are equal, their order or headers are not"]


def check(path: Path, *, seed: int) -> bool:
    """Print how the archive compares with a fresh rendering; return whether the tar is equal."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--check --out={path}: no such file (without --check it is written)"
        )
    compressed, fresh = path.read_bytes(), build(seed)
    changed = differences(gzip.decompress(compressed), fresh)
    for name in changed[:20]:
        print(f"differs path={name}")
    is_same_gzip = gzip_bytes(fresh) == compressed
    print(f"check tar_equal={not changed} gzip_equal={is_same_gzip} changed={len(changed)}")
    return not changed


def contact_sheet(seed: int, *, columns: int) -> Image.Image:
    """Return a picture of the first training images, a row per class, names on the left."""
    margin = 76
    sheet = Image.new("RGB", (margin + columns * IMAGE_PX, len(CATEGORIES) * IMAGE_PX), "white")
    for label, category in enumerate(CATEGORIES):
        top = label * IMAGE_PX
        ImageDraw.Draw(sheet).text((4, top + 26), category.words, fill="black")
        for index in range(columns):
            data, _ = render_jpeg(seed, "train", label=label, index=index)
            with Image.open(io.BytesIO(data)) as image:
                sheet.paste(image, (margin + index * IMAGE_PX, top))
    return sheet


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line, parsed."""
    parser = argparse.ArgumentParser(description="Render the bundled five-class data set.")
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="archive to write or to check")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--check", action="store_true", help="compare with --out, write nothing")
    parser.add_argument("--contact-sheet", type=Path, metavar="PATH", help="write only this PNG")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status."""
    args = parse_arguments(arguments)
    if pillow_version != PILLOW_VERSION:
        print(f"warning pillow={pillow_version} bytes are promised for pillow={PILLOW_VERSION}")
    if args.check:
        return 0 if check(args.out, seed=args.seed) else 1
    if args.contact_sheet is not None:
        contact_sheet(args.seed, columns=10).save(args.contact_sheet, optimize=True)
        return 0
    compressed = gzip_bytes(build(args.seed))
    args.out.write_bytes(compressed)
    print(f"wrote path={args.out} bytes={len(compressed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
