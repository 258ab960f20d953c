"""Which folders are checkpoints, whether each is whole, and how good it says it is.

    <run folder> -> candidates (newest or best first) -> first_whole -> Checkpoint
                    score: a figure of state.json        verify: every byte against the manifest

A folder counts only if it belongs to this user and every byte matches its manifest. One process.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from weights import dcp_writer
from weights.dcp_reader import untrusted_reason
from weights.dcp_writer import MANIFEST, NAME, SCHEMA_VERSION, STATE, Json, sha256

# Larger ones are not ours: a manifest has some 120 bytes for each rank.
_MAX_JSON_BYTES = 8 * 2**20
# Ours has 6 levels. With so few, nothing that walks through it comes to the end of Python's stack.
_MAX_DEPTH = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READERS = 8
# Names of figures as users of the option know them, where ours differ.
_FIGURES = {"val_top1": "top1", "val_top5": "top5"}


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


def _read_small(path: Path) -> bytes:
    """Return the content of a small regular file; nothing else is read, or waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        if facts.st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.name} has {facts.st_size} bytes, at most {_MAX_JSON_BYTES}")
        return file.read(_MAX_JSON_BYTES)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        trees = [tree for tree in level if isinstance(tree, dict | list)]
        level = [item for t in trees for item in (t.values() if isinstance(t, dict) else t)]
    return bool(level)


def _read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file of ours, which is small and of few levels."""
    content = _read_small(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if _is_deep(value):
        raise ValueError(f"{path.name} has more than {_MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, must be an object")
    return value


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return (bytes, sha256) of each file that the manifest lists, every field checked."""
    manifest = _read_json(folder / MANIFEST)
    version, listed = manifest.get("schema_version"), manifest.get("files")
    if version != SCHEMA_VERSION:
        raise ValueError(f"{MANIFEST} schema_version={version}: must be {SCHEMA_VERSION}")
    if not isinstance(listed, dict):
        raise ValueError(f"{MANIFEST} files={type(listed).__name__}: must be an object")
    files = {}
    for name, facts in listed.items():
        known = facts if isinstance(facts, dict) else {}
        size, digest = known.get("bytes"), known.get("sha256")
        if type(size) is not int or size < 0:
            raise ValueError(f"{MANIFEST} {name} bytes={size}: must be a number >= 0")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"{MANIFEST} {name} sha256={digest}: must be 64 hex digits")
        files[name] = (size, digest)
    # No digest covers this file, so it must be, to the byte, what `encode` makes of its content.
    if dcp_writer.encode(manifest) != _read_small(folder / MANIFEST):
        raise ValueError(f"{MANIFEST} is not as it was written")
    return files


def _check_trusted(path: Path, *, any_mode: bool) -> None:
    if reason := untrusted_reason(path, any_mode=any_mode):
        raise ValueError(f"{path.name} {reason}")


def _check_files(folder: Path, *, any_mode: bool) -> None:
    """Read every byte of `folder` and compare it with the manifest."""
    _check_trusted(folder, any_mode=any_mode)
    for path in folder.iterdir():
        _check_trusted(path, any_mode=any_mode)
    files = _read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if odd := sorted(present ^ files.keys()):
        raise ValueError(f"files {odd} are not in both the folder and its manifest")
    for name, (size, _) in files.items():
        if (found := (folder / name).lstat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes != manifest {size}")
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(sha256, (folder / name for name in files))
        for (name, (_, expected)), digest in zip(files.items(), digests, strict=True):
            if digest != expected:
                raise ValueError(f"{name} sha256 {digest[:8]} != manifest {expected[:8]}")


def _is_figure(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold: JSON has integers of any size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _check_state(state: Json) -> None:
    if state.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{STATE} schema_version={state.get('schema_version')}: must be {SCHEMA_VERSION}"
        )
    step, metrics = state.get("step"), state.get("metrics")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"{STATE} step={step}: must be a number from 0 to 2^63 - 1")
    if not isinstance(metrics, dict):
        raise ValueError(f"{STATE} metrics={metrics}: must be an object")
    for name, value in metrics.items():
        if not _is_figure(value):
            raise ValueError(f"{STATE} metrics {name}={value}: must be a finite number")


def verify(folder: Path, *, any_mode: bool = False) -> Checkpoint:
    """Return the checkpoint in `folder` after reading every byte of it.

    `any_mode`: even if every user can write to its files, as on file systems without modes.

    Raises:
        ValueError: A file is missing, extra, differs from the manifest, or could have been written
            by somebody else; it is named.
    """
    try:
        _check_files(folder, any_mode=any_mode)
        state = _read_json(folder / STATE)
        _check_state(state)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder.name}: {error}") from error
    return Checkpoint(folder, state)


def claimed_figures(folder: Path) -> dict[str, object]:
    """Return the figures in state.json, not verified; none where it cannot be read."""
    try:
        _check_trusted(folder, any_mode=True)
        metrics = _read_json(folder / STATE).get("metrics")
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def score(folder: Path, metric: str) -> float:
    """Return how good the checkpoint says it is, more is better; -infinity if it does not say.

    `metric` is "+name" where the highest figure is the best and "-name" where the lowest is.
    """
    sign, name = {"+": 1.0, "-": -1.0}[metric[0]], metric[1:]
    figure = claimed_figures(folder).get(_FIGURES.get(name, name))
    return sign * float(figure) if _is_figure(figure) else -math.inf


def candidates(root: Path, *, metric: str | None = None) -> list[Path]:
    """Return what is named like a checkpoint, newest step and attempt first.

    With `metric`, see `score`, the best come first; of equals, and of those that do not have the
    figure, the newest.
    """
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[3] or 1), path))
    folders = [path for _, _, path in sorted(found, reverse=True)]
    if metric is not None:  # a stable sort: equals stay in order of age
        folders.sort(key=lambda folder: score(folder, metric), reverse=True)
    return folders


def first_whole(
    folders: Iterable[Path], *, any_mode: bool = False
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the first complete checkpoint, and what is wrong with each of those before it."""
    rejected: dict[Path, str] = {}
    for folder in folders:
        try:
            return verify(folder, any_mode=any_mode), rejected
        except ValueError as error:
            rejected[folder] = str(error)
    return None, rejected
