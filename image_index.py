"""Find the images of a dataset on disk: unpack the bundled archive, recognise the layout, label.

    <root>.tar.gz -> unpack_archive -> folder -> index_images -> ImageIndex

Labels are positions in the sorted class ids. Nothing is decoded here.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

Split = Literal["train", "val"]

ANNOTATIONS = "val_annotations.txt"
LAYOUTS = "<split>/<wnid>/*.JPEG, or <split>/<wnid>/images/*.JPEG and val/images/*.JPEG"
ARCHIVE_MARKER = ".archive-sha256"
MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split in a fixed order; `paths` are relative to the split folder `root`."""

    root: Path
    layout: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    split: Split


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
                if not _is_harmless(member, top=top):
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


def _is_harmless(member: tarfile.TarInfo, *, top: str) -> bool:
    parts = PurePosixPath(member.name).parts  # of an absolute path the first one is "/"
    is_below = parts[:1] == (top,) and ".." not in parts
    is_plain_name = "\\" not in member.name and member.name.isprintable()
    is_plain = (member.isdir() or member.isreg()) and not member.mode & 0o6000  # set user or group
    return is_below and is_plain_name and is_plain


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    # Only name and bytes are taken over: owner, mode and time are those of whoever unpacks.
    (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
    if source := tar.extractfile(member):  # None for a folder
        with target.open("xb") as sink:
            shutil.copyfileobj(source, sink)


def index_images(root: Path, split: Split) -> ImageIndex:
    """List one split; `root` is the dataset's root or the split folder, the layout is recognised.

    Classes and, within a class, file names are in sorted order; hidden files are ignored.

    Raises:
        FileNotFoundError: the folder or the annotation file is missing.
        ValueError: no image, an empty class, or annotations that do not match the images.
    """
    if (root / split).is_dir():
        folder = root / split
    elif root.is_dir() and not any((root / name).is_dir() for name in ("train", "val")):
        folder = root
    else:
        problem = f"no folder {root / split}; allowed: {LAYOUTS}"
        raise FileNotFoundError(_wrong_root(root, split, problem))
    is_annotated = (folder / "images").is_dir()
    return (_index_annotated if is_annotated else _index_class_folders)(folder, split)


def digest(index: ImageIndex) -> str:
    """Return a SHA-256 of the names and labels in order: what a position of the stream means."""
    lines = (f"{path}\t{label}" for path, label in zip(index.paths, index.labels, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise ValueError unless both splits have the same classes, hence the same labels."""
    if train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))[:5]
        extra = sorted(set(val.classes) - set(train.classes))[:5]
        problem = f"classes must be those of {train.root} (missing {missing}, unknown {extra})"
        raise ValueError(_wrong_root(val.root, "val", problem))


def _wrong_root(root: Path, split: Split, problem: str) -> str:
    return f"config dataset.{split}.root={root}: {problem}"


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
    return [name for name in names if name.lower().endswith((".jpeg", ".jpg", ".png"))]


def _index_class_folders(folder: Path, split: Split) -> ImageIndex:
    classes = _subfolders(folder)
    is_tiny = bool(classes) and (folder / classes[0] / "images").is_dir()
    inner = "images/" if is_tiny else ""
    names_of = {wnid: _images(folder / wnid / inner) for wnid in classes}
    if not all(names_of.values()) or not classes:
        empty = next((f"class folder {wnid}/{inner}" for wnid in classes if not names_of[wnid]), "")
        problem = f"{empty or 'it'} holds no images; allowed: {LAYOUTS}"
        raise ValueError(_wrong_root(folder, split, problem))
    paths = tuple(f"{wnid}/{inner}{name}" for wnid in classes for name in names_of[wnid])
    labels = tuple(label for label, wnid in enumerate(classes) for _ in names_of[wnid])
    layout = "tiny-imagenet" if is_tiny else "imagefolder"
    return ImageIndex(folder, layout, paths, labels, tuple(classes), split)


def _index_annotated(folder: Path, split: Split) -> ImageIndex:
    names = _images(folder / "images")
    wnid_of = _read_annotations(folder, split)
    if not names:
        raise ValueError(_wrong_root(folder, split, f"images/ holds no images: {LAYOUTS}"))
    for name in sorted(wnid_of.keys() ^ set(names)):
        what = "is missing in images/" if name in wnid_of else f"is not in {ANNOTATIONS}"
        raise ValueError(_wrong_root(folder, split, f"image {name} {what}; they must match"))
    # The training folder beside it knows all classes; without one the annotations define them.
    train = folder.parent / "train"
    classes = _subfolders(train) if train.is_dir() else sorted(set(wnid_of.values()))
    for wnid in sorted(set(wnid_of.values()) - set(classes)):
        problem = f"{ANNOTATIONS} names class {wnid}, which is not a folder of {train}"
        raise ValueError(_wrong_root(folder, split, problem))
    paths = tuple(f"images/{name}" for name in names)
    labels = tuple(classes.index(wnid_of[name]) for name in names)
    return ImageIndex(folder, "tiny-imagenet", paths, labels, tuple(classes), split)


def _read_annotations(folder: Path, split: Split) -> dict[str, str]:
    if not (folder / ANNOTATIONS).is_file():
        problem = f"images/ needs {ANNOTATIONS} beside it; allowed: {LAYOUTS}"
        raise FileNotFoundError(_wrong_root(folder, split, problem))
    wnid_of: dict[str, str] = {}
    lines = (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")  # file name, wnid, then a bounding box that is not needed here
        if len(fields) < 2 or fields[0] in wnid_of:
            problem = f"{ANNOTATIONS} line {number} must be a new file name, a tab and a class"
            raise ValueError(_wrong_root(folder, split, problem))
        wnid_of[fields[0]] = fields[1]
    return wnid_of
