"""Index tar shards in WebDataset's layout; members are read in place, never unpacked.

    <split>/*.tar, or <any>-<split>-*.tar in one folder (validation counts as val)
    member <key>.jpg, .png, ...   an image; keys may be in folders
    member <key>.cls              its class: a number, or an id such as n01440764
    member <key>.json             or the same under "label"

Without either, the key names the class: its folder, or the n01440764 of n01440764_10026. That is an
id, even if it consists of digits; digits in .cls and .json are a number, of a line of a classes.txt
beside the shards. Without such a list all labels are numbers, or all are ids. A shard may only hold
plain files and folders with plain names, so that it is also safe to unpack elsewhere.
"""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from images.files import read_text
from images.index import ImageIndex, Names, Split, ordered_classes, unused_note, wrong_root
from images.reading import IMAGE_SUFFIXES, SIDE_SUFFIXES
from images.roots import is_harmless, members_of, open_tar

CLASSES = "classes.txt"
MAX_MEMBERS = 200_000  # of one shard
MAX_LABEL_BYTES = 1 << 16
WNID = re.compile(r"n\d{8}")
SPLIT_WORDS = {"train": ("train",), "val": ("val", "validation")}
PARALLEL_SHARDS = 8  # this many or more are shared out to processes


Label = str | int  # the id of a class, or its number


class Member(NamedTuple):
    """An image in a shard: its name, its class as the shard has it, where its bytes are."""

    name: str
    label: Label
    offset: int
    size: int


class Shard(NamedTuple):
    """The images of a shard in its order, and the names of what is neither image nor label."""

    members: list[Member]
    unused: list[str]


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
    members = [(number, member) for number, part in enumerate(found) for member in part.members]
    unused = [f"{shards[n].name}/{name}" for n, part in enumerate(found) for name in part.unused]
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
        notes=unused_note([*unused, *_beside(root)]),
    )


def _beside(root: Path) -> list[str]:
    """Return the files beside the shards that are neither shards nor labels."""
    known = (".tar", ".idx", *SIDE_SUFFIXES)
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries]
    return [name for name in names if not name.startswith(".") and not name.endswith(known)]


def watched_files(root: Path) -> tuple[str, ...]:
    """Return what shows whether an index of shards is out of date."""
    return (str(root), str(root.parent / CLASSES))


def _classes(
    root: Path, split: Split, labels: set[Label]
) -> tuple[tuple[str, ...], dict[Label, int]]:
    """Return the class names in order and label -> their position among them."""
    numbers = sorted(label for label in labels if isinstance(label, int))
    ids = sorted(label for label in labels if isinstance(label, str))
    file = next((p / CLASSES for p in (root, root.parent) if (p / CLASSES).is_file()), None)
    if file is None:
        if numbers and ids:
            problem = f"has classes by number ({numbers[0]}) and by id ({ids[0]!r})"
            raise ValueError(wrong_root(root, split, f"{problem}, so it needs a {CLASSES}"))
        names = tuple(ids or map(str, numbers))  # ids in the order of class folders
        found: list[Label] = [*ids, *numbers]
        return names, {label: place for place, label in enumerate(found)}
    listed = read_text(file).splitlines()
    try:
        classes = ordered_classes(listed)
    except ValueError as err:
        raise ValueError(f"{file}: {err}") from err
    place_of = {name: place for place, name in enumerate(classes)}
    label_of: dict[Label, int] = {number: place_of[name] for number, name in enumerate(listed)}
    label_of.update(place_of)
    wrong = [label for label in (*numbers, *ids) if label not in label_of]
    if wrong:
        problem = f"class {wrong[0]!r} must be one of the {len(listed)} lines of {file}"
        raise ValueError(wrong_root(root, split, problem))
    if numbers and (line := ambiguous_line(listed)) is not None:
        problem = (
            f"line {line} of {file}, counted from 0, is class {listed[line]!r}, so numbers in .cls "
            "or .json could be lines or classes; class ids that are no numbers, or labels from "
            "folders alone, would be clear"
        )
        raise ValueError(wrong_root(root, split, problem))
    return classes, label_of


def ambiguous_line(classes: Sequence[str]) -> int | None:
    """Return the number of the first class whose name is another number, None if there is none."""
    pairs = enumerate(classes)
    return next((line for line, name in pairs if name.isdecimal() and name != str(line)), None)


def read_shard(path: Path) -> Shard:
    """Return what is in one shard.

    Raises:
        ValueError: It is damaged, or holds no images or a forbidden member.
    """
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, Label] = {}
    unused: list[str] = []
    with path.open("rb") as raw:
        for member in _headers(path):
            key, suffix = _split_key(member.name)
            if suffix in IMAGE_SUFFIXES:
                images.append((key, member))
            elif suffix in (".cls", ".json"):
                text = os.pread(raw.fileno(), member.size, member.offset_data)
                where = f"{path}: {member.name!r}"
                label = _label(text, suffix, where=where)
                if label is None:
                    continue
                kept = labels.setdefault(key, label)
                if type(kept) is type(label) and kept != label:
                    raise ValueError(f"shard {where}: label {label!r} was {kept!r} before")
            elif suffix not in SIDE_SUFFIXES:
                unused.append(member.name)
    if not images:
        raise ValueError(f"shard {path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    members = []
    for key, member in images:
        where = f"{path}: {member.name!r}"
        label = labels[key] if key in labels else _label_of_key(key, where=where)
        members.append(Member(member.name, label, member.offset_data, member.size))
    return Shard(members, unused)


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of a shard; refuse forbidden members."""
    size = path.stat().st_size
    try:
        with path.open("rb") as raw, open_tar(raw) as tar:
            for number, member in enumerate(members_of(tar), start=1):
                _check_member(path, member, number=number, shard_bytes=size)
                if member.isreg():
                    yield member
    except (tarfile.TarError, EOFError, OverflowError, MemoryError) as err:
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


def _label(text: bytes, suffix: str, *, where: str) -> Label | None:
    """Return a label: digits are a number, anything else is an id; None if it says nothing."""
    try:
        value = json.loads(text) if suffix == ".json" else text.decode("ascii").strip()
        label = value.get("label") if isinstance(value, dict) else value
        label = int(label) if isinstance(label, str) and label.isdecimal() else label
    except (ValueError, RecursionError) as err:
        raise ValueError(f"shard {where}: is not a label ({err})") from err
    if label is None and isinstance(value, dict):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise ValueError(f"shard {where}: label {label!r} must be a number or an id")
    return label


def _label_of_key(key: str, *, where: str) -> str:
    folder, _, stem = key.rpartition("/")
    if folder:
        return folder.rpartition("/")[2]
    if found := WNID.match(stem):
        return found[0]
    raise ValueError(f"shard {where}: has no class; it needs a .cls beside it")
