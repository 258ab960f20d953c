"""A whole run that is hurt: disk full, weights that are not finite, asked to stop, folder gone."""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import checkpoint
import train
from images.reading import ImageReader
from tests.support.pages import PAGES
from tests.support.processes import TIMEOUT_S, meeting_place, wait_until
from tests.support.runs import train_and_watch
from training import scoring, stopping
from weights import background, dcp_writer, verify
from weights.sources import Choice, read_source

EVERY_STEP = ["training.val_interval=100", "training.checkpoint.interval=1"]
MODES = pytest.mark.parametrize("is_async", ["false", "true"], ids=["at once", "in background"])


def events(root: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def steps(root: Path) -> set[int]:
    folders = [path for path in root.iterdir() if path.name.startswith("step_")]
    assert all(verify.verify(folder) for folder in folders)
    return {int(path.name.split("_")[1]) for path in folders}


def limit_files(num_bytes: int | None) -> None:
    """Let writes beyond `num_bytes` of a file fail, as on a full disk, in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


def limited_save(world, root, which):
    if world.rank in which:
        limit_files(20_000)
    with pytest.raises(OSError, match=r"rank \d: .*need 0.00 GiB, free \d+") as caught:
        content = {"model": {f"w{n}": torch.ones(100, 100) for n in range(4)}}
        checkpoint.save(root, content, state={"step": 1, "metrics": {}}, loss=1.0)
    return str(caught.value)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
def test_a_full_disk_is_never_success(ranks, tmp_path, which):
    for message in ranks(2, limited_save, tmp_path, which):
        assert f"rank {which[0]}: [Errno 27] write __{which[0]}_0.distcp: File too large" in message
    assert list(tmp_path.iterdir()) == []


def test_stock_dcp_with_two_threads_calls_a_full_disk_success(ranks, tmp_path):
    def save(world):
        limit_files(20_000)
        content = {"large": torch.ones(100, 100), "small": torch.ones(2)}
        state_dict_saver.save(content, storage_writer=FileSystemWriter(tmp_path, thread_count=2))

    ranks(1, save)
    assert (tmp_path / ".metadata").exists()


def run_with_full_disk(world, config, full_at):
    """Train with the disk full on rank 1 while the steps of `full_at` are saved."""
    real = dcp_writer.make_target

    def make_target(root, *, state, loss):
        # The worker process has the limit of when it started, so its rank fails as a whole.
        failing = state["step"] in full_at and world.rank == 1
        dcp_writer.write = full if failing else write
        return real(root, state=state, loss=loss)

    write = dcp_writer.write

    def full(*_):
        raise OSError(28, "write __1_0.distcp: No space left on device")

    dcp_writer.make_target = make_target
    try:
        train.train(config, world)
    except OSError as error:
        return str(error)
    return None


def test_a_failed_save_costs_its_interval_alone(ranks, small_run, tmp_path):
    config = small_run("training.steps=6", *EVERY_STEP, "training.checkpoint.keep_last=9")
    assert ranks(2, run_with_full_disk, config, (2, 4, 5)) == [None, None]
    assert steps(tmp_path / "run") == {1, 3, 6}
    failed = events(tmp_path / "run", "save_failed")
    assert [line["step"] for line in failed] == [2, 4, 5]
    assert failed[0]["error"].startswith("checkpoint save failed at step 2: checkpoint ")
    assert (
        "rank 1: [Errno 28] write __1_0.distcp: No space left on device (need" in failed[0]["error"]
    )
    assert "; last good step_1_loss_" in failed[0]["error"]
    assert failed[2]["error"].endswith("failure 2 of 3")


def test_three_failures_in_a_row_end_the_run(ranks, small_run, tmp_path):
    config = small_run("training.steps=9", *EVERY_STEP)
    for message in ranks(2, run_with_full_disk, config, range(3, 9)):
        assert "failed at step 5: " in message
        assert message.endswith("failure 3 of 3")
    assert steps(tmp_path / "run") >= {2}
    assert max(steps(tmp_path / "run")) == 2


def test_a_failure_of_the_last_save_ends_the_run(ranks, small_run, tmp_path):
    config = small_run("training.steps=2", *EVERY_STEP)
    for message in ranks(2, run_with_full_disk, config, (2,)):
        assert "failed at step 2: " in message
    assert steps(tmp_path / "run") == {1}


def run_killing_worker(world, config, at):
    """Train; when step `at` is saved, this rank's worker is killed."""
    real = train.Saver.save

    def save(self, *, step, figures, is_last):
        real(self, step=step, figures=figures, is_last=is_last)
        if step in at and world.rank == 1:
            os.kill(self._background.worker.process.pid, signal.SIGKILL)

    train.Saver.save = save
    real_step = train.train_step

    def slow_step(*arguments, **options):
        time.sleep(0.3)  # longer than a save takes, so that each step has one
        real_step(*arguments, **options)

    train.train_step = slow_step
    train.train(config, world)


@pytest.mark.slow
def test_a_killed_worker_costs_one_background_save(ranks, small_run, tmp_path):
    options = ["training.checkpoint.async_save=true", "training.checkpoint.keep_last=9"]
    config = small_run("training.steps=6", *EVERY_STEP, *options)
    ranks(2, run_killing_worker, config, (2,))
    failed = events(tmp_path / "run", "save_failed")
    assert [line["step"] for line in failed] == [2]
    assert "rank 1: the checkpoint worker was killed by signal 9" in failed[0]["error"]
    assert steps(tmp_path / "run") == {1, 3, 4, 5, 6}


@MODES
def test_a_vanished_folder_is_never_success(ranks, small_run, tmp_path, is_async):
    config = small_run(
        "training.steps=4", *EVERY_STEP, f"training.checkpoint.async_save={is_async}"
    )

    def vanish(world):
        real = train.Saver.save

        def remove_and_save(self, *, step, **options):
            if step == 2:
                self.drain()
                # At once: beside a worker that stages, rmtree alone may leave the folder there.
                shutil.rmtree((tmp_path / "run").rename(tmp_path / "gone"))
            real(self, step=step, **options)

        train.Saver.save = remove_and_save
        with pytest.raises(OSError, match=r"failed at step 4: .*No such file or directory"):
            train.train(config, world)

    ranks(1, vanish)
    assert not list((tmp_path / "run").glob("step_*"))


def run_noting_images(world, config, path, kill_in):
    """Train and note which images each update reads; the process is killed within `kill_in`."""
    step_of, read = train.train_step, ImageReader.__call__
    current = []

    def step_and_note(run, batches, *, step, meter):
        current[:] = [step]
        step_of(run, batches, step=step, meter=meter)
        if step == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        current.clear()

    def read_and_note(self, image):
        if current:
            with path.open("a") as file:
                print(os.getpid(), current[0], image, file=file)
        return read(self, image)

    train.train_step, ImageReader.__call__ = step_and_note, read_and_note
    train.train(config, world)


def images_of_steps(path):
    """By update the images that each run, in order, read for it."""
    by_step = {}
    for line in path.read_text().splitlines():
        process, step, image = map(int, line.split())
        by_step.setdefault(step, {}).setdefault(process, []).append(image)
    return {step: list(by_step[step].values()) for step in sorted(by_step)}


def test_an_epoch_has_each_image_once_over_three_killed_runs(ranks, small_run, tmp_path):
    """And the pixels are the same, cropped, erased and mixed: so are the final weights."""
    options = ["training.steps=12", "training.val_interval=100", "training.checkpoint.interval=3"]
    options += ["dataset.train.batch_size=4", "dataset.train.mixup=0.8", "dataset.train.cutmix=1"]
    options += ["dataset.train.reprob=0.5", "dataset.train.auto_augment=3aug"]
    config = small_run(*options)
    killed = tmp_path / "killed"
    for at in (4, 6, 10):
        with pytest.raises(pytest.fail.Exception, match="died"):
            ranks(1, run_noting_images, config, killed, at)
    ranks(1, run_noting_images, config, killed, None)
    whole = tmp_path / "whole"
    elsewhere = f"training.checkpoint.path={tmp_path / 'other'}"
    ranks(1, run_noting_images, small_run(*options, elsewhere), whole, None)
    images = {step: found[0] for step, found in images_of_steps(whole).items()}
    for step, found in images_of_steps(killed).items():
        # Killed within updates 4, 6 and 10; saved after every third.
        assert found == [images[step]] * (2 if step in (3, 4, 6, 9, 10) else 1)
    for epoch in (range(6), range(6, 12)):  # of 24 images
        assert sorted(image for step in epoch for image in images[step]) == list(range(24))
    once, again = (read_source(tmp_path / name, Choice()).weights() for name in ("other", "run"))
    assert all(torch.equal(once[name], again[name]) for name in once.keys() | again.keys())


@MODES
def test_weights_that_are_not_finite_end_the_run_and_keep_the_good(
    ranks, small_run, tmp_path, is_async
):
    config = small_run(
        "training.steps=4", *EVERY_STEP, f"training.checkpoint.async_save={is_async}"
    )

    def poison(world):
        real = train.read_meter

        def read_and_poison(run, meter, *, step):
            if step == 3 and world.rank == 1:
                next(s for s in run.shards if s.local.numel()).local.data.view(-1)[0] = float("nan")
            return real(run, meter, step=step)

        train.read_meter = read_and_poison
        with pytest.raises((dcp_writer.NonFiniteTensorError, train.NonFiniteError)):
            train.train(config, world)

    ranks(2, poison)
    assert max(steps(tmp_path / "run")) == 2


def test_background_saves_train_the_same_run(ranks, small_run, tmp_path):
    def trained(is_async):
        folder = tmp_path / is_async
        options = [f"training.checkpoint.path={folder}", "training.checkpoint.keep_last=9"]
        options.append(f"training.checkpoint.async_save={is_async}")
        config = small_run("training.steps=4", *EVERY_STEP, *options)
        ranks(2, lambda world: train.train(config, world))
        assert steps(folder) == {1, 2, 3, 4}
        return {
            (path.parent.name, path.name): path.read_bytes() for path in folder.glob("*/*.distcp")
        }

    assert trained("true") == trained("false")


# Asked to stop, by a signal of the process to itself at a known place.


def raise_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_a_step(world):
    real = train.train_step

    def step_and_signal(run, batches, *, step, meter):
        if step == 2:
            raise_signal()
        real(run, batches, step=step, meter=meter)

    train.train_step = step_and_signal


def in_validation(world):
    real, calls = scoring._sums, []

    def score_and_signal(*arguments):
        calls.append(1)
        assert len(calls) == 1, "the first batch is the last"
        raise_signal()
        return real(*arguments)

    scoring._sums = score_and_signal


def in_a_save(world):
    real = dcp_writer.write

    def write_and_signal(*arguments):
        raise_signal()
        return real(*arguments)

    dcp_writer.write = write_and_signal


def in_a_background_save(world):
    real = background.AsyncSaver.begin

    def begin_and_signal(*arguments, **options):
        real(*arguments, **options)
        raise_signal()

    background.AsyncSaver.begin = begin_and_signal


# Two ranks agree on what was asked in a step after the next one, without a wait.
STOPS = {"a step": (in_a_step, 4), "validation": (in_validation, 2), "a save": (in_a_save, 2)}


def train_until_stopped(world, config, install, ranks_with_signal):
    if world.rank in ranks_with_signal:
        install(world)
    with pytest.raises(stopping.Stopped, match="SIGTERM at step") as caught:
        train.train(config, world)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "with_signal"),
    [
        ("a step", (0,)),
        ("a step", (0, 1)),
        ("validation", (1,)),
        ("a save", (0,)),
        ("a save", (1,)),
    ],
    ids=str,
)
def test_a_signal_anywhere_ends_in_one_checkpoint_of_the_step(
    ranks, small_run, tmp_path, monkeypatch, where, with_signal
):
    install, step = STOPS[where]
    # Where steps take long, as on a busy machine, ranks wait and stop in the step itself.
    monkeypatch.setattr(stopping, "_LONG_STEP_S", float("inf"))
    config = small_run("training.steps=6", "training.val_interval=2")
    started = time.monotonic()
    messages = ranks(2, train_until_stopped, config, install, with_signal)
    seconds = time.monotonic() - started
    assert messages[0].startswith(f"SIGTERM at step {step}, checkpoint ")
    assert max(steps(tmp_path / "run")) == step
    assert len(list((tmp_path / "run").glob(f"step_{step}_*"))) == 1
    stopped = events(tmp_path / "run", "stopped")
    assert [(line["step"], line["signal"]) for line in stopped] == [(step, "SIGTERM")]
    assert 0 <= stopped[0]["saved_after_s"] < seconds < 30
    print(where, with_signal, stopped[0]["saved_after_s"], "s")


BACKGROUND = ["training.checkpoint.async_save=true"]
MOMENTS = {
    "a step": (in_a_step, BACKGROUND),
    "validation": (in_validation, BACKGROUND),
    "a save": (in_a_save, []),
    "a background save": (in_a_background_save, BACKGROUND),
}


def finish(world, config):
    return train_and_watch(world, config, None)[1]


def test_a_stopped_run_goes_on_where_it_was(ranks, small_run, tmp_path):
    options = ["training.steps=5", "training.val_interval=2"]
    whole = ranks(1, finish, small_run(*options, f"training.checkpoint.path={tmp_path / 'whole'}"))
    for where, (install, mode) in MOMENTS.items():
        folder = f"training.checkpoint.path={tmp_path / where}"
        parted = small_run(*options, *mode, folder)
        message = ranks(1, train_until_stopped, parted, install, (0,))[0]
        assert message.startswith(f"SIGTERM at step {3 if where == 'a step' else 2}, "), where
        # At once: a worker takes seconds to start, and another test shows that it saves the same.
        assert ranks(1, finish, small_run(*options, folder)) == whole, where


def test_a_second_signal_ends_the_process_at_once(ranks, small_run, tmp_path):
    config = small_run("training.steps=4", "training.val_interval=1")

    def signal_twice(world):
        stopping._SAME_REQUEST_S = 0.1
        real = train.train_step

        def step_and_signal(run, batches, *, step, meter):
            real(run, batches, step=step, meter=meter)
            if step == 1:
                raise_signal()
                time.sleep(0.2)
                raise_signal()
                raise AssertionError("must not come here")

        train.train_step = step_and_signal
        train.train(config, world)

    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(1, signal_twice)
    assert steps(tmp_path / "run") == {1}


def test_the_same_request_twice_is_one(ranks, small_run, tmp_path):
    """A scheduler that signals the whole group reaches each rank twice under torchrun."""
    config = small_run("training.steps=4", "training.val_interval=1")

    def install(world):
        real = train.train_step

        def step_and_signal(run, batches, *, step, meter):
            real(run, batches, step=step, meter=meter)
            if step == 1:
                raise_signal()
                raise_signal()

        train.train_step = step_and_signal

    ranks(1, train_until_stopped, config, install, (0,))
    assert max(steps(tmp_path / "run")) == 2


def test_the_handlers_are_given_back(ranks, small_run):
    def handlers(world):
        before = [signal.getsignal(number) for number in stopping.SIGNALS]
        train.train(small_run("training.steps=1"), world)
        return before == [signal.getsignal(number) for number in stopping.SIGNALS]

    assert ranks(1, handlers) == [True]


ROOT = Path(train.__file__).parent


def typed_flags():
    """The options of the torchrun command that the page on checkpoints gives for SIGUSR1."""
    line = re.search(r"torchrun (.* --signals-to-handle .*) train\.py", PAGES["checkpoints.md"])[1]
    return shlex.split(line)


# What is sent to torchrun -> its flags. A signal that torchrun does not handle ends torchrun alone:
# its ranks save all the same.
TO_TORCHRUN = {
    "SIGTERM": ["--nproc-per-node", "2"],
    "SIGUSR1": typed_flags(),
    "SIGUSR1 without its flag": ["--nproc-per-node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TO_TORCHRUN)
def test_a_signal_to_torchrun_is_saved_and_the_same_options_resume(
    ranks, image_folder, tmp_path, case
):
    command = ["-m", "torch.distributed.run", *TO_TORCHRUN[case], "--standalone", "train.py"]
    options = [
        *("--config-name", "vit_tiny_patch8_64", "device=cpu", "model.vit.num_classes=3"),
        *("model.vit.depth=1", "optimizer.warmup_steps=0", "training.log_interval=1"),
        *(f"dataset.train.root={image_folder}", "dataset.train.batch_size=4"),
        *(f"training.checkpoint.path={tmp_path}/run", "training.val_interval=100000"),
    ]
    arguments = [sys.executable, *command, *options, "training.steps=100000"]
    said = (tmp_path / "err").read_text
    log = tmp_path / "run/log.jsonl"
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=err, stderr=err)
    pids = [process.pid]
    try:
        wait_until(lambda: log.exists() and '"train"' in log.read_text(), said)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        pids += map(int, children.split())
        signalled = time.monotonic()
        process.send_signal(signal.Signals[case.split()[0]])
        assert process.wait(TIMEOUT_S) != 0
        # Where torchrun is gone before its ranks, they are still saving.
        wait_until(lambda: said().count("stopped: SIG") == 2, said)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - signalled
    print(f"{seconds:.1f} s from {case} to the checkpoint")
    assert seconds < 30, "torchrun kills after that"
    (step,) = steps(tmp_path / "run")
    assert events(tmp_path / "run", "stopped")[0]["step"] == step
    config = train.parse([*options, f"training.steps={step + 1}"])
    ranks(2, lambda world: train.train(config, world))
    assert events(tmp_path / "run", "resumed")[0]["step"] == step


def test_a_closed_terminal_is_a_request_to_stop_and_nohup_is_respected():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stopping.StopSignals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stopping.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop._name == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_exit_code_says_try_again(small_run, image_folder, tmp_path, capfd):
    argv = ["--config-name", "vit_tiny_patch8_64", "device=cpu", "model.vit.num_classes=3"]
    argv += ["model.vit.depth=1", f"dataset.train.root={image_folder}", "training.steps=9"]
    argv += ["optimizer.warmup_steps=0", "dataset.train.batch_size=4", "training.tensorboard=false"]
    argv += [f"training.checkpoint.path={tmp_path}/run"]
    pid = os.fork()
    if pid == 0:
        in_a_step(None)
        os._exit(train.main(argv))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert "stopped: SIGTERM at step 3, checkpoint " in capfd.readouterr().err


def test_a_closed_stdout_does_not_end_the_run(ranks, small_run, tmp_path):
    def without_reader(world):
        receiver, sender = os.pipe()
        os.close(receiver)
        sys.stdout = os.fdopen(sender, "w")
        train.train(small_run("training.steps=2", "training.log_interval=1"), world)

    ranks(1, without_reader)
    assert steps(tmp_path / "run") == {2}
    assert len(events(tmp_path / "run", "train")) == 2


def exit_code(pid):
    """The exit code of a child that ends in time."""
    found = []

    def has_ended():
        ended, status = os.waitpid(pid, os.WNOHANG)
        found.append(status)
        return ended

    wait_until(has_ended, lambda: f"process {pid} still runs")
    return os.waitstatus_to_exitcode(found[-1])


# The slowest that a healthy rank may be, here too: all of it counts, also the start.
HANGS_AFTER_S = max(5, TIMEOUT_S / 20)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=str)
def test_a_lost_rank_is_named_by_the_others(image_folder, tmp_path, capfd, monkeypatch, number):
    """One hangs, or is gone: one line says at which step and in which collective."""
    argv = ["--config-name", "vit_tiny_patch8_64", "device=cpu", "model.vit.num_classes=3"]
    argv += ["model.vit.depth=1", f"dataset.train.root={image_folder}", "training.steps=9"]
    argv += ["optimizer.warmup_steps=0", "dataset.train.batch_size=4", "training.tensorboard=false"]
    argv += [f"training.checkpoint.path={tmp_path}/run", *EVERY_STEP]
    argv += [f"distributed.timeout_s={HANGS_AFTER_S}"]
    real, pids = train.train_step, []

    def step_and_vanish(run, batches, *, step, meter):
        if step == 2 and run.world.rank == 1:
            os.kill(os.getpid(), number)
        real(run, batches, step=step, meter=meter)

    with meeting_place(2) as places:
        for variables in places:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            pids.append(os.fork())
            if pids[-1] == 0:
                train.train_step = step_and_vanish
                try:
                    os._exit(train.main(argv))
                finally:  # an error must not go on as a second pytest
                    os._exit(1)
        try:
            assert exit_code(pids[0]) == 69
            if number == signal.SIGSTOP:
                os.kill(pids[1], signal.SIGCONT)
            left = exit_code(pids[1])
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert left == (69 if number == signal.SIGSTOP else -signal.SIGKILL)
    error = capfd.readouterr().err
    assert re.search(r"error \(rank 0\): at step 3: \w+ failed: [^;]+; another rank is gone", error)
    assert "Traceback" not in error
    assert max(steps(tmp_path / "run")) == 2
