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

from images.index import ImageIndex, Names, Split, wrong_root

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
XML_THREADS = 16
SOURCES = (SOLUTION, XML_FOLDER, GROUND_TRUTH, META)
PARENTS = 4  # from Data/CLS-LOC/val up to the folder of Kaggle's LOC_val_solution.csv
Labels = dict[str, str]  # name of an image without its suffix -> wnid


def subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, except hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> dict[str, int]:
    """Return name -> bytes of the images in a folder, sorted by name."""
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


def _images_below(folder: Path, above: tuple[Path, ...] = ()) -> dict[str, int]:
    """Return relative path -> bytes of the images anywhere below a folder, sorted."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"folder {folder}: links back to {real}, which contains it")
    found = _images(folder)
    for name in subfolders(folder):
        inner = _images_below(folder / name, (*above, real))
        found |= {f"{name}/{path}": size for path, size in inner.items()}
    return dict(sorted(found.items()))


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
    if subfolders(folder) or not _images(folder):
        return _index_class_folders(folder, split)
    return _index_flat(folder, split)


def _index_class_folders(folder: Path, split: Split) -> ImageIndex:
    classes = subfolders(folder)
    is_tiny = bool(classes) and (folder / classes[0] / "images").is_dir()
    inner = "images/" if is_tiny else ""
    listed = _images if is_tiny else _images_below
    found = {wnid: listed(folder / wnid / inner) for wnid in classes}
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
        source=folder / ANNOTATIONS,
    )


def _with_train_classes(
    folder: Path,
    split: Split,
    *,
    layout: str,
    sizes: dict[str, int],
    wnids: Sequence[str],
    inner: str,
    source: Path,
    watched: Sequence[Path] = (),
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
        watched=(str(folder), *map(str, watched)),
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
    """Return where a flat folder's labels may be: in it, and above it up to the dataset's root."""
    return [folder, *islice(folder.parents, PARENTS)]


def _index_flat(folder: Path, split: Split) -> ImageIndex:
    sizes = _images(folder)
    stems = [Path(name).stem for name in sizes]
    found = list(_sources(folder, split, stems))
    if not found:
        problem = (
            f"images without class folders need {SOLUTION}, {XML_FOLDER} or {GROUND_TRUTH} there "
            f"or above; allowed: {LAYOUTS}"
        )
        raise FileNotFoundError(wrong_root(folder, split, problem))
    (source, wnid_of), *others = found
    if len(set(stems)) != len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(wrong_root(folder, split, f"two images are named {twice}"))
    for stem in sorted(wnid_of.keys() ^ set(stems)):
        what = "is not among the images" if stem in wnid_of else f"is not in {source}"
        raise ValueError(wrong_root(folder, split, f"image {stem} {what}; they must match"))
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
        watched=[place / name for place in _places(folder) for name in SOURCES],
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
            lines = (place / GROUND_TRUTH).read_text("utf-8").split()
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
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.reader(lines) if row and row[0] != "ImageId"]
    return {row[0]: row[1].split(" ")[0] for row in rows if len(row) > 1}


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
    if not all(line.isdecimal() for line in lines):
        return dict(zip(stems, lines, strict=True))
    if not (place / META).is_file():
        problem = f"{file} has the devkit's numbers, which need its {META} beside it"
        raise FileNotFoundError(wrong_root(folder, split, problem))
    wnid_of = _read_wnids(place / META)
    for number, line in enumerate(lines, start=1):
        if int(line) not in wnid_of:
            problem = f"{GROUND_TRUTH} line {number}: {line} is not in {META}"
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
