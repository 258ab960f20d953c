"""The parts of a save to Torch DCP: who writes what, one rank's file, the commit.

    make_plan (all ranks) -> write (each rank its file) -> commit (rank 0: manifest, rename)

    <run folder>/.staging-<n>-<id>/ -> step_<n>_loss_<x>/   __<rank>_0.distcp, .metadata
                                                           state.json, manifest.json

`checkpoint.save` puts them together in one process; background.py spreads them over time and
processes. Nothing is under its final name before every byte of it is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from parallel.collectives import all_gather, from_main, gather, scatter

T = TypeVar("T")

SCHEMA_VERSION = 1
NAME = re.compile(r"step_(\d+)_loss_(\d+\.\d+)(?:_r(\d+))?")
STAGING = re.compile(r"\.staging-\d+-[0-9a-f]{32}")
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"

# Nested names to tensors: {"model": {name: tensor}, "optimizer": {name: {key: tensor}}}.
TensorTree = Mapping[str, "Tensor | TensorTree"]
Json = Mapping[str, object]


class NonFiniteTensorError(ValueError):
    """Weights or moments have NaN or infinities: no run could go on from them."""


# What a save, or another rank's part of it, may raise; every rank then raises the same.
FAILURES = (OSError, NonFiniteTensorError, ValueError)


class Source(Protocol):
    """What DCP's writer asks for the tensor of a planned item."""

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the tensor of one item."""


@dataclass(frozen=True)
class Plan:
    """What this rank writes; `metadata`, about the whole checkpoint, is on rank 0 alone."""

    local: SavePlan
    metadata: Metadata | None


@dataclass(frozen=True)
class FileFacts:
    """Size and digest of a file, as they were written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """What one rank has put on disk: DCP's index of it and the facts of each file."""

    results: list[WriteResult]
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Target:
    """A checkpoint in the making: where it is staged, what it will be called, its state.json."""

    staging: Path
    folder: Path
    state: Json


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(value: Json) -> bytes:
    """Return the one form in which a JSON file is written."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _write_json(path: Path, value: Json) -> FileFacts:
    content = encode(value)
    path.write_bytes(content)
    fsync(path)
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


class _Hashed:
    """A file that remembers the size and digest of what it was given, and its own failure.

    The digest is of the bytes in memory: what a bad disk or another process makes of them later
    differs from the manifest and is found when the checkpoint is verified.
    """

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.failure: OSError | None = None
        self.tell, self.fileno, self.flush = file.tell, file.fileno, file.flush

    def write(self, data: bytes | memoryview) -> int:
        # DCP's and torch's layers above report a failed write in their own words, or not at all.
        try:
            count = self.file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.num_bytes += count
        return count

    def close(self) -> None:
        """Left to `create_stream`, which must close once even after a failure."""


class _HashedFiles(FileSystem):
    """DCP's file access, which creates new files only and keeps the facts of each."""

    def __init__(self) -> None:
        self.streams: dict[str, _Hashed] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with Path(path).open(mode.replace("w", "x")) as file:
            stream = self.streams[Path(path).name] = _Hashed(file)  # type: ignore[arg-type]
            yield stream  # type: ignore[misc]


def make_plan(tensors: TensorTree) -> tuple[Plan, Source]:
    """Share out who writes what; replicated tensors are written once. Collective.

    DCP's own `save` does these steps and the writing in one call. They are taken apart here because
    a background save plans once, in the trainers, and writes often, in processes without a group.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=dist.get_rank() == 0)
    plans = gather(planner.create_local_plan())
    answers: list[SavePlan | ValueError] = []
    metadata = None
    if plans:
        try:
            plans, metadata = planner.create_global_plan(plans)
            for item in (item for plan in plans for item in plan.items):
                if item.type == WriteItemType.BYTE_IO:
                    raise ValueError(f"checkpoint: {item.index.fqn} is not a tensor")
            answers += FileSystemWriter("").prepare_global_plan(plans)
        except (ValueError, RuntimeError) as error:  # which of the two depends on torch's version
            answers = [ValueError(str(error))] * len(plans)
    answer = scatter(answers)
    if isinstance(answer, ValueError):
        raise answer
    return Plan(planner.finish_plan(answer), metadata), planner  # type: ignore[return-value]


def source_of(tensors: TensorTree) -> Source:
    """Return where the tensors of a plan made for such `tensors` are now."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors))
    return planner  # type: ignore[return-value]


def make_target(root: Path, *, state: Json, loss: float) -> Target:
    """Return the names of a checkpoint of `state["step"]`, the same on all ranks. Collective."""
    step = state["step"]
    if not math.isfinite(loss):
        raise ValueError(f"checkpoint of step {step}: loss={loss}: must be a finite number")
    json.dumps(state, allow_nan=False)  # what cannot be written is refused before the work
    staging = from_main(root / f".staging-{step}-{uuid.uuid4().hex}")
    return Target(staging, root / f"step_{step}_loss_{loss:.3f}", state)


def _check_finite(plan: SavePlan, source: Source) -> None:
    """Refuse to write weights or moments that no run could go on from."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for item in plan.items:
        tensor = source.resolve_data(item).detach()
        if tensor.is_floating_point() and tensor.numel():
            # Both are NaN if anything is; 25 times as fast as isfinite on a CPU.
            extremes_2 = torch.stack(torch.aminmax(tensor))
            check = item.index.fqn, extremes_2.isfinite().all()
            by_device.setdefault(tensor.device, []).append(check)
    for checks in by_device.values():
        # One transfer for all of them: on a GPU each would stop the queue.
        finite = torch.stack([flag for _, flag in checks]).tolist()
        bad = [name for (name, _), is_finite in zip(checks, finite, strict=True) if not is_finite]
        if bad:
            raise NonFiniteTensorError(f"{bad[0]} is not finite (of {len(bad)} such tensors)")


def write(staging: Path, plan: SavePlan, source: Source) -> Written:
    """Write and sync this rank's file. Not collective; may run in another process."""
    _check_finite(plan, source)
    staging.mkdir(exist_ok=True)  # not the run folder too: one that has vanished is an error
    # One thread: with more, a full disk is reported as success (pytorch/pytorch#191391).
    # No copy-ahead: it would open a CUDA context even where the tensors are on the CPU.
    writer = FileSystemWriter(staging, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
    files = writer.fs = _HashedFiles()
    try:
        results = writer.write_data(plan, source).wait()  # type: ignore[arg-type]
    except (RuntimeError, OSError) as error:
        for name, stream in files.streams.items():
            cause = stream.failure or error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, f"write {name}: {cause.strerror}") from error
        raise
    facts = {n: FileFacts(s.num_bytes, s.digest.hexdigest()) for n, s in files.streams.items()}
    return Written(results, facts)


def _check_on_disk(staging: Path, files: Mapping[str, FileFacts]) -> None:
    """Compare the folder with what was written: some file systems lose bytes without an error."""
    on_disk = {path.name: path.lstat().st_size for path in staging.iterdir()}
    for name in sorted(on_disk.keys() | files.keys()):
        expected = files[name].num_bytes if name in files else "no file"
        found = on_disk.get(name, "no file")
        if found != expected:
            raise OSError(f"{name} has {found} bytes, written were {expected}")


def seal(folder: Path, state: Json, files: Mapping[str, FileFacts]) -> None:
    """Complete a checkpoint of which `files` and DCP's index lie in `folder`: state and manifest.

    The manifest is written last, over everything else: without it the folder is no checkpoint.
    """
    state = {"schema_version": SCHEMA_VERSION, **state}
    index = folder / METADATA
    facts = {
        **files,
        STATE: _write_json(folder / STATE, state),
        METADATA: FileFacts(index.stat().st_size, sha256(index)),
    }
    _check_on_disk(folder, facts)
    listed = {n: {"bytes": f.num_bytes, "sha256": f.sha256} for n, f in sorted(facts.items())}
    _write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, "files": listed})


def commit(target: Target, metadata: Metadata, written: list[Written]) -> Path:
    """Seal what all ranks have written and give it its name. Rank 0 only."""
    staging = target.staging
    FileSystemWriter(staging, sync_files=True).finish(metadata, [part.results for part in written])
    files = {name: facts for part in written for name, facts in part.files.items()}
    seal(staging, target.state, files)
    # In this order: the files' bytes are on disk already, then their names, then the rename and the
    # folder that has it. A power cut at any point leaves a staging folder or a whole checkpoint,
    # never a checkpoint's name over missing files.
    fsync(staging)
    attempt, final = 1, target.folder
    while os.path.lexists(final):  # a name is never reused: nothing complete is overwritten
        attempt += 1
        final = target.folder.with_name(f"{target.folder.name}_r{attempt}")
    staging.rename(final)
    fsync(final.parent)
    return final


def num_bytes(tensors: TensorTree) -> int:
    """Return how much a checkpoint of `tensors` holds, all ranks together. Collective."""
    flat, _ = flatten_state_dict(dict(tensors))
    # A rank without rows of a parameter has no moments of it: the union counts.
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in flat.items()}
    return sum({n: size for part in all_gather(sizes) for n, size in part.items()}.values())


def _space(root: Path, metadata: Metadata) -> str:
    entries = metadata.state_dict_metadata.values()
    needed = sum(
        math.prod(entry.size) * entry.properties.dtype.itemsize
        for entry in entries
        if isinstance(entry, TensorStorageMetadata)
    )
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.2f}"
    except OSError as error:
        free = f"unknown, {error.strerror}:"
    return f"(need {needed / 2**30:.2f} GiB, free {free} GiB)"


def first_failure(
    target: Target, plan: Plan, outcomes: Sequence[Written | Path | Exception]
) -> Exception | None:
    """Return the error that the save ends with if a part of it failed, and clear up. Rank 0."""
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            # What was staged is useless and, on a full disk, takes the room of the next attempt.
            shutil.rmtree(target.staging, ignore_errors=True)
            reason = f"checkpoint {target.folder}: rank {rank}: {outcome}"
            kind = next(kind for kind in FAILURES if isinstance(outcome, kind))
            if kind is OSError:
                assert plan.metadata is not None, "rank 0 has it"
                reason += f" {_space(target.folder.parent, plan.metadata)}"
            return kind(reason)
    return None
