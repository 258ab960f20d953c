"""Small files that ask for all of a machine: a line each, in bounded time and memory."""

import argparse
import dataclasses
import json
import os
import pickle
import resource
import time
import warnings
import zipfile

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from options.schema import Config
from tests.support.models import model_of, rank_files
from weights import dcp_reader, files, pickles
from weights.sources import Choice, read_source

GIB = 2**30


@pytest.fixture(autouse=True)
def bounded():
    """Each of these ends within seconds and takes less than a GiB."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - begun < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB


def refused(path, *, choice=None):
    with pytest.raises(ValueError) as caught:  # the caller looks at the line
        read_source(path, choice or Choice()).weights()
    line = str(caught.value)
    assert "\n" not in line
    return line


def nested(depth):
    """A pickle of a key of `depth` tuples, each of which has the one inside of it twice."""
    return b"\x80\x02}" + b"K\x01" + b"q\x00h\x00\x86" * depth + b"K\x02s."


def old_file(content):
    """A file of torch.save before zip whose content is this pickle."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001}]
    return b"".join(pickle.dumps(part, 2) for part in parts) + content + pickle.dumps([], 2)


def zip_file(path, content):
    """A file of torch.save whose content is this pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in parts.items():
            archive.writestr(name, content if name.endswith("data.pkl") else value)


def test_a_key_of_nested_tuples_in_metadata_is_refused_at_once(tmp_path):
    (tmp_path / ".metadata").write_bytes(nested(60))
    assert (tmp_path / ".metadata").stat().st_size < 400
    assert "has a key that is a tuple" in refused(tmp_path)


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_key_of_nested_tuples_in_a_pickle_is_refused_at_once(tmp_path, is_zip):
    path = tmp_path / "x.pth"
    path.write_bytes(old_file(nested(60)))
    if is_zip:
        zip_file(path, nested(60))
    assert refused(path) == f"file {path}: has a key that is a tuple"


def test_a_memory_format_of_nested_tuples_is_refused_at_once(tmp_path):
    """An enumeration hashes the value that it is asked for."""
    value = b"K\x01" + b"q\x00h\x00\x86" * 60
    name = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + name + value + b"\x85R.")
    assert "has a memory format that is a tuple" in refused(tmp_path)


def test_a_rank_of_ten_digits_is_no_list_of_ten_billion(tmp_path):
    for name in ("0.pth", "9999999999.pth"):
        torch.save({"model": {"cls_token": torch.ones(1, 1, 2)}}, tmp_path / name)
    line = refused(tmp_path)
    assert "the files of ranks [1, 2, 3, 4, 5, 6] and 9999999992 more are missing" in line


def test_two_files_of_one_rank_are_refused(tmp_path):
    for name in ("0.pth", "00.pth"):
        torch.save({"model": {"cls_token": torch.ones(1, 1, 2)}}, tmp_path / name)
    assert "are of one rank" in refused(tmp_path)


def test_a_tensor_of_one_value_and_four_terabytes_is_refused(tmp_path):
    huge = torch.ones(1).expand(2**40)
    torch.save({"model": {"blocks.1.mlp.experts.htoh4.bias": huge}}, tmp_path / "x.pth")
    assert "of shape (1099511627776,) needs 4398046511104 bytes, the file has 4" in refused(
        tmp_path / "x.pth"
    )


def test_a_tensor_of_many_names_is_not_copied_for_each(tmp_path):
    one = torch.ones(2**16, 4)
    torch.save({f"blocks.{i}.mlp.fc1.weight": one for i in range(10_000)}, tmp_path / "x.pth")
    assert "its tensors need 10485760000" in refused(tmp_path / "x.pth")


def test_an_archive_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(64 * 2**20 // 4)}}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in parts.items():
            archive.writestr(name, value)
    assert "unpacks to 671" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
        b"ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
        b"ccollections\nCounter\nK\x01" + b"q\x00h\x00\x86" * 60 + b"\x85R",
    ],
    ids=["bytearray", "Tensor", "Counter"],
)
def test_a_call_that_makes_a_terabyte_is_refused(tmp_path, call):
    path = tmp_path / "x.pth"
    path.write_bytes(old_file(b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."))
    assert refused(path).startswith(f"file {path}: ")


def test_a_bytearray_that_is_longer_than_its_file_is_refused(tmp_path):
    content = b"\x80\x03\x96\x00\x00\x00\x00\x00\x01\x00\x00."
    (tmp_path / "x.pth").write_bytes(old_file(content))
    (tmp_path / ".metadata").write_bytes(content)
    for path in (tmp_path / "x.pth", tmp_path):
        assert "has an instruction that no file of weights has" in refused(path)


@pytest.mark.parametrize("value", ["[" * 10**6, '{"model": ' + '{"vit": ' * 900 + "1" + "}" * 901])
def test_options_that_are_a_million_deep_are_none(tmp_path, value):
    weights = model_of(recipe="vit_tiny_patch8_64")[0].state_dict()
    torch.save({"model": weights, "config": value}, tmp_path / "x.pth")
    assert read_source(tmp_path / "x.pth", Choice()).config == {}


def test_options_with_a_deep_value_are_none(tmp_path):
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    options = dataclasses.asdict(Config())
    options["dataset"]["class_filter"] = deep
    weights = model_of(recipe="vit_tiny_patch8_64")[0].state_dict()
    torch.save({"model": weights, "config": json.dumps(options)}, tmp_path / "x.pth")
    assert read_source(tmp_path / "x.pth", Choice()).config == {}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "0.pth", ".metadata"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    path = tmp_path / name if name.startswith("x") else tmp_path
    assert refused(path) == f"file {tmp_path / name}: is not a regular file"


@pytest.fixture(scope="module")
def moe():
    return model_of()


def save_ranks(folder, shards):
    folder.mkdir()
    for rank, shard in enumerate(shards):
        torch.save({"model": shard}, folder / f"{rank}.pth")
    return folder


HTOH4 = "blocks.1.mlp.experts.htoh4.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensor: tensor[:, :-1].clone(),
            r"have shapes (71, 36) and (72, 36), must have one",
        ),
        (lambda tensor: torch.tensor(1.0), f"weights {HTOH4} (): must have 3 dimensions"),
        (lambda tensor: tensor.flatten(), "must have 3 dimensions"),
        (lambda tensor: tensor.to_sparse(), f"{HTOH4} is a sparse_coo tensor, must be a plain one"),
        (lambda tensor: tensor.to("meta"), f"{HTOH4} is a meta tensor, must be a plain one"),
    ],
)
def test_ranks_whose_experts_do_not_go_together_are_refused(moe, tmp_path, change, message):
    shards, _ = rank_files(moe, world=2)
    shards[1][HTOH4] = change(shards[1][HTOH4])
    line = refused(save_ranks(tmp_path / "ranks", shards))
    assert str(tmp_path) in line and message in line


def quantised(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to("meta"), "cls_token is a meta tensor, must be a plain one"),
        (quantised, "cls_token is a quantised tensor, must be a plain one"),
        (lambda tensor: tensor[0, 0], "cls_token (36,): must have 3 dimensions"),
        (lambda tensor: torch.tensor(1.0), "cls_token (): must have 3 dimensions"),
    ],
)
def test_a_tensor_that_is_no_parameter_is_named(tmp_path, change, message):
    weights = model_of(recipe="vit_tiny_patch8_64")[0].state_dict()
    torch.save(
        {"model": {**weights, "cls_token": change(weights["cls_token"])}}, tmp_path / "x.pth"
    )
    assert message in refused(tmp_path / "x.pth")


def test_a_pickle_of_protocol_4_says_how_to_save_it(tmp_path):
    torch.save({"model": {"cls_token": torch.ones(1, 1, 2)}}, tmp_path / "x.pth", pickle_protocol=4)
    line = refused(tmp_path / "x.pth")
    assert "has pickle protocol 4" in line and "save it again with torch.save's own, 2" in line


def test_a_pickle_of_protocol_3_is_read_without_a_warning(tmp_path):
    content = {"model": {"cls_token": torch.ones(1, 1, 2)}}
    torch.save(content, tmp_path / "x.pth", pickle_protocol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickles.read_pickle(tmp_path / "x.pth").keys() == {"model"}


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("argparse", "ArgumentParser"), ("numpy", "load"), ("torch", "load")],
)
def test_what_is_more_than_plain_data_is_refused_by_name_with_the_way_out(tmp_path, module, name):
    call = f"c{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R"
    (tmp_path / "x.pth").write_bytes(old_file(b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."))
    line = refused(tmp_path / "x.pth")
    assert f"wants {module}.{name}: refused, and nothing was run; " in line
    assert line.endswith("torch.save(model.state_dict(), path)")


@pytest.mark.parametrize("attribute", [b"__class__", b"__dict__", b"__init__"])
def test_a_namespace_has_no_way_to_code(tmp_path, attribute):
    """BUILD of a Namespace whose attributes are those of a class."""
    text = b"X" + len(attribute).to_bytes(4, "little") + attribute
    content = b"\x80\x02cargparse\nNamespace\n)\x81}" + text + b"K\x01sb."
    (tmp_path / "x.pth").write_bytes(old_file(content))
    found = pickles.read_pickle(tmp_path / "x.pth")
    assert not isinstance(found, argparse.Namespace)
    assert type(found).__init__ is object.__init__


def test_a_numpy_object_is_refused(tmp_path):
    content = b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R."
    (tmp_path / "x.pth").write_bytes(old_file(content))
    assert "has a NumPy value that is no number" in refused(tmp_path / "x.pth")


@pytest.fixture
def folder(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = FileSystemWriter(tmp_path / "dcp", thread_count=1)
        weights = {"model": {"cls_token": torch.ones(1, 1, 2**14), "head.bias": torch.ones(4)}}
        state_dict_saver.save(weights, storage_writer=writer, no_dist=True)
    return tmp_path / "dcp"


def set_chunk(metadata, **changed):
    (chunk,) = metadata.state_dict_metadata["model.head.bias"].chunks
    for name, value in changed.items():
        setattr(chunk, name, torch.Size(value))


CHANGES = {
    "has parts with 3 of its 4 values": lambda m: set_chunk(m, sizes=[3]),
    "has a part that is outside of it": lambda m: set_chunk(m, offsets=[1]),
    "has a part that is outside of it ": lambda m: set_chunk(m, sizes=[4, 1]),
    "has a part that is in no file": lambda m: m.storage_data.pop(
        next(index for index in m.storage_data if index.fqn == "model.head.bias")
    ),
    "parts with 8 of its 4 values": lambda m: m.state_dict_metadata[
        "model.head.bias"
    ].chunks.append(m.state_dict_metadata["model.head.bias"].chunks[0]),
    "has a place in a file that is none": lambda m: setattr(
        next(iter(m.storage_data.values())), "offset", 0.5
    ),
    "has a file's name that is a bytes": lambda m: setattr(
        next(iter(m.storage_data.values())), "relative_path", b"x"
    ),
    "model.head.bias has a dtype that is a str": lambda m: setattr(
        m.state_dict_metadata["model.head.bias"].properties, "dtype", "float32"
    ),
    "model.head.bias has a shape that is none": lambda m: setattr(
        m.state_dict_metadata["model.head.bias"], "size", [4]
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_metadata_that_leaves_values_to_chance_is_refused(folder, message):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    CHANGES[message](metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message.strip()):
        dcp_reader.read_metadata(folder / ".metadata")


def test_tensors_that_together_need_more_than_all_files_are_refused(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    one = metadata.state_dict_metadata["model.cls_token"]
    place = metadata.storage_data[MetadataIndex("model.cls_token", torch.Size([0, 0, 0]))]
    for name in (f"model.blocks.{i}.x" for i in range(1000)):
        metadata.state_dict_metadata[name] = one
        metadata.storage_data[MetadataIndex(name, torch.Size([0, 0, 0]))] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="all files together have"):
        dcp_reader.read_metadata(folder / ".metadata")


def test_an_index_of_json_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / files.INDEX_NAME).open("wb") as file:
        file.truncate(2**33)
    assert "has 8589934592 bytes, at most 67108864" in refused(tmp_path)
