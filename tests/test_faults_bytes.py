"""Damage to any byte or file of a checkpoint is found, and the older one is used."""

import json
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import train
from tests.support import faults
from weights import verify

FLIPS = 200


def save_two(world, root):
    for step in (1, 2):
        faults.Ours.save(root, step, float(step))


@pytest.fixture
def two(ranks, tmp_path):
    """A run folder with the complete checkpoints of steps 1 and 2, of two ranks."""
    ranks(2, save_two, tmp_path)
    return tmp_path


def is_refused(folder) -> bool:
    try:
        verify.verify(folder)
    except ValueError as error:
        assert folder.name in str(error)
        return True
    return False


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_200_flipped_bits_are_all_found(two):
    rng = random.Random(0)
    folder = two / "step_2_loss_1.000"
    files = sorted(folder.iterdir())
    assert {f.name for f in files} >= {"__0_0.distcp", ".metadata", "state.json", "manifest.json"}
    missed = []
    for flip in range(FLIPS):
        path = files[flip % len(files)]
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        path.write_bytes(flipped(whole, bit))
        if not is_refused(folder):
            missed.append((path.name, bit))
        assert verify.first_whole(verify.candidates(two))[0].step == (
            1 if path.name not in missed else 2
        )
        path.write_bytes(whole)
    assert missed == []
    assert verify.verify(folder).step == 2


def test_the_manifest_counts_to_the_last_bit(two):
    """The one file that no digest covers."""
    path = two / "step_2_loss_1.000" / "manifest.json"
    whole = path.read_bytes()
    missed = []
    for bit in [*range(3, 8 * len(whole), 9), 8 * len(whole) - 8]:
        path.write_bytes(flipped(whole, bit))
        if not is_refused(path.parent):
            missed.append((bit, flipped(whole, bit)))
    assert missed == []


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def zero_block(path):
    content = bytearray(path.read_bytes())
    start = len(content) // 3
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: cut(path, 0),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "one byte short": lambda path: cut(path, path.stat().st_size - 1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed block": zero_block,
    "of the older checkpoint": lambda path: shutil.copy(
        path.parent.parent / "step_1_loss_1.000" / path.name, path
    ),
    "an extra one beside it": lambda path: path.with_name(f"x{path.name}").write_text(""),
    "a link to a copy": lambda path: (
        shutil.copy(path, path.parent.parent / "copy"),
        path.unlink(),
        path.symlink_to(path.parent.parent / "copy"),
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_damaged_in_every_way_is_found(two, kind):
    folder = two / "step_2_loss_1.000"
    names = [path.name for path in folder.iterdir()]
    for name in names:
        copy = two / "step_3_loss_1.000"
        shutil.copytree(folder, copy)
        DAMAGES[kind](copy / name)
        assert is_refused(copy), name
        assert verify.first_whole(verify.candidates(two))[0].folder == folder
        shutil.rmtree(copy)


BAD_JSON = {
    "no object": "[1]",
    "another schema": '{"schema_version": 7, "files": {}}',
    "files is a list": '{"schema_version": 1, "files": []}',
    "facts is a number": '{"schema_version": 1, "files": {"a": 1}}',
    "no size": '{"schema_version": 1, "files": {"a": {"sha256": "00"}}}',
    "negative size": '{"schema_version": 1, "files": {"a": {"bytes": -1}}}',
    "size of truth": '{"schema_version": 1, "files": {"a": {"bytes": true}}}',
    "digest is a list": '{"schema_version": 1, "files": {"a": {"bytes": 1, "sha256": []}}}',
    "names leave the folder": json.dumps(
        {"schema_version": 1, "files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}
    ),
    "unicode": '{"schema_version": 1, "files": {"\\ud800": {"bytes": 1}}}',
    "no unicode": b"\xff\xfe\x00",
    "nested a million deep": "[" * 10**6,
    "10 MB": json.dumps({"schema_version": 1, "files": {}, "x": "y" * 10**7}),
}


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused(two, name, kind):
    content = BAD_JSON[kind]
    path = two / "step_2_loss_1.000" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert is_refused(path.parent)


def test_stray_entries_of_a_run_folder_are_passed_over(ranks, two):
    for name in (
        ".ipynb_checkpoints",
        "old_step_10",
        "step_50",
        "step_7_loss_nan",
        "step_-1_loss_1.0",
    ):
        shutil.copytree(two / "step_2_loss_1.000", two / name)
    (two / "step_9_loss_1.0").write_text("a file")
    assert ranks(1, lambda world: faults.Ours.resume(two))[0] == 2.0


def test_a_run_whose_checkpoints_are_all_bad_ends_with_each_reason(
    ranks, small_run, tmp_path, capfd
):
    config = small_run("training.steps=2", "training.val_interval=1")
    ranks(1, lambda world: train.train(config, world))
    folders = sorted((tmp_path / "run").glob("step_*"))
    for folder in folders:
        zero_block(folder / "__0_0.distcp")

    def refused(world):
        with pytest.raises(ValueError, match="none of 2 can be used") as caught:
            train.train(config, world)
        return str(caught.value)

    reason = ranks(1, refused)[0]
    assert all(f"checkpoint {folder.name}: __0_0.distcp sha256" in reason for folder in folders)
    assert sorted((tmp_path / "run").glob("step_*")) == folders


def test_stock_dcp_loads_flipped_bits(tmp_path):
    """Why bytes are hashed: most flips in a data file change values silently."""
    content = {"w": torch.zeros(64, 64)}
    writer = FileSystemWriter(tmp_path, thread_count=1)
    state_dict_saver.save(content, storage_writer=writer, no_dist=True)
    path = tmp_path / "__0_0.distcp"
    whole, rng, silent = path.read_bytes(), random.Random(0), 0
    for _ in range(20):
        path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        try:
            reader = FileSystemReader(tmp_path)
            state_dict_loader.load({"w": torch.ones(64, 64)}, storage_reader=reader, no_dist=True)
            silent += 1
        except BaseException as error:
            assert not isinstance(error, KeyboardInterrupt)
    assert silent > 10
