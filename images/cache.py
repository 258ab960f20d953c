"""The index of a dataset: made once by recognising the layout, kept on disk, read by every rank.

    rank 0: refresh -> current? else index_images -> <folder>/<split>-<key>.npz
                    then with fingerprints, if they are asked for, as far as time allows
            -> its place and digest -> first rank of each node -> every rank: load -> ImageIndex

The file is in `.moevit-index/` beside the images, or in ~/.cache/moevit if that is read-only. It is
current as long as every watched file keeps its name, size and time. A digest in it is checked on
reading; a damaged file is made again.
"""

import hashlib
import json
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import duplicates
from images.arrow import find_saved, index_saved
from images.folders import LAYOUTS, find_folder, index_folder
from images.index import ImageIndex, Names, Split, check_names, wrong_root
from images.shards import find_shards, index_shards
from parallel import collectives
from parallel.distributed import World

VERSION = 4
FOLDER = ".moevit-index"
HOME_FOLDER = Path("~/.cache/moevit")
SEPARATOR = "\0"  # no file name contains it
TEXTS = ("layout", "classes", "split", "shards", "watched")
NUMBERS = {"labels": "i", "sizes": "q", "shard_of": "i", "offsets": "q", "prints": "Q"}
DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)
STAT_THREADS = 16  # network file systems answer several requests at once


def index_images(root: Path, split: Split) -> ImageIndex:
    """List one split; `root` is the dataset's root or the split's folder, of any known layout.

    Classes are in sorted order, and so are the files of a class or shard. Hidden files are ignored.

    Raises:
        FileNotFoundError: The folder or the annotation file is missing.
        ValueError: There is no image, a class is empty, annotations do not match the images, names
            of images contradict their labels, or a shard must not be read.
    """
    if saved := find_saved(root, split):
        index = index_saved(saved, split)
    elif shards := find_shards(root, split):
        index = index_shards(shards, split)
    elif folder := find_folder(root, split):
        index = index_folder(folder, split)
    else:
        problem = f"no folder {root / split}; allowed: {LAYOUTS}"
        raise FileNotFoundError(wrong_root(root, split, problem))
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
    paths = [place / f"{split}-{key}.npz" for place in _places(root, folder)]
    current, cached = _find_current(paths)
    index = index_images(root, split) if current is None else current
    is_new, needs_prints = current is None, prints_s > 0 and duplicates.num_unknown(index) > 0
    if cached is not None and not needs_prints:
        return cached
    try:
        # Before the fingerprints, so that an interruption loses only those, and so that none are
        # taken if there is no place to keep them.
        cached = _write_first(paths, index, is_new=is_new)
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


def _places(root: Path, folder: Path | None) -> list[Path]:
    """Return where an index may be kept: in `folder` alone, or with the data or in the home."""
    if folder:
        return [folder]
    try:
        return [root / FOLDER, HOME_FOLDER.expanduser()]
    except RuntimeError:  # a user without a home; the data's folder will do, or the error says so
        return [root / FOLDER]


def _find_current(paths: Sequence[Path]) -> tuple[ImageIndex | None, Cached | None]:
    """Return the current index with the most fingerprints, if there is one, and its place."""
    found = [
        (kept[0], Cached(path, kept[1]["identity"], is_new=False))
        for path in paths
        if (kept := _read(path)) and kept[1]["state"] == _state(kept[0].watched)
    ]
    return min(found, key=lambda one: duplicates.num_unknown(one[0]), default=(None, None))


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
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("wb") as sink:
            np.savez(sink, allow_pickle=False, **arrays)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _read(path: Path) -> tuple[ImageIndex, dict] | None:
    """Return the index and its header, None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        digest = header.pop("digest")
        if header["version"] != VERSION or _digest(arrays, header) != digest:
            return None
        return _index(arrays, header), header
    except DAMAGED:
        return None


def _index(arrays: Mapping[str, np.ndarray], header: Mapping) -> ImageIndex:
    numbers = list(range(len(header["classes"])))  # one int object per class, not one per image
    names = arrays["paths"].tobytes().decode("utf-8", "surrogateescape")
    found = {name: array(kind, arrays[name].tobytes()) for name, kind in NUMBERS.items()}
    return ImageIndex(
        root=Path(header["root"]),
        layout=header["layout"],
        paths=Names(names.split(SEPARATOR)),
        labels=tuple(numbers[label] for label in found.pop("labels")),
        classes=tuple(header["classes"]),
        split=header["split"],
        shards=tuple(header["shards"]),
        watched=tuple(header["watched"]),
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
