"""Index images that are files: class folders, Tiny-ImageNet, and ILSVRC's CLS-LOC.

    <split>/<wnid>/**/*.JPEG              class folders (ImageFolder; CLS-LOC train)
    <split>/<wnid>/images/*.JPEG          Tiny-ImageNet train; val/images/ + val_annotations.txt
    Data/CLS-LOC/val/*.JPEG               a flat val folder, labelled by the first of these that
                                          exists; the others must not contradict it
        LOC_val_solution.csv              as on Kaggle
        Annotations/CLS-LOC/val/*.xml     bounding boxes, whose object is the class
        ILSVRC2012_validation_ground_truth.txt   a line per image in order: a wnid, or a number that
                                          the devkit's meta.mat turns into one (needs scipy)

Labels are positions in the sorted class ids. Only names, sizes and annotations are read here.
"""

import csv
import importlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from images.files import read_text
from images.index import (
    ImageIndex,
    Names,
    Split,
    first_twice,
    suffix_of,
    unused_note,
    wrong_root,
)
from images.reading import IMAGE_SUFFIXES, SIDE_SUFFIXES

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
NUMBERED = re.compile(r"_val_(\d{8})(?!\d)")  # as ILSVRC numbers validation images, from 1
XML_FILE = re.compile(r"<filename>\s*([^<\s]+)")
XML_CLASS = re.compile(r"<object>\s*<name>\s*([^<\s]+)")
MAX_XML_BYTES = 1 << 20
MAX_META_BYTES = 4 << 20  # compressed; zlib makes up to a thousand times as many of them
MAX_DIGITS = 9  # of a class's number
XML_THREADS = 16
SOURCES = (SOLUTION, XML_FOLDER, GROUND_TRUTH, META)
PARENTS = 4  # from Data/CLS-LOC/val up to the folder of Kaggle's LOC_val_solution.csv
Labels = dict[str, str]  # name of an image without its suffix -> wnid


def subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, except hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


class Listing(NamedTuple):
    """The images in a folder (name -> bytes), and the files that are neither images nor labels."""

    images: dict[str, int]
    others: list[str]


def _files(folder: Path) -> Listing:
    """List the files in a folder; hidden ones are ignored.

    Raises:
        ValueError: A link leads nowhere, or what has an image's name is no file.
    """
    found = Listing({}, [])
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = suffix_of(entry.name)
            is_image = suffix in IMAGE_SUFFIXES
            if entry.name.startswith(".") or suffix in SIDE_SUFFIXES or entry.is_dir():
                continue
            if entry.is_symlink() and not entry.is_file():
                target = Path(entry.path).readlink()
                raise ValueError(f"link {entry.path}: leads to {target}, which does not exist")
            if is_image and not entry.is_file():
                raise ValueError(f"image {entry.path}: is not a plain file")
            if is_image:
                found.images[entry.name] = entry.stat().st_size
            else:
                found.others.append(entry.name)
    return found


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Listing:
    """List the files anywhere below a folder by their relative paths; images are sorted."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"folder {folder}: links back to {real}, which contains it")
    images, others = _files(folder)
    for name in subfolders(folder):
        inner = _files_below(folder / name, (*above, real))
        images |= {f"{name}/{path}": size for path, size in inner.images.items()}
        others += [f"{name}/{path}" for path in inner.others]
    return Listing(dict(sorted(images.items())), others)


def _split_off(listing: Listing, inner: str) -> tuple[dict[str, int], list[str]]:
    """Return the images right in the folder `inner` (name -> bytes), and all other files."""
    used, unused = {}, list(listing.others)
    for path, size in listing.images.items():
        if path.rpartition("/")[0] == inner.rstrip("/"):
            used[path.removeprefix(inner)] = size
        else:
            unused.append(path)
    return used, unused


def find_folder(root: Path, split: Split) -> Path | None:
    """Return the folder of the split's images: `root` itself if it is not a dataset's root."""
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
    if subfolders(folder) or not _files(folder).images:
        return _index_class_folders(folder, split)
    return _index_flat(folder, split)


def watched_files(folder: Path) -> tuple[str, ...]:
    """Return what shows whether an index of the folder is out of date: it, and its labels."""
    is_flat = not subfolders(folder)
    labels = [place / name for place in _places(folder) for name in SOURCES] if is_flat else []
    return (str(folder), *map(str, labels))


def _index_class_folders(folder: Path, split: Split) -> ImageIndex:
    classes = subfolders(folder)
    is_tiny = bool(classes) and (folder / classes[0] / "images").is_dir()
    inner = "images/" if is_tiny else ""
    beside = _files(folder)
    found, unused = {}, [*beside.images, *beside.others]
    for wnid in classes:
        listing = _files_below(folder / wnid)
        found[wnid], rest = _split_off(listing, inner) if is_tiny else listing
        unused += [f"{wnid}/{path}" for path in rest]
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
        notes=unused_note(unused),
    )


def _index_annotated(folder: Path, split: Split) -> ImageIndex:
    sizes, unused = _split_off(_files_below(folder), "images/")
    wnid_of = _read_annotations(folder, split)
    if not sizes:
        raise ValueError(wrong_root(folder, split, f"images/ holds no images: {LAYOUTS}"))
    notes = _match(folder, split, wnid_of, list(sizes), source=ANNOTATIONS)
    wnids = [wnid_of[name] for name in sizes]
    return _with_train_classes(
        folder,
        split,
        layout="tiny-imagenet",
        sizes=sizes,
        wnids=wnids,
        inner="images/",
        source=folder / ANNOTATIONS,
        notes=notes + unused_note(unused),
    )


def _match(
    folder: Path, split: Split, labels: Labels, names: Sequence[str], *, source: Path | str
) -> tuple[str, ...]:
    """Return what to say about labels without an image, which a part of a dataset has.

    Raises:
        ValueError: An image has no label.
    """
    missing = [name for name in names if name not in labels]
    spare = sorted(labels.keys() - set(names))
    without = f"{len(spare)} of {len(labels)} labels in {source} are of no image there"
    if missing:
        problem = (
            f"image {missing[0]} is not in {source}, as {len(missing)} of {len(names)} images, "
            f"and {without}"
        )
        raise ValueError(wrong_root(folder, split, problem))
    return (f"{without} (the first: {spare[0]!r})",) if spare else ()


def _with_train_classes(
    folder: Path,
    split: Split,
    *,
    layout: str,
    sizes: dict[str, int],
    wnids: Sequence[str],
    inner: str,
    source: Path,
    notes: tuple[str, ...],
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
        notes=notes,
    )


def _read_annotations(folder: Path, split: Split) -> dict[str, str]:
    if not (folder / ANNOTATIONS).is_file():
        problem = f"images/ needs {ANNOTATIONS} beside it; allowed: {LAYOUTS}"
        raise FileNotFoundError(wrong_root(folder, split, problem))
    wnid_of: dict[str, str] = {}
    lines = read_text(folder / ANNOTATIONS).splitlines()
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")  # file name, wnid, then a bounding box that is not needed here
        if len(fields) < 2 or not all(fields[:2]) or fields[0] in wnid_of:
            problem = f"{ANNOTATIONS} line {number} must be a new file name, a tab and a class"
            raise ValueError(wrong_root(folder, split, problem))
        wnid_of[fields[0]] = fields[1]
    return wnid_of


def _places(folder: Path) -> list[Path]:
    """Return where a flat folder's labels may be: in it, and above it up to the dataset's root."""
    return [folder, *islice(folder.parents, PARENTS)]


def _index_flat(folder: Path, split: Split) -> ImageIndex:
    sizes, unused = _files(folder)
    sizes = dict(sorted(sizes.items()))
    stems = [Path(name).stem for name in sizes]
    found = list(_sources(folder, split, stems))
    if not found:
        problem = (
            f"images without class folders need {SOLUTION}, {XML_FOLDER} or {GROUND_TRUTH} there "
            f"or above; allowed: {LAYOUTS}"
        )
        raise FileNotFoundError(wrong_root(folder, split, problem))
    (source, wnid_of), *others = found
    if (twice := first_twice(stems)) is not None:
        raise ValueError(wrong_root(folder, split, f"two images are named {twice}"))
    notes = _match(folder, split, wnid_of, stems, source=source)
    for other, theirs in others:
        _check_agree(folder, split, (source, wnid_of), (other, theirs))
    return _with_train_classes(
        folder,
        split,
        layout="cls-loc",
        sizes=sizes,
        wnids=[wnid_of[stem] for stem in stems],
        inner="",
        source=source,
        notes=notes + unused_note(unused),
    )


def _sources(folder: Path, split: Split, stems: Sequence[str]) -> Iterator[tuple[Path, Labels]]:
    """Yield each file or folder of labels with its labels; the first one decides.

    After it, a list of labels in order is left out unless it is as long as the list of images: it
    belongs to the whole dataset, of which these images are a part.
    """
    is_first = True
    for place in _places(folder):
        if (place / SOLUTION).is_file():
            yield place / SOLUTION, _from_solution(place / SOLUTION)
            is_first = False
        if (place / XML_FOLDER).is_dir():
            yield place / XML_FOLDER, _from_xml(place / XML_FOLDER, folder, split, stems)
            is_first = False
        if (place / GROUND_TRUTH).is_file():
            lines = read_text(place / GROUND_TRUTH).split()
            if is_first or len(lines) == len(stems):
                yield place / GROUND_TRUTH, _from_ground_truth(place, folder, split, stems, lines)
                is_first = False


def _check_agree(
    folder: Path, split: Split, first: tuple[Path, Labels], second: tuple[Path, Labels]
) -> None:
    """Raise ValueError if two sources of labels contradict each other."""
    (source, wnid_of), (other, theirs) = first, second
    both = sorted(wnid_of.keys() & theirs.keys())
    wrong = [stem for stem in both if wnid_of[stem] != theirs[stem]]
    if wrong:
        stem = wrong[0]
        problem = (
            f"{len(wrong)} of {len(both)} labels in {source} and {other} differ, the first of "
            f"{stem}: {wnid_of[stem]} and {theirs[stem]}"
        )
        raise ValueError(wrong_root(folder, split, problem))


def _from_solution(file: Path) -> Labels:
    try:
        rows = [row for row in csv.reader(read_text(file).splitlines()) if row]
    except csv.Error as err:
        raise ValueError(f"{file}: is not a table of ImageId,PredictionString ({err})") from err
    labels: Labels = {}
    for number, row in enumerate(rows, start=1):
        if row[0] == "ImageId":
            continue
        wnid = row[1].split(" ")[0] if len(row) > 1 else ""
        if not wnid or labels.setdefault(row[0], wnid) != wnid:
            raise ValueError(f"{file}: row {number} must be a new image and its class")
    return labels


def _from_xml(annotations: Path, folder: Path, split: Split, stems: Sequence[str]) -> Labels:
    with ThreadPoolExecutor(XML_THREADS) as pool:
        texts = pool.map(_read_small, (annotations / f"{stem}.xml" for stem in stems))
    known, wnid_of = set(stems), {}
    for stem, text in zip(stems, texts, strict=True):
        if text is None:
            continue
        # No XML parser: only two words are needed, and entities in foreign files are a hazard.
        of_class, of_file = XML_CLASS.search(text), XML_FILE.search(text)
        if of_class is None:
            problem = f"image {stem}: {annotations / stem}.xml must name the class of an object"
            raise ValueError(wrong_root(folder, split, problem))
        named = Path(of_file[1]).stem if of_file else stem
        if named != stem and named in known:  # some of ILSVRC's files have a placeholder there
            problem = f"image {stem}: {annotations / stem}.xml belongs to {named}"
            raise ValueError(wrong_root(folder, split, problem))
        wnid_of[stem] = of_class[1]
    return wnid_of


def _read_small(file: Path) -> str | None:
    """Return a file's text, "" if it is too long, None if it does not exist."""
    if not file.is_file():
        return None
    return file.read_text("utf-8", "replace") if file.stat().st_size <= MAX_XML_BYTES else ""


def _from_ground_truth(
    place: Path, folder: Path, split: Split, stems: Sequence[str], lines: Sequence[str]
) -> Labels:
    file = place / GROUND_TRUTH
    if len(lines) != len(stems):
        problem = f"has {len(stems)} images, {file} has {len(lines)} lines"
        raise ValueError(wrong_root(folder, split, problem))
    _check_numbers(file, folder, split, stems)
    numbers = [line for line in lines if line.isdecimal()]
    if 0 < len(numbers) < len(lines):  # are "7" and "cat" ids, or is 7 a number of the devkit's?
        problem = f"{file} has both numbers and ids, as {numbers[0]}; it must have one kind"
        raise ValueError(wrong_root(folder, split, problem))
    if not numbers:
        return dict(zip(stems, lines, strict=True))
    if not (place / META).is_file():
        problem = f"{file} has the devkit's numbers, which need its {META} beside it"
        raise FileNotFoundError(wrong_root(folder, split, problem))
    wnid_of = _read_wnids(place / META)
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_DIGITS or int(line) not in wnid_of:
            problem = f"{GROUND_TRUTH} line {number}: {line[:MAX_DIGITS]} is not in {META}"
            raise ValueError(wrong_root(folder, split, problem))
    return {stem: wnid_of[int(line)] for stem, line in zip(stems, lines, strict=True)}


def _read_wnids(path: Path) -> dict[int, str]:
    """Return number -> wnid from the devkit's meta.mat.

    In a process of its own: scipy's reader is compiled code that recurses without a limit, so a
    hostile file can crash it. A crash, like any error there, is just a file that cannot be read.
    """
    if path.stat().st_size > MAX_META_BYTES:
        raise ValueError(f"{path}: is not the meta.mat of ILSVRC's devkit (too large)")
    with ProcessPoolExecutor(1) as pool:
        future = pool.submit(_load_wnids, path)
    error = future.exception()
    if isinstance(error, ImportError):
        needs = "reading the devkit's meta.mat needs scipy (pip install scipy)"
        raise ValueError(f"{path}: {needs}") from error
    if error is not None:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not the meta.mat of ILSVRC's devkit ({reason})") from error
    return future.result()


def _load_wnids(path: Path) -> dict[int, str]:
    loadmat = importlib.import_module("scipy.io").loadmat
    synsets = loadmat(path, variable_names=["synsets"])["synsets"]
    numbers, wnids = synsets["ILSVRC2012_ID"].ravel(), synsets["WNID"].ravel()
    return {
        int(number.item()): str(wnid.item()) for number, wnid in zip(numbers, wnids, strict=True)
    }


def _check_numbers(file: Path, folder: Path, split: Split, stems: Sequence[str]) -> None:
    """Raise ValueError if images are numbered and one of them is not at the line of its number."""
    for line, stem in enumerate(stems, start=1):
        number = NUMBERED.search(stem)
        if number is not None and int(number[1]) != line:
            problem = (
                f"image {stem} is number {line} in the folder, so {file} does not belong to these "
                f"images; {SOLUTION} would name them"
            )
            raise ValueError(wrong_root(folder, split, problem))
