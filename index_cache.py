"""Keep the index of a dataset on disk, so that it is made once and not by every rank and run.

    refresh (one process): current? else layouts.index_images -> <folder>/<split>-<key>.npz
                           with fingerprints, if they are asked for, as far as time allows
    load (every process):  .npz -> ImageIndex

It lies in `.moevit-index/` beside the images, or in ~/.cache/moevit where that cannot be written.
It is current while every watched file has the name, size and time that it had. What is read back
is checked against a digest; a damaged file is made anew.
"""

import hashlib
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import duplicates
import layouts
from image_index import ImageIndex, Names, Split

VERSION = 2
FOLDER = ".moevit-index"
HOME_FOLDER = Path("~/.cache/moevit")
SEPARATOR = "\0"  # no file name has it
DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)


class Cached(NamedTuple):
    """Where an index is kept, the digest of its content, and whether it was made just now."""

    path: Path
    digest: str
    is_new: bool


def refresh(
    root: Path, split: Split, *, folder: Path | None = None, prints_s: float = 0.0
) -> Cached:
    """Return the current index of a split, making it if there is none. One process only.

    With `prints_s` it takes up to so many seconds to give images fingerprints that have none.

    Raises:
        ValueError: The dataset cannot be indexed, or the index can be written nowhere.
    """
    key = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    places = [folder] if folder else [root / FOLDER, HOME_FOLDER.expanduser()]
    paths = [place / f"{split}-{key}.npz" for place in places]
    current, cached = _find_current(paths)
    index = layouts.index_images(root, split) if current is None else current
    if prints_s and (not index.prints or duplicates.UNKNOWN in index.prints):
        index = replace(index, prints=duplicates.fingerprints(index, within_s=prints_s))
        cached = None
    if cached is not None:
        return cached
    return _write_first(
        paths, index, is_new=current is None, where=f"{folder}: the index of {root}"
    )


def _find_current(paths: Sequence[Path]) -> tuple[ImageIndex | None, Cached | None]:
    """Return the index kept in one of the files, if it is current, and where it is."""
    for path in paths:
        if (kept := _read(path)) and kept[1]["state"] == layouts.state(kept[0].watched):
            return kept[0], Cached(path, kept[1]["digest"], is_new=False)
    return None, None


def _write_first(paths: Sequence[Path], index: ImageIndex, *, is_new: bool, where: str) -> Cached:
    """Write the index to the first of the files that can be written."""
    arrays, digest = _pack(index)
    problems = []
    for path in paths:
        try:
            _write(path, arrays)
        except OSError as error:
            problems.append(str(error))
        else:
            return Cached(path, digest, is_new)
    raise ValueError(
        f"config dataset.index_folder={where} can be written nowhere ({'; '.join(problems)})"
    )


def is_kept(cached: Cached) -> bool:
    """Return whether this process sees the index that another one made."""
    kept = _read(cached.path)
    return kept is not None and kept[1]["digest"] == cached.digest


def load(cached: Cached) -> ImageIndex:
    """Return the index that `refresh` found or made.

    Raises:
        ValueError: The file is another one by now, or damaged.
    """
    kept = _read(cached.path)
    if kept is None or kept[1]["digest"] != cached.digest:
        raise ValueError(f"index {cached.path}: is not what was written; start again")
    return kept[0]


def _pack(index: ImageIndex) -> tuple[dict[str, np.ndarray], str]:
    header = {
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
        "prints": np.asarray(index.prints, np.uint64),
    }
    digest = _digest(arrays, header)
    text = json.dumps(header | {"digest": digest}).encode()
    return {**arrays, "header": np.frombuffer(text, np.uint8)}, digest


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
        return _index(arrays, header), header | {"digest": digest}
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
