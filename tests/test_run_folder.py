"""One run at a time in a folder, room for its saves, and which of them are kept."""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

import checkpoint
from parallel import collectives
from tests.support import faults
from training import run_folder
from weights import dcp_writer, verify

OPTIONS = {"keep_last": 2, "keep_best": 1, "metric": "-val_loss"}


def save_losses(world, root, losses):
    for step, (loss, val_loss) in enumerate(losses, start=1):
        metrics = {"loss": loss} | ({} if val_loss is None else {"val_loss": val_loss})
        state = {"step": step, "metrics": metrics}
        checkpoint.save(root, faults.tensors(0.0), state=state, loss=val_loss or loss)


@pytest.fixture
def five(ranks, tmp_path):
    """Five checkpoints; step 2 has the lowest loss of all, but it is a training loss."""
    losses = [(0.9, 0.5), (0.1, None), (0.9, 0.9), (0.9, 0.8), (0.9, 0.7)]
    ranks(1, save_losses, tmp_path, losses)
    return sorted(tmp_path.iterdir())


def steps(folders) -> set[int]:
    return {int(folder.name.split("_")[1]) for folder in folders}


def left(root) -> set[int]:
    assert all(verify.verify(folder) for folder in root.iterdir())
    return steps(root.iterdir())


def retention(known, protected=(), **options):
    kept = {"known": frozenset(known), "protected": frozenset(protected)}
    return run_folder.Retention(**kept, **(options or OPTIONS))


def test_the_newest_and_the_best_validated_stay(tmp_path, five):
    assert steps(retention(five).surplus(tmp_path)) == {2, 3}
    assert retention(five).sweep(tmp_path) == {}
    assert left(tmp_path) == {1, 4, 5}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "metric", "expected"),
    [
        (1, 0, "-val_loss", {5}),
        (1, 2, "-val_loss", {1, 5}),
        (1, 3, "-val_loss", {1, 4, 5}),
        (1, 1, "+val_loss", {3, 5}),
        (1, 1, "-loss", {2, 5}),
        (1, 1, "-unheard", {5}),
        (9, 0, "-val_loss", {1, 2, 3, 4, 5}),
    ],
)
def test_how_many_of_each_stay(tmp_path, five, keep_last, keep_best, metric, expected):
    options = {"keep_last": keep_last, "keep_best": keep_best, "metric": metric}
    retention(five, **options).sweep(tmp_path)
    assert left(tmp_path) == expected


def test_only_known_checkpoints_count(tmp_path, five):
    """Three torn newer ones do not push out the two that can be resumed from."""
    known = five[:2]
    retention(known).sweep(tmp_path)
    assert steps(tmp_path.iterdir()) == {1, 2, 3, 4, 5}, "nothing known is surplus"
    retention(five[:4]).sweep(tmp_path)
    assert steps(tmp_path.iterdir()) == {1, 3, 4, 5}, "5 is unknown: neither counted nor older"


def test_an_unknown_one_that_may_be_the_best_stays(tmp_path, five):
    retention(five[1:]).sweep(tmp_path)
    assert left(tmp_path) == {1, 4, 5}


def test_what_is_protected_stays(tmp_path, five):
    retention(five, five[1:3]).sweep(tmp_path)
    assert left(tmp_path) == {1, 2, 3, 4, 5}


def test_nothing_is_read_to_decide(tmp_path, five, monkeypatch):
    monkeypatch.setattr(dcp_writer, "sha256", lambda path: pytest.fail("hashed"))
    monkeypatch.setattr(verify, "sha256", lambda path: pytest.fail("hashed"))
    retention(five).sweep(tmp_path)


def test_what_unfinished_saves_left_is_swept(tmp_path, five):
    for name in (f".staging-9-{'a' * 32}", f".trash-{'b' * 32}"):
        (tmp_path / name).mkdir()
    for name in (".staging-9-abc", "notes", ".trash"):
        (tmp_path / name).mkdir()
    retention(five).sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {f.name for f in five} == {
        ".staging-9-abc",
        "notes",
        ".trash",
    }


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_deletion_that_fails_is_named_and_leaves_no_half(tmp_path, five, monkeypatch, call):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os if call == "rename" else shutil, call, refuse)
    failed = retention(five).sweep(tmp_path)
    assert len(failed) == 2
    assert all("Permission denied" in reason for reason in failed.values())
    monkeypatch.undo()
    whole = [path for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert all(verify.verify(folder) for folder in whole)
    retention(five).sweep(tmp_path)
    assert left(tmp_path) == {1, 4, 5}, "the next sweep does it"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    failed = retention(()).sweep(tmp_path / "x")
    assert list(failed) == [tmp_path / "x"]


def hold(world, root, is_held, may_end):
    with run_folder.locked(root):
        is_held.set()
        may_end.wait(60)
    return os.getpid()


def refused(world, root):
    with pytest.raises(BlockingIOError) as caught, run_folder.locked(root):
        pass
    return str(caught.value)


def test_a_second_run_is_refused_and_told_who_has_the_folder(ranks, tmp_path):
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    root = tmp_path / "run"

    def first(pipe):
        pipe.send(ranks(1, hold, root, is_held, may_end))

    receiver, sender = context.Pipe()
    process = context.Process(target=first, args=(sender,))
    process.start()
    assert is_held.wait(60)
    messages = ranks(2, refused, root)
    may_end.set()
    pid = receiver.recv()[0]
    process.join(10)
    assert messages[0] == messages[1], "every rank is told"
    assert f"folder {root}: in use by pid {pid} on " in messages[0]
    assert not root.exists(), "neither the lock nor an empty folder is left behind"


def test_a_killed_runs_lock_does_not_hold(ranks, tmp_path):
    def die_holding(world):
        with run_folder.locked(tmp_path):
            os._exit(9)

    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(1, die_holding)
    assert (tmp_path / run_folder.LOCK).exists()

    def take(world):
        with run_folder.locked(tmp_path):
            return True

    assert ranks(2, take) == [True, True]


def test_loader_processes_do_not_keep_the_lock(ranks, tmp_path):
    """They can outlive a killed run by seconds; its successor must not be refused for that."""
    context = multiprocessing.get_context("fork")
    may_end, lock = context.Event(), tmp_path / run_folder.LOCK

    def die_with_a_child(world):
        with run_folder.locked(tmp_path):
            if os.fork() == 0:
                # It keeps the lock's file alone: with the pipe open, `ranks` would wait for it.
                for descriptor in list(Path("/proc/self/fd").iterdir()):
                    with contextlib.suppress(OSError):
                        if descriptor.readlink() != lock:
                            os.close(int(descriptor.name))
                may_end.wait(60)
                os._exit(0)
            os._exit(9)

    with pytest.raises(pytest.fail.Exception, match=r"died|no result"):
        ranks(1, die_with_a_child, timeout_s=10)

    def take(world):
        with run_folder.locked(tmp_path):
            return True

    assert ranks(1, take) == [True]
    may_end.set()


def check(world, root, num_bytes=1000):
    try:
        run_folder.check_writable(root, num_bytes)
    except OSError as error:
        return str(error)
    return None


def test_a_folder_that_can_be_saved_to_is_left_as_it_was(ranks, tmp_path):
    assert ranks(2, check, tmp_path) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_the_first_step(ranks, tmp_path):
    message = ranks(2, check, tmp_path, 10**15)[1]
    assert f"folder {tmp_path}: " in message
    assert "2 checkpoints need 1862645.15 GiB" in message
    assert "GiB free" in message


def patched(world, root, name, replacement):
    setattr(os, name, replacement)
    return check(world, root)


def fail_with(errno, text):
    def fail(*_, **__):
        raise OSError(errno, text)

    return fail


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_folder_that_refuses_a_call_is_found_before_the_first_step(ranks, tmp_path, call):
    broken = fail_with(30, "Read-only file system")
    for message in ranks(2, patched, tmp_path, call, broken):
        assert message == f"folder {tmp_path}: cannot save there: [Errno 30] Read-only file system"


def test_files_that_every_user_could_write_are_found_before_the_first_step(ranks, tmp_path):
    def with_umask(world):
        os.umask(0)
        return check(world, tmp_path)

    message = ranks(1, with_umask)[0]
    assert "what is made there can be written by every user (mode 0777)" in message


def test_ranks_that_do_not_share_the_folder_are_found(ranks, tmp_path):
    roots = [tmp_path / "0", tmp_path / "1"]
    for root in roots:
        root.mkdir()

    def check_own(world):
        real = collectives.broadcast_or_raise
        collectives.broadcast_or_raise = lambda made: (
            roots[world.rank] / real(made).relative_to(roots[0])
        )
        return check(world, roots[0])

    for message in ranks(2, check_own):
        assert message == f"folder {roots[0]}: ranks [1] do not see the files of rank 0 there"


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder_is_refused_on_every_rank(ranks, tmp_path, name):
    (tmp_path / "file").write_text("")
    says = rf"config training\.checkpoint\.path=.*{name}: cannot be made: "

    def locked(world):
        with pytest.raises(OSError, match=says), run_folder.locked(tmp_path / name):
            pass

    ranks(2, locked)


def test_a_lock_file_replaced_while_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    """Its holder deletes it on leaving: what was locked then protects nothing."""
    real, calls = fcntl.lockf, []

    def lock_and_replace(descriptor, operation):
        real(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / run_folder.LOCK).unlink()
            (tmp_path / run_folder.LOCK).touch()

    monkeypatch.setattr(fcntl, "lockf", lock_and_replace)
    descriptor = run_folder._try_lock(tmp_path)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(descriptor), (tmp_path / run_folder.LOCK).stat())
    os.close(descriptor)


def test_a_folder_that_nothing_came_of_is_not_left_behind(ranks, tmp_path):
    (tmp_path / "theirs").mkdir()

    def fail_in(world, folder):
        with pytest.raises(ValueError, match="early"), run_folder.locked(folder):
            raise ValueError("early")

    for name in ("new", "theirs"):
        ranks(2, fail_in, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
