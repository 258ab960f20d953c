"""A save killed at any moment: the one before, or the new one, whole; never a mixture."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import checkpoint
from tests.support import faults
from weights import dcp_writer

KILLS = 120


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: a kill keeps the page cache, so a disk only waits."""
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("is_same_step", [False, True], ids=["new folders", "an existing step"])
def test_120_kills_lose_nothing_that_was_acknowledged(folder, is_same_step):
    tally = faults.kill_saves(
        faults.Ours, folder, trials=KILLS, is_same_step=is_same_step, seed=KILLS
    )
    print(tally)
    assert tally.trials == KILLS
    assert tally.mid_save > KILLS / 10, "the kills must hit saves"
    assert (tally.failed, tally.lost) == ([], [])


@pytest.mark.parametrize(
    ("scheme", "is_same_step"),
    [(faults.BY_NAME, False), (faults.BY_METADATA, True)],
    ids=["newest by name, new folders", "newest with .metadata, an existing step"],
)
def test_the_same_kills_break_the_naive_schemes(folder, scheme, is_same_step):
    tally = faults.kill_saves(scheme, folder, trials=60, is_same_step=is_same_step, seed=1)
    print(len(tally.failed), len(tally.lost))
    assert tally.failed or tally.lost


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(staging, plan, source):
    staging.mkdir(exist_ok=True)
    (staging / "__1_0.distcp").write_bytes(b"half")
    die()


def write_and_die(*arguments, write=dcp_writer.write):
    write(*arguments)
    die()


def save_and_die(world, root, where):
    """Save steps 1 and then 2 of two ranks' shares; one rank dies in the second save."""
    for step in (1, 2):
        if step == 2 and world.rank == (0 if where == "before the manifest" else 1):
            if where == "before the manifest":
                dcp_writer.commit = lambda *_: die()
            else:
                dcp_writer.write = {
                    "before its write": lambda *_: die(),
                    "in its write": die_half_way,
                    "after its write": write_and_die,
                }[where]
        state = {"step": step, "metrics": {}}
        checkpoint.save(root, faults.tensors(float(step)), state=state, loss=1.0)


POINTS = ["before its write", "in its write", "after its write", "before the manifest"]


@pytest.mark.parametrize("where", POINTS)
def test_one_of_two_ranks_killed_commits_nothing(ranks, tmp_path, where):
    with pytest.raises(pytest.fail.Exception, match=r"died|Connection|closed"):
        ranks(2, save_and_die, tmp_path, where)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_1_loss_1.000"]
    assert ranks(2, lambda world: faults.Ours.resume(tmp_path)) == [1.0, 1.0]


class DyingWriter(FileSystemWriter):
    """Stock DCP's writer on rank 1, killed before it writes; rank 0 has written by then."""

    def write_data(self, plan, planner):
        while not (Path(self.path) / "rank 0 has written").exists():
            pass
        die()


class MarkingWriter(FileSystemWriter):
    def write_data(self, plan, planner):
        results = super().write_data(plan, planner)
        (Path(self.path) / "rank 0 has written").touch()
        return results


def naive_save_and_die(world, folder):
    half = {0: ("a", "b"), 1: ("c",)}[world.rank]
    for step in (1.0, 2.0):
        content = {name: torch.full(faults.SHAPE, step) for name in half}
        kind = FileSystemWriter
        if step == 2:
            kind = DyingWriter if world.rank else MarkingWriter
        planner = {name: content.get(name, torch.full(faults.SHAPE, step)) for name in "abc"}
        state_dict_saver.save(planner, storage_writer=kind(folder, thread_count=1))


def test_stock_dcp_mixes_two_checkpoints_then(ranks, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"died|Connection|closed"):
        ranks(2, naive_save_and_die, tmp_path)
    content = {name: torch.full(faults.SHAPE, -1.0) for name in "abc"}
    state_dict_loader.load(content, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert {float(tensor[0, 0]) for tensor in content.values()} == {1.0, 2.0}


CALLS = ("mkdir", "fsync", "rename", "replace", "unlink")


def count_or_die(calls: list, before: int | None) -> None:
    """Wrap the calls that change names on disk: note each, and die before number `before`."""

    def wrap(name: str, real):
        def wrapped(*arguments, **options):
            if len(calls) == before:
                die()
            target = arguments[0]
            path = Path(f"/proc/self/fd/{target}").readlink() if name == "fsync" else target
            calls.append((name, str(path)))
            return real(*arguments, **options)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def saved_twice(world, root, before):
    calls: list = []
    for value in (1, 2):
        if value == 2:
            count_or_die(calls, before)
        faults.Ours.save(root, value, float(value))
    return calls


def test_a_kill_between_any_two_steps_of_the_commit(ranks, tmp_path):
    root = tmp_path / "whole"
    root.mkdir()
    calls = ranks(1, saved_twice, root, None)[0]
    renames = [n for n, (call, path) in enumerate(calls) if call == "rename" and ".staging" in path]
    committed = next(n for n in renames if calls[n][1].endswith(tuple("0123456789abcdef")))
    assert len(calls) >= 8, "the calls must be seen"
    for before in range(len(calls)):
        root = tmp_path / str(before)
        root.mkdir()
        with pytest.raises(pytest.fail.Exception, match="died"):
            ranks(1, saved_twice, root, before)
        expected = 2.0 if before > committed else 1.0
        assert ranks(1, lambda world, root=root: faults.Ours.resume(root))[0] == expected, calls[
            before
        ]


def test_names_are_synced_after_what_they_name(ranks, tmp_path):
    """A power cut after the rename: data file and metadata, then the folder, rename, parent."""
    calls = ranks(1, saved_twice, tmp_path, None)[0]
    staging = next(path for call, path in calls if call == "mkdir")
    order = [(call, Path(path).name) for call, path in calls if path.startswith(str(tmp_path))]
    name = Path(staging).name
    sealed = order.index(("fsync", name))
    files = {"__0_0.distcp", ".metadata.tmp", "state.json", "manifest.json"}
    assert {path for call, path in order[:sealed] if call == "fsync"} == files
    assert order[sealed : sealed + 3] == [
        ("fsync", name),
        ("rename", name),
        ("fsync", tmp_path.name),
    ]
