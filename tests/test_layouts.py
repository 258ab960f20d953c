"""The same images and labels from every layout; the index is made once and noticed when stale."""

import dataclasses
import importlib.util
import io
import json
import os
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from imagenet_dataset import val_loader
from images import cache as index_cache
from images import layouts, path_env, shared_index
from images.augment import val_transform
from images.image_reader import ImageReader
from images.index import Names, check_count, digest, select
from images.layouts import index_images
from options import compose
from tests.support.pictures import folder_dataset
from training import loaders

# ILSVRC's validation images are numbered; its labels are in a file of their own.
ROOT = Path(layouts.__file__).parents[1]
WNIDS = ("n00000001", "n00000002", "n00000003")
VAL_NAME = "ILSVRC2012_val_{:08d}"


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "folders", classes=(WNIDS[1], WNIDS[0], WNIDS[2]))


def images_of(folder):
    """(bytes, wnid) of every image of a split of class folders."""
    paths = sorted(folder.rglob("*.JPEG"))
    return [(path.read_bytes(), path.parent.name) for path in paths]


def as_is(root, _out):
    return root


def as_tiny_imagenet(root, out):
    for data, wnid in images_of(root / "train"):
        folder = out / "train" / wnid / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{wnid}_{len(list(folder.iterdir()))}.JPEG").write_bytes(data)
    lines = []
    (out / "val" / "images").mkdir(parents=True)
    for number, (data, wnid) in enumerate(images_of(root / "val")):
        (out / "val" / "images" / f"val_{number}.JPEG").write_bytes(data)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (out / "val" / "val_annotations.txt").write_text("".join(lines))
    return out


def as_cls_loc(root, out, *, labels):
    data_folder = out / "ILSVRC" / "Data" / "CLS-LOC"
    (data_folder / "val").mkdir(parents=True)
    for data, wnid in images_of(root / "train"):
        folder = data_folder / "train" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{wnid}_{len(list(folder.iterdir()))}.JPEG").write_bytes(data)
    val = images_of(root / "val")
    for number, (data, _) in enumerate(val, start=1):
        (data_folder / "val" / f"{VAL_NAME.format(number)}.JPEG").write_bytes(data)
    labels(out, [wnid for _, wnid in val])
    return out


def in_solution(out, wnids):
    lines = [
        f"{VAL_NAME.format(n)},{wnid} 0 0 7 7 {wnid} 1 1 2 2" for n, wnid in enumerate(wnids, 1)
    ]
    rows = "\n".join(reversed(lines))  # Kaggle's is in no order
    (out / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}\n")


def in_xml(out, wnids):
    folder = out / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for number, wnid in enumerate(wnids, start=1):
        thing = f"<object>\n\t<name>{wnid}</name></object>"
        text = f"<annotation><filename>x</filename>\n{thing}</annotation>"
        (folder / f"{VAL_NAME.format(number)}.xml").write_text(text)


def in_ground_truth(out, wnids):
    lines = "\n".join(wnids)
    (out / "ILSVRC" / "ILSVRC2012_validation_ground_truth.txt").write_text(f"{lines}\n")


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(kind, sizes, *contents, name=b""):
    flags = element(6, struct.pack("<II", kind, 0))
    parts = [flags, element(5, struct.pack("<ii", *sizes)), element(1, name), *contents]
    return element(14, b"".join(parts))


def devkit_numbers(out, wnids):
    """Numbers that are not in the order of the wnids, and MATLAB's file that says what they are."""
    number_of = {WNIDS[0]: 3, WNIDS[1]: 1, WNIDS[2]: 2}
    fields = [
        element(5, struct.pack("<i", 16)),
        element(1, b"ILSVRC2012_ID".ljust(16, b"\0") + b"WNID".ljust(16, b"\0")),
    ]
    values = []
    for wnid, number in number_of.items():
        # A number that fits is stored as a byte, in an element of one word.
        short = struct.pack("<HHI", 2, 1, number)
        values.append(matrix(6, (1, 1), short))
        values.append(matrix(4, (1, len(wnid)), element(4, wnid.encode("utf-16-le"))))
    whole = matrix(2, (len(number_of), 1), *fields, *values, name=b"synsets")
    packed = zlib.compress(whole)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    (out / "ILSVRC" / "meta.mat").write_bytes(header + struct.pack("<II", 15, len(packed)) + packed)
    lines = "\n".join(str(number_of[wnid]) for wnid in wnids)
    (out / "ILSVRC" / "ILSVRC2012_validation_ground_truth.txt").write_text(f"{lines}\n")


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def load_pack():
    if "pack" in sys.modules:  # pytest and imports know this file by two names
        return sys.modules["pack"]
    spec = importlib.util.spec_from_file_location("pack", ROOT / "data" / "pack.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module  # its workers look their functions up there
    spec.loader.exec_module(module)
    return module


pack = load_pack()


def as_packed(root, out):
    """Our own shards, which keep every file as it is."""
    for split in ("train", "val"):
        pack.pack(root, out, split=split, side=None)
    return out


def as_flat_shards(root, out):
    """Shards as WebDataset's ImageNet script writes them: numbers as keys, classes in .cls."""
    out.mkdir()
    (out / "classes.txt").write_text("\n".join(WNIDS) + "\n")
    for split, name in (("train", "train"), ("val", "validation")):
        for shard in range(2):
            with tarfile.open(out / f"imagenet1k-{name}-{shard:04d}.tar", "w") as tar:
                for number, (data, wnid) in enumerate(images_of(root / split)):
                    if number % 2 == shard:
                        add(tar, f"{number:08d}.cls", str(WNIDS.index(wnid)).encode())
                        add(tar, f"{number:08d}.jpg", data)
    return out


def as_json_shards(root, out):
    for split in ("train", "val"):
        (out / split).mkdir(parents=True)
        with tarfile.open(out / split / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number, (data, wnid) in enumerate(images_of(root / split)):
                add(tar, f"x/{number}.jpeg", data)
                add(tar, f"x/{number}.json", json.dumps({"label": wnid, "width": 8}).encode())
    return out


def as_tarred_folders(root, out):
    """What `tar cf 0.tar .` makes of class folders."""
    for split in ("train", "val"):
        (out / split).mkdir(parents=True)
        with tarfile.open(out / split / "0.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    return out


def as_arrow(root, out):
    """What `datasets.DatasetDict.save_to_disk` writes, in two files of two record batches."""
    pyarrow = pytest.importorskip("pyarrow")
    image = {"_type": "Image"}
    features = {"image": image, "label": {"_type": "ClassLabel", "names": list(WNIDS)}}
    for split, name in (("train", "train"), ("val", "validation")):
        (out / name).mkdir(parents=True)
        rows = images_of(root / split)
        files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
        for number, file in enumerate(files):
            part = rows[number::2]
            columns = {
                "image": pyarrow.array([{"bytes": data, "path": "x.JPEG"} for data, _ in part]),
                "label": pyarrow.array([WNIDS.index(wnid) for _, wnid in part], pyarrow.int64()),
            }
            table = pyarrow.table(columns)
            with pyarrow.OSFile(str(out / name / file), "wb") as sink:
                with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=2)
        (out / name / "dataset_info.json").write_text(json.dumps({"features": features}))
        state = {"_data_files": [{"filename": file} for file in files]}
        (out / name / "state.json").write_text(json.dumps(state))
    return out


LAYOUTS = {
    "imagefolder": (as_is, "imagefolder"),
    "tiny-imagenet": (as_tiny_imagenet, "tiny-imagenet"),
    "cls-loc, solution": (partial(as_cls_loc, labels=in_solution), "cls-loc"),
    "cls-loc, xml": (partial(as_cls_loc, labels=in_xml), "cls-loc"),
    "cls-loc, wnids": (partial(as_cls_loc, labels=in_ground_truth), "cls-loc"),
    "cls-loc, devkit": (partial(as_cls_loc, labels=devkit_numbers), "cls-loc"),
    "shards, packed": (as_packed, "webdataset"),
    "shards, flat": (as_flat_shards, "webdataset"),
    "shards, json": (as_json_shards, "webdataset"),
    "shards, folders": (as_tarred_folders, "webdataset"),
    "arrow": (as_arrow, "arrow"),
}


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
    assert cached.path.parent == data / ".moevit-index"


def as_pixels(root, split):
    transform = val_transform(
        img_size=(8, 8), crop_ratio=1.0, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    loader = val_loader(
        ImageReader(index_images(root, split)),
        transform=transform,
        batch_size=4,
        rank=0,
        world=1,
        num_workers=1,
        pin_memory=False,
    )
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
    make = layouts.index_images

    def noted(*args):
        with log.open("a") as lines:
            lines.write(f"{world.rank}\n")
        return make(*args)

    layouts.index_images = noted
    return digest(shared_index.find_index(root, "train", world, folder=None))


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
            shared_index.find_index(root, "train", world, folder=None)
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
    with pytest.raises(ValueError, match="is not what was written"):
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
    (root / ".moevit-index").write_text("a file where the folder should be")
    monkeypatch.setattr(index_cache, "HOME_FOLDER", tmp_path / "home")
    cached = index_cache.refresh(root, "train")
    assert cached.path.parent == tmp_path / "home"
    assert not index_cache.refresh(root, "train").is_new


def test_an_index_that_can_be_written_nowhere_is_an_error(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dataset\.index_folder=.*written nowhere"):
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
        path_env.read_root(file, "mine")
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None or "hf_secret" not in str(caught.value.__cause__)
