"""Unpack the bundled archive beside its folder, once, and nothing that could write elsewhere.

<root>.tar.gz -> unpack_archive -> <root>/
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

ARCHIVE_MARKER = ".archive-sha256"
MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 1 << 30


def unpack_archive(root: Path) -> bool:
    """Unpack `<root>.tar.gz` if `root` is absent; True if this call put the folder in place.

    Ranks may race and be killed: a staging folder beside `root` is renamed once it is complete.

    Raises:
        ValueError: the archive is damaged, holds anything but plain files below `<root.name>/`, or
            is not the one that `root` was unpacked from.
    """
    archive = root.with_name(f"{root.name}.tar.gz")
    if not archive.is_file():
        return False
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if root.exists():
        marker = root / ARCHIVE_MARKER
        if marker.is_file() and marker.read_text() != found:
            raise ValueError(f"archive {archive}: {root} is of another one; delete that folder")
        return False
    # The random ending keeps two containers apart that share a disk and see the same process id.
    prefix = f".{root.name}.staging-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent) as staging:
        _extract(archive, Path(staging), top=root.name)
        (Path(staging) / root.name / ARCHIVE_MARKER).write_text(found)
        try:
            (Path(staging) / root.name).rename(root)
        except OSError:
            if not root.is_dir():
                raise
            return False  # another process was first
        return True


def _extract(archive: Path, staging: Path, *, top: str) -> None:
    num_bytes = 0
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for number, member in enumerate(tar, start=1):
                num_bytes += member.size
                if not (is_harmless(member) and PurePosixPath(member.name).parts[:1] == (top,)):
                    rule = f"must be a plain file or folder below {top}/ with a plain name"
                    raise ValueError(f"archive {archive}: member {member.name!r} {rule}")
                if number > MAX_MEMBERS or num_bytes > MAX_UNPACKED_BYTES:
                    rule = f"exceeds {MAX_MEMBERS} members or {MAX_UNPACKED_BYTES} bytes"
                    raise ValueError(f"archive {archive}: member {member.name!r} {rule}")
                _write_member(tar, member, staging / member.name)
            while stream.read(1 << 20):  # gzip compares its checksum only at the very end
                continue
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise ValueError(f"archive {archive}: damaged, fetch it again ({err})") from err
    if not (staging / top).is_dir():
        raise ValueError(f"archive {archive}: must hold a folder named {top}")


def is_harmless(member: tarfile.TarInfo) -> bool:
    """Return whether it is a plain file or folder with a plain name below where it is unpacked."""
    parts = PurePosixPath(member.name).parts  # of an absolute path the first one is "/"
    is_below = bool(parts) and parts[0] != "/" and ".." not in parts
    is_plain_name = "\\" not in member.name and member.name.isprintable()
    is_plain = (member.isdir() or member.isreg()) and not member.mode & 0o6000  # set user or group
    return is_below and is_plain_name and is_plain


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    # Only name and bytes are taken over: owner, mode and time are those of whoever unpacks.
    (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
    if source := tar.extractfile(member):  # None for a folder
        with target.open("xb") as sink:
            shutil.copyfileobj(source, sink)
