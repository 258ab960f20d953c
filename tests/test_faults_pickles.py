"""Nothing that somebody put into a checkpoint runs when it is read."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

import checkpoint
from weights import dcp_reader


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plain_save(folder: Path, content: dict) -> None:
    writer = FileSystemWriter(folder, thread_count=1)
    state_dict_saver.save(content, storage_writer=writer, no_dist=True)


def plain_load(folder: Path, content: dict, reader=FileSystemReader) -> None:
    state_dict_loader.load(content, storage_reader=reader(folder), no_dist=True)


def rewrite(folder: Path, change) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.fixture
def folder(tmp_path):
    plain_save(tmp_path / "dcp", {"w": torch.ones(3)})
    return tmp_path / "dcp"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def in_planner_data(metadata, payload):
    metadata.planner_data = payload


def in_storage_meta(metadata, payload):
    metadata.storage_meta.modules = [payload]


def in_a_key(metadata, payload):
    metadata.state_dict_metadata["w"].size = payload


PLACES = [in_planner_data, in_storage_meta, in_a_key]


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_in_the_metadata_is_refused_by_name(folder, marker, place):
    rewrite(folder, lambda metadata: place(metadata, Payload(marker)))
    path = f"{folder}/.metadata"
    message = rf"checkpoint {path}: names the global posix.mkdir, which is not allowed"
    for read in (
        lambda: dcp_reader.SafeReader(folder).read_metadata(),
        lambda: checkpoint._differences(folder, {"w": torch.ones(3)}, wanted=set()),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    # torch 2.11 replaces the reader's reason by its own.
    with pytest.raises(BaseException, match=r"posix.mkdir|metadata is None"):
        plain_load(folder, {"w": torch.ones(3)}, dcp_reader.SafeReader)
    assert not marker.exists()


def test_stock_dcp_runs_it(folder, marker):
    rewrite(folder, lambda metadata: in_planner_data(metadata, Payload(marker)))
    plain_load(folder, {"w": torch.ones(3)})
    assert marker.exists()


def test_a_payload_in_a_value_is_refused_before_it_is_read(tmp_path, marker):
    plain_save(tmp_path / "dcp", {"w": torch.ones(3), "x": Payload(marker)})
    reader = dcp_reader.SafeReader(tmp_path / "dcp")
    assert set(reader.read_metadata().state_dict_metadata) == {"w", "x"}
    with pytest.raises(BaseException, match=r"x is not a tensor; values that would have to be"):
        plain_load(tmp_path / "dcp", {"w": torch.ones(3), "x": 1}, dcp_reader.SafeReader)
    assert not marker.exists()
    weights = {"w": torch.zeros(3)}
    plain_load(tmp_path / "dcp", weights, dcp_reader.SafeReader)
    assert weights["w"].tolist() == [1, 1, 1]
    plain_load(tmp_path / "dcp", {"w": torch.ones(3), "x": 1})
    assert marker.exists(), "stock DCP runs it"


def test_a_payload_in_a_pt_file_is_refused(tmp_path, marker):
    torch.save({"model": Payload(marker)}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"posix.mkdir"):
        checkpoint.load_torch_checkpoint(tmp_path / "x.pt", torch.nn.Linear(1, 1))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "nn.Linear"),
        ("torch.serialization", "_get_layout.cache"),
        ("pathlib", "Path"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
    ],
)
def test_only_the_records_of_the_format_are_allowed(tmp_path, module, name):
    content = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    content += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=rf"names the global {module}.{name}, which is not"):
        dcp_reader.read_metadata(tmp_path / ".metadata")


def test_a_class_cannot_be_changed_for_later(tmp_path):
    """GLOBAL MetadataIndex, then BUILD with attributes: would outlive the load."""
    content = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    content += b"N}\x8c\x06poisonI1\ns\x86b."
    assert pickle.loads(content).poison == 1
    del MetadataIndex.poison
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="sets attributes of a type"):
        dcp_reader.read_metadata(tmp_path / ".metadata")
    assert not hasattr(MetadataIndex, "poison")


def move_out(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"


def read_past_the_end(metadata):
    for info in metadata.storage_data.values():
        info.length = 10**12


def ask_for_a_terabyte(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size([2**40])


def ask_for_less_than_nothing(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size([-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_out, r"w is in ../secret, which is not in the folder"),
        (read_past_the_end, r"w is at 0 \+ 1000000000000 of __0_0.distcp, which has \d+ bytes"),
        (ask_for_a_terabyte, r"w of shape .* needs 4398046511104 bytes, all files together"),
        (ask_for_less_than_nothing, r"w of shape \(-1,\) needs -4 bytes"),
        (lambda metadata: vars(metadata).clear(), r"AttributeError"),
        (lambda metadata: setattr(metadata, "storage_data", None), r"AttributeError"),
    ],
)
def test_metadata_that_cannot_be_is_refused(folder, change, message):
    (folder.parent / "secret").write_bytes(b"x" * 4096)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        dcp_reader.read_metadata(folder / ".metadata")


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", b"\x80\x04N.", pickle.dumps({})])
def test_damaged_metadata_is_a_value_error_that_names_the_file(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint {tmp_path}/.metadata: "):
        dcp_reader.read_metadata(tmp_path / ".metadata")


def test_every_cut_and_many_flips_end_as_value_errors(folder):
    path = folder / ".metadata"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="checkpoint"):
            dcp_reader.read_metadata(path)
    for bit in range(0, 8 * len(whole), 5):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            dcp_reader.read_metadata(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_a_checkpoint_of_every_kind_of_tensor_is_read(ranks, tmp_path):
    """The allow-list is what the installed torch writes."""
    content = {
        "model": {
            "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
            "channels": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(7),
            "flag": torch.tensor([True, False]),
            "none": torch.empty(0, 4),
        }
    }

    def round_trip(world):
        checkpoint.save(tmp_path, content, state={"step": 1, "metrics": {}}, loss=1.0)
        found, _ = checkpoint.find_newest(tmp_path)
        empty = {name: torch.zeros_like(tensor) for name, tensor in content["model"].items()}
        checkpoint.load(found, {"model": empty})
        return all(torch.equal(empty[name], tensor) for name, tensor in content["model"].items())

    assert ranks(2, round_trip) == [True, True]


def test_a_folder_that_stock_dcp_wrote_is_read(folder):
    weights = {"w": torch.zeros(3)}
    plain_load(folder, weights, dcp_reader.SafeReader)
    assert weights["w"].tolist() == [1, 1, 1]
