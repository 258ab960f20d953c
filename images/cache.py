"""The index of a dataset: made once by recognising the layout, kept on disk, read by every rank.

    rank 0: refresh -> current? else index_images -> <folder>/<split>-<key>.npz
                    then with fingerprints, if they are asked for, as far as time allows
            -> its place and digest -> first rank of each node -> every rank: load -> ImageIndex

The file is `<root>/.moevit-index-<split>-<key>.npz`, or in ~/.cache/moevit if that is read-only: a
file, because a folder would be a class to others that read class folders. It is current if it is
this user's or root's own, watches what the layout gives, and every watched file keeps its name,
size and time. A digest in it is checked on reading; a damaged file is made again.
"""

import contextlib
import hashlib
import json
import os
import struct
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import duplicates, folders, shards
from images.arrow import find_saved, index_saved
from images.files import staging, sweep, untrusted_reason
from images.folders import LAYOUTS, find_folder, index_folder
from images.index import ImageIndex, Names, Split, check_names, wrong_root
from images.shards import find_shards, index_shards
from parallel import collectives
from parallel.distributed import World
from parallel.terminal import warn

VERSION = 5
PREFIX = ".moevit-index"
HOME_FOLDER = Path("~/.cache/moevit")
SEPARATOR = "\0"  # no file name contains it
TEXTS = ("layout", "classes", "split", "shards", "watched", "notes")
NUMBERS = {"labels": "i", "sizes": "q", "shard_of": "i", "offsets": "q", "prints": "Q"}
DAMAGED = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, ArithmeticError),
    *(SyntaxError, MemoryError, RecursionError, NotImplementedError, struct.error),
    *(zlib.error, zipfile.BadZipFile),
)
STAT_THREADS = 16  # network file systems answer several requests at once


class Layout(NamedTuple):
    """How to index a split, its folder, and what shows whether that has to be done again."""

    make: Callable[[], ImageIndex]
    root: Path
    watched: tuple[str, ...]


def find_layout(root: Path, split: Split) -> Layout:
    """Recognise the layout of a split; no image is looked at.

    Raises:
        FileNotFoundError: There is none.
    """
    if saved := find_saved(root, split):
        return Layout(partial(index_saved, saved, split), saved, (str(saved),))
    if tars := find_shards(root, split):
        top = tars[0].parent
        return Layout(partial(index_shards, tars, split), top, shards.watched_files(top))
    if folder := find_folder(root, split):
        return Layout(partial(index_folder, folder, split), folder, folders.watched_files(folder))
    problem = f"no folder {root / split}; allowed: {LAYOUTS}"
    raise FileNotFoundError(wrong_root(root, split, problem))


def index_images(root: Path, split: Split) -> ImageIndex:
    """List one split; `root` is the dataset's root or the split's folder, of any known layout.

    Classes are in sorted order, and so are the files of a class or shard. Hidden files are ignored.

    Raises:
        FileNotFoundError: The folder or the annotation file is missing.
        ValueError: There is no image, a class is empty, annotations do not match the images, names
            of images contradict their labels, or a shard must not be read.
    """
    layout = find_layout(root, split)
    index = replace(layout.make(), watched=layout.watched)
    check_names(index)
    return index


def _state(watched: Iterable[str]) -> str:
    """Return a digest of the name, size and time of every file below the paths.

    This costs a stat per file, which is why one rank does it for all.
    """
    folders, lines = [], []
    for path in map(Path, watched):
        if path.is_dir():
            folders.append(path)
        elif path.is_file():
            lines.append(_line(path.name, path.stat()))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for folder in folders:
            inner = [folder, *_folders_below(folder)]
            found = pool.map(partial(_file_lines, start=len(str(folder))), inner)
            lines += [line for part in found for line in part]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _folders_below(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        below = [Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir()]
    for path in below:
        yield path
        yield from _folders_below(path)


def _file_lines(folder: Path, *, start: int) -> list[str]:
    with os.scandir(folder) as entries:
        plain = [e for e in entries if not e.name.startswith(".") and e.is_file()]
    return [_line(entry.path[start:], entry.stat()) for entry in plain]


def _line(name: str, stat: os.stat_result) -> str:
    return f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}"


class Cached(NamedTuple):
    """Where an index is kept, a digest of it without its fingerprints, and whether it is new.

    Two jobs that take fingerprints at the same time may get to different images before their time
    is up. Either's index will do for the other, hence a digest without them.
    """

    path: Path
    identity: str
    is_new: bool


def refresh(
    root: Path, split: Split, *, folder: Path | None = None, prints_s: float = 0.0
) -> Cached:
    """Find the current index of a split, or make it. One process only.

    Then images without a fingerprint get one, for up to `prints_s` seconds from the call on. If the
    fingerprints cannot be written anywhere, an index kept earlier is returned without them.

    Raises:
        ValueError: The dataset cannot be indexed, or the index cannot be written anywhere.
    """
    ends = time.monotonic() + prints_s
    key = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    name = f"{split}-{key}.npz"
    paths = _places(root, folder, name)
    for path in paths:
        sweep(path)
    current, cached = _find_current(paths, find_layout(root, split))
    index = index_images(root, split) if current is None else current
    is_new, needs_prints = current is None, prints_s > 0 and duplicates.num_unknown(index) > 0
    if cached is not None and not needs_prints:
        return cached
    try:
        # Before the fingerprints, so that an interruption loses only those, and so that none are
        # taken if there is no place to keep them.
        cached = _write_first(paths, index, is_new=is_new)
        _remove_old(root / PREFIX, name)
        if needs_prints:
            index = replace(index, prints=duplicates.fingerprints(index, ends=ends))
            cached = _write_first(paths, index, is_new=is_new)
    except OSError as error:
        if cached is None:
            raise ValueError(
                f"config dataset.index_folder={folder}: the index of {root} cannot be written "
                f"anywhere ({error})"
            ) from error
    return cached


def _places(root: Path, folder: Path | None, name: str) -> list[Path]:
    """Return where an index may be kept: in `folder` alone, or with the data or in the home."""
    if folder:
        return [folder / name]
    beside = root / f"{PREFIX}-{name}"
    try:
        return [beside, HOME_FOLDER.expanduser() / name]
    except RuntimeError:  # a user without a home; the data's folder will do, or the error says so
        return [beside]


def _find_current(paths: Sequence[Path], layout: Layout) -> tuple[ImageIndex | None, Cached | None]:
    """Return the current index with the most fingerprints, if there is one, and its place."""
    found = []
    state = None
    for path in filter(_is_trusted, paths):
        kept = _read(path)
        # What it says about itself proves nothing: it may be of another dataset.
        if kept is None or (kept[0].root, kept[0].watched) != (layout.root, layout.watched):
            continue
        state = state or _state(layout.watched)
        if kept[1]["state"] == state:
            found.append((kept[0], Cached(path, kept[1]["identity"], is_new=False)))
    return min(found, key=lambda one: duplicates.num_unknown(one[0]), default=(None, None))


def _is_trusted(path: Path) -> bool:
    """Return whether an index is there and this user's own; say so if it is another's."""
    try:
        reason = untrusted_reason(path.lstat())
    except OSError:
        return False
    if reason:
        warn(f"data: index {path}: is not used, it {reason}")
    return reason is None


def _remove_old(folder: Path, name: str) -> None:
    """Remove the index of an earlier version, whose folder looks like a class to others."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
            folder.rmdir()  # unless it holds more


def _write_first(paths: Sequence[Path], index: ImageIndex, *, is_new: bool) -> Cached:
    """Write the index to the first path that can be written; OSError if none can."""
    arrays, identity = _pack(index)
    problems = []
    for path in paths:
        try:
            _write(path, arrays)
        except OSError as error:
            problems.append(str(error))
        else:
            return Cached(path, identity, is_new)
    raise OSError("; ".join(problems))


def is_kept(cached: Cached) -> bool:
    """Return whether this process sees the index that another one, maybe on another node, made."""
    kept = _read(cached.path)
    return kept is not None and kept[1]["identity"] == cached.identity


def load(cached: Cached) -> ImageIndex:
    """Return the index that `refresh` found or made.

    Raises:
        ValueError: The file has been replaced or damaged since.
    """
    kept = _read(cached.path)
    if kept is None or kept[1]["identity"] != cached.identity:
        raise ValueError(f"index {cached.path}: has changed since it was written; start again")
    return kept[0]


def _pack(index: ImageIndex) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays to write, and the index's identity."""
    header: dict[str, object] = {name: getattr(index, name) for name in TEXTS}
    header |= {"version": VERSION, "root": str(index.root), "state": _state(index.watched)}
    names = SEPARATOR.join(index.paths).encode("utf-8", "surrogateescape")
    arrays = {name: np.asarray(getattr(index, name), kind) for name, kind in NUMBERS.items()}
    arrays["paths"] = np.frombuffer(names, np.uint8)
    prints = arrays.pop("prints")
    identity = _digest(arrays, header)
    header["identity"] = identity
    arrays["prints"] = prints
    text = json.dumps(header | {"digest": _digest(arrays, header)}).encode()
    return {**arrays, "header": np.frombuffer(text, np.uint8)}, identity


def _digest(arrays: Mapping[str, np.ndarray], header: Mapping[str, object]) -> str:
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        owner = path.lstat().st_uid
        if owner not in (os.geteuid(), 0):  # each would replace the other's at every start
            raise PermissionError(f"{path} belongs to user {owner}")
    with staging(path) as staged:
        np.savez(staged.sink, allow_pickle=False, **arrays)
        staged.sink.flush()
        staged.path.replace(path)
        if reason := untrusted_reason(path.lstat()):  # on a mount with owners or modes of its own
            path.unlink()
            raise PermissionError(f"what is written to {path.parent} {reason}")


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an index, which take no more memory than the file has bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        members = zipfile.ZipFile(file).infolist()
        is_plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_plain or sum(member.file_size for member in members) > size:
            raise ValueError("is larger than its file")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def _read(path: Path) -> tuple[ImageIndex, dict] | None:
    """Return the index and its header, None if the file is missing or damaged."""
    try:
        arrays = _load_arrays(path)
        header = json.loads(arrays.pop("header").tobytes())
        digest = header.pop("digest")
        if header["version"] != VERSION or _digest(arrays, header) != digest:
            return None
        index = _index(arrays, header)
        return (index, header) if _is_whole(index) else None
    except DAMAGED:
        return None


def _is_whole(index: ImageIndex) -> bool:
    """Return whether every number is one of a class, a shard or a place in a file."""
    count, in_shards = len(index), len(index) if index.shards else 0
    lengths = [len(index.labels), len(index.sizes), len(index.shard_of), len(index.offsets)]
    return (
        lengths == [count, count, in_shards, in_shards]
        and len(index.prints) in (0, count)
        and _are_below(len(index.shards), index.shard_of)
        and _are_below(1 << 63, index.sizes)
        and _are_below(1 << 63, index.offsets)
    )


def _are_below(limit: int, numbers: Sequence[int] | array) -> bool:
    found = np.asarray(numbers, np.int64)
    return not len(found) or (found.min() >= 0 and int(found.max()) < limit)


def _index(arrays: Mapping[str, np.ndarray], header: Mapping) -> ImageIndex:
    numbers = list(range(len(header["classes"])))  # one int object per class, not one per image
    names = arrays["paths"].tobytes().decode("utf-8", "surrogateescape")
    found = {name: array(kind, arrays[name].tobytes()) for name, kind in NUMBERS.items()}
    labels = found.pop("labels")
    if not _are_below(len(numbers), labels):
        raise ValueError("has labels of no class")
    return ImageIndex(
        root=Path(header["root"]),
        layout=header["layout"],
        paths=Names(names.split(SEPARATOR)),
        labels=tuple(numbers[label] for label in labels),
        classes=tuple(header["classes"]),
        split=header["split"],
        shards=tuple(header["shards"]),
        watched=tuple(header["watched"]),
        notes=tuple(map(str, header["notes"])),
        **found,
    )


def find_index(
    root: Path, split: Split, world: World, *, folder: Path | None, prints_s: float = 0.0
) -> ImageIndex:
    """Return a split's index; only rank 0 looks at the images, except where nodes have own disks.

    Collective. `folder` is where the index is kept, None for beside the images. `prints_s` bounds
    the time for finding the images and taking missing fingerprints.

    Raises:
        ValueError, OSError: On every rank, if any of them cannot index the images.
    """
    index = _find_index(root, split, world, folder=folder, prints_s=prints_s)
    for note in index.notes if world.is_main else ():
        warn(f"data {split}: {index.root}: {note}")
    return index


def _find_index(
    root: Path, split: Split, world: World, *, folder: Path | None, prints_s: float
) -> ImageIndex:
    make = partial(refresh, root, split, folder=folder, prints_s=prints_s)
    first = collectives.broadcast_or_raise(collectives.capture(make) if world.is_main else None)
    mine = None
    if world.local_rank == 0:
        assert first is not None, "rank 0 made it"
        mine = first if is_kept(first) else collectives.capture(make)
    nodes: list[Cached] = []
    for rank, found in enumerate(collectives.all_gather(mine)):
        if isinstance(found, Exception):
            raise found
        if found is not None and rank <= world.rank:
            nodes.append(found)
    return load(nodes[-1])  # ranks of a node are consecutive, and its first one made the index
