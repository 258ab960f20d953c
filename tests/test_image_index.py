"""Finding images on disk: layouts, labels, refusals, and safe unpacking."""

import gzip
import io
import os
import tarfile
from functools import partial
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from images import roots
from images.cache import index_images
from images.index import check_same_classes
from images.roots import unpack_archive
from tests.support.pictures import folder_dataset, tiny_dataset, write_image


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "data")


@pytest.mark.parametrize("make", [folder_dataset, tiny_dataset])
def test_index_recognises_the_layout_and_labels_by_sorted_wnid(tmp_path, make):
    index = index_images(make(tmp_path), "train")
    assert index.layout == {"folder_dataset": "imagefolder"}.get(make.__name__, "tiny-imagenet")
    assert index.classes == ("n01", "n02", "n03")
    assert list(index.paths) == sorted(index.paths)
    for path, label in zip(index.paths, index.labels, strict=True):
        assert path.startswith(index.classes[label])
        assert (index.root / path).is_file()


def test_index_reads_tiny_imagenet_validation_annotations(tmp_path):
    index = index_images(tiny_dataset(tmp_path), "val")
    assert index.classes == ("n01", "n02", "n03"), "classes come from the training folder"
    assert index.paths == tuple(f"images/val_{n}.JPEG" for n in range(4))
    assert index.labels == (2, 0, 2, 0)


def test_index_of_annotated_images_alone_takes_their_classes(tmp_path):
    tiny_dataset(tmp_path / "a")
    (tmp_path / "a" / "val").rename(tmp_path / "val")
    assert index_images(tmp_path / "val", "val").classes == ("n01", "n03")


def test_images_in_folders_inside_a_class_are_its_images_as_in_torchvision(root):
    write_image(root / "train" / "n02" / "part 1" / "deep" / "a.JPEG", seed=50)
    write_image(root / "train" / "n02" / "0" / "b.jpg", seed=51)
    (root / "train" / "n03" / "empty").mkdir()
    index = index_images(root, "train")
    theirs = ImageFolder(root / "train")
    expected = sorted((str(Path(p).relative_to(root / "train")), y) for p, y in theirs.samples)
    assert sorted(zip(index.paths, index.labels, strict=True)) == expected
    assert "n02/part 1/deep/a.JPEG" in index.paths


def test_a_folder_that_links_back_is_an_error(root):
    (root / "train" / "n02" / "loop").symlink_to(root / "train" / "n02")
    with pytest.raises(ValueError, match=r"n02/loop: links back to .*n02, which contains it"):
        index_images(root, "train")


def test_index_accepts_the_split_folder_itself(root):
    assert index_images(root / "train", "train") == index_images(root, "train")


def test_index_ignores_hidden_files_and_the_case_of_suffixes(root):
    for name in ("a.JPG", "b.jpeg", "c.PnG", ".hidden.jpg", "._d.JPEG", "notes.txt"):
        write_image(root / "train" / "n01" / name)
    (root / "train" / ".cache").mkdir()
    names = {Path(p).name for p in index_images(root, "train").paths if p.startswith("n01")}
    assert {"a.JPG", "b.jpeg", "c.PnG"} <= names
    assert not names & {".hidden.jpg", "._d.JPEG", "notes.txt"}


def break_missing_root(root):
    return root / "nowhere"


def break_missing_split(root):
    (root / "val").rename(root / "validation")
    return root


def break_no_annotations(root):
    (root / "val" / "val_annotations.txt").unlink()
    return root


def break_empty_class(root):
    (root / "val" / "n00").mkdir()
    return root


def break_no_classes(root):
    for image in (root / "val").rglob("*.JPEG"):
        image.unlink()
    for folder in (root / "val").iterdir():
        folder.rmdir()
    return root


def break_image_unannotated(root):
    write_image(root / "val" / "images" / "stray.JPEG")
    return root


def break_no_val_images(root):
    for image in (root / "val" / "images").iterdir():
        image.unlink()
    return root


def append_annotation(line, root):
    file = root / "val" / "val_annotations.txt"
    file.write_text(file.read_text() + line + "\n")
    return root


def break_class_unknown(root):
    write_image(root / "val" / "images" / "new.JPEG")
    return append_annotation("new.JPEG\tn99", root)


@pytest.mark.parametrize(
    ("make", "damage", "error", "says"),
    [
        (folder_dataset, break_missing_root, FileNotFoundError, r"nowhere.*<split>/<wnid>/images"),
        (folder_dataset, break_missing_split, FileNotFoundError, r"no folder .*val; allowed"),
        (tiny_dataset, break_no_annotations, FileNotFoundError, r"needs val_annotations\.txt"),
        (folder_dataset, break_empty_class, ValueError, r"class folder n00/ holds no images"),
        (folder_dataset, break_no_classes, ValueError, r"holds no images; allowed"),
        (tiny_dataset, break_no_val_images, ValueError, r"images/ holds no images"),
        (tiny_dataset, break_image_unannotated, ValueError, r"stray\.JPEG is not in val_annot"),
        (tiny_dataset, break_class_unknown, ValueError, r"class n99, which is not a folder"),
        (tiny_dataset, partial(append_annotation, "no tab"), ValueError, r"line 5 must be"),
        (tiny_dataset, partial(append_annotation, "val_0.JPEG\tn01"), ValueError, r"line 5"),
    ],
)
def test_index_names_field_value_and_what_is_allowed(tmp_path, make, damage, error, says):
    bad = damage(make(tmp_path / "data"))
    with pytest.raises(error, match=says) as caught:
        index_images(bad, "val")
    assert str(caught.value).startswith(f"config dataset.val.root={bad}")
    assert "\n" not in str(caught.value)


def test_check_same_classes_names_the_difference(root):
    train, val = index_images(root, "train"), index_images(root, "val")
    check_same_classes(train, val)
    write_image(root / "val" / "n77" / "x.JPEG")
    with pytest.raises(ValueError, match=r"config dataset\.val\.root=.*: has class n77, which"):
        check_same_classes(train, index_images(root, "val"))


def archive_of(path, members):
    """Write (name, bytes or None for a folder, changes to the header) as a tar.gz."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.mode = 0o755
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data or b""))


GOOD = [("set", None, {}), ("set/a/b.txt", b"hello" * 200, {}), ("set/c.txt", b"", {})]


def test_unpack_puts_the_folder_in_place_and_leaves_nothing_else(tmp_path):
    archive_of(tmp_path / "set.tar.gz", GOOD)
    assert unpack_archive(tmp_path / "set")
    assert (tmp_path / "set" / "a" / "b.txt").read_bytes() == b"hello" * 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.tar.gz"]


def test_unpack_leaves_an_existing_folder_or_a_missing_archive_alone(tmp_path):
    assert not unpack_archive(tmp_path / "set")
    archive_of(tmp_path / "set.tar.gz", GOOD)
    (tmp_path / "set").mkdir()
    assert not unpack_archive(tmp_path / "set")
    assert not list((tmp_path / "set").iterdir())


def test_unpack_accepts_that_another_process_was_first(tmp_path, monkeypatch):
    archive_of(tmp_path / "set.tar.gz", GOOD)
    extract = roots._extract

    def extract_slowly(*args, **kwargs):
        extract(*args, **kwargs)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "theirs").touch()

    monkeypatch.setattr(roots, "_extract", extract_slowly)
    assert not unpack_archive(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["theirs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.tar.gz"]


HOSTILE = {
    "absolute": ("/set/evil", b"x", {}),
    "parent": ("set/../../evil", b"x", {}),
    "outside": ("other/evil", b"x", {}),
    "bare": ("evil", b"x", {}),
    "symlink": ("set/evil", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
    "hardlink": ("set/evil", b"", {"type": tarfile.LNKTYPE, "linkname": "set/c.txt"}),
    "character device": ("set/evil", b"", {"type": tarfile.CHRTYPE}),
    "block device": ("set/evil", b"", {"type": tarfile.BLKTYPE}),
    "pipe": ("set/evil", b"", {"type": tarfile.FIFOTYPE}),
    "setuid": ("set/evil", b"x", {"mode": 0o4755}),
    "setgid": ("set/evil", b"x", {"mode": 0o2755}),
    "newline": ("set/evil\nname", b"x", {}),
    "backslash": ("set/evil\\name", b"x", {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_unpack_refuses_hostile_members_and_writes_nothing(tmp_path, kind):
    box = tmp_path / "box"
    box.mkdir()
    archive_of(box / "set.tar.gz", [*GOOD, HOSTILE[kind]])
    with pytest.raises(ValueError, match=r"set\.tar\.gz: member .*evil") as caught:
        unpack_archive(box / "set")
    assert repr(HOSTILE[kind][0]) in str(caught.value)
    assert [p.name for p in box.iterdir()] == ["set.tar.gz"]
    assert [p.name for p in tmp_path.iterdir()] == ["box"]


def test_unpack_refuses_too_many_members(tmp_path, monkeypatch):
    assert roots.MAX_MEMBERS == 100_000
    monkeypatch.setattr(roots, "MAX_MEMBERS", 3)
    archive_of(tmp_path / "set.tar.gz", [*GOOD, ("set/fourth", None, {})])
    with pytest.raises(ValueError, match=r"member 'set/fourth' exceeds 3 members"):
        unpack_archive(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def test_unpack_refuses_a_total_beyond_one_gib_before_writing_it(tmp_path):
    info = tarfile.TarInfo("set/huge")
    info.size = (1 << 30) + 1
    with gzip.open(tmp_path / "set.tar.gz", "wb") as sink:
        sink.write(info.tobuf())
    with pytest.raises(ValueError, match=r"member 'set/huge' exceeds .* 1073741824 bytes"):
        unpack_archive(tmp_path / "set")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not gzip"])
def test_unpack_refuses_a_damaged_archive(tmp_path, damage):
    path = tmp_path / "set.tar.gz"
    archive_of(path, GOOD)
    raw = path.read_bytes()
    flipped = raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]  # in the checksum
    content = {"truncated": raw[:-20], "flipped": flipped, "empty": b"", "not gzip": b"hello"}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"set\.tar\.gz: damaged"):
        unpack_archive(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def test_an_archive_that_changed_since_it_was_unpacked_is_noticed(tmp_path):
    archive_of(tmp_path / "set.tar.gz", GOOD)
    assert unpack_archive(tmp_path / "set")
    assert not unpack_archive(tmp_path / "set"), "the same one is fine"
    archive_of(tmp_path / "set.tar.gz", [*GOOD, ("set/new.txt", b"new", {})])
    with pytest.raises(ValueError, match=r"set was unpacked from another one; delete that folder"):
        unpack_archive(tmp_path / "set")


def test_a_folder_that_was_not_unpacked_is_used_as_it_is(tmp_path):
    archive_of(tmp_path / "set.tar.gz", GOOD)
    (tmp_path / "set").mkdir()
    assert not unpack_archive(tmp_path / "set")


def test_another_archive_by_a_published_name_is_refused(tmp_path):
    archive_of(tmp_path / "tiny-imagenet-5.tar.gz", [("tiny-imagenet-5/a", b"x", {})])
    says = r"-5\.tar\.gz: is not the published one, fetch it again \(its SHA-256 is \w{64}\)$"
    with pytest.raises(ValueError, match=says):
        unpack_archive(tmp_path / "tiny-imagenet-5")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-imagenet-5.tar.gz"]


def test_unpacked_files_take_over_neither_owner_nor_mode(tmp_path):
    archive_of(tmp_path / "set.tar.gz", [*GOOD, ("set/d", b"x", {"mode": 0o777, "uid": 12345})])
    assert unpack_archive(tmp_path / "set")
    stat = (tmp_path / "set" / "d").stat()
    assert stat.st_uid == os.getuid() and not stat.st_mode & 0o022
