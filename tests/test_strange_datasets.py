"""What people really have in a dataset's folder, and what others may put there."""

import dataclasses
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from images import cache, roots
from images.cache import index_images
from images.reading import FORMATS, UnreadableError, read_header, rgb
from images.roots import unpack_archive
from tests.support.datasets import add, as_arrow, as_packed, jpeg
from tests.support.pictures import folder_dataset, tiny_dataset, write_image

ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "data", classes=("n00000001", "n00000002", "n00000003"))


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)


TWELVE = [str(number) for number in range(12)]
AS_TEXT = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def labels_by_name(index):
    pairs = zip(index.paths, index.labels, strict=True)
    return {path: index.classes[label] for path, label in pairs}


def test_folders_that_are_numbers_are_ids_beside_classes_sorted_as_text(tmp_path):
    shard(tmp_path / "train" / "0.tar", [(f"{name}/a.jpg", jpeg()) for name in TWELVE])
    (tmp_path / "classes.txt").write_text("\n".join(AS_TEXT))
    index = index_images(tmp_path, "train")
    assert labels_by_name(index) == {f"0.tar/{name}/a.jpg": name for name in TWELVE}


def test_numbers_that_could_be_lines_or_classes_are_refused(tmp_path):
    members = [("a.jpg", jpeg()), ("a.cls", b"2")]
    shard(tmp_path / "train" / "0.tar", members)
    (tmp_path / "classes.txt").write_text("\n".join(AS_TEXT))
    with pytest.raises(
        ValueError, match=r"line 2 of .*classes\.txt, counted from 0, is class '10'"
    ):
        index_images(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("\n".join(TWELVE))
    assert index_images(tmp_path, "train").labels == (2,), "every line is its own number"


def test_numbers_and_ids_without_a_list_are_refused(tmp_path):
    members = [("a.jpg", jpeg()), ("a.cls", b"2"), ("2/b.jpg", jpeg())]
    shard(tmp_path / "train" / "0.tar", members)
    with pytest.raises(
        ValueError, match=r"by number \(2\) and by id \('2'\), so it needs a classes"
    ):
        index_images(tmp_path, "train")


def test_two_labels_of_an_image_that_differ_are_refused(tmp_path):
    shard(tmp_path / "train" / "0.tar", [("a.jpg", jpeg()), ("a.cls", b"2"), ("a.json", b"3")])
    with pytest.raises(ValueError, match=r"'a\.json': label 3 was 2 before"):
        index_images(tmp_path, "train")


def test_numeric_class_folders_survive_a_pack(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(TWELVE):
            write_image(tmp_path / "in" / split / name / f"{name}.JPEG", seed=number)
    packed = as_packed(tmp_path / "in", tmp_path / "out")
    before, after = (index_images(folder, "val") for folder in (tmp_path / "in", packed))
    assert (before.classes, before.labels) == (after.classes, after.labels)


def encode(format_name, size=(16, 8), **options):
    sink = io.BytesIO()
    pixels = np.full((size[1], size[0], 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(sink, format_name, **options)
    return sink.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded(name):
    source = read_header(encode(name))
    assert (source.width, source.height) == (16, 8)
    assert np.abs(rgb(source).astype(int) - (200, 100, 50)).max() < 12


@pytest.mark.parametrize("name", ["WEBP", "BMP", "TIFF", "PNG"])
def test_an_image_of_any_format_is_in_the_index_and_keeps_its_kind_in_a_pack(tmp_path, name):
    suffix = {"WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PNG": "png"}[name]
    for split in ("train", "val"):
        path = tmp_path / "in" / split / "n00000001" / f"a.{suffix.upper()}"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(name))
    assert index_images(tmp_path / "in", "val").paths == (f"n00000001/a.{suffix.upper()}",)
    packed = as_packed(tmp_path / "in", tmp_path / "out")
    assert index_images(packed, "val").paths[0].endswith(f"_a.{suffix}")


def test_too_many_pixels_of_a_bmp_are_refused_before_memory_is_taken():
    raw = bytearray(encode("BMP"))
    raw[18:26] = (9000).to_bytes(4, "little") * 2
    with pytest.raises(UnreadableError, match="9000x9000 pixels, at most 64,000,000"):
        read_header(bytes(raw))


def test_a_tiff_whose_tiles_are_larger_than_an_image_may_be_is_refused():
    side = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60_000, 323: 60_000}
    tags = [
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**side, 324: 8, 325: 8}.items()
    ]
    raw = b"II*\0" + struct.pack("<IQH", 16, 0, len(tags)) + b"".join(tags) + bytes(4)
    with pytest.raises(UnreadableError, match="tiles of 3,600,000,000 pixels, at most 64,000,000"):
        read_header(raw)


def test_a_tiff_of_floating_point_pixels_is_refused():
    sink = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(sink, "TIFF")
    with pytest.raises(UnreadableError, match="pixels of mode F"):
        rgb(read_header(sink.getvalue()))


def test_files_that_are_not_used_are_counted_and_the_first_is_named(root):
    for number in range(3):
        (root / "train" / "n00000001" / f"{number}.gif").write_bytes(b"GIF89a")
    (root / "train" / "n00000002" / "plain").write_bytes(b"x")
    write_image(root / "train" / "beside.jpg")
    (root / "train" / "n00000002" / "boxes.txt").write_text("labels, which nobody misses")
    (note,) = index_images(root, "train").notes
    assert note == (
        "5 files that are no images read here are not used: 1 without a suffix (the first: "
        "'n00000002/plain'), 3 .gif (the first: 'n00000001/0.gif'), 1 .jpg (the first: "
        "'beside.jpg')"
    )


def test_members_that_are_not_used_are_counted(tmp_path):
    members = [("n00000001/a.jpg", jpeg()), ("n00000001/b.gif", b"x"), ("n00000001/a.txt", b"x")]
    shard(tmp_path / "train" / "0.tar", members)
    (tmp_path / "train" / "1.tar.gz").write_bytes(b"x")
    (note,) = index_images(tmp_path, "train").notes
    assert "2 files" in note and "'0.tar/n00000001/b.gif'" in note and "'1.tar.gz'" in note


def test_each_start_says_what_is_not_used(ranks, root, capfd):
    (root / "val" / "n00000001" / "a.gif").write_bytes(b"x")
    for _ in range(2):
        ranks(2, lambda world: len(cache.find_index(root, "val", world, folder=None)))
        assert capfd.readouterr().err.count("1 .gif (the first: 'n00000001/a.gif')") == 1


@pytest.mark.parametrize("name", ["n00000001/new.JPEG", "n00000009"])
def test_a_link_that_leads_nowhere_stops(root, name):
    (root / "train" / name).symlink_to("/nowhere")
    with pytest.raises(ValueError, match=rf"{name}: leads to /nowhere, which does not exist"):
        index_images(root, "train")


def test_a_part_of_tiny_imagenet_is_read_and_the_spare_lines_are_counted(tmp_path):
    data = tiny_dataset(tmp_path)
    (data / "val" / "images" / "val_2.JPEG").unlink()
    index = index_images(data, "val")
    assert labels_by_name(index) == {
        "images/val_0.JPEG": "n03",
        "images/val_1.JPEG": "n01",
        "images/val_3.JPEG": "n01",
    }
    assert index.notes == (
        "1 of 4 labels in val_annotations.txt are of no image there (the first: 'val_2.JPEG')",
    )
    write_image(data / "val" / "images" / "stray.JPEG")
    says = "stray.JPEG is not in val_annotations.txt, as 1 of 4 images, and 1 of 4 labels in"
    with pytest.raises(ValueError, match=says):
        index_images(data, "val")


@pytest.mark.parametrize("at", ["", "train"])
def test_torchvision_reads_the_training_folder_after_us(root, at):
    old = root / at / ".moevit-index"
    (old / "other").mkdir(parents=True)
    name = cache.refresh(root / at, "train").path.name.removeprefix(".moevit-index-")
    cache.refresh(root / at, "train").path.unlink()
    (old / name).write_bytes(b"of an earlier version")
    (old / "other").rmdir()
    cache.refresh(root / at, "train")
    assert not old.exists()
    assert ImageFolder(root / "train").classes == ["n00000001", "n00000002", "n00000003"]


def planted(folder, **changes):
    """An index whose digests are right and whose content is not."""
    cached = cache.refresh(folder, "train")
    arrays, _ = cache._pack(dataclasses.replace(cache.load(cached), **changes))
    cache._write(cached.path, arrays)
    return cached.path


def test_an_index_that_watches_nothing_or_another_folder_is_made_anew(root, tmp_path):
    reversed_labels = tuple(reversed(cache.load(cache.refresh(root, "train")).labels))
    for changes in ({"watched": ()}, {"root": tmp_path}, {"watched": (str(root / "val"),)}):
        planted(root, labels=reversed_labels, **changes)
        again = cache.refresh(root, "train")
        assert again.is_new and cache.load(again) == index_images(root, "train"), changes


def test_an_index_with_numbers_of_nothing_is_made_anew(root):
    for labels in ((-1,) * 11, (3,) * 11, (0,) * 10):
        planted(root, labels=labels)
        assert cache.refresh(root, "train").is_new, labels


def test_an_index_that_others_may_write_is_made_anew_and_said(root, capfd):
    path = cache.refresh(root, "train").path
    path.chmod(0o666)
    assert cache.refresh(root, "train").is_new
    assert "is not used, it can be written by every user (mode 0666)" in capfd.readouterr().err
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_index_of_another_user_is_neither_used_nor_replaced(root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HOME_FOLDER", tmp_path / "home")
    path = planted(root, labels=tuple([0] * 11))
    os.chown(path, 12345, 12345)
    before = path.read_bytes()
    made = cache.refresh(root, "train")
    assert made.path.parent == tmp_path / "home"
    assert cache.load(made) == index_images(root, "train")
    assert path.read_bytes() == before


def bomb_of_zeros(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("paths.npy", bytes(64 << 20))


def huge_header(path):
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    head = head.ljust(117) + b"\n"
    raw = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", raw)


def nested_header(path):
    sink = io.BytesIO()
    np.savez(sink, header=np.frombuffer(b"[" * 200_000, np.uint8))
    path.write_bytes(sink.getvalue())


def list_header(path):
    sink = io.BytesIO()
    np.savez(sink, header=np.frombuffer(b"[1]", np.uint8))
    path.write_bytes(sink.getvalue())


def unknown_compression(path):
    raw = bytearray(path.read_bytes())
    method = raw.index(b"PK\x01\x02") + 10  # in the first entry of the zip's list
    raw[method : method + 2] = b"\x63\0"
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage", [bomb_of_zeros, huge_header, nested_header, list_header, unknown_compression]
)
def test_a_damaged_index_of_any_kind_is_made_anew(root, damage):
    path = cache.refresh(root, "train").path
    damage(path)
    assert cache.refresh(root, "train").is_new
    assert cache.load(cache.refresh(root, "train")) == index_images(root, "train")


def test_an_index_larger_than_its_file_is_not_unpacked(tmp_path):
    bomb_of_zeros(tmp_path / "bomb.npz")
    with pytest.raises(ValueError, match="is larger than its file"):
        cache._load_arrays(tmp_path / "bomb.npz")


def test_changed_classes_above_the_shards_are_noticed(root, tmp_path):
    data = as_packed(root, tmp_path / "out")
    cache.refresh(data, "train")
    (data / "classes.txt").write_text("n00000003\nn00000002\nn00000001\n# more\n")
    assert cache.find_layout(data, "train").watched == (str(data / "train"), f"{data}/classes.txt")
    with pytest.raises(ValueError, match="named after another class"):
        cache.refresh(data, "train")


KILLED = """
import os, signal, sys
from pathlib import Path
from images import cache, roots
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "unpack":
    checked = roots._checked
    def some(*args, **kwargs):
        yield next(checked(*args, **kwargs))
        die()
    roots._checked = some
    roots.unpack_archive(Path(sys.argv[2]))
else:
    cache.np.savez = die
    cache.refresh(Path(sys.argv[2]), "train")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unpack", "index"])
def test_what_a_kill_leaves_is_swept_and_what_is_alive_is_not(root, tmp_path, what):
    if what == "unpack":
        root = tmp_path / "set"
        with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
            add(tar, "set/a.txt", b"x")
    process = subprocess.run([sys.executable, "-c", KILLED, what, str(root)], cwd=ROOT, check=False)
    assert process.returncode == -9
    folder = tmp_path if what == "unpack" else root
    assert [path for path in folder.iterdir() if ".staging-" in path.name], "the kill left it"
    (folder / ".other.staging-0").write_text("somebody else's")
    unpack_archive(root) if what == "unpack" else cache.refresh(root, "train")
    left = [path.name for path in folder.iterdir() if ".staging-" in path.name]
    assert left == [".other.staging-0"]


def test_what_is_in_the_making_elsewhere_is_left_alone(tmp_path):
    code = "import sys;from pathlib import Path;from images.files import staging\n"
    code += (
        "with staging(Path(sys.argv[1])) as s: s.folder.mkdir(); print('ready', flush=1); input()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert maker.stdout.readline() == b"ready\n"
    roots.sweep(tmp_path / "set")
    assert len(list(tmp_path.iterdir())) == 2
    maker.communicate(b"\n")
    assert not list(tmp_path.iterdir())


def test_a_tar_header_that_claims_2_to_the_60_bytes_is_one_line(tmp_path):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE):
        info = tarfile.TarInfo("n00000001/a.jpg")
        info.type, info.size = kind, 1 << 60
        path = tmp_path / "train" / "0.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(ValueError, match=r"0\.tar: .*(1,152,921,504,606,846,976|truncated)"):
            index_images(tmp_path, "train")


ENCODINGS = {
    "UTF-16": b"\xff\xfen\x000\x00",
    "UTF-16 without a mark": b"n\x000\x00",
    "latin": b"\xe9",
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_text_in_another_encoding_is_one_line_with_the_files_name(tmp_path, kind):
    shard(tmp_path / "s" / "train" / "0.tar", [("n00000001/a.jpg", jpeg())])
    tiny = tiny_dataset(tmp_path / "tiny")
    files = [
        tmp_path / "s" / "classes.txt",
        tiny / "val" / "val_annotations.txt",
        tmp_path / "p.yml",
    ]
    for file in files:
        file.write_bytes(ENCODINGS[kind])
    reads = [
        lambda: index_images(tmp_path / "s", "train"),
        lambda: index_images(tiny, "val"),
        lambda: roots.read_root(files[2], "mine"),
    ]
    for file, read in zip(files, reads, strict=True):
        with pytest.raises(ValueError, match=rf"{file}: is not UTF-8 text \(byte 0x.. at \d"):
            read()


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    shard(tmp_path / "train" / "0.tar", [("n00000001/a.jpg", jpeg())])
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfn00000001\r\n")
    assert index_images(tmp_path, "train").classes == ("n00000001",)


def test_names_in_path_env_may_be_numbers_and_aliases_cost_nothing(tmp_path):
    file = tmp_path / "p.yml"
    levels = "\n".join(
        f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}" for n in range(1, 30)
    )
    file.write_text(f"k0: &k0 {{a: b}}\n{levels}\ndataset_roots: {{1: /x, a: /y}}\n")
    start = time.monotonic()
    assert roots.read_root(file, "1") == Path("/x")
    with pytest.raises(ValueError, match="must be one of 1, a in"):
        roots.read_root(file, "b")
    file.write_text("[" * 20_000)
    with pytest.raises(ValueError, match="is not YAML"):
        roots.read_root(file, "1")
    assert time.monotonic() - start < 5


def mutated(raw, seed):
    """Some bytes changed, cut out, repeated or made extreme."""
    draw, raw = random.Random(seed), bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(raw) + 1)
        end = min(len(raw), place + draw.choice([1, 4, 8, 64]))
        extreme = draw.choice([b"\xff", b"\x00", b"\x80", b"9", b"\n", b"["])
        raw[place:end] = draw.choice(
            [b"", raw[place:end] * 3, extreme * (end - place), draw.randbytes(end - place)]
        )
    return bytes(raw)


def fuzz_tar(folder):
    shard(folder / "train" / "0.tar", [("n00000001/a.jpg", jpeg()), ("n00000001/a.cls", b"0")])
    (folder / "classes.txt").write_text("n00000001\n")
    return folder / "train" / "0.tar", lambda: index_images(folder, "train")


def fuzz_classes(folder):
    fuzz_tar(folder)
    return folder / "classes.txt", lambda: index_images(folder, "train")


def fuzz_annotations(folder):
    tiny_dataset(folder)
    return folder / "val" / "val_annotations.txt", lambda: index_images(folder, "val")


def fuzz_index(folder):
    folder_dataset(folder, train=3)
    path = cache.refresh(folder, "train").path
    whole = index_images(folder, "train")

    def read():
        assert cache.load(cache.refresh(folder, "train")) == whole

    return path, read


def fuzz_path_env(folder):
    file = folder / "p.yml"
    file.write_text("token: x\ndataset_roots:\n  mine: /a\n  1: ~/b\n")
    return file, lambda: roots.read_root(file, "mine")


def fuzz_arrow(folder, name="data-00000-of-00002.arrow"):
    as_arrow(
        folder_dataset(folder / "f", classes=("n00000001", "n00000002", "n00000003")), folder / "a"
    )
    return folder / "a" / "train" / name, lambda: index_images(folder / "a", "train")


def fuzz_arrow_info(folder):
    return fuzz_arrow(folder, "dataset_info.json")


def fuzz_arrow_state(folder):
    return fuzz_arrow(folder, "state.json")


def fuzz_image(folder, name):
    file = folder / "image"
    file.write_bytes(encode(name))
    return file, lambda: rgb(read_header(file.read_bytes()))


FUZZED = {
    **{make.__name__: make for make in (fuzz_tar, fuzz_classes, fuzz_annotations, fuzz_index)},
    **{make.__name__: make for make in (fuzz_path_env, fuzz_arrow, fuzz_arrow_info)},
    "fuzz_arrow_state": fuzz_arrow_state,
    **{name: lambda folder, name=name: fuzz_image(folder, name) for name in FORMATS},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FUZZED)
def test_two_hundred_mutations_of_a_file_are_read_or_one_line(tmp_path, kind):
    file, read = FUZZED[kind](tmp_path)
    raw = file.read_bytes()
    for seed in range(200):
        file.write_bytes(mutated(raw, seed))
        try:
            read()
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), seed
