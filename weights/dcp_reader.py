"""Reads a Torch DCP folder without running code that somebody put into it.

    .metadata (a pickle) -> allow-list of globals -> sizes and files checked -> Metadata

torch's reader unpickles `.metadata`, and every value that is not a tensor, without limits: whoever
can write to the folder can run code as whoever loads it. Here `.metadata` may name only the plain
records that it consists of, and values that are not tensors are refused before they are read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

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

# What a damaged or hostile pickle can raise.
_BROKEN = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    UnicodeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
_ROOT_UID = 0


def untrusted_reason(path: Path) -> str | None:
    """Return why what lies at `path` may be somebody else's work, None if it is this user's own."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return "is neither a file nor a folder"
    if facts.st_uid not in (os.geteuid(), _ROOT_UID):
        return f"belongs to user {facts.st_uid}, not to {os.geteuid()} or root"
    if facts.st_mode & stat.S_IWOTH:
        return f"can be written by every user (mode {stat.S_IMODE(facts.st_mode):04o})"
    return None


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"{name} is no tensor layout")
    return found


def _path(*parts: str) -> str:
    """Stand in for the path classes: the writer's note of where it was, which opens nothing."""
    return "/".join(parts)


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
_ALLOWED: Mapping[tuple[str, str], object] = {
    **{(_METADATA, record.__name__): record for record in _RECORDS},
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("pathlib", "PosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
}


# The unpickler written in Python, because only there BUILD can be narrowed. BUILD sets attributes;
# set on an allowed class or function, they would outlive the load.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        found: object = _ALLOWED.get((module, name))
        if found is None and module == "torch":
            dtype = getattr(torch, name, None)
            found = dtype if isinstance(dtype, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"names the global {module}.{name}, which is not allowed")
        return found

    def load_build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        if not isinstance(target, (*_RECORDS, _StorageInfo)):
            raise pickle.UnpicklingError(f"sets attributes of a {type(target).__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _check_sizes(metadata: Metadata, folder: Path) -> None:
    """Refuse paths out of the folder, and tensors larger than all its files together."""
    present = {path.name: path.lstat().st_size for path in folder.iterdir()}
    for index, info in metadata.storage_data.items():
        size = present.get(info.relative_path)
        if size is None:
            raise ValueError(f"{index.fqn} is in {info.relative_path}, which is not in the folder")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
            raise ValueError(
                f"{index.fqn} is at {info.offset} + {info.length} of {info.relative_path}, "
                f"which has {size} bytes"
            )
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn} is transformed by {info.transform_descriptors}")
    total = sum(present.values())
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            needed = math.prod(entry.size) * entry.properties.dtype.itemsize
            if min(entry.size, default=0) < 0 or needed > total:
                raise ValueError(
                    f"{name} of shape {tuple(entry.size)} needs {needed} bytes, "
                    f"all files together have {total}"
                )
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{name} is a {type(entry).__name__}")


def read_metadata(path: Path) -> Metadata:
    """Return the content of a `.metadata` file; nothing in it can run or leave its folder."""
    content = path.read_bytes()
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"holds a {type(metadata).__name__}, not Metadata")
        _check_sizes(metadata, path.parent)
    except _BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError | pickle.UnpicklingError):
            reason = str(error)
        raise ValueError(f"checkpoint {path}: {reason}") from error
    if metadata.storage_meta is None:
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
