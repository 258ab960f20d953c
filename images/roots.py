"""Where datasets are: folders named in a file of this machine, and the archive that comes along.

path_env file, name -> read_root -> folder
<root>.tar.gz -> unpack_archive -> <root>/
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import yaml

from images.files import read_text, staging, sweep
from parallel import collectives, distributed
from parallel.distributed import World

ROOTS_KEY = "dataset_roots"
STR_TAG = "tag:yaml.org,2002:str"
MAX_PATH_ENV_BYTES = 64 << 10
ARCHIVE_MARKER = ".archive-sha256"
# The bundled archives: another file of such a name is a damaged download, or somebody else's.
PINNED_SHA256 = {
    "tiny-imagenet-5.tar.gz": "36cc9e9fad0d3a1de5a6d9832229360bbde92fdfa1e4fb4e5a70f40422671a07",
}
MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20  # of the long names and extra fields before a member


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
    roots = _read_roots(path, where)
    if name not in roots:
        raise ValueError(f"config dataset.name={name}: must be one of {', '.join(roots)} in {path}")
    try:
        return distributed.expand_path(roots[name])
    except ValueError as error:
        raise ValueError(f"{where}: {ROOTS_KEY}.{name}: {error}") from error


def _read_roots(path: Path, where: str) -> dict[str, str]:
    """Return name -> folder as they are typed.

    Only these lines are looked at, as nodes: other values may be secrets, or aliases of aliases
    that take all memory once they are built.
    """
    try:
        top = yaml.compose(read_text(path, limit=MAX_PATH_ENV_BYTES), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        # Not `from error`: its text quotes the file.
        raise ValueError(f"{where}: is not YAML{line}") from None
    found = [value for key, value in _pairs(top) if key.value == ROOTS_KEY]
    lines = [pair for value in found for pair in _pairs(value)]
    texts = [value.tag for key, value in lines if isinstance(key, yaml.ScalarNode)]
    if not texts or len(lines) != len(texts) or set(texts) - {STR_TAG}:
        raise ValueError(f"{where}: must have {ROOTS_KEY}: with lines of name: folder")
    return {key.value: value.value for key, value in lines}


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


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
    sweep(root)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PINNED_SHA256.get(archive.name, found):
        raise ValueError(
            f"archive {archive}: is not the published one, fetch it again (its SHA-256 is {found})"
        )
    if root.exists():
        marker = root / ARCHIVE_MARKER
        if marker.is_file() and read_text(marker) != found:
            raise ValueError(
                f"archive {archive}: {root} was unpacked from another one; delete that folder"
            )
        return False
    # Processes may race and be killed, so a folder beside `root` is renamed once it is complete.
    with staging(root) as staged:
        staged.folder.mkdir()
        _extract(archive, staged.folder, top=root.name)
        unpacked = staged.folder / root.name
        (unpacked / ARCHIVE_MARKER).write_text(found)
        try:
            unpacked.rename(root)
        except OSError:
            if not root.is_dir():
                raise
            return False  # another process was first
        return True


def _extract(archive: Path, folder: Path, *, top: str) -> None:
    try:
        with (
            gzip.open(archive) as stream,
            open_tar(stream) as tar,
        ):
            tar.extractall(folder, members=_checked(tar, archive, top=top), filter="data")
            while stream.read(1 << 20):  # gzip compares its checksum only at the very end
                continue
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise ValueError(f"archive {archive}: damaged, fetch it again ({err})") from err
    if not (folder / top).is_dir():
        raise ValueError(f"archive {archive}: must hold a folder named {top}")


def _checked(tar: tarfile.TarFile, archive: Path, *, top: str) -> Iterator[tarfile.TarInfo]:
    """Yield each member before it is extracted; the filter "data" would let links through."""
    num_bytes = 0
    for number, member in enumerate(members_of(tar), start=1):
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


class HeaderReader:
    """A tar's file for `tarfile`, which takes memory for as many bytes as a header claims."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read a header, or a piece of a member."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)


def open_tar(file: BinaryIO | gzip.GzipFile) -> tarfile.TarFile:
    """Open an uncompressed tar whose headers take little memory, whatever they claim."""
    return tarfile.open(fileobj=cast("BinaryIO", HeaderReader(file)), mode="r:")


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar opened with a HeaderReader; none is kept.

    Raises:
        tarfile.ReadError: A header is damaged in any way.
    """
    while True:
        try:
            member = tar.next()
        except (ValueError, LookupError, ArithmeticError, RecursionError, struct.error) as err:
            raise tarfile.ReadError(f"a header is damaged: {err}") from err
        if member is None:
            return
        if member.size < 0:
            raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
        tar.members.clear()  # type: ignore[attr-defined]  # TarFile would keep them all
        yield member
