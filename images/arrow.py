"""Index a Hugging Face dataset saved to disk: Arrow files, whose image bytes are read in place.

    dataset.save_to_disk(root) -> <root>/<split>/{state.json, dataset_info.json, data-*.arrow}

Only indexing needs pyarrow: columns lie uncompressed in the file, so an image is a range of its
bytes, as in a tar shard. No other file imports pyarrow.
"""

from __future__ import annotations

import importlib
import itertools
import json
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from images.files import read_text
from images.index import ImageIndex, Names, Split, ordered_classes, wrong_root

STATE, INFO = "state.json", "dataset_info.json"
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
DAMAGED = (
    *(KeyError, IndexError, struct.error, AttributeError, TypeError, ValueError),
    *(OSError, OverflowError, MemoryError, NotImplementedError),
)
Row = tuple[str, int, int, int]  # name, label as stored, offset, size


def find_saved(root: Path, split: Split) -> Path | None:
    """Return the folder of a saved dataset's split, None if there is none."""
    folders = [*(root / name for name in SPLIT_FOLDERS[split]), root]
    return next((folder for folder in folders if (folder / STATE).is_file()), None)


def index_saved(folder: Path, split: Split) -> ImageIndex:
    """Find the images of one split.

    Raises:
        ValueError: pyarrow is not installed, or the dataset does not consist of labelled images.
    """
    images, labels, names = _columns(folder, split)
    shards = _shards(folder, split)
    rows = [
        (number, row)
        for number, shard in enumerate(shards)
        for row in _rows(folder / shard, images, labels, where=(folder, split))
    ]
    if not rows:
        raise ValueError(wrong_root(folder, split, "the saved dataset has no rows"))
    try:
        classes = ordered_classes(names)
    except ValueError as err:
        raise ValueError(f"{folder / INFO}: {err}") from err
    place_of = {name: place for place, name in enumerate(classes)}
    label_of = [place_of[name] for name in names]
    bad = next((row for _, row in rows if not _is_number(row[1], below=len(names))), None)
    if bad is not None:
        problem = f"image {bad[0]} has label {bad[1]}, must be 0 to {len(names) - 1}"
        raise ValueError(wrong_root(folder, split, problem))
    return ImageIndex(
        root=folder,
        layout="arrow",
        paths=Names(row[0] for _, row in rows),
        labels=tuple(label_of[row[1]] for _, row in rows),
        classes=classes,
        split=split,
        sizes=array("q", (row[3] for _, row in rows)),
        shards=tuple(shards),
        shard_of=array("i", (number for number, _ in rows)),
        offsets=array("q", (row[2] for _, row in rows)),
    )


def _is_number(label: object, *, below: int) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < below


def _shards(folder: Path, split: Split) -> list[str]:
    """Return the names of a split's files."""
    try:
        names = [item["filename"] for item in _json(folder / STATE, split)["_data_files"]]
    except (LookupError, TypeError) as err:
        problem = f"{STATE} must list its _data_files, each with a filename"
        raise ValueError(wrong_root(folder, split, problem)) from err
    wrong = [name for name in names if not isinstance(name, str) or "\0" in name]
    if wrong:
        raise ValueError(wrong_root(folder, split, f"{STATE} names the file {wrong[0]!r}"))
    return names


def _json(file: Path, split: Split) -> dict[str, Any]:
    try:
        return json.loads(read_text(file))
    except (ValueError, OSError, RecursionError) as err:
        raise ValueError(
            wrong_root(file.parent, split, f"{file.name} is not JSON ({err})")
        ) from err


def _columns(folder: Path, split: Split) -> tuple[str, str, list[str]]:
    """Return the names of the image and label columns, and the classes."""
    try:
        features = _json(folder / INFO, split)["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
    except (LookupError, TypeError, AttributeError) as err:
        problem = f"{INFO} must have features, each with its _type"
        raise ValueError(wrong_root(folder, split, problem)) from err
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1:
        problem = f"{INFO} must have one Image and one ClassLabel, has {images} and {labels}"
        raise ValueError(wrong_root(folder, split, problem))
    names = features[labels[0]].get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(wrong_root(folder, split, f"{INFO} must name the classes of {labels[0]}"))
    return images[0], labels[0], names


def _rows(file: Path, images: str, labels: str, *, where: tuple[Path, Split]) -> Iterator[Row]:
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError as err:
        problem = "a saved Hugging Face dataset needs pyarrow (pip install pyarrow)"
        raise ValueError(wrong_root(*where, problem)) from err
    if not file.resolve().is_relative_to(where[0].resolve()) or not file.is_file():
        raise ValueError(wrong_root(*where, f"{STATE} names {file}, which is not a file in it"))
    with pyarrow.memory_map(str(file)) as mapped:
        start = mapped.read_buffer().address
        end = start + mapped.size()
        mapped.seek(0)
        try:
            for number, batch in enumerate(pyarrow.ipc.open_stream(mapped)):
                batch.validate(full=True)  # pyarrow itself would follow wrong offsets anywhere
                column, stored = batch.column(images), batch.column(labels).to_pylist()
                pieces = _pieces(column.field("bytes"), start=start, end=end)
                for place, ((offset, size), label) in enumerate(zip(pieces, stored, strict=True)):
                    name = f"{file.name}/{number}/{place}"
                    yield name, -1 if label is None else label, offset, size
        except (pyarrow.ArrowException, *DAMAGED) as err:
            problem = f"{file.name} is not an Arrow stream of images with their bytes ({err})"
            raise ValueError(wrong_root(*where, problem)) from err


def _pieces(values: Any, *, start: int, end: int) -> Iterator[tuple[int, int]]:  # noqa: ANN401
    """Yield where each value of a binary column lies in the file: (offset, size)."""
    _, ends, data = values.buffers()
    is_large = str(values.type) == "large_binary"
    whole = memoryview(ends).cast("q") if is_large else memoryview(ends).cast("i")
    bounds = whole[values.offset : values.offset + len(values) + 1]
    if values.null_count or not start <= data.address <= data.address + data.size <= end:
        raise KeyError("images are not stored in the file, or compressed")
    for first, last in itertools.pairwise(bounds):
        yield data.address - start + first, last - first
