"""Reads a Torch DCP folder without running code that somebody put into it.

    .metadata (a pickle) -> allow-list of globals -> sizes and files checked -> Metadata

torch's reader unpickles `.metadata`, and every value that is not a tensor, without limits: whoever
can write to the folder can run code as whoever loads it. Here `.metadata` may name only the plain
records that it consists of, and values that are not tensors are refused before they are read.
"""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from parallel.ownership import foreign_reason
from weights.pickles import BROKEN, PlainUnpickler, Refused, check_regular


def untrusted_reason(path: Path, *, any_mode: bool = False) -> str | None:
    """Return why what lies at `path` may be somebody else's work, None if it is this user's own.

    `any_mode`: the file system has no modes of its own (every file is 0777), so they say nothing.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return "is neither a file nor a folder"
    return foreign_reason(facts, any_mode=any_mode)


def _layout(name: str) -> torch.layout:
    found = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise Refused(f"{name} is no tensor layout")
    return found


def _memory_format(number: int) -> _MEM_FORMAT_ENCODING:
    if type(number) is not int:
        raise Refused(f"has a memory format that is a {type(number).__name__}")
    return _MEM_FORMAT_ENCODING(number)


def _path(*parts: str) -> str:
    """Stand in for the path classes: the writer's note of where it was, which opens nothing."""
    return "/".join(map(str, parts))


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS: tuple[type, ...] = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
_ALLOWED: Mapping[str, object] = {
    **{f"{_METADATA}.{record.__name__}": record for record in _RECORDS},
    f"{_METADATA}._MEM_FORMAT_ENCODING": _memory_format,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _StorageInfo,
    **{f"torch.{name}": d for name, d in vars(torch).items() if isinstance(d, torch.dtype)},
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _layout,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,
}


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int for number in value)


def _is_index(key: object) -> bool:
    """Whether `key` names a tensor or a part of one by plain values, and so can be hashed."""
    if not isinstance(key, MetadataIndex):
        return False
    fqn, offset, index = (vars(key).get(name) for name in ("fqn", "offset", "index"))
    return (
        type(fqn) is str
        and (offset is None or _is_shape(offset))
        and (index is None or type(index) is int)
    )


class _Unpickler(PlainUnpickler):
    allowed = _ALLOWED
    buildable = (*_RECORDS, _StorageInfo)

    def is_key(self, key: object) -> bool:
        return super().is_key(key) or _is_index(key)


def _check_types(metadata: Metadata) -> None:
    """Refuse fields that are not what the format has there: nothing after this is a surprise."""
    for index, info in metadata.storage_data.items():
        numbers = (info.offset, info.length)
        if not _is_index(index) or any(type(number) is not int for number in numbers):
            raise Refused("has a place in a file that is none")
        if type(info.relative_path) is not str:
            raise Refused(f"has a file's name that is a {type(info.relative_path).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            raise Refused(f"has a name that is a {type(name).__name__}")
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise Refused(f"{name} is a {type(entry).__name__}")
        properties, chunks = entry.properties, entry.chunks
        sizes = [entry.size, *(part for c in chunks for part in (c.offsets, c.sizes))]
        if not all(map(_is_shape, sizes)):
            raise Refused(f"{name} has a shape that is none")
        if not isinstance(properties.dtype, torch.dtype):
            raise Refused(f"{name} has a dtype that is a {type(properties.dtype).__name__}")


def _check_files(metadata: Metadata, folder: Path) -> int:
    """Refuse paths out of the folder and places past a file's end; return all files' bytes."""
    present = {path.name: path.lstat().st_size for path in folder.iterdir() if path.is_file()}
    for index, info in metadata.storage_data.items():
        size = present.get(info.relative_path)
        if size is None:
            raise Refused(f"{index.fqn} is in {info.relative_path}, which is not in the folder")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
            raise Refused(
                f"{index.fqn} is at {info.offset} + {info.length} of {info.relative_path}, "
                f"which has {size} bytes"
            )
        if info.transform_descriptors:
            raise Refused(f"{index.fqn} is transformed, which is not supported")
    return sum(present.values())


def _check_parts(name: str, entry: TensorStorageMetadata) -> None:
    """Refuse a tensor whose parts do not make it up: the rest would be whatever is in memory."""
    total, num_dims = 0, len(entry.size)
    for chunk in entry.chunks:
        is_inside = len(chunk.offsets) == len(chunk.sizes) == num_dims and all(
            0 <= low and 0 <= length and low + length <= size
            for low, length, size in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        )
        if not is_inside:
            raise Refused(f"{name} of shape {tuple(entry.size)} has a part that is outside of it")
        total += math.prod(chunk.sizes)
    filled = [tuple(chunk.offsets) for chunk in entry.chunks if math.prod(chunk.sizes)]
    if total != math.prod(entry.size) or len(set(filled)) != len(filled):
        raise Refused(
            f"{name} of shape {tuple(entry.size)} has parts with {total} of its "
            f"{math.prod(entry.size)} values"
        )


def _check_sizes(metadata: Metadata, folder: Path) -> None:
    """Refuse tensors that the folder's files do not hold, whole."""
    total, needed = _check_files(metadata, folder), 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        num_bytes = math.prod(entry.size) * entry.properties.dtype.itemsize
        needed += num_bytes
        if min(entry.size, default=0) < 0 or needed > total:
            raise Refused(
                f"{name} of shape {tuple(entry.size)} needs {num_bytes} bytes, "
                f"all files together have {total}"
            )
        _check_parts(name, entry)
        for chunk in entry.chunks:
            if MetadataIndex(name, torch.Size(chunk.offsets)) not in metadata.storage_data:
                raise Refused(f"{name} has a part that is in no file")


def read_metadata(path: Path) -> Metadata:
    """Return the content of a `.metadata` file; nothing in it can run or leave its folder."""
    check_regular(path)
    content = path.read_bytes()
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise Refused(f"holds a {type(metadata).__name__}, not Metadata")
        _check_types(metadata)
        _check_sizes(metadata, path.parent)
    except BROKEN as error:
        reason = f"damaged ({type(error).__name__}: {error})"
        raise ValueError(
            f"checkpoint {path}: {error if isinstance(error, Refused) else reason}"
        ) from error
    metadata.planner_data = None  # no reader of ours needs it, and it could be anything
    if not isinstance(metadata.storage_meta, StorageMeta):
        metadata.storage_meta = StorageMeta()
    return metadata


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, for tensors alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        """Return the folder's metadata; see the function of this name."""
        return read_metadata(self.folder / ".metadata")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned tensors; refuse the plan if one of its values is not a tensor."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise ValueError(
                    f"checkpoint {self.folder}: {item.storage_index.fqn} is not a tensor; values "
                    "that would have to be unpickled are not loaded"
                )
        return super().read_data(plan, planner)
