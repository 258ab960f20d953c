"""A run's folder: one run at a time in it, room for what it will save, which saves are kept.

    <run folder>/  .lock  .staging-<n>-<id>/  .trash-<id>/  step_<n>_loss_<x>/ ...

Rank 0 acts, and every rank hears what it found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from parallel import collectives
from weights import dcp_writer, verify
from weights.dcp_reader import untrusted_reason
from weights.dcp_writer import STAGING
from weights.files import PARTIAL

LOCK = ".lock"
TRASH = re.compile(r"\.trash-[0-9a-f]{32}")
# A save is staged beside what it will replace.
COPIES_IN_FLIGHT = 2


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def check_place(folder: Path, watched: Iterable[str]) -> None:
    """Refuse a run folder inside a dataset: its folders would pass for classes or shards.

    `watched` are the dataset's files and folders.

    Raises:
        ValueError: It is inside.
    """
    place = folder.resolve()
    for images in sorted(watched):
        if place.is_relative_to(Path(images).resolve()):
            raise ValueError(
                f"config training.checkpoint.path={folder}: is inside the images of {images}, and "
                "what a run writes would be taken for classes; use a folder outside"
            )


def _open_lock(path: Path) -> int:
    """Open or create the lock file, which is about to be emptied: only a file that is just that."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise OSError(f"file {path}: cannot be opened: {error.strerror}") from error
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise OSError(f"file {path}: not a regular file with one name; delete it if no run is there")


def _try_lock(folder: Path) -> int:
    """Return the descriptor that holds the lock of `folder`.

    A record lock (not flock): the kernel drops it when this process ends, however it ends, and
    loader processes, which can outlive it by seconds, do not inherit it.
    """
    path = folder / LOCK
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have deleted the file between open and lock: a lock on a file
            # that nobody else can find would protect nothing.
            if _same_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"folder {folder}: in use by {holder} ({path}); wait for it, or give another "
                "training.checkpoint.path"
            ) from error
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise OSError(
                f"folder {folder}: cannot be locked ({path}): {error} (on a file system without "
                "locks: training.checkpoint.lock=false, and one run at a time)"
            ) from error
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, *, lock: bool = True) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is missing. Collective.

    Two runs in one folder would sweep each other's staging folders and take turns to resume from
    each other's checkpoints. Without `lock` it is the user who keeps them apart.

    Raises:
        OSError: On every rank, if another process has it, which is named, or it cannot be made.
    """

    def take() -> int | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"config training.checkpoint.path={folder}: cannot be made: {error}"
            ) from error
        return _try_lock(folder) if lock else None

    is_new = not folder.exists()
    held = collectives.capture(take) if dist.get_rank() == 0 else None
    collectives.broadcast_or_raise(held)
    try:
        yield
    finally:
        if isinstance(held, int):
            with contextlib.suppress(OSError):  # a folder that is gone needs no lock
                (folder / LOCK).unlink()
            os.close(held)
        if is_new and dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # fails, as it should, if the run left anything
                folder.rmdir()


def _trash(root: Path) -> Path:
    return root / f".trash-{uuid.uuid4().hex}"


def _probe(folder: Path, num_bytes: int, *, any_mode: bool) -> Path:
    """Do what a save does, in small, so that a run fails here and not at its first save."""
    staged = folder / f".staging-0-{uuid.uuid4().hex}"
    needed, free = COPIES_IN_FLIGHT * num_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"folder {folder}: {free / 2**30:.2f} GiB free, {COPIES_IN_FLIGHT} checkpoints need "
            f"{needed / 2**30:.2f} GiB (free some, or set training.checkpoint.path elsewhere)"
        )
    try:
        staged.mkdir()
        probe = staged / "probe"
        probe.write_bytes(b"0" * 4096)
        dcp_writer.fsync(probe)
        dcp_writer.fsync(staged)
        renamed = staged.rename(_trash(folder))
        dcp_writer.fsync(folder)
    except OSError as error:
        raise OSError(f"folder {folder}: cannot save there: {error}") from error
    for path in (renamed, renamed / "probe"):
        if reason := untrusted_reason(path, any_mode=any_mode):
            raise OSError(
                f"folder {folder}: what is made there {reason}; no run could resume it (where "
                "files have no modes: training.checkpoint.any_mode=true)"
            )
    return renamed / "probe"


def check_writable(folder: Path, num_bytes: int, *, any_mode: bool = False) -> None:
    """Find out before the first step whether a checkpoint of `num_bytes` can be saved. Collective.

    Raises:
        OSError: On every rank: no room, not writable, not shared by all ranks, or what is made
            there would be refused on resume.
    """
    probing = functools.partial(_probe, folder, num_bytes, any_mode=any_mode)
    made = collectives.capture(probing) if dist.get_rank() == 0 else None
    probe = collectives.broadcast_or_raise(made)
    assert isinstance(probe, Path), "rank 0 has made it"
    blind = [rank for rank, sees in enumerate(collectives.all_gather(probe.exists())) if not sees]
    if dist.get_rank() == 0:
        shutil.rmtree(probe.parent, ignore_errors=True)
    if blind:
        raise OSError(f"folder {folder}: ranks {blind} do not see the files of rank 0 there")


def supersede(root: Path, folder: Path, *, apart_from: Collection[Path]) -> list[str]:
    """Rename the checkpoints newer than `folder`, which the run goes on from. Collective.

    The run abandons the steps after `folder`; under their names the next start would take those
    checkpoints for the newest. Returns the new names; nothing deletes them, and damaged ones
    (`apart_from`) keep theirs.

    Raises:
        OSError: On every rank, if one cannot be renamed.
    """

    def rename() -> list[str]:
        folders = verify.candidates(root)
        newer = [path for path in folders[: folders.index(folder)] if path not in apart_from]
        return [path.rename(_unused(path)).name for path in newer]

    names = collectives.capture(rename) if dist.get_rank() == 0 else None
    told = collectives.broadcast_or_raise(names)
    assert isinstance(told, list), "rank 0 has renamed them"
    return told


def _unused(path: Path) -> Path:
    attempt, name = 1, path.with_name(f"superseded_{path.name}")
    while os.path.lexists(name):
        attempt += 1
        name = path.with_name(f"superseded_{path.name}_{attempt}")
    return name


def is_litter(name: str) -> bool:
    """Whether `name` is that of something which a run had not finished when it ended."""
    return any(pattern.fullmatch(name) for pattern in (STAGING, TRASH, PARTIAL))


def _remove(path: Path) -> None:
    """Delete a folder with what is in it, or a file; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _try(function: Callable[[Path], object], path: Path) -> str | None:
    """Return why a deletion failed, None if it did not."""
    try:
        function(path)
    except OSError as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a run stay: the newest `keep_last`, the best `keep_best`, `protected`.

    known: complete ones that need no second look; only these count, so that nothing is read.
    protected: what was resumed from, and what was refused on resume: a person may want to see it.
    metric: what the best are the best by, "+name" or "-name".
    """

    known: frozenset[Path]
    protected: frozenset[Path]
    keep_last: int
    keep_best: int
    metric: str

    def surplus(self, root: Path) -> list[Path]:
        """Return the checkpoints that neither being new nor being good keeps.

        One that is not known goes when as many known ones as are kept are newer and better.
        """
        folders = verify.candidates(root)
        scores = {folder: verify.score(folder, self.metric) for folder in folders}
        known = [folder for folder in folders if folder in self.known]
        if len(known) < self.keep_last:
            return []
        older = folders[folders.index(known[self.keep_last - 1]) + 1 :]
        best = [folder for folder in known if scores[folder] > -math.inf]
        best = sorted(best, key=lambda folder: scores[folder], reverse=True)[: self.keep_best]
        # An unknown one may be the best of all: it goes only if `keep_best` known ones are better.
        is_full = len(best) == self.keep_best
        bar = min((scores[folder] for folder in best), default=math.inf) if is_full else -math.inf
        kept = {*best, *self.protected}
        return [
            folder
            for folder in older
            if folder not in kept and not scores[folder] > bar and not folder.is_symlink()
        ]

    def sweep(self, root: Path) -> dict[Path, str]:
        """Delete old checkpoints and what unfinished saves left; return what failed, and why.

        Rank 0 only. No save may be under way in `root`.
        """
        failed = {}
        try:
            for folder in self.surplus(root):
                # Renamed first: half a checkpoint must not lie under a checkpoint's name.
                if reason := _try(folder.rename, _trash(root)):
                    failed[folder] = reason
            for path in root.iterdir():
                if is_litter(path.name) and (reason := _try(_remove, path)):
                    failed[path] = reason
        except OSError as error:  # the folder itself cannot be listed
            failed[root] = str(error)
        return failed

    def sweep_after(self, folder: Path) -> dict[Path, str]:
        """Sweep after the commit of `folder`, which stays."""
        also = dataclasses.replace(
            self, known=self.known | {folder}, protected=self.protected | {folder}
        )
        return also.sweep(folder.parent)
