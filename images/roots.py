"""Where datasets are: folders named in a file of this machine, and the archive that comes along.

path_env file, name -> read_root -> folder
<root>.tar.gz -> unpack_archive -> <root>/
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import yaml

from parallel import collectives, distributed
from parallel.distributed import World

ROOTS_KEY = "dataset_roots"
ARCHIVE_MARKER = ".archive-sha256"
# The bundled archives: another file of such a name is a damaged download, or somebody else's.
PINNED_SHA256 = {
    "tiny-imagenet-5.tar.gz": "36cc9e9fad0d3a1de5a6d9832229360bbde92fdfa1e4fb4e5a70f40422671a07",
}
MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 1 << 30


def read_root(path: Path, name: str | None) -> Path:
    """Return the folder of dataset `name` in a YAML file of the user's.

        dataset_roots:
          imagenet: ${DATA}/imagenet     # environment variables and ~ are expanded

    Its other keys, which may be secrets of other programs, are ignored, and no value is printed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not have that name, or a variable in the folder is not set.
    """
    where = f"config dataset.path_env={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: not found")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        # Not `from error`: its text quotes the file.
        raise ValueError(f"{where}: is not YAML{line}") from None
    roots = content.get(ROOTS_KEY) if isinstance(content, dict) else None
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise ValueError(f"{where}: must have {ROOTS_KEY}: with lines of name: folder")
    if name not in roots:
        raise ValueError(f"config dataset.name={name}: must be one of {', '.join(roots)} in {path}")
    try:
        return distributed.expand_path(roots[name])
    except ValueError as error:
        raise ValueError(f"{where}: {ROOTS_KEY}.{name}: {error}") from error


def unpack_once(root: Path, world: World) -> None:
    """Unpack a bundled archive on first use, once per node; the other ranks wait. Collective.

    Raises:
        ValueError, OSError: On every rank, if the archive cannot be unpacked on any node.
    """
    mine = collectives.capture(unpack_archive, root) if world.local_rank == 0 else None
    for outcome in collectives.all_gather(mine):
        if isinstance(outcome, Exception):
            raise outcome


def unpack_archive(root: Path) -> bool:
    """Unpack `<root>.tar.gz` if `root` is absent; True if this call put the folder in place.

    Raises:
        ValueError: The archive is damaged, is not the one that we published under its name, holds
            anything but plain files below `<root.name>/`, or is not the one that `root` was
            unpacked from.
    """
    archive = root.with_name(f"{root.name}.tar.gz")
    if not archive.is_file():
        return False
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != PINNED_SHA256.get(archive.name, found):
        raise ValueError(
            f"archive {archive}: is not the published one, fetch it again (its SHA-256 is {found})"
        )
    if root.exists():
        marker = root / ARCHIVE_MARKER
        if marker.is_file() and marker.read_text() != found:
            raise ValueError(
                f"archive {archive}: {root} was unpacked from another one; delete that folder"
            )
        return False
    # Processes may race and be killed, so a folder beside `root` is renamed once it is complete.
    # Its random ending keeps two containers apart that share a disk and see the same process id.
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
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            tar.extractall(staging, members=_checked(tar, archive, top=top), filter="data")
            while stream.read(1 << 20):  # gzip compares its checksum only at the very end
                continue
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise ValueError(f"archive {archive}: damaged, fetch it again ({err})") from err
    if not (staging / top).is_dir():
        raise ValueError(f"archive {archive}: must hold a folder named {top}")


def _checked(tar: tarfile.TarFile, archive: Path, *, top: str) -> Iterator[tarfile.TarInfo]:
    """Yield each member before it is extracted; the filter "data" would let links through."""
    num_bytes = 0
    for number, member in enumerate(tar, start=1):
        num_bytes += member.size
        rule = None
        if not (is_harmless(member) and PurePosixPath(member.name).parts[:1] == (top,)):
            rule = f"must be a plain file or folder below {top}/ with a plain name"
        elif number > MAX_MEMBERS or num_bytes > MAX_UNPACKED_BYTES:
            rule = f"exceeds {MAX_MEMBERS} members or {MAX_UNPACKED_BYTES} bytes"
        if rule is not None:
            raise ValueError(f"archive {archive}: member {member.name!r} {rule}")
        yield member


def is_harmless(member: tarfile.TarInfo) -> bool:
    """Return whether it is a plain file or folder with a plain name below where it is unpacked."""
    parts = PurePosixPath(member.name).parts  # of an absolute path the first one is "/"
    is_below = bool(parts) and parts[0] != "/" and ".." not in parts
    is_plain_name = "\\" not in member.name and member.name.isprintable()
    is_plain = (member.isdir() or member.isreg()) and not member.mode & 0o6000  # set user or group
    return is_below and is_plain_name and is_plain
