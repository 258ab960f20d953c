"""Shards of smaller JPEGs: what is in them, in which order, and what an interruption leaves."""

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images.cache import index_images
from images.reading import ImageReader, UnreadableError, read_header, rgb
from tests.support.datasets import ROOT, bomb, jpeg, pack, png, sixteen_bit
from tests.support.pictures import folder_dataset, write_image
from tests.support.processes import wait_until

SIDE = 32


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "data")


@pytest.fixture(autouse=True)
def four_images_a_shard(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_IMAGES", 4)


def packed(root, out, *, split="train", side=SIDE, **options):
    pack.pack(root, out, split=split, side=side, **options)
    index = index_images(out, split)
    read = ImageReader(index)
    return index, [read(image) for image in range(len(index))]


def smooth(size, mode="RGB"):
    """A picture that JPEG keeps nearly as it is."""
    noise = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(image, kind="JPEG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def one_image(tmp_path, content):
    """What is packed of a dataset of one image."""
    folder = tmp_path / "one" / "train" / "n01"
    folder.mkdir(parents=True)
    (folder / "x.JPEG").write_bytes(content)
    return packed(tmp_path / "one", tmp_path / "out")[1][0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((80, 64), (40, 32)),
        ((64, 80), (32, 40)),
        ((101, 33), (98, 32)),  # 97.9
        ((640, 33), (621, 32)),  # 620.6
        ((33, 33), (32, 32)),
    ],
)
def test_the_shorter_side_of_larger_images_is_as_asked_for(tmp_path, size, expected):
    content = saved(smooth(size))
    source = one_image(tmp_path, content)
    assert (source.width, source.height) == expected
    whole = Image.fromarray(rgb(read_header(content)))
    assert source.data == saved(whole.resize(expected, Image.Resampling.BICUBIC), quality=90)


@pytest.mark.parametrize("size", [(32, 32), (31, 90), (1, 1), (90, 32)])
def test_images_that_are_no_larger_are_kept_as_they_are(tmp_path, size):
    content = saved(smooth(size), quality=70)
    assert one_image(tmp_path, content).data == content


def test_quality_is_90_and_nothing_else_of_the_file_is_taken_over(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    source = one_image(tmp_path, saved(smooth((80, 64)), quality=60, exif=exif))
    with Image.open(io.BytesIO(source.data)) as image:
        tables = Image.open(io.BytesIO(saved(smooth((8, 8)), quality=90))).quantization
        assert image.format == "JPEG"
        assert image.quantization == tables
        assert not image.getexif()
        assert image.size == (40, 32), "the rotation is ignored, as in training"


ODD = {
    "cmyk": saved(smooth((80, 64), "CMYK")),
    "grey": saved(smooth((80, 64), "L")),
    "png": saved(smooth((80, 64)), "PNG"),
    "palette": saved(smooth((80, 64), "P"), "PNG"),
    "16-bit": saved(Image.fromarray(np.full((64, 80), 40_000, np.uint16)), "PNG"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_rgb_jpegs_of_the_same_colors(tmp_path, kind):
    source = one_image(tmp_path, ODD[kind])
    with Image.open(io.BytesIO(source.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 32))
    whole = Image.fromarray(rgb(read_header(ODD[kind])))
    assert source.data == saved(whole.resize((40, 32), Image.Resampling.BICUBIC), quality=90)


@pytest.mark.parametrize("content", [png(), sixteen_bit()])
def test_a_small_png_stays_one_and_is_called_so(tmp_path, content):
    assert one_image(tmp_path, content).data == content
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["png", "cls"]


@pytest.mark.parametrize("side", [None, 4])
def test_shards_have_the_images_in_order_with_their_labels(root, tmp_path, side):
    before = index_images(root, "train")
    index, found = packed(root, tmp_path / "out", side=side)
    assert index.classes == before.classes
    assert list(index.labels) == list(before.labels)
    assert list(index.shard_of) == [0] * 4 + [1] * 4 + [2] * 3
    read = ImageReader(before)
    for image, source in enumerate(found):
        if side is None:
            assert source.data == read(image).data
            continue
        wanted = Image.fromarray(rgb(read(image))).resize((4, 4), Image.Resampling.BICUBIC)
        assert source.data == saved(wanted, quality=90)


def content_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}


def test_any_number_of_workers_writes_the_same_files(root, tmp_path):
    for workers in (1, 2, 3):
        packed(root, tmp_path / str(workers), side=4, workers=workers)
    one, two, three = (content_of(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert one == two == three
    assert set(one) == {"classes.txt", *(f"train/train-00000{n}.tar" for n in range(3))}


BAD = {
    "empty": (b"", "empty"),
    "html": (b"<html>404</html>", "is not a JPEG or PNG"),
    "truncated": (jpeg(size=(64, 64))[:-900], "truncated"),
    "bomb": (bomb(9_500), "9500x9500 pixels"),
}


def spoil(root, image, content):
    index = index_images(root, "train")
    (index.root / index.paths[image]).write_bytes(content)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_stops_it_and_is_named(root, tmp_path, kind, workers):
    content, reason = BAD[kind]
    spoil(root, 5, content)
    with pytest.raises(ValueError, match=rf"^data train/n02 index 5: 3\.JPEG .*{reason}") as caught:
        packed(root, tmp_path / "out", workers=workers)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="holds no images"):
        index_images(tmp_path / "out", "train")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_skipped_and_counted_if_asked_for(root, tmp_path, capfd, workers):
    for image, (content, _) in zip((0, 5, 9), BAD.values(), strict=False):
        spoil(root, image, content)
    before = index_images(root, "train")
    with pytest.raises(ValueError, match="--max-bad 2: 3 images cannot be used"):
        packed(root, tmp_path / "out", workers=workers, max_bad=2)
    capfd.readouterr()
    index, _ = packed(root, tmp_path / "out", workers=workers, max_bad=3)
    kept = [image for image in range(len(before)) if image not in (0, 5, 9)]
    assert list(index.labels) == [before.labels[image] for image in kept]
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("; ")[2] for line in lines] == [
        f"skipped {n} of at most 3" for n in (1, 2, 3)
    ]
    assert [f"index {n}:" in line for n, line in zip((0, 5, 9), lines, strict=True)] == [True] * 3


def written(monkeypatch):
    """The shards that are written from now on, not those that are kept."""
    numbers, real = [], pack.Packer._members
    monkeypatch.setattr(
        pack.Packer,
        "_members",
        lambda packer, number, skipped: numbers.append(number) or real(packer, number, skipped),
    )
    return numbers


def test_an_interrupted_one_is_no_dataset_and_the_same_command_goes_on(
    root, tmp_path, monkeypatch, capfd
):
    spoil(root, 0, b"")
    whole = tmp_path / "whole"
    packed(root, whole, max_bad=1)
    real, out = pack.Packer.write, tmp_path / "out"

    def stops(packer, number):
        if number == 2:
            raise KeyboardInterrupt
        return real(packer, number)

    with monkeypatch.context() as patch:
        patch.setattr(pack.Packer, "write", stops)
        with pytest.raises(KeyboardInterrupt):
            packed(root, out, max_bad=1)
    (out / ".train.part" / ".train-000002.tar.part").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds no images"):
        index_images(out, "train")
    capfd.readouterr()
    numbers = written(monkeypatch)
    packed(root, out, max_bad=1)
    assert numbers == [2]
    assert content_of(out) == content_of(whole)
    assert sorted(path.name for path in out.iterdir()) == ["classes.txt", "train"]
    assert "skipped 1 of at most 1" in capfd.readouterr().err, "that of the first run counts"


@pytest.mark.parametrize(
    ("change", "again"),
    [("image", [1]), ("side", [0, 1, 2]), ("stop", [0]), ("fewer", [0, 1]), ("note", [0])],
)
def test_only_what_was_made_of_the_same_is_kept(root, tmp_path, monkeypatch, change, again):
    spoil(root, 0, b"")
    out, side, max_bad = tmp_path / "out", 4, 1
    with monkeypatch.context() as patch:
        patch.setattr(pack.Path, "rename", rename_but_not(".train.part"))
        with pytest.raises(OSError, match="injected"):
            packed(root, out, side=side, max_bad=max_bad)
    index = index_images(root, "train")
    if change == "image":
        write_image(index.root / index.paths[6], seed=9, size=(40, 40))
    elif change == "side":
        side = 5
    elif change == "stop":
        max_bad = None
    elif change == "fewer":  # the images after it move up, and the last shard is gone
        for image in (1, 2, 3):
            (index.root / index.paths[image]).unlink()
    else:
        (out / ".train.part" / ".train-000000.txt").write_bytes(b"")
    numbers = written(monkeypatch)
    if max_bad is None:
        with pytest.raises(ValueError, match="index 0"):
            packed(root, out, side=side)
    else:
        packed(root, out, side=side, max_bad=max_bad)
        packed(root, tmp_path / "fresh", side=side, max_bad=max_bad)
        assert content_of(out) == content_of(tmp_path / "fresh")
    assert numbers[: len(again)] == again


def rename_but_not(name):
    real = pack.Path.rename

    def rename(path, target):
        if path.name == name:
            raise OSError("injected")
        return real(path, target)

    return rename


def test_a_split_that_is_there_is_left_alone(root, tmp_path):
    out = tmp_path / "out"
    packed(root, out)
    before = content_of(out)
    for folder in (out, root):
        with pytest.raises(FileExistsError, match="train: is there already; delete it or name"):
            packed(root, folder)
    assert content_of(out) == before
    packed(root, out, split="val")
    assert len(index_images(out, "val")) == 7


def test_classes_of_another_dataset_are_refused(root, tmp_path):
    packed(root, tmp_path / "out")
    other = folder_dataset(tmp_path / "other", classes=("a", "b"))
    with pytest.raises(ValueError, match=r"classes\.txt: .*other/val has other classes in val"):
        packed(other, tmp_path / "out", split="val")


def test_names_that_tar_has_no_room_for_are_shortened(tmp_path):
    folder = tmp_path / "data" / "train" / "a class with spaces and \u00e9"
    write_image(folder / f"{'x' * 200}.JPEG")
    write_image(folder / "a\tb\u00e9.JPEG", seed=1)
    index, found = packed(tmp_path / "data", tmp_path / "out")
    assert index.classes == ("a class with spaces and \u00e9",)
    assert len(found) == 2


KILLED = """
import os, signal, sys, time
sys.path.insert(0, "data")
import pack
pack.SHARD_IMAGES = 4
real = pack.encoded
def encoded(reader, image, side):
    if image == 6:
        open(os.path.join(sys.argv[4], "pid"), "w").write(str(os.getpid()))
        os.kill(os.getpid() if "1" in sys.argv else os.getppid(), signal.SIGKILL)
        time.sleep(0.2)  # the worker that did it is not done when its parent is gone
    return real(reader, image, side)
pack.encoded = encoded
pack.main(sys.argv[1:])
"""


def test_a_killed_command_goes_on_where_it_was(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, "--root", root, "--out", out, "--side", "4"]
    killed = subprocess.run([*map(str, words), "--workers", "1"], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    made = (out / ".train.part" / "train-000000.tar").stat()
    assert list((out / ".train.part").glob(".train-000001.tar.*.part"))
    numbers = written(monkeypatch)
    packed(root, out, side=4)
    assert numbers == [1, 2]
    kept = (out / "train" / "train-000000.tar").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    packed(root, tmp_path / "fresh", side=4)
    assert content_of(out) == content_of(tmp_path / "fresh")


def test_workers_of_a_killed_command_end(root, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, "--root", root, "--out", out, "--side", "4"]
    killed = subprocess.run([*map(str, words), "--workers", "2"], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    worker = Path("/proc") / (out / "pid").read_text()
    wait_until(lambda: not worker.exists() or "(zombie)" in (worker / "status").read_text())


def test_the_command_packs_both_splits(root, tmp_path):
    words = [sys.executable, ROOT / "data" / "pack.py", "--root", root, "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True)
    assert done.stdout == (
        f"train: 11 images in {tmp_path}/out/train, 0 skipped\n"
        f"val: 7 images in {tmp_path}/out/val, 0 skipped\n"
    )
    assert len(index_images(tmp_path / "out", "val")) == 7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-bad", "3"], "--max-bad 3: has no effect without --on-error skip"),
        (["--side", "-1"], "--side and --max-bad must be at least 0"),
        (["--workers", "0"], "--workers 1 to 1024"),
    ],
)
def test_options_that_do_nothing_or_make_no_sense_are_refused(
    root, tmp_path, capsys, options, says
):
    with pytest.raises(SystemExit, match="2"):
        pack.main(["--root", str(root), "--out", str(tmp_path / "out"), *options])
    assert says in capsys.readouterr().err


def test_what_cannot_be_done_is_one_line(root, tmp_path, capsys):
    spoil(root, 0, b"")
    assert pack.main(["--root", str(root), "--out", str(tmp_path / "o"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error == "error: data train/n01 index 0: 1.JPEG empty (0 bytes)\n"
    assert pack.main(["--root", str(tmp_path / "no"), "--out", str(tmp_path / "o")]) == 2


def test_a_bad_image_is_only_found_by_its_header_if_nothing_is_decoded(root, tmp_path):
    spoil(root, 5, jpeg(size=(64, 64))[:-900])
    _, found = packed(root, tmp_path / "out", side=None)
    with pytest.raises(UnreadableError):
        rgb(found[5])
