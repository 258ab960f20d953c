"""Index tar shards in WebDataset's layout; members are read in place, never unpacked.

    <split>/*.tar, or <any>-<split>-*.tar in one folder (validation counts as val)
    member <key>.jpg|.jpeg|.png   an image; keys may be in folders
    member <key>.cls              its class: a number, or an id such as n01440764
    member <key>.json             or the same under "label"

Without either, the key names the class: its folder, or the n01440764 of n01440764_10026. Numbers
are lines of a classes.txt beside the shards, or else names of their own. A shard may only hold
plain files and folders with plain names, so that it is also safe to unpack elsewhere.
"""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from images.index import ImageIndex, Names, Split, ordered_classes, wrong_root
from images.roots import is_harmless

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
CLASSES = "classes.txt"
MAX_MEMBERS = 200_000  # of one shard
MAX_LABEL_BYTES = 1 << 16
WNID = re.compile(r"n\d{8}")
SPLIT_WORDS = {"train": ("train",), "val": ("val", "validation")}
PARALLEL_SHARDS = 8  # this many or more are shared out to processes


class Member(NamedTuple):
    """An image in a shard: its name, its class as the shard spells it, where its bytes are."""

    name: str
    label: str
    offset: int
    size: int


def find_shards(root: Path, split: Split) -> list[Path]:
    """Return the split's shards in order of their names."""
    for word in SPLIT_WORDS[split]:
        if found := _tars(root / word):
            return found
    shards = _tars(root)  # not tars beside class folders, which were unpacked from them
    words = {path: set(re.split(r"[^a-z]+", path.stem.lower())) for path in shards}
    mine = [path for path in shards if words[path] & set(SPLIT_WORDS[split])]
    names_split = any(words[path] & set(sum(SPLIT_WORDS.values(), ())) for path in shards)
    return mine if names_split else shards  # if no name has a split, all belong to this one


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in found):
        return []
    return sorted(Path(entry.path) for entry in found if entry.name.endswith(".tar"))


def index_shards(shards: list[Path], split: Split) -> ImageIndex:
    """Read the headers of all shards.

    Raises:
        ValueError: A shard is damaged, empty or holds a forbidden member, or an image has no class.
    """
    root = shards[0].parent
    if len(shards) < PARALLEL_SHARDS:
        found = [read_shard(path) for path in shards]
    else:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            found = list(pool.map(read_shard, shards, chunksize=4))
    members = [(number, member) for number, part in enumerate(found) for member in part]
    classes, label_of = _classes(root, split, {member.label for _, member in members})
    return ImageIndex(
        root=root,
        layout="webdataset",
        paths=Names(f"{shards[number].name}/{member.name}" for number, member in members),
        labels=tuple(label_of[member.label] for _, member in members),
        classes=classes,
        split=split,
        sizes=array("q", (member.size for _, member in members)),
        shards=tuple(path.name for path in shards),
        shard_of=array("i", (number for number, _ in members)),
        offsets=array("q", (member.offset for _, member in members)),
        watched=(str(root),),
    )


def _classes(root: Path, split: Split, labels: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names in order and label -> their number."""
    file = next((p / CLASSES for p in (root, root.parent) if (p / CLASSES).is_file()), None)
    if file is None:
        names = sorted(labels, key=lambda label: (label.isdecimal(), label.zfill(8)))
        return tuple(names), {name: number for number, name in enumerate(names)}
    listed = file.read_text("utf-8").splitlines()
    classes = ordered_classes(listed)
    label_of = {name: number for number, name in enumerate(classes)}
    label_of |= {str(number): label_of[name] for number, name in enumerate(listed)}
    for label in sorted(labels - label_of.keys()):
        problem = f"class {label!r} must be one of the {len(listed)} lines of {file}"
        raise ValueError(wrong_root(root, split, problem))
    return classes, label_of


def read_shard(path: Path) -> list[Member]:
    """Return the images of one shard, in its order.

    Raises:
        ValueError: It is damaged, or holds no images or a forbidden member.
    """
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, str] = {}
    with path.open("rb") as raw:
        for member in _headers(path):
            key, suffix = _split_key(member.name)
            if suffix in IMAGE_SUFFIXES:
                images.append((key, member))
            elif suffix in (".cls", ".json"):
                text = os.pread(raw.fileno(), member.size, member.offset_data)
                labels.setdefault(key, _label(text, suffix, where=f"{path}: {member.name!r}"))
    if not images:
        raise ValueError(f"shard {path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [
        Member(
            member.name,
            labels.get(key) or _label_of_key(key, where=f"{path}: {member.name!r}"),
            member.offset_data,
            member.size,
        )
        for key, member in images
    ]


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of a shard; refuse forbidden members."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar, start=1):
                tar.members.clear()  # type: ignore[attr-defined]  # TarFile would keep them all
                _check_member(path, member, number=number, shard_bytes=size)
                if member.isreg():
                    yield member
    except (tarfile.TarError, EOFError, OverflowError) as err:
        raise ValueError(f"shard {path}: damaged ({err})") from err


def _check_member(path: Path, member: tarfile.TarInfo, *, number: int, shard_bytes: int) -> None:
    is_top = member.isdir() and PurePosixPath(member.name) == PurePosixPath()
    rule = None
    if not (is_top or is_harmless(member)) or member.issparse():
        rule = "must be a plain file or folder with a plain name below the shard's top"
    elif number > MAX_MEMBERS:
        rule = f"exceeds {MAX_MEMBERS:,} members"
    elif member.offset_data + member.size > shard_bytes:
        rule = f"ends after the shard's {shard_bytes:,} bytes: truncated"
    elif member.isreg() and member.name.endswith((".cls", ".json")):
        rule = "exceeds 64 KiB" if member.size > MAX_LABEL_BYTES else None
    if rule is not None:
        raise ValueError(f"shard {path}: member {member.name!r} {rule}")


def _split_key(name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, rest = base.partition(".")  # WebDataset's key ends at the first dot
    suffix = f".{rest.rpartition('.')[2].lower()}" if dot else ""
    return f"{folder}/{stem}" if folder else stem, suffix


def _label(text: bytes, suffix: str, *, where: str) -> str:
    try:
        value = json.loads(text) if suffix == ".json" else text.decode("ascii").strip()
        label = value.get("label", "") if isinstance(value, dict) else value
    except (ValueError, RecursionError) as err:
        raise ValueError(f"shard {where}: is not a label ({err})") from err
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"shard {where}: label {label!r} must be a number or an id")
    label = str(label)
    return str(int(label)) if label.isdecimal() else label


def _label_of_key(key: str, *, where: str) -> str:
    folder, _, stem = key.rpartition("/")
    if folder:
        return folder.rpartition("/")[2]
    if found := WNID.match(stem):
        return found[0]
    raise ValueError(f"shard {where}: has no class; it needs a .cls beside it")
