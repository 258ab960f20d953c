"""Which images a split has, in a fixed order, with their labels and where their bytes are.

    cache.index_images -> ImageIndex -> select -> reading.ImageReader

An image is a file below `root`, or a range of bytes in one of the `shards` below it. Nothing is
read or decoded here.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

from parallel.seeds import stable_seed

Split = Literal["train", "val"]
SHOWN_KINDS = 5  # of files that are not used
WNID = re.compile(r"n\d+")
WNID_IN_NAME = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")


class Names(Sequence[str]):
    """A tuple of strings in two buffers: a million take 30 MB, and forked workers share them.

    A tuple of str would be copied page by page into every worker, as reading a string counts its
    references.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._bytes = bytearray()
        self._ends = array("q")
        for name in names:
            self._bytes += name.encode("utf-8", "surrogateescape")
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[str, ...]: ...
    def __getitem__(self, number: int | slice) -> str | tuple[str, ...]:
        if isinstance(number, slice):
            return tuple(self[item] for item in range(*number.indices(len(self))))
        number = range(len(self))[number]
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split in a fixed order; `paths` are relative to the split folder `root`.

    With `shards` (files below `root`), image i is the `sizes[i]` bytes from `offsets[i]` on in
    `shards[shard_of[i]]`, and its path is only a name. `watched` are the files and folders whose
    state shows whether the index is out of date. `prints` are the fingerprints of duplicates.py,
    if they were asked for. `notes` say what is in the dataset and not in the index.
    """

    root: Path
    layout: str
    paths: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    split: Split
    sizes: array
    shards: tuple[str, ...] = ()
    shard_of: array = field(default_factory=lambda: array("i"))
    offsets: array = field(default_factory=lambda: array("q"))
    watched: tuple[str, ...] = ()
    prints: array = field(default_factory=lambda: array("Q"))
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


def digest(index: ImageIndex) -> str:
    """Return a SHA-256 of the names and labels in order: they define what a position stands for."""
    lines = (f"{path}\t{label}" for path, label in zip(index.paths, index.labels, strict=True))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def check_splits(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless two splits belong together and every class has images."""
    check_separate(train, val)
    check_same_classes(train, val)
    check_every_class(train)
    check_every_class(val)


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless both splits have the same classes, hence the same labels."""
    if train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))
        unknown = sorted(set(val.classes) - set(train.classes))
        problems = [f"lacks {_some(missing)}"] * bool(missing)
        problems += [f"has {_some(unknown)}, which training lacks"] * bool(unknown)
        problem = " and ".join(problems) or "has the classes in another order"
        problem = f"{problem}; its classes must be those of {train.root}"
        raise ValueError(wrong_root(val.root, "val", problem))


def _some(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:5])
    return f"class {shown}" if len(classes) == 1 else f"{len(classes)} classes, as {shown}"


def check_separate(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError if both splits are the same images."""
    if (train.root, train.shards, train.paths) == (val.root, val.shards, val.paths):
        problem = "are the training images, too; name the dataset's root, or a folder for each"
        raise ValueError(wrong_root(val.root, "val", f"the {len(val)} images {problem}"))


def check_every_class(index: ImageIndex) -> None:
    """Raise ValueError if a class has no image; other layouts than class folders allow that."""
    present = set(index.labels)
    missing = [name for label, name in enumerate(index.classes) if label not in present]
    if missing:
        problem = (
            f"{len(missing)} of {len(index.classes)} classes have no image, the first "
            f"{missing[:5]}: labels are wrong, or dataset.class_filter must leave these out"
        )
        raise ValueError(wrong_root(index.root, index.split, problem))


def check_names(index: ImageIndex) -> None:
    """Raise ValueError if an image's path names another of the classes than its label."""
    label_of = {
        name: label for label, name in enumerate(index.classes) if WNID_IN_NAME.fullmatch(name)
    }
    if not label_of:
        return
    wrong = [
        (path, label)
        for path, label in zip(index.paths, index.labels, strict=True)
        if any(label_of.get(name, label) != label for name in WNID_IN_NAME.findall(path))
    ]
    if wrong:
        path, label = wrong[0]
        problem = (
            f"{len(wrong)} of {len(index)} images are named after another class than their label, "
            f"the first {path}, labelled {index.classes[label]}"
        )
        raise ValueError(wrong_root(index.root, index.split, problem))


def check_count(index: ImageIndex, expected: int | None) -> None:
    """Raise ValueError unless there are as many images as expected; None means any number."""
    if expected is not None and len(index) != expected:
        raise ValueError(
            f"config dataset.{index.split}.images={expected}: {index.root} has {len(index)} images "
            f"in {len(index.classes)} classes"
        )


def wrong_root(root: Path, split: Split, problem: str) -> str:
    """Return the message about an unusable dataset folder."""
    return f"config dataset.{split}.root={root}: {problem}"


def select(index: ImageIndex, *, class_filter: Sequence[str], share: float) -> ImageIndex:
    """Keep the named classes (all if none are), and a share of each one's images, at least one.

    Which images are kept depends only on the class and on their number in it, so every run keeps
    the same ones.

    Raises:
        ValueError: A class is not in the dataset.
    """
    unknown = sorted(set(class_filter) - set(index.classes))
    if unknown:
        raise ValueError(
            f"config dataset.class_filter={unknown[:5]}: not among the {len(index.classes)} "
            f"classes of {index.root}, the first of which are {', '.join(index.classes[:5])}"
        )
    classes = tuple(name for name in index.classes if not class_filter or name in class_filter)
    if classes == index.classes and share == 1:
        return index
    members: dict[int, list[int]] = {}
    for image, label in enumerate(index.labels):
        members.setdefault(label, []).append(image)
    new_label = {index.classes.index(name): number for number, name in enumerate(classes)}
    kept = [
        image
        for label in new_label
        for image in _share(members.get(label, []), index.classes[label], share)
    ]
    return _subset(index, sorted(kept), classes, new_label)


def relabel(index: ImageIndex, classes: Sequence[str]) -> ImageIndex:
    """Return the index with its labels as numbers in `classes`, which has all of its own."""
    number_of = {name: number for number, name in enumerate(classes)}
    labels = tuple(number_of[index.classes[label]] for label in index.labels)
    return replace(index, labels=labels, classes=tuple(classes))


def _share(images: list[int], wnid: str, share: float) -> list[int]:
    count = max(1, round(share * len(images)))
    order = sorted(range(len(images)), key=lambda place: stable_seed(0, "subset", wnid, place))
    return [images[place] for place in order[:count]]


def _subset(
    index: ImageIndex, kept: list[int], classes: tuple[str, ...], new_label: dict[int, int]
) -> ImageIndex:
    return replace(
        index,
        paths=Names(index.paths[image] for image in kept),
        labels=tuple(new_label[index.labels[image]] for image in kept),
        classes=classes,
        sizes=array("q", (index.sizes[image] for image in kept)),
        shard_of=array("i", (index.shard_of[image] for image in kept) if index.shards else ()),
        offsets=array("q", (index.offsets[image] for image in kept) if index.shards else ()),
        prints=array("Q", (index.prints[image] for image in kept) if index.prints else ()),
    )


def ordered_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Return a dataset's list of classes in label order: wnids sorted, other names as listed.

    Raises:
        ValueError: A name is listed twice.
    """
    if (twice := first_twice(names)) is not None:
        raise ValueError(f"class {twice!r} is listed twice")
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} is empty")
    is_wnids = all(WNID.fullmatch(name) for name in names)
    return tuple(sorted(names) if is_wnids else names)


def first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot."""
    stem, dot, rest = name.rpartition(".")
    return f".{rest.lower()}" if dot and stem else ""


def unused_note(names: Iterable[str]) -> tuple[str, ...]:
    """Say how many files are there and not used, with the first one of each suffix."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(suffix_of(name), []).append(name)
    if not kinds:
        return ()
    shown = [
        f"{len(found)} {suffix or 'without a suffix'} (the first: {found[0]!r})"
        for suffix, found in sorted(kinds.items())[:SHOWN_KINDS]
    ]
    more = [f"{len(kinds) - SHOWN_KINDS} other kinds"] * (len(kinds) > SHOWN_KINDS)
    count = sum(map(len, kinds.values()))
    return (f"{count} files that are no images read here are not used: {', '.join(shown + more)}",)
