"""The same few images in every layout, and files that are no good images."""

import importlib.util
import io
import json
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images.cache import index_images

# ILSVRC's validation images are numbered; its labels are in a file of their own.
ROOT = Path(__file__).resolve().parents[2]


WNIDS = ("n00000001", "n00000002", "n00000003")


VAL_NAME = "ILSVRC2012_val_{:08d}"


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


def jpeg(size=(8, 8), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, "JPEG", **options)
    return sink.getvalue()


def png(size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, "PNG")
    return sink.getvalue()


def bomb(side):
    """A PNG of 8 x 8 pixels whose header says that it is larger."""
    raw = bytearray(png(mode="1"))
    raw[16:24] = side.to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


def sixteen_bit():
    sink = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(sink, "PNG")
    return sink.getvalue()


def put(root, split, image, content):
    index = index_images(root, split)
    (index.root / index.paths[image]).write_bytes(content)
    return index_images(root, split)
