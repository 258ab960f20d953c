"""Recognise a dataset's layout on disk and index it; say what its state on disk is.

root, split -> index_images -> ImageIndex
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from images.arrow import find_saved, index_saved
from images.folders import LAYOUTS, find_folder, index_folder
from images.index import ImageIndex, Split, check_names, wrong_root
from images.shards import find_shards, index_shards

STAT_THREADS = 16  # file systems across a network answer several at once


def index_images(root: Path, split: Split) -> ImageIndex:
    """List one split; `root` is the dataset's root or the split folder, the layout is recognised.

    Classes and, within a class or shard, files are in sorted order; hidden files are ignored.

    Raises:
        FileNotFoundError: The folder or the annotation file is missing.
        ValueError: No image, an empty class, annotations that do not match the images, names of
            images that contradict their labels, or a shard that may not be read.
    """
    index = _index(root, split)
    check_names(index)
    return index


def _index(root: Path, split: Split) -> ImageIndex:
    if saved := find_saved(root, split):
        return index_saved(saved, split)
    if shards := find_shards(root, split):
        return index_shards(shards, split)
    folder = find_folder(root, split)
    if folder is None:
        problem = f"no folder {root / split}; allowed: {LAYOUTS}"
        raise FileNotFoundError(wrong_root(root, split, problem))
    return index_folder(folder, split)


def state(watched: Iterable[str]) -> str:
    """Return a digest of every file's name, size and time below the paths; of nothing's content.

    It stats each file, so one process should ask and tell the others.
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
