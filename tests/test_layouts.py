"""The same images and labels from every layout; the index is made once and noticed when stale."""

import dataclasses
import json
import os
import sys
import tarfile

import numpy as np
import pytest

from images import cache as index_cache
from images import roots
from images.augment import val_transform
from images.cache import index_images
from images.index import Names, check_count, digest, select
from images.reading import ImageReader
from options import compose
from tests.support.datasets import (
    LAYOUTS,
    WNIDS,
    add,
    as_cls_loc,
    as_packed,
    images_of,
    in_solution,
)
from tests.support.pictures import folder_dataset, val_batches
from training import loaders


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "folders", classes=(WNIDS[1], WNIDS[0], WNIDS[2]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_same_images_and_labels(root, tmp_path, name, split):
    write, layout = LAYOUTS[name]
    index = index_images(write(root, tmp_path / "out"), split)
    assert index.layout == layout
    assert index.classes == WNIDS
    read = ImageReader(index)
    found = [(read(image).data, index.classes[index.labels[image]]) for image in range(len(index))]
    assert sorted(found) == sorted(images_of(root / split))
    assert list(index.sizes) == [len(data) for data, _ in found]


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_index_survives_its_cache(root, tmp_path, name):
    write, _ = LAYOUTS[name]
    data = write(root, tmp_path / "out")
    index = index_images(data, "val")
    cached = index_cache.refresh(data, "val")
    assert index_cache.load(cached) == index
    assert cached.path.parent == data and cached.path.name.startswith(".moevit-index-val-")


def as_pixels(root, split):
    transform = val_transform(
        img_size=(8, 8), crop_ratio=1.0, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    index = index_images(root, split)
    loader = val_batches(index, transform=transform, batch_size=4, num_workers=1)
    return sorted(
        (image_CHW.numpy().tobytes(), int(label))
        for batch in loader
        for image_CHW, label in zip(batch.image_BCHW, batch.label_B, strict=True)
    )


def test_workers_read_shards_like_files(root, tmp_path):
    assert as_pixels(as_packed(root, tmp_path / "out"), "val") == as_pixels(root, "val")


def test_saved_datasets_without_pyarrow_say_what_to_install(root, tmp_path, monkeypatch):
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    info = {"features": {"i": {"_type": "Image"}, "l": {"_type": "ClassLabel", "names": ["n1"]}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"train\.root=.*needs pyarrow \(pip install pyarrow\)"):
        index_images(tmp_path / "saved", "train")


def test_archives_beside_class_folders_are_left_alone(root):
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        add(tar, "n00000001.tar", b"nested")
    assert index_images(root, "train").layout == "imagefolder"


def count_lines(file):
    return len(file.read_text().splitlines())


def build_at_the_same_time(world, root, log):
    make = index_cache.index_images

    def noted(*args):
        with log.open("a") as lines:
            lines.write(f"{world.rank}\n")
        return make(*args)

    index_cache.index_images = noted
    return digest(index_cache.find_index(root, "train", world, folder=None))


def test_four_ranks_that_start_together_make_the_index_once(ranks, root, tmp_path):
    log = tmp_path / "log"
    found = ranks(4, build_at_the_same_time, root, log)
    assert len(set(found)) == 1
    assert found[0] == digest(index_images(root, "train"))
    assert log.read_text() == "0\n"
    ranks(4, build_at_the_same_time, root, log)
    assert log.read_text() == "0\n", "the next run makes none"


def test_an_error_of_rank_0_stops_every_rank(ranks, tmp_path):
    def fails(world, root):
        with pytest.raises(FileNotFoundError, match="no folder"):
            index_cache.find_index(root, "train", world, folder=None)
        return True

    assert all(ranks(2, fails, tmp_path / "nowhere"))


def change_content(root):
    path = next((root / "train").rglob("*.JPEG"))
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def change_size(root):
    path = next((root / "train").rglob("*.JPEG"))
    stat = path.stat()
    path.write_bytes(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove_one(root):
    next((root / "train").rglob("*.JPEG")).unlink()


def add_one(root):
    (root / "train" / WNIDS[0] / "new.JPEG").write_bytes(b"new")


def rename_class(root):
    (root / "train" / WNIDS[0]).rename(root / "train" / "n00000000")


@pytest.mark.parametrize("change", [change_content, change_size, remove_one, add_one, rename_class])
def test_a_changed_dataset_is_indexed_anew(root, change):
    first = index_cache.refresh(root, "train")
    assert first.is_new
    assert not index_cache.refresh(root, "train").is_new
    change(root)
    second = index_cache.refresh(root, "train")
    assert second.is_new
    assert second.identity != first.identity
    assert index_cache.load(second) == index_images(root, "train")
    with pytest.raises(ValueError, match="has changed since it was written"):
        index_cache.load(first)


def test_changed_labels_of_flat_images_are_noticed(root, tmp_path):
    data = as_cls_loc(root, tmp_path / "out", labels=in_solution)
    first = index_cache.refresh(data, "val")
    in_solution(data, [WNIDS[0]] * 7)
    assert index_cache.refresh(data, "val").is_new
    assert set(index_images(data, "val").labels) == {0}
    assert first.is_new


def test_a_changed_shard_is_noticed(root, tmp_path):
    data = as_packed(root, tmp_path / "out")
    index_cache.refresh(data, "train")
    shard = data / "train" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert index_cache.refresh(data, "train").is_new


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not a zip"])
def test_a_damaged_index_is_made_anew(root, damage):
    cached = index_cache.refresh(root, "train")
    raw = cached.path.read_bytes()
    flipped = raw.replace(b"n00000001", b"n00000009", 1)
    content = {"truncated": raw[:-300], "flipped": flipped, "not a zip": b"hello"}
    assert content[damage] != raw
    cached.path.write_bytes(content[damage])
    assert index_cache.refresh(root, "train").is_new


def test_a_read_only_dataset_has_its_index_at_home(root, monkeypatch, tmp_path):
    beside = index_cache.refresh(root, "train").path
    beside.unlink()
    beside.mkdir()  # root may write anywhere, but not a file where a folder is
    monkeypatch.setattr(index_cache, "HOME_FOLDER", tmp_path / "home")
    cached = index_cache.refresh(root, "train")
    assert cached.path.parent == tmp_path / "home"
    assert not index_cache.refresh(root, "train").is_new


def test_an_index_that_can_be_written_nowhere_is_an_error(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dataset\.index_folder=.*cannot be written anywhere"):
        index_cache.refresh(root, "train", folder=tmp_path / "file" / "folder")


def test_names_are_a_tuple_of_strings_in_little_memory():
    names = Names(["a", "", "b\udcff", "\u00e9t\u00e9"])
    assert names == ("a", "", "b\udcff", "\u00e9t\u00e9")
    assert names[-1] == "\u00e9t\u00e9"
    assert names[1:3] == ("", "b\udcff")
    assert names != ("a",)
    with pytest.raises(IndexError):
        names[4]


def test_a_share_of_each_class_is_kept(root):
    index = index_images(root, "train")
    counts = np.bincount(index.labels)
    kept = select(index, class_filter=[], share=0.5)
    assert np.bincount(kept.labels).tolist() == [round(0.5 * count) for count in counts]
    assert set(kept.paths) < set(index.paths)
    assert kept == select(index, class_filter=[], share=0.5)
    assert np.bincount(select(index, class_filter=[], share=0.01).labels).tolist() == [1, 1, 1]


def test_a_smaller_share_is_part_of_a_larger_one(root):
    index = index_images(root, "train")
    small, large = (select(index, class_filter=[], share=share) for share in (0.3, 0.8))
    assert set(small.paths) <= set(large.paths)


@pytest.mark.parametrize("name", ["imagefolder", "shards, packed"])
def test_a_class_filter_keeps_classes_and_numbers_them(root, tmp_path, name):
    index = index_images(LAYOUTS[name][0](root, tmp_path / "out"), "train")
    kept = select(index, class_filter=[WNIDS[2], WNIDS[0]], share=1.0)
    assert kept.classes == (WNIDS[0], WNIDS[2])
    read = ImageReader(kept)
    found = sorted((read(i).data, kept.classes[kept.labels[i]]) for i in range(len(kept)))
    wanted = [pair for pair in images_of(root / "train") if pair[1] != WNIDS[1]]
    assert found == sorted(wanted)


def test_a_class_filter_of_unknown_classes_is_an_error(root):
    with pytest.raises(ValueError, match=r"class_filter=\['n9'\]: not among the 3 classes"):
        select(index_images(root, "train"), class_filter=["n9", WNIDS[0]], share=1.0)


def test_a_wrong_number_of_images_is_an_error(root):
    index = index_images(root, "train")
    check_count(index, 11)
    check_count(index, None)
    with pytest.raises(ValueError, match=r"config dataset\.train\.images=12: .* has 11 images"):
        check_count(index, 12)


@pytest.mark.parametrize("recipe", ["vit_tiny_patch8_64", "deit_tiny"])
def test_a_run_looks_up_its_dataset_by_name(ranks, root, tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("MOEVIT_DATA", str(root.parent))
    file = tmp_path / "path_env.yml"
    file.write_text(
        "huggingface_access_token: hf_secret\n"
        "dataset_roots:\n  mine: ${MOEVIT_DATA}/folders\n  other: /nowhere\n"
    )
    by_name = [f"dataset.path_env={file}", "dataset.name=mine"]
    config = compose.compose(recipe, [*by_name, "model.vit.num_classes=3", "dataset.subset=0.5"])
    assert loaders.data_root(config) == root
    with pytest.raises(ValueError, match=r"train\.root=.*: has no effect with dataset\.path_env="):
        compose.compose(recipe, [*by_name, "dataset.train.root=data/tiny-imagenet-5"])
    with pytest.raises(ValueError, match=r"train\.root=.*: has no effect with dataset\.path_env="):
        compose.restore(dataclasses.asdict(config), ["dataset.train.root=data/tiny-imagenet-5"])
    train, val = ranks(1, lambda world: loaders.find_images(config, world))[0]
    assert (len(train), len(val)) == (6, 7)


PROBLEMS = {
    "dataset_roots: {mine: '${NOT_SET_ANYWHERE}/x'}": r"mine: .*variable NOT_SET_ANYWHERE is not",
    "dataset_roots: {other: /x}": r"dataset\.name=mine: must be one of other",
    "token: hf_secret": "must have dataset_roots",
    "dataset_roots: [a]": "must have dataset_roots",
    "token: hf_secret\n  a: [": r"is not YAML \(line 2\)",
}


@pytest.mark.parametrize("content", PROBLEMS)
def test_a_wrong_path_env_is_named_and_its_secrets_are_not(tmp_path, content):
    file = tmp_path / "path_env.yml"
    file.write_text(content)
    with pytest.raises(ValueError, match=PROBLEMS[content]) as caught:
        roots.read_root(file, "mine")
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None or "hf_secret" not in str(caught.value.__cause__)
