"""Checkpoints in Torch DCP: saved whole or not at all, found again, loaded strictly.

    <run folder>/step_<n>_loss_<x>/   __<rank>_0.distcp, .metadata   tensors, by global name
                                      state.json                    step, config, versions
                                      manifest.json                 size and sha256 of each file

A save writes to a staging folder beside it, which is renamed when every byte is on disk. A folder
counts only if its manifest matches. Sees state dicts of tensors, never models or options.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed import from_main

SCHEMA_VERSION = 1
_NAME = re.compile(r"step_(\d+)_loss_(\d+\.\d+)(?:_r(\d+))?")
_STAGING = re.compile(r"\.staging-\d+-[0-9a-f]{32}")

# Nested names to tensors: {"model": {name: tensor}, "optimizer": {name: {key: tensor}}}.
TensorTree = Mapping[str, "Tensor | TensorTree"]
Json = Mapping[str, object]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and its state.json."""

    folder: Path
    state: Json

    @property
    def step(self) -> int:
        """Optimizer updates done, which is the number of the next update to run."""
        step = self.state["step"]
        assert isinstance(step, int), "verify() has checked it"
        return step

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the run when it was saved."""
        metrics = self.state["metrics"]
        assert isinstance(metrics, dict), "verify() has checked it"
        return metrics


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    _fsync(path)


def _commit(staging: Path, target: Path) -> Path:
    """Seal `staging` with a manifest and rename it to `target`, or to a new attempt of it."""
    files = sorted(path for path in staging.iterdir())
    manifest = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files}
    _write_json(staging / "manifest.json", {"schema_version": SCHEMA_VERSION, "files": manifest})
    _fsync(staging)
    attempt, final = 1, target
    while final.exists():  # a name is never reused, so nothing complete is ever overwritten
        attempt += 1
        final = target.with_name(f"{target.name}_r{attempt}")
    staging.rename(final)
    _fsync(final.parent)
    return final


def save(root: Path, tensors: TensorTree, *, state: Json, loss: float) -> Path:
    """Write a checkpoint of `state["step"]` under `root` and return its folder. Collective.

    Raises:
        OSError: On every rank, if a rank cannot write; the staging folder stays behind.
        ValueError: On every rank, if `state` has a number that JSON has not.
    """
    staging = from_main(root / f".staging-{state['step']}-{uuid.uuid4().hex}")
    target = root / f"step_{state['step']}_loss_{loss:.3f}"
    # One thread: with more, a full disk is reported as success (pytorch/pytorch#191391).
    writer = FileSystemWriter(staging, thread_count=1, sync_files=True)
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # no Exception, so nobody up there would say it in a line
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"checkpoint {target.name}: rank {rank}: {cause}") from error
    result: Path | OSError | ValueError = target
    if dist.get_rank() == 0:
        try:
            _write_json(staging / "state.json", {"schema_version": SCHEMA_VERSION, **state})
            result = _commit(staging, target)
        except (OSError, ValueError) as error:
            result = error
    result = from_main(result)
    if not isinstance(result, Path):
        raise result
    return result


def verify(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder` after reading every byte of it.

    Raises:
        ValueError: A file is missing, extra or different from the manifest; it is named.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        state = json.loads((folder / "state.json").read_text())
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {folder.name}: {error}") from error
    present = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if present != set(files):
        raise ValueError(
            f"checkpoint {folder.name}: files {sorted(present ^ set(files))} are not in both the "
            "folder and its manifest"
        )
    for name, expected in files.items():
        digest = _sha256(folder / name)
        if digest != expected["sha256"]:
            raise ValueError(
                f"checkpoint {folder.name}: {name} sha256 {digest[:8]} != manifest "
                f"{expected['sha256'][:8]}"
            )
    if state.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"checkpoint {folder.name}: state.json schema_version={state.get('schema_version')}: "
            f"must be {SCHEMA_VERSION}"
        )
    for name, kind in (("step", int), ("metrics", dict)):
        if not isinstance(state.get(name), kind):
            raise ValueError(
                f"checkpoint {folder.name}: state.json {name}={state.get(name)}: "
                f"must be a {kind.__name__}"
            )
    return Checkpoint(folder, state)


def _candidates(root: Path) -> list[Path]:
    """Return the folders named like checkpoints, newest step and attempt first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), int(match[3] or 1), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _newest(root: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    rejected: dict[Path, str] = {}
    for folder in _candidates(root):
        try:
            return verify(folder), rejected
        except ValueError as error:
            rejected[folder] = str(error)
    return None, rejected


def find_newest(root: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest complete checkpoint under `root` and why newer ones are not. Collective.

    Rank 0 looks and every rank gets its answer, so ranks cannot disagree.

    Raises:
        ValueError: There are checkpoints and none is complete; starting over would hide that.
    """
    found, rejected = from_main(_newest(root) if dist.get_rank() == 0 else (None, {}))
    if found is None and rejected:
        raise ValueError(
            f"checkpoint {root}: none of {len(rejected)} can be used: "
            f"{'; '.join(rejected.values())}"
        )
    return found, rejected


def _check_keys(folder: Path, tensors: TensorTree) -> None:
    """Compare names, shapes and dtypes with what is on disk, before any tensor is read."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    flat, _ = flatten_state_dict(dict(tensors))
    # A rank without rows of a parameter has no optimizer state for it: the union counts.
    all_keys: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(all_keys, list(flat))
    wanted = {key for keys in all_keys for key in keys}
    problems = [f"missing {key}" for key in sorted(wanted - set(metadata))]
    problems += [f"unexpected {key}" for key in sorted(set(metadata) - wanted)]
    for key in sorted(set(flat) & set(metadata)):
        stored = metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            problems.append(f"{key} is not a tensor")
        elif stored.size != flat[key].shape or stored.properties.dtype != flat[key].dtype:
            problems.append(
                f"{key} is {tuple(stored.size)} {stored.properties.dtype}, "
                f"the model has {tuple(flat[key].shape)} {flat[key].dtype}"
            )
    if problems:
        raise ValueError(f"checkpoint {folder}: {len(problems)} differences: {'; '.join(problems)}")


def load(checkpoint: Checkpoint, tensors: TensorTree) -> None:
    """Fill `tensors` in place from `checkpoint`, resharding as needed. Collective.

    Raises:
        ValueError: A name, shape or dtype differs; all are listed and no tensor was touched.
    """
    _check_keys(checkpoint.folder, tensors)
    state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(checkpoint.folder))


def _val_loss(folder: Path) -> float:
    """Return the validation loss in a checkpoint's state, infinity if it was not validated."""
    try:
        loss = json.loads((folder / "state.json").read_text())["metrics"]["val_loss"]
    except (OSError, KeyError, ValueError):
        return math.inf
    return float(loss)


def sweep(root: Path, newest: Path, *, keep_last: int, rejected: Collection[Path]) -> list[Path]:
    """Delete old checkpoints and abandoned staging folders; return what was deleted. Rank 0 only.

    `newest`, the newest `keep_last` and the one of the lowest validation loss stay. Those that were
    `rejected` on resume are neither counted nor touched: a person may want to look at them.
    """
    folders = [path for path in _candidates(root) if path not in rejected]
    best = min(folders, key=_val_loss, default=None)
    old = [path for path in folders[keep_last:] if path not in (newest, best)]
    old += [path for path in root.iterdir() if _STAGING.fullmatch(path.name)]
    for path in old:
        shutil.rmtree(path)
    return old


def load_torch_checkpoint(path: Path, model: nn.Module) -> None:
    """Load a file written by `format_utils dcp_to_torch` into an unsharded model, strictly.

    Raises:
        ValueError: The file holds no model weights.
        RuntimeError: Names or shapes differ (from `load_state_dict`).
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"file {path}: has no `model` weights (found {type(content).__name__})")
    model.load_state_dict(weights, strict=True)
