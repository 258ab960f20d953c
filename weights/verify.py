"""Which folders are checkpoints, whether each is whole, and how good it says it is.

    <run folder> -> candidates (newest or best first) -> first_whole -> Checkpoint
                    score: a figure of state.json        verify: every byte against the manifest

A folder counts only if it belongs to this user and every byte matches its manifest. One process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weights import dcp_writer
from weights.dcp_reader import untrusted_reason
from weights.dcp_writer import MANIFEST, NAME, SCHEMA_VERSION, STATE, Json, sha256

# Larger ones are not ours: a manifest has some 120 bytes for each rank.
_MAX_JSON_BYTES = 8 * 2**20
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


def _read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file of ours, which is small: one of another size is not read."""
    if (num_bytes := path.lstat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {num_bytes} bytes, at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
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
    if dcp_writer.encode(manifest) != (folder / MANIFEST).read_bytes():
        raise ValueError(f"{MANIFEST} is not as it was written")
    return files


def _check_files(folder: Path) -> None:
    """Read every byte of `folder` and compare it with the manifest."""
    for path in (folder, *folder.iterdir()):
        if reason := untrusted_reason(path):
            raise ValueError(f"{path.name} {reason}")
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


def _check_state(state: Json) -> None:
    if state.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{STATE} schema_version={state.get('schema_version')}: must be {SCHEMA_VERSION}"
        )
    step, metrics = state.get("step"), state.get("metrics")
    if type(step) is not int or step < 0:
        raise ValueError(f"{STATE} step={step}: must be a number >= 0")
    if not isinstance(metrics, dict):
        raise ValueError(f"{STATE} metrics={metrics}: must be an object")
    for name, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{STATE} metrics {name}={value}: must be a finite number")


def verify(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder` after reading every byte of it.

    Raises:
        ValueError: A file is missing, extra, differs from the manifest, or could have been written
            by somebody else; it is named.
    """
    try:
        _check_files(folder)
        state = _read_json(folder / STATE)
        _check_state(state)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder.name}: {error}") from error
    return Checkpoint(folder, state)


def claimed_figures(folder: Path) -> dict[str, object]:
    """Return the figures in state.json, not verified; none where it cannot be read."""
    try:
        metrics = _read_json(folder / STATE).get("metrics")
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def score(folder: Path, metric: str) -> float:
    """Return how good the checkpoint says it is, more is better; -infinity if it does not say.

    `metric` is "+name" where the highest figure is the best and "-name" where the lowest is.
    """
    sign, name = {"+": 1.0, "-": -1.0}[metric[0]], metric[1:]
    try:
        figure = claimed_figures(folder)[_FIGURES.get(name, name)]
        value = sign * float(figure)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return -math.inf
    return value if math.isfinite(value) else -math.inf


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


def first_whole(folders: Iterable[Path]) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the first complete checkpoint, and what is wrong with each of those before it."""
    rejected: dict[Path, str] = {}
    for folder in folders:
        try:
            return verify(folder), rejected
        except ValueError as error:
            rejected[folder] = str(error)
    return None, rejected
