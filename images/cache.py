"""Keep the index of a dataset on disk, so that it is made once and not by every rank and run.

    refresh (one process): current? else layouts.index_images -> <folder>/<split>-<key>.npz
                           then with fingerprints, if they are asked for, as far as time allows
    load (every process):  .npz -> ImageIndex

It lies in `.moevit-index/` beside the images, or in ~/.cache/moevit where that cannot be written.
It is current while every watched file has the name, size and time that it had. What is read back
is checked against a digest; a damaged file is made anew.
"""

import hashlib
import json
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import duplicates, layouts
from images.index import ImageIndex, Names, Split

VERSION = 4
FOLDER = ".moevit-index"
HOME_FOLDER = Path("~/.cache/moevit")
SEPARATOR = "\0"  # no file name has it
DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)


class Cached(NamedTuple):
    """Where an index is kept, a digest of all but its fingerprints, and whether it is new.

    Two jobs may take fingerprints at the same time and come to different ones: either's index will
    do for the other.
    """

    path: Path
    identity: str
    is_new: bool


def refresh(
    root: Path, split: Split, *, folder: Path | None = None, prints_s: float = 0.0
) -> Cached:
    """Return the current index of a split, making it if there is none. One process only.

    With `prints_s` it gives images fingerprints that have none, until so many seconds after the
    call. If they can be written nowhere, an index that is there is returned without them.

    Raises:
        ValueError: The dataset cannot be indexed, or the index can be written nowhere.
    """
    ends = time.monotonic() + prints_s
    key = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    places = [folder] if folder else [root / FOLDER, HOME_FOLDER.expanduser()]
    paths = [place / f"{split}-{key}.npz" for place in places]
    current, cached = _find_current(paths)
    index = layouts.index_images(root, split) if current is None else current
    is_new, needs_prints = current is None, prints_s > 0 and duplicates.num_unknown(index) > 0
    if cached is not None and not needs_prints:
        return cached
    try:
        # Before fingerprints: an interruption loses only those, and for no place none are taken.
        cached = _write_first(paths, index, is_new=is_new)
        if needs_prints:
            index = replace(index, prints=duplicates.fingerprints(index, ends=ends))
            cached = _write_first(paths, index, is_new=is_new)
    except OSError as error:
        if cached is None:
            raise ValueError(
                f"config dataset.index_folder={folder}: the index of {root} can be written "
                f"nowhere ({error})"
            ) from error
    return cached


def _find_current(paths: Sequence[Path]) -> tuple[ImageIndex | None, Cached | None]:
    """Return the current index with the most fingerprints in the files, if any, and its place."""
    found = [
        (kept[0], Cached(path, kept[1]["identity"], is_new=False))
        for path in paths
        if (kept := _read(path)) and kept[1]["state"] == layouts.state(kept[0].watched)
    ]
    return min(found, key=lambda one: duplicates.num_unknown(one[0]), default=(None, None))


def _write_first(paths: Sequence[Path], index: ImageIndex, *, is_new: bool) -> Cached:
    """Write the index to the first of the files that can be written; OSError if none can."""
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
    """Return whether this process sees the index that another one made."""
    kept = _read(cached.path)
    return kept is not None and kept[1]["identity"] == cached.identity


def load(cached: Cached) -> ImageIndex:
    """Return the index that `refresh` found or made.

    Raises:
        ValueError: The file is another one by now, or damaged.
    """
    kept = _read(cached.path)
    if kept is None or kept[1]["identity"] != cached.identity:
        raise ValueError(f"index {cached.path}: is not what was written; start again")
    return kept[0]


def _pack(index: ImageIndex) -> tuple[dict[str, np.ndarray], str]:
    """Return what is written, and the index's identity."""
    header: dict[str, object] = {
        "version": VERSION,
        "root": str(index.root),
        "layout": index.layout,
        "classes": index.classes,
        "split": index.split,
        "shards": index.shards,
        "watched": index.watched,
        "state": layouts.state(index.watched),
        "images": len(index),
        "bytes": sum(index.sizes),
    }
    names = SEPARATOR.join(index.paths).encode("utf-8", "surrogateescape")
    arrays: dict[str, np.ndarray] = {
        "paths": np.frombuffer(names, np.uint8),
        "labels": np.asarray(index.labels, np.int32),
        "sizes": np.asarray(index.sizes, np.int64),
        "shard_of": np.asarray(index.shard_of, np.int32),
        "offsets": np.asarray(index.offsets, np.int64),
    }
    identity = _digest(arrays, header)
    header["identity"] = identity
    arrays["prints"] = np.asarray(index.prints, np.uint64)
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
    """Return the index and its header, None if there is none or it is damaged."""
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
    numbers = list(range(len(header["classes"])))  # one object per label, not one per image
    names = arrays["paths"].tobytes().decode("utf-8", "surrogateescape")
    return ImageIndex(
        root=Path(header["root"]),
        layout=header["layout"],
        paths=Names(names.split(SEPARATOR)),
        labels=tuple(numbers[label] for label in arrays["labels"].tolist()),
        classes=tuple(header["classes"]),
        split=header["split"],
        sizes=array("q", arrays["sizes"].tobytes()),
        shards=tuple(header["shards"]),
        shard_of=array("i", arrays["shard_of"].tobytes()),
        offsets=array("q", arrays["offsets"].tobytes()),
        watched=tuple(header["watched"]),
        prints=array("Q", arrays["prints"].tobytes()),
    )
