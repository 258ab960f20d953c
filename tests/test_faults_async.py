"""Saves in the background: values of the moment, failures that are noticed, workers that die."""

import functools
import os
import resource
import signal
import time

import pytest
import torch

import checkpoint
from tests.support import faults
from tests.support.processes import wait_until
from training import stopping
from weights import verify
from weights.background import AsyncSaver, Committed

STATE = {"step": 1, "metrics": {}}


# The worker imports what it is sent, so nothing of this file.
KEEP_ALL = functools.partial(dict.fromkeys, ())


def begin(saver, root, content, step=1):
    state = {"step": step, "metrics": {}}
    saver.begin(root, content, state=state, loss=1.0, retention=KEEP_ALL)


def value_in(folder):
    found = verify.verify(folder)
    content = faults.tensors(-1.0)
    checkpoint.load(found, content)
    return faults.value_of(content)


def mutate_at_once(world, saver, root):
    content = faults.tensors(0.0)
    found = []
    for trial in range(20):
        for tensor in content["model"].values():
            tensor.fill_(float(trial))
        begin(saver, root, content, step=trial)
        for tensor in content["model"].values():
            tensor.fill_(-5.0)
        outcome = saver.drain()
        assert isinstance(outcome, Committed), outcome
        found.append(value_in(outcome.folder))
    return found


def requests_to_stop(world, saver, root):
    saver.prepare(faults.tensors(1.0))
    saver.worker.wait_ready()
    worker = saver.worker.process.pid
    for number in (*stopping.SIGNALS, signal.SIGINT):
        os.kill(worker, number)
    begin(saver, root, faults.tensors(1.0))
    return isinstance(saver.drain(), Committed) and saver.worker.process.pid == worker


def not_finite(world, saver, root):
    content = faults.tensors(1.0)
    content["model"]["b"][3, 3] = float("nan")
    begin(saver, root, content)
    outcome = saver.drain()
    assert type(outcome) is checkpoint.NonFiniteTensorError
    return str(outcome)


def equal_files(world, saver, root):
    """What is written in the background is what is written at once, byte for byte."""
    content = {"model": {"w": torch.randn(40, 3), "s": torch.tensor(3.0)}}
    begin(saver, root, content)
    behind = saver.drain().folder
    at_once = checkpoint.save(root, content, state=STATE, loss=1.0)
    names = {path.name for path in behind.glob("*.distcp")}
    assert names and names == {path.name for path in at_once.glob("*.distcp")}
    return all((behind / name).read_bytes() == (at_once / name).read_bytes() for name in names)


def large_message(world, saver, root):
    """Thousands of tensors have a plan of megabytes, more than a pipe takes before it is read."""
    content = {"model": {f"layer.{n}": torch.ones(2) for n in range(3000)}}
    saver.prepare(content)
    os.kill(saver.worker.process.pid, signal.SIGSTOP)
    begin(saver, root, content)
    assert saver.poll() is None
    os.kill(saver.worker.process.pid, signal.SIGCONT)
    return isinstance(saver.drain(), Committed)


def another_form(world, saver, root):
    """Tensors of other names and sizes than before get a new plan and enough memory."""
    found = []
    for step, size in enumerate((3, 50000, 0, 7), start=1):
        content = {"model": {f"w{size}": torch.full((size, 2), float(step))}}
        begin(saver, root, content, step=step)
        outcome = saver.drain()
        assert isinstance(outcome, Committed), outcome
        empty = {"model": {f"w{size}": torch.zeros(size, 2)}}
        checkpoint.load(verify.verify(outcome.folder), empty)
        found.append(torch.equal(empty["model"][f"w{size}"], content["model"][f"w{size}"]))
    return found


# None of these ends the worker, which takes seconds to start: they share one on each rank.
SHARED = [mutate_at_once, requests_to_stop, not_finite, equal_files, large_message, another_form]


def with_one_worker(world, root):
    saver = AsyncSaver(timeout_s=60)
    try:
        return {check.__name__: check(world, saver, root / check.__name__) for check in SHARED}
    finally:
        saver.close()


@pytest.fixture(scope="module")
def shared(ranks, tmp_path_factory):
    """The folder in which each check of SHARED has one, and by rank what they returned."""
    root = tmp_path_factory.mktemp("shared")
    for check in SHARED:
        (root / check.__name__).mkdir()
    return root, ranks(2, with_one_worker, root)


def test_saved_values_are_those_at_the_call(shared):
    for found in shared[1]:
        assert found["mutate_at_once"] == [float(trial) for trial in range(20)]


def test_a_request_to_stop_does_not_end_the_worker(shared):
    assert [found["requests_to_stop"] for found in shared[1]] == [True, True]


def test_weights_that_are_not_finite_are_not_committed(shared):
    root, results = shared
    assert "model.b is not finite" in results[0]["not_finite"]
    assert list((root / "not_finite").iterdir()) == []


def test_both_ways_write_the_same_bytes(shared):
    assert shared[1][0]["equal_files"]


def test_a_pipe_message_larger_than_the_pipe_does_not_hold_up_the_call(shared):
    assert all(found["large_message"] for found in shared[1])


def test_the_memory_follows_the_tensors(shared):
    assert [found["another_form"] for found in shared[1]] == [[True] * 4] * 2


def kill_the_worker(world, root, when):
    """Save 1; save 2 while rank 0's worker is killed; then saves 3 and 4."""
    saver = AsyncSaver(timeout_s=60)
    outcomes = []
    try:
        for step in (1, 2, 3, 4):
            content = faults.tensors(float(step))
            saver.prepare(content)
            if step == 2 and world.is_main and when == "idle":
                os.kill(saver.worker.process.pid, signal.SIGKILL)
                saver.worker.process.wait()
            if step == 2 and world.is_main and when == "writing":
                # It stands still first, so that the kill is in the middle of the save.
                os.kill(saver.worker.process.pid, signal.SIGSTOP)
            begin(saver, root, content, step=step)
            if step == 2 and world.is_main and when == "writing":
                os.kill(saver.worker.process.pid, signal.SIGKILL)
            outcome = saver.drain()
            assert saver.worker.process.poll() is None, "a new one is there before the next save"
            is_saved = isinstance(outcome, Committed)
            outcomes.append(value_in(outcome.folder) if is_saved else str(outcome))
    finally:
        saver.close()
    return outcomes


def test_a_worker_killed_while_writing_loses_that_save_alone(ranks, tmp_path):
    for outcomes in ranks(2, kill_the_worker, tmp_path, "writing"):
        assert [outcomes[0], *outcomes[2:]] == [1.0, 3.0, 4.0]
        assert "rank 0: the checkpoint worker was killed by signal 9" in outcomes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step_{step}_loss_1.000" for step in (1, 3, 4)
    ]


def test_a_worker_killed_between_saves_loses_nothing(ranks, tmp_path):
    assert ranks(1, kill_the_worker, tmp_path, "idle")[0] == [1.0, 2.0, 3.0, 4.0]


def stand_still(world, root):
    saver = AsyncSaver(timeout_s=1.0)
    try:
        saver.prepare(faults.tensors(1.0))
        saver.worker.wait_ready()
        if world.rank == 1:
            os.kill(saver.worker.process.pid, signal.SIGSTOP)
        begin(saver, root, faults.tensors(1.0))
        return str(saver.drain())
    finally:
        saver.close()


def test_a_worker_that_hangs_is_given_up_after_the_timeout(ranks, tmp_path):
    for outcome in ranks(2, stand_still, tmp_path):
        assert "rank 1: the checkpoint worker was killed by signal 9" in outcome


def leave_without_notice(world, root):
    saver = AsyncSaver(timeout_s=60)
    saver.prepare(faults.tensors(1.0))
    saver.worker.wait_ready()
    child = os.fork()
    if child == 0:
        time.sleep(60)  # as a loader process: it has all that was open here
        os._exit(0)
    return saver.worker.process.pid, child


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_ends_with_its_trainer_even_if_loader_processes_do_not(ranks, tmp_path):
    worker, child = ranks(1, leave_without_notice, tmp_path)[0]
    try:
        assert is_alive(child)
        wait_until(lambda: not is_alive(worker))
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_worker_is_not_a_fork(ranks, tmp_path):
    """A fork would share locks of threads and a CUDA context with the trainer."""

    def command(world):
        saver = AsyncSaver(timeout_s=60)
        try:
            saver.prepare(faults.tensors(1.0))
            return saver.worker.process.args[1:4]
        finally:
            saver.close()

    assert ranks(1, command) == [["-P", "-m", "weights.background"]]


def with_a_full_disk(world, root):
    """The workers inherit the limit of their trainer, as of when they start."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = AsyncSaver(timeout_s=60)
    content = {"model": {f"w{n}": torch.ones(100, 100) for n in range(4)}}
    try:
        saver.prepare(content)
        saver.worker.wait_ready()
        if world.rank == 1:
            resource.prlimit(saver.worker.process.pid, resource.RLIMIT_FSIZE, (20_000, hard))
        begin(saver, root, content)
        failed = saver.drain()
        if world.rank == 1:
            resource.prlimit(saver.worker.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        begin(saver, root, content, step=2)
        return str(failed), saver.drain()
    finally:
        saver.close()


def test_a_full_disk_is_noticed_and_the_next_save_is_whole(ranks, tmp_path):
    for failed, done in ranks(2, with_a_full_disk, tmp_path):
        assert "rank 1: [Errno 27] write __1_0.distcp: File too large (need 0.00 GiB" in failed
        assert isinstance(done, Committed)
        assert verify.verify(done.folder).step == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_the_worker_takes_no_module_from_the_working_folder(ranks, tmp_path, monkeypatch):
    """`python -m` looks there first, and `weights` is a common name."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)

    def save(world):
        saver, content = AsyncSaver(timeout_s=60), faults.tensors(1.0)
        try:
            saver.prepare(content)
            begin(saver, tmp_path / "run", content)
            return isinstance(saver.drain(), Committed)
        finally:
            saver.close()

    (tmp_path / "run").mkdir()
    assert ranks(1, save) == [True]
