"""Files around the images: text that people wrote, and what is in the making beside a dataset.

    read_text -> str, or one line that names the file
    staging(path) -> .<name>.staging-<id>, locked while its maker lives -> path
    sweep(path): what dead makers of `path` left is removed

A record lock (not flock) says whether a maker lives: the kernel drops it when that process ends,
however it ends and on whatever node. Where a file system has no locks, nothing is swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from parallel.ownership import foreign_reason

MAX_TEXT_BYTES = 16 << 20  # ImageNet's longest list of labels has 3 MB
TOKEN = re.compile(r"[0-9a-f]{32}")
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
KNOWN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe does not block it


def read_text(file: Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Return a file's text; a byte order mark is dropped.

    Raises:
        ValueError: It is not UTF-8, or has more than `limit` bytes.
    """
    with file.open("rb") as source:
        data = source.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{file}: has more than {limit:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        place = data.find(0)  # UTF-16 without a mark reads as UTF-8 with zeros
    except UnicodeDecodeError as err:
        place = err.start
    if place >= 0:
        byte = f"byte {data[place]:#04x} at {place}"
        raise ValueError(f"{file}: is not UTF-8 text ({byte}); save it as UTF-8")
    return text


def untrusted_reason(facts: os.stat_result) -> str | None:
    """Return why a file may be somebody else's work, None if it is this user's or root's own."""
    if not stat.S_ISREG(facts.st_mode):
        return "is not a plain file"
    return foreign_reason(facts)


class Staged(NamedTuple):
    """A file in the making, and room for a folder of the same maker, which it has to make."""

    path: Path
    folder: Path
    sink: BinaryIO


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Staged]:
    """Hold a new, empty file beside `path`; it and its folder are gone at the end.

    Raises:
        OSError: The file cannot be made.
    """
    claimed, descriptor = _claim(path)
    # The lock would be lost as soon as the file was opened and closed once more.
    with os.fdopen(descriptor, "wb") as sink:
        try:
            yield Staged(claimed, _folder(claimed), sink)
        finally:
            shutil.rmtree(_folder(claimed), ignore_errors=True)
            claimed.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what makers of `path` left that this user started and that are dead."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_prefix(path))]
        for name in names:
            if TOKEN.fullmatch(name.removeprefix(_prefix(path))):
                with contextlib.suppress(OSError):  # it is gone, alive, or of another user
                    _sweep_dead(path.with_name(name))


def _sweep_dead(claimed: Path) -> None:
    descriptor = os.open(claimed, KNOWN)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(_folder(claimed), ignore_errors=True)
            claimed.unlink()
    finally:
        os.close(descriptor)


def _claim(path: Path) -> tuple[Path, int]:
    while True:
        claimed = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}")
        descriptor = os.open(claimed, NEW, 0o644)
        with contextlib.suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if claimed.exists():  # nobody swept it between the two calls
            return claimed, descriptor
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name.lstrip('.')}.staging-"


def _folder(claimed: Path) -> Path:
    return claimed.with_name(f"{claimed.name}.d")
