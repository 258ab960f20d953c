"""Index images that are files: class folders, Tiny-ImageNet, and ILSVRC's CLS-LOC.

    <split>/<wnid>/*.JPEG                 class folders (ImageFolder; CLS-LOC train)
    <split>/<wnid>/images/*.JPEG          Tiny-ImageNet train; val/images/ + val_annotations.txt
    Data/CLS-LOC/val/*.JPEG               a flat val folder, labelled by the first found of
        LOC_val_solution.csv              as on Kaggle
        Annotations/CLS-LOC/val/*.xml     bounding boxes, whose object is the class
        ILSVRC2012_validation_ground_truth.txt   a line per image in order: a wnid, or the devkit's
                                          number, which its meta.mat turns into one

Labels are positions in the sorted class ids. Only names, sizes and annotations are read here.
"""

import csv
import os
import re
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from devkit import read_wnids
from image_index import ImageIndex, Names, Split, wrong_root

ANNOTATIONS = "val_annotations.txt"
SOLUTION = "LOC_val_solution.csv"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
XML_FOLDER = Path("Annotations", "CLS-LOC", "val")
CLS_LOC = Path("Data", "CLS-LOC")
LAYOUTS = (
    "<split>/<wnid>/*.JPEG, <split>/<wnid>/images/*.JPEG and val/images/*.JPEG, "
    "[ILSVRC/]Data/CLS-LOC/<split>, tar shards, or a saved Hugging Face dataset"
)
WNID = re.compile(r"n\d{8}")
XML_CLASS = re.compile(r"<object>\s*<name>\s*([^<\s]+)")
MAX_XML_BYTES = 1 << 20
PARENTS = 4  # from Data/CLS-LOC/val up to where Kaggle has LOC_val_solution.csv


def subfolders(folder: Path) -> list[str]:
    """Return the names of its folders, sorted; hidden ones are ignored."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> dict[str, int]:
    """Return name -> bytes of its images, sorted by name."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = {
            entry.name: entry.stat().st_size
            for entry in entries
            if entry.name.lower().endswith((".jpeg", ".jpg", ".png"))
            and not entry.name.startswith(".")
            and entry.is_file()
        }
    return dict(sorted(found.items()))


def find_folder(root: Path, split: Split) -> Path | None:
    """Return the folder of the split's images, `root` itself if it is none of a whole dataset."""
    for base in (root, root / CLS_LOC, root / "ILSVRC" / CLS_LOC):
        if (base / split).is_dir():
            return base / split
    is_whole = any((root / name).is_dir() for name in ("train", "val", "Data", "ILSVRC"))
    return root if root.is_dir() and not is_whole else None


def index_folder(folder: Path, split: Split) -> ImageIndex:
    """Index one split's folder in any of the layouts above.

    Raises:
        FileNotFoundError: Annotations are missing.
        ValueError: No image, an empty class, or annotations that do not match the images.
    """
    if (folder / "images").is_dir():
        return _index_annotated(folder, split)
    if subfolders(folder) or not _images(folder):
        return _index_class_folders(folder, split)
    return _index_flat(folder, split)


def _index_class_folders(folder: Path, split: Split) -> ImageIndex:
    classes = subfolders(folder)
    is_tiny = bool(classes) and (folder / classes[0] / "images").is_dir()
    inner = "images/" if is_tiny else ""
    found = {wnid: _images(folder / wnid / inner) for wnid in classes}
    if not all(found.values()) or not classes:
        empty = next((f"class folder {wnid}/{inner}" for wnid in classes if not found[wnid]), "")
        problem = f"{empty or 'it'} holds no images; allowed: {LAYOUTS}"
        raise ValueError(wrong_root(folder, split, problem))
    layout = "tiny-imagenet" if is_tiny else "imagefolder"
    return ImageIndex(
        root=folder,
        layout="cls-loc" if folder.parent.name == CLS_LOC.name else layout,
        paths=Names(f"{wnid}/{inner}{name}" for wnid in classes for name in found[wnid]),
        labels=tuple(label for label, wnid in enumerate(classes) for _ in found[wnid]),
        classes=tuple(classes),
        split=split,
        sizes=array("q", (size for wnid in classes for size in found[wnid].values())),
        watched=(str(folder),),
    )


def _index_annotated(folder: Path, split: Split) -> ImageIndex:
    sizes = _images(folder / "images")
    wnid_of = _read_annotations(folder, split)
    if not sizes:
        raise ValueError(wrong_root(folder, split, f"images/ holds no images: {LAYOUTS}"))
    for name in sorted(wnid_of.keys() ^ sizes.keys()):
        what = "is missing in images/" if name in wnid_of else f"is not in {ANNOTATIONS}"
        raise ValueError(wrong_root(folder, split, f"image {name} {what}; they must match"))
    wnids = [wnid_of[name] for name in sizes]
    return _with_train_classes(
        folder,
        split,
        layout="tiny-imagenet",
        sizes=sizes,
        wnids=wnids,
        inner="images/",
        source=ANNOTATIONS,
    )


def _with_train_classes(
    folder: Path,
    split: Split,
    *,
    layout: str,
    sizes: dict[str, int],
    wnids: Sequence[str],
    inner: str,
    source: str,
) -> ImageIndex:
    # The training folder beside it knows all classes; without one the annotations define them.
    train = folder.parent / "train"
    classes = subfolders(train) if train.is_dir() else sorted(set(wnids))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    for wnid in sorted(set(wnids) - set(classes)):
        problem = f"{source} names class {wnid}, which is not a folder of {train}"
        raise ValueError(wrong_root(folder, split, problem))
    return ImageIndex(
        root=folder,
        layout=layout,
        paths=Names(f"{inner}{name}" for name in sizes),
        labels=tuple(label_of[wnid] for wnid in wnids),
        classes=tuple(classes),
        split=split,
        sizes=array("q", sizes.values()),
        watched=(str(folder), *(str(place / source) for place in _places(folder))),
    )


def _read_annotations(folder: Path, split: Split) -> dict[str, str]:
    if not (folder / ANNOTATIONS).is_file():
        problem = f"images/ needs {ANNOTATIONS} beside it; allowed: {LAYOUTS}"
        raise FileNotFoundError(wrong_root(folder, split, problem))
    wnid_of: dict[str, str] = {}
    lines = (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")  # file name, wnid, then a bounding box that is not needed here
        if len(fields) < 2 or fields[0] in wnid_of:
            problem = f"{ANNOTATIONS} line {number} must be a new file name, a tab and a class"
            raise ValueError(wrong_root(folder, split, problem))
        wnid_of[fields[0]] = fields[1]
    return wnid_of


def _places(folder: Path) -> list[Path]:
    """Return where labels of a flat folder may be: in it and up to where datasets begin."""
    return [folder, *islice(folder.parents, PARENTS)]


def _index_flat(folder: Path, split: Split) -> ImageIndex:
    sizes = _images(folder)
    for place in _places(folder):
        if (place / SOLUTION).is_file():
            source, wnids = SOLUTION, _from_solution(place / SOLUTION, folder, split, list(sizes))
        elif (place / XML_FOLDER).is_dir():
            source, wnids = str(XML_FOLDER), _from_xml(place / XML_FOLDER, folder, split, [*sizes])
        elif (place / GROUND_TRUTH).is_file():
            source, wnids = GROUND_TRUTH, _from_ground_truth(place, folder, split, len(sizes))
        else:
            continue
        return _with_train_classes(
            folder, split, layout="cls-loc", sizes=sizes, wnids=wnids, inner="", source=source
        )
    problem = (
        f"images without class folders need {SOLUTION}, {XML_FOLDER} or {GROUND_TRUTH} there or "
        f"above; allowed: {LAYOUTS}"
    )
    raise FileNotFoundError(wrong_root(folder, split, problem))


def _from_solution(file: Path, folder: Path, split: Split, names: list[str]) -> list[str]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.reader(lines) if row and row[0] != "ImageId"]
    wnid_of = {row[0]: row[1].split(" ")[0] for row in rows if len(row) > 1}
    stems = [Path(name).stem for name in names]
    for stem in sorted(wnid_of.keys() ^ set(stems)):
        what = "is not among the images" if stem in wnid_of else f"is not in {SOLUTION}"
        raise ValueError(wrong_root(folder, split, f"image {stem} {what}; they must match"))
    return [wnid_of[stem] for stem in stems]


def _from_xml(annotations: Path, folder: Path, split: Split, names: list[str]) -> list[str]:
    wnids = []
    for name in names:
        file = annotations / f"{Path(name).stem}.xml"
        is_small = file.is_file() and file.stat().st_size <= MAX_XML_BYTES
        # Not an XML parser: one word is needed, and entities of a foreign file are a hazard.
        found = XML_CLASS.search(file.read_text("utf-8", "replace")) if is_small else None
        if found is None:
            problem = f"image {name}: {file} must name the class of an object"
            raise ValueError(wrong_root(folder, split, problem))
        wnids.append(found[1])
    return wnids


def _from_ground_truth(place: Path, folder: Path, split: Split, count: int) -> list[str]:
    lines = (place / GROUND_TRUTH).read_text("utf-8").split()
    if len(lines) != count:
        problem = f"has {count} images, {place / GROUND_TRUTH} has {len(lines)} lines"
        raise ValueError(wrong_root(folder, split, problem))
    if not all(line.isdecimal() for line in lines):
        return lines
    if not (place / META).is_file():
        problem = f"{place / GROUND_TRUTH} has the devkit's numbers, which need its {META} beside"
        raise FileNotFoundError(wrong_root(folder, split, problem))
    wnid_of = read_wnids(place / META)
    for number, line in enumerate(lines, start=1):
        if int(line) not in wnid_of:
            problem = f"{GROUND_TRUTH} line {number}: {line} is not in {META}"
            raise ValueError(wrong_root(folder, split, problem))
    return [wnid_of[int(line)] for line in lines]
