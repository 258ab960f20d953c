"""The bundled data set: what is in it, that it can be rebuilt, and that only shape tells."""

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import PIL
import pytest
from PIL import Image

from images import roots

DATA = Path(__file__).parents[1] / "data"
ARCHIVE = DATA / "tiny-imagenet-5.tar.gz"
WNIDS = ("n03404251", "n03976657", "n04507155", "n06596364", "n09193705")
NUM_TRAIN, NUM_VAL = 400, 100  # per class
NAMES = ("baselines", "indoors", "make_tiny_imagenet_5", "outdoors", "scene")


@pytest.fixture(scope="module")
def scripts():
    """Import the scripts of data/, which find each other only from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DATA))
        import baselines
        import make_tiny_imagenet_5

        yield baselines, make_tiny_imagenet_5
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def files(scripts):
    return scripts[0].read_members(ARCHIVE)


@pytest.fixture(scope="module")
def splits(scripts):
    return scripts[0].read_splits(ARCHIVE)


def skip_unless_pinned_pillow(maker):
    if PIL.__version__ != maker.PILLOW_VERSION:
        pytest.skip(f"bytes are promised for pillow {maker.PILLOW_VERSION}, not {PIL.__version__}")


def test_archive_is_smaller_than_four_megabytes():
    assert ARCHIVE.stat().st_size < 4_000_000


def test_every_class_has_its_train_pictures_and_a_box_for_each(files):
    for wnid in WNIDS:
        rows = files[f"train/{wnid}/{wnid}_boxes.txt"].decode().splitlines()
        names = [f"{wnid}_{i}.JPEG" for i in range(NUM_TRAIN)]
        assert [row.split("\t")[0] for row in rows] == names
        assert all(f"train/{wnid}/images/{name}" in files for name in names)


def test_val_annotations_name_every_val_picture_once_with_a_class_and_a_box(files):
    rows = [row.split("\t") for row in files["val/val_annotations.txt"].decode().splitlines()]
    assert {f"val/images/{row[0]}" for row in rows} == {
        n for n in files if n.endswith(".JPEG") and n.startswith("val")
    }
    assert len(rows) == NUM_VAL * len(WNIDS)
    for wnid in WNIDS:
        assert sum(row[1] == wnid for row in rows) == NUM_VAL
    boxes = [[int(value) for value in row[2:]] for row in rows]
    assert all(0 <= x0 < x1 < 64 and 0 <= y0 < y1 < 64 for x0, y0, x1, y1 in boxes)


def test_wnids_and_words_list_the_five_classes(files):
    assert tuple(files["wnids.txt"].decode().split()) == WNIDS
    words = dict(line.split("\t") for line in files["words.txt"].decode().splitlines())
    assert words == {
        "n03404251": "fur coat",
        "n03976657": "pole",
        "n04507155": "umbrella",
        "n06596364": "comic book",
        "n09193705": "alp",
    }


def test_every_picture_is_a_64_pixel_rgb_jpeg_and_no_two_are_equal(files):
    pictures = [content for name, content in files.items() if name.endswith(".JPEG")]
    assert len(set(pictures)) == len(pictures) == (NUM_TRAIN + NUM_VAL) * len(WNIDS)
    for content in pictures:
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_members_are_sorted_and_carry_no_owner_time_or_odd_mode():
    with tarfile.open(ARCHIVE) as archive:
        entries = archive.getmembers()
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert all(name == "tiny-imagenet-5" or name.startswith("tiny-imagenet-5/") for name in names)
    for entry in entries:
        assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "", "")
        assert entry.mode == (0o755 if entry.isdir() else 0o644)
        assert entry.isdir() or entry.isfile()


def test_gzip_header_holds_no_time_and_no_file_name():
    header = ARCHIVE.read_bytes()[:10]
    assert header[:4] == b"\x1f\x8b\x08\x00"
    assert header[4:8] == bytes(4)


def test_a_picture_does_not_depend_on_the_others(scripts, files):
    _, maker = scripts
    skip_unless_pinned_pillow(maker)
    for label, wnid in enumerate(WNIDS):
        content, _ = maker.render_jpeg(maker.SEED, "train", label=label, index=NUM_TRAIN - 1)
        assert content == files[f"train/{wnid}/images/{wnid}_{NUM_TRAIN - 1}.JPEG"]


def test_another_seed_gives_other_pictures(scripts, files):
    _, maker = scripts
    content, _ = maker.render_jpeg(maker.SEED + 1, "train", label=0, index=0)
    assert content != files[f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"]


def test_pictures_and_boxes_of_every_class_render_again_byte_for_byte(scripts, files):
    """One in 25; `--check`, shown below to find any difference, renders all 2500."""
    _, maker = scripts
    skip_unless_pinned_pillow(maker)
    val = [row.split("\t") for row in files["val/val_annotations.txt"].decode().splitlines()]
    val = {(files[f"val/images/{name}"], wnid, *box) for name, wnid, *box in val}
    for label, wnid in enumerate(WNIDS):
        rows = files[f"train/{wnid}/{wnid}_boxes.txt"].decode().splitlines()
        for index in range(0, NUM_TRAIN, 25):
            content, box = maker.render_jpeg(maker.SEED, "train", label=label, index=index)
            assert content == files[f"train/{wnid}/images/{wnid}_{index}.JPEG"]
            assert rows[index].split("\t")[1:] == list(map(str, box))
        for index in range(0, NUM_VAL, 25):
            content, box = maker.render_jpeg(maker.SEED, "val", label=label, index=index)
            assert (content, wnid, *map(str, box)) in val


def test_the_archive_is_what_the_script_packs_and_the_one_that_is_unpacked(scripts, files):
    assert gzip.decompress(ARCHIVE.read_bytes()) == scripts[1].tar_bytes(files)
    sha = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    assert roots.PINNED_SHA256 == {ARCHIVE.name: sha}


def test_differences_name_the_member_that_changed(scripts):
    _, maker = scripts
    before = maker.tar_bytes({"wnids.txt": b"a\n", "words.txt": b"b\n"})
    after = maker.tar_bytes({"wnids.txt": b"a\n", "words.txt": b"c\n"})
    assert maker.differences(before, before) == []
    assert maker.differences(before, after) == ["tiny-imagenet-5/words.txt"]


def test_check_fails_and_says_what_differs(scripts, tmp_path, monkeypatch, capsys):
    _, maker = scripts
    monkeypatch.setattr(maker, "NUM_TRAIN", 1)
    monkeypatch.setattr(maker, "NUM_VAL", 1)
    path = tmp_path / "small.tar.gz"
    assert maker.main(["--out", str(path)]) == 0
    assert maker.main(["--out", str(path), "--check"]) == 0
    content = maker.members(gzip.decompress(path.read_bytes()))
    changed = {name.split("/", 1)[1]: data for name, data in content.items()}
    changed["words.txt"] += b"n0\textra\n"
    path.write_bytes(maker.gzip_bytes(maker.tar_bytes(changed)))
    assert maker.main(["--out", str(path), "--check"]) == 1
    assert "differs path=tiny-imagenet-5/words.txt" in capsys.readouterr().out


def test_check_of_a_missing_archive_names_the_file(scripts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tar\.gz"):
        scripts[1].main(["--out", str(tmp_path / "gone.tar.gz"), "--check"])


@pytest.mark.slow
def test_colour_and_file_size_say_next_to_nothing_and_pixels_little(scripts, splits):
    baselines, _ = scripts
    top1 = baselines.measure(*splits)
    # Chance is 20 %, one standard error on 500 pictures 1.8 points: the bound is 4.5 of them away.
    assert top1["nearest_mean_colour"] < 0.28
    assert top1["logistic_colour"] < 0.28
    assert top1["logistic_file_size"] < 0.28
    assert top1["logistic_pixels"] < 0.60
