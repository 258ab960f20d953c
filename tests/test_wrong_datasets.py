"""Datasets whose files are fine and which are wrong as a whole: copies of images, wrong labels."""

import dataclasses
import errno
import itertools
import math
import os
import shutil
import struct
import sys
import tarfile
from array import array

import pytest

import evaluate
from images import cache as index_cache
from images import duplicates
from images.cache import index_images
from images.duplicates import UNKNOWN, UNREADABLE, find_twins, fingerprints
from images.index import check_every_class, check_separate, select
from tests.support.datasets import (
    LAYOUTS,
    VAL_NAME,
    WNIDS,
    add,
    as_cls_loc,
    devkit_numbers,
    element,
    in_ground_truth,
    in_solution,
    in_xml,
    matrix,
)
from tests.support.pictures import folder_dataset, write_image
from training import loaders
from weights.sources import Source


@pytest.fixture
def root(tmp_path):
    """Three classes, 11 training and 7 validation images, all of them different."""
    folder = folder_dataset(tmp_path / "folders", classes=WNIDS)
    for number, path in enumerate(sorted((folder / "val").rglob("*.JPEG"))):
        write_image(path, seed=100 + number)
    return folder


def indexed(folder, **options):
    """Both splits, with fingerprints."""
    return [
        index_cache.load(index_cache.refresh(folder, split, prints_s=60, **options))
        for split in ("train", "val")
    ]


def image_of(folder, split, number):
    return sorted((folder / split).rglob("*.JPEG"))[number]


def test_images_that_differ_are_no_copies(root):
    assert find_twins(*indexed(root)) == []


@pytest.mark.parametrize("name", ["imagefolder", "shards, flat", "shards, packed", "arrow"])
def test_copies_are_found_in_every_layout(root, tmp_path, name):
    shutil.copy(image_of(root, "train", 0), image_of(root, "val", 3))
    write, _ = LAYOUTS[name]
    (line,) = find_twins(*indexed(write(root, tmp_path / "out")))
    assert line.startswith("1 of 7 validation images are training images, too; the first: val/")
    assert " is train/" in line


def test_copies_in_a_split_are_counted_and_those_of_other_classes_are_named(root):
    shutil.copy(image_of(root, "train", 0), image_of(root, "train", 1))
    (line,) = find_twins(*indexed(root))
    assert line == (
        "1 of 11 train images are copies of others; the first: "
        f"train/{WNIDS[0]}/3.JPEG is train/{WNIDS[0]}/0.JPEG"
    )
    for number in (4, 8):
        shutil.copy(image_of(root, "train", 0), image_of(root, "train", number))
    shutil.copy(image_of(root, "val", 0), image_of(root, "val", 6))
    lines = find_twins(*indexed(root))
    assert [line.partition(";")[0] for line in lines] == [
        "3 of 11 train images are copies of others (1 times under several labels)",
        "1 of 7 val images are copies of others (1 times under several labels)",
    ]


def test_equal_size_and_middle_are_not_enough(root):
    """Same size and same bytes in the middle: only the whole file says that they differ."""
    first = bytearray(image_of(root, "train", 0).read_bytes() + bytes(8000))
    second = bytes(first)
    first[-1] = 1
    image_of(root, "train", 0).write_bytes(first)
    image_of(root, "train", 1).write_bytes(second)
    train, val = indexed(root)
    assert train.prints[0] == train.prints[1]
    assert find_twins(train, val) == []


def test_only_files_that_may_be_copies_are_read_whole(root, monkeypatch):
    shutil.copy(image_of(root, "train", 0), image_of(root, "val", 3))
    read = []
    real = duplicates.ImageReader.__call__
    monkeypatch.setattr(
        duplicates.ImageReader,
        "__call__",
        lambda reader, image: read.append((reader.index.split, image)) or real(reader, image),
    )
    find_twins(*indexed(root))
    assert sorted(read) == [("train", 0), ("val", 3)]


def test_more_copies_than_are_compared_are_at_least_so_many(root, monkeypatch):
    for number in range(1, 6):
        shutil.copy(image_of(root, "train", 0), image_of(root, "train", number))
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 3)
    (line,) = find_twins(*indexed(root))
    assert line.startswith("at least 2 of 11 train images")


def test_empty_and_missing_files_are_no_copies_of_each_other(root):
    for number in (0, 1):
        image_of(root, "train", number).write_bytes(b"")
    index = index_images(root, "train")
    image_of(root, "train", 5).unlink()
    prints = fingerprints(index, ends=math.inf)
    assert [image for image, value in enumerate(prints) if value == UNREADABLE] == [0, 1, 5]
    shutil.copy(image_of(root, "train", 6), image_of(root, "train", 5))
    assert find_twins(*indexed(root))[0].startswith("1 of 10 train images")


def test_bytes_that_are_no_image_are_left_to_the_reader(root):
    for number in (0, 1):
        image_of(root, "train", number).write_bytes(b"<html>404</html>")
    assert find_twins(*indexed(root)) == []


def test_fingerprints_are_taken_once_and_kept(root, monkeypatch):
    first = indexed(root)
    monkeypatch.setattr(duplicates, "fingerprints", None)  # not called again
    assert indexed(root) == first
    assert index_cache.load(index_cache.refresh(root, "train")).prints == first[0].prints


def test_an_index_without_fingerprints_gets_them_when_they_are_asked_for(root):
    plain = index_cache.load(index_cache.refresh(root, "train"))
    assert len(plain.prints) == 0
    assert len(indexed(root)[0].prints) == 11


def test_a_changed_image_has_another_fingerprint(root):
    before = indexed(root)[0].prints
    write_image(image_of(root, "train", 4), seed=77, size=(9, 9))
    after = indexed(root)[0].prints
    assert [a == b for a, b in zip(before, after, strict=True)] == [n != 4 for n in range(11)]


def test_what_there_was_no_time_for_is_done_at_the_next_start(root, monkeypatch):
    whole = fingerprints(index_images(root, "train"), ends=math.inf)
    monkeypatch.setattr(duplicates, "CHUNK", 4)
    monkeypatch.setattr(duplicates, "THREADS", 1)
    clock = itertools.count()
    monkeypatch.setattr(duplicates.time, "monotonic", lambda: next(clock))
    done = []
    for _ in range(6):
        index = index_cache.load(index_cache.refresh(root, "train", prints_s=3))
        done.append(11 - index.prints.count(UNKNOWN))
    assert done == [3, 6, 9, 11, 11, 11]
    assert index.prints == whole


@pytest.mark.parametrize("is_passing", [True, False])
def test_a_file_that_cannot_be_read_for_a_while_is_tried_again(root, monkeypatch, is_passing):
    index = index_images(root, "train")

    def fail(*_):
        raise OSError(errno.ESTALE if is_passing else errno.EACCES, "said by the file system")

    with monkeypatch.context() as patch:
        patch.setattr(duplicates.os, "pread", fail)
        prints = fingerprints(index, ends=math.inf)
    assert set(prints) == {UNKNOWN if is_passing else UNREADABLE}


def test_an_interruption_loses_fingerprints_and_not_the_index(root, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "fingerprints", interrupt)
    with pytest.raises(KeyboardInterrupt):
        index_cache.refresh(root, "train", prints_s=60)
    assert not index_cache.refresh(root, "train").is_new


def test_finding_images_takes_its_time_from_that_for_fingerprints(root, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(duplicates.time, "monotonic", lambda: now[0])
    real = index_cache.index_images

    def slow(*where):
        now[0] += 61
        return real(*where)

    monkeypatch.setattr(index_cache, "index_images", slow)
    first = index_cache.load(index_cache.refresh(root, "train", prints_s=60))
    assert duplicates.num_unknown(first) == 11
    second = index_cache.load(index_cache.refresh(root, "train", prints_s=60))
    assert duplicates.num_unknown(second) == 0


def only_writable_in(monkeypatch, *folders):
    real = index_cache._write

    def write(path, arrays):
        if path.parent not in folders:
            raise PermissionError(errno.EROFS, "Read-only file system", str(path))
        real(path, arrays)

    monkeypatch.setattr(index_cache, "_write", write)


def test_fingerprints_of_a_read_only_index_are_kept_at_home(root, monkeypatch, tmp_path):
    monkeypatch.setattr(index_cache, "HOME_FOLDER", tmp_path)
    index_cache.refresh(root, "train")
    only_writable_in(monkeypatch, tmp_path)
    first = index_cache.refresh(root, "train", prints_s=60)
    assert first.path.parent == tmp_path
    monkeypatch.setattr(duplicates, "fingerprints", None)  # not called again
    assert index_cache.refresh(root, "train", prints_s=60) == first


def test_an_index_is_used_without_fingerprints_where_none_can_be_kept(root, monkeypatch, tmp_path):
    shutil.copy(image_of(root, "val", 1), image_of(root, "val", 3))
    monkeypatch.setattr(index_cache, "HOME_FOLDER", tmp_path)
    val = index_cache.load(index_cache.refresh(root, "val", prints_s=60))
    plain = index_cache.refresh(root, "train")
    only_writable_in(monkeypatch)
    monkeypatch.setattr(duplicates, "fingerprints", None)  # the time would be lost
    kept = index_cache.refresh(root, "train", prints_s=60)
    assert kept == plain._replace(is_new=False)
    lines = duplicates._report(index_cache.load(kept), val)
    assert lines[0].startswith("1 of 7 val images are copies of others"), "of the split that has"
    assert lines[1].startswith("11 images have not been compared yet")


def test_jobs_with_different_fingerprints_use_each_others_index(root):
    first = index_cache.refresh(root, "train")
    second = index_cache.refresh(root, "train", prints_s=60)
    assert index_cache.is_kept(first)
    assert len(index_cache.load(first).prints) == 11
    raw = second.path.read_bytes()
    prints = index_cache.load(second).prints.tobytes()
    second.path.write_bytes(raw.replace(prints, prints[::-1]))
    assert not index_cache.is_kept(second), "fingerprints are part of what is checked"


def test_scores_take_no_fingerprints(small_run):
    arguments = evaluate.parse(["nowhere", "dataset.duplicates=stop"])
    with pytest.raises(ValueError, match=r"config dataset\.duplicates=stop: has no effect here"):
        evaluate.check_used(arguments)
    options = dataclasses.asdict(small_run("dataset.duplicates=stop"))
    source = Source(content={}, config=options, origin="made here")
    assert evaluate.restore(source, []).dataset.duplicates == "ignore"


def test_a_part_of_a_dataset_keeps_its_fingerprints(root):
    train, val = indexed(root)
    part = select(train, class_filter=[WNIDS[1]], share=1.0)
    assert len(part.prints) == len(part) < 11
    assert set(part.prints) < set(train.prints)
    shutil.copy(image_of(root, "train", 0), image_of(root, "val", 0))
    train, val = indexed(root)
    assert find_twins(train, val)
    parts = [select(index, class_filter=[WNIDS[1]], share=1.0) for index in (train, val)]
    assert find_twins(*parts) == []


def prepared(world, config):
    try:
        loaders.find_images(config, world)
    except ValueError as error:
        return str(error)
    return "prepared"


@pytest.mark.parametrize(
    ("do", "result", "printed"),
    [("warn", "prepared", True), ("ignore", "prepared", False), ("stop", "=stop: 1 of 7", False)],
)
def test_copies_do_what_the_option_says(ranks, root, small_run, capfd, do, result, printed):
    shutil.copy(image_of(root, "train", 0), image_of(root, "val", 3))
    config = small_run(f"dataset.train.root={root}", f"dataset.duplicates={do}")
    assert all(result in message for message in ranks(2, prepared, config))
    line = "data: 1 of 7 validation images are training images, too; the first: val/"
    assert capfd.readouterr().err.count(line) == printed, "by one rank"
    kept = index_cache.load(index_cache.refresh(root, "train"))
    assert bool(kept.prints) == (do != "ignore")


def test_images_not_yet_compared_stop_a_run_that_asks_for_it(ranks, root):
    """As if there had been no time for any; the copy in it is not looked for."""
    shutil.copy(image_of(root, "train", 0), image_of(root, "val", 3))
    train, val = (
        dataclasses.replace(index, prints=array("Q", bytes(8 * len(index))))
        for index in indexed(root)
    )

    def check(world):
        with pytest.raises(
            ValueError, match=r"=stop: 18 images have not been compared yet: the nex"
        ):
            duplicates.check_copies(train, val, world, duplicates="stop")
        return True

    assert ranks(1, check) == [True]


@pytest.mark.parametrize("name", ["imagefolder", "shards, flat"])
def test_one_folder_for_both_splits_is_refused(root, tmp_path, name):
    data = LAYOUTS[name][0](root, tmp_path / "out")
    folder = index_images(data, "train").root
    if name == "shards, flat":
        for path in folder.glob("*validation*"):
            path.unlink()
        (folder / "imagenet1k-train-0000.tar").rename(folder / "0.tar")
        (folder / "imagenet1k-train-0001.tar").rename(folder / "1.tar")
    train, val = index_images(folder, "train"), index_images(folder, "val")
    with pytest.raises(ValueError, match=r"dataset\.val\.root=.*the 11 images are the training im"):
        check_separate(train, val)
    check_separate(*(index_images(root, split) for split in ("train", "val")))


def test_a_run_on_one_folder_for_both_is_refused(ranks, root, small_run):
    (message,) = ranks(1, prepared, small_run(f"dataset.train.root={root / 'train'}"))
    assert "the 11 images are the training images, too" in message


def test_classes_without_images_are_refused(ranks, root, small_run, tmp_path):
    data = LAYOUTS["cls-loc, solution"][0](root, tmp_path / "out")
    in_solution(data, [WNIDS[0], WNIDS[1]] * 3 + [WNIDS[0]])
    says = rf"dataset\.val\.root=.*1 of 3 classes have no image, the first \['{WNIDS[2]}'\]"
    with pytest.raises(ValueError, match=says):
        check_every_class(index_images(data, "val"))
    (message,) = ranks(1, prepared, small_run(f"dataset.train.root={data}"))
    assert "1 of 3 classes have no image" in message
    kept = small_run(
        f"dataset.train.root={data}",
        f"dataset.class_filter=[{WNIDS[0]},{WNIDS[1]}]",
        "model.vit.num_classes=2",
    )
    assert ranks(1, prepared, kept) == ["prepared"]


def shifted(wnids):
    return [*wnids[1:], wnids[0]]


PAIRS = [
    (in_solution, in_xml),
    (in_solution, in_ground_truth),
    (in_solution, devkit_numbers),
    (in_xml, in_ground_truth),
]


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_labels_shifted_in_one_of_two_files_are_refused(root, tmp_path, pair, is_second):
    def labels(out, wnids):
        pair[0](out, wnids if is_second else shifted(wnids))
        pair[1](out, shifted(wnids) if is_second else wnids)

    data = as_cls_loc(root, tmp_path / "out", labels=labels)
    # Of the classes' 3, 2 and 2 images, the last of each has the next class.
    says = r"dataset\.val\.root=.*3 of 7 labels in .* and .* differ, the first of ILSVRC2012_val_0"
    with pytest.raises(ValueError, match=says):
        index_images(data, "val")


@pytest.mark.parametrize("pair", PAIRS)
def test_files_that_agree_are_fine_and_each_is_watched(root, tmp_path, pair):
    def labels(out, wnids):
        for write in pair:
            write(out, wnids)

    data = as_cls_loc(root, tmp_path / "out", labels=labels)
    index = index_images(data, "val")
    one = index_images(as_cls_loc(root, tmp_path / "one", labels=pair[0]), "val")
    assert index.labels == one.labels
    index_cache.refresh(data, "val")
    assert not index_cache.refresh(data, "val").is_new
    files = [path for path in data.rglob("*") if path.suffix in (".xml", ".txt", ".csv", ".mat")]
    for file in {path.suffix: path for path in files}.values():
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        assert index_cache.refresh(data, "val").is_new, file


def nested(depth):
    """A meta.mat of cells inside cells, whose declared sizes go beyond the file."""
    one = struct.pack("<II", 14, 1 << 30) + matrix(1, (1, 1))[8:]
    whole = struct.pack("<II", 14, 1 << 30) + matrix(1, (1, 1), name=b"synsets")[8:] + one * depth
    return META_HEADER + whole


META_HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
METAS = {
    "empty": b"",
    "text": b"<html>not found</html>" * 40,
    "header alone": META_HEADER,
    "no synsets": META_HEADER + matrix(6, (1, 1), element(9, bytes(8)), name=b"other"),
    "a number": META_HEADER + matrix(6, (1, 1), element(9, bytes(8)), name=b"synsets"),
    "huge": META_HEADER + matrix(2, (1 << 30, 1 << 30), element(5, bytes(4)), name=b"synsets"),
    "newer": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(64),
    "too deep": nested(50_000),
    "too large": META_HEADER + bytes(4 << 20),
}


@pytest.mark.parametrize("kind", [*METAS, "cut", "flipped"])
def test_a_damaged_or_hostile_meta_mat_is_one_line(root, tmp_path, kind):
    data = as_cls_loc(root, tmp_path / "out", labels=devkit_numbers)
    file = data / "ILSVRC" / "meta.mat"
    good = file.read_bytes()
    flipped = good[:160] + bytes([good[160] ^ 255]) + good[161:]
    file.write_bytes({**METAS, "cut": good[:200], "flipped": flipped}[kind])
    with pytest.raises(
        ValueError, match=r"meta\.mat: is not the meta\.mat of ILSVRC's dev"
    ) as caught:
        index_images(data, "val")
    assert "\n" not in str(caught.value)


def test_a_meta_mat_without_scipy_says_what_to_install(root, tmp_path, monkeypatch):
    data = as_cls_loc(root, tmp_path / "out", labels=devkit_numbers)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ValueError, match=r"meta\.mat: reading .* needs scipy \(pip install scipy\)$"
    ):
        index_images(data, "val")


def test_a_second_list_of_other_images_says_nothing(root, tmp_path):
    """A part of the images, with the list of all of them still there."""
    data = as_cls_loc(root, tmp_path / "out", labels=in_xml)
    in_ground_truth(data, [WNIDS[0]] * 50)
    assert index_images(data, "val").layout == "cls-loc"


def test_xml_of_another_image_is_refused(root, tmp_path):
    data = as_cls_loc(root, tmp_path / "out", labels=in_xml)
    folder = data / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    for number in range(1, 8):
        file = folder / f"{VAL_NAME.format(number)}.xml"
        named = VAL_NAME.format(number % 7 + 1)
        file.write_text(file.read_text().replace("<filename>x<", f"<filename>{named}<"))
    with pytest.raises(ValueError, match=r"0001: .*0001\.xml belongs to ILSVRC2012_val_00000002"):
        index_images(data, "val")


def test_numbered_images_that_are_not_at_their_lines_are_refused(root, tmp_path):
    data = as_cls_loc(root, tmp_path / "out", labels=in_ground_truth)
    folder = data / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    (folder / f"{VAL_NAME.format(3)}.JPEG").rename(folder / f"{VAL_NAME.format(9)}.JPEG")
    with pytest.raises(
        ValueError, match=r"val_00000004 is number 3 in the folder, so .* not belong"
    ):
        index_images(data, "val")


def test_two_images_of_one_name_are_refused(root, tmp_path):
    data = as_cls_loc(root, tmp_path / "out", labels=in_solution)
    folder = data / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    write_image(folder / f"{VAL_NAME.format(3)}.png")
    with pytest.raises(ValueError, match=r"two images are named ILSVRC2012_val_00000003"):
        index_images(data, "val")


def test_names_that_contradict_labels_are_refused(root):
    for number, name in enumerate((f"{WNIDS[0]}_1.JPEG", f"x_9_{WNIDS[1]}.JPEG")):
        path = root / "val" / WNIDS[number] / name
        write_image(path, seed=200 + number)
    assert len(index_images(root, "val")) == 9, "what fits"
    write_image(root / "val" / WNIDS[2] / "n12345678_2.JPEG", seed=300)
    assert len(index_images(root, "val")) == 10, "no class of this dataset"
    (root / "val" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").rename(
        root / "val" / WNIDS[2] / f"{WNIDS[0]}_1.JPEG"
    )
    says = rf"1 of 10 images are named .*{WNIDS[2]}/{WNIDS[0]}_1\.JPEG, labelled {WNIDS[2]}"
    with pytest.raises(ValueError, match=says):
        index_images(root, "val")


def test_shifted_numbers_in_shards_are_refused(tmp_path):
    """Keys name the class, .cls the number before it."""
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS) + "\n")
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for number, wnid in enumerate(WNIDS):
            write_image(tmp_path / "x.jpg", seed=number)
            add(tar, f"{wnid}_{number}.jpg", (tmp_path / "x.jpg").read_bytes())
            add(tar, f"{wnid}_{number}.cls", str((number + 1) % 3).encode())
    with pytest.raises(ValueError, match=r"dataset\.train\.root=.*3 of 3 images are named after"):
        index_images(tmp_path, "train")
