"""Output that nobody reads or that cannot be written costs its lines, never the run."""

import json
import os
import pty
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from parallel import terminal
from training import log_file
from training.log_file import LogFile
from training.logbook import Logbook, as_table
from weights import dcp_writer

ROOT = Path(__file__).resolve().parents[1]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def dead_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def run(arguments: list[str], stdout: int) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False
    )
    os.close(stdout)
    return done


def train_without(world, config, output, streams):
    for stream, name in enumerate(("stdout", "stderr"), start=1):
        if stream in streams:
            os.dup2(output(), stream)
            setattr(sys, name, os.fdopen(stream, "w", closefd=False))  # pytest has its own
    train.train(config, world)
    sys.stdout.flush()
    sys.stderr.flush()


@pytest.mark.parametrize("output", [unread_pipe, dead_terminal, full_disk])
@pytest.mark.parametrize("streams", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
def test_training_ends_whoever_reads_it(ranks, small_run, tmp_path, output, streams):
    options = ["training.steps=2", "training.log_interval=1", "training.tensorboard=true"]
    ranks(1, train_without, small_run(*options), output, streams)
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["event"] == "train"] == [
        1,
        2,
    ]
    assert len(list((tmp_path / "run").glob("step_2_*"))) == 1


def test_a_full_stdout_is_said_once():
    code = "from parallel.terminal import say; say('a'); say('b'); print('c')"
    done = run(["-c", code], full_disk())
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "warning: stdout cannot be written: [Errno 28] No space left on device; "
        "the run goes on without it"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["train.py --help", "train.py --print-config"])
def test_help_and_options_may_be_piped_into_head(arguments):
    done = run(arguments.split(), unread_pipe())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_result_that_cannot_be_shown_is_an_error():
    code = (
        "from training.stopping import exit_code, leave\n"
        "from parallel.terminal import show_result\n"
        "leave(exit_code(lambda: show_result('97.4 %')))"
    )
    done = run(["-c", code], full_disk())
    assert done.returncode == 2
    assert done.stderr == (
        "error (rank 0): stdout cannot be written: [Errno 28] No space left on device\n"
    )


def start(config, folder: Path, *, step: int = 0) -> Logbook:
    folder.mkdir(exist_ok=True)
    return Logbook(folder, config=config, is_main=True, step=step)


def limit_files(num_bytes: int) -> None:
    """Let writes beyond `num_bytes` of a file fail, as on a full disk, in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes < 0 else num_bytes, hard))


def test_a_full_disk_under_the_log_costs_lines_and_is_said_once(small_run, tmp_path, capsys):
    book = start(small_run("training.tensorboard=true"), tmp_path)
    book.event("whole")
    size = (tmp_path / "log.jsonl").stat().st_size
    limit_files(size + 10)
    try:
        for step in (1, 2, 3):
            book.metrics("train", step=step, values={"loss": 1.0})
        book.close()
    finally:
        limit_files(-1)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line for line in warnings if "log.jsonl" in line] == [
        "warning: log.jsonl cannot be written: [Errno 27] File too large; the run goes on without",
        "warning: 3 writes to log.jsonl failed",
    ]
    assert len([line for line in warnings if "TensorBoard cannot" in line]) == 1
    # Room again: the half line is ended before the next, so that only it is lost.
    again = start(small_run(), tmp_path)
    again.event("after")
    again.close()
    whole, half, after = (tmp_path / "log.jsonl").read_text().splitlines()
    assert (json.loads(whole)["event"], json.loads(after)["event"]) == ("whole", "after")
    assert len(half) == 10


def test_a_line_that_a_kill_cut_short_is_ended_before_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    log = LogFile(path)
    log.append('{"step": 2}')
    log.append('{"step": 3}')
    log.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}', '{"step": 3}']


def run_with_all_full(world, config):
    """Train while neither the log nor the checkpoint of step 1 can be written."""

    def no_room(*_):
        raise OSError(28, "No space left on device")

    log_file.os = types.SimpleNamespace(**{**vars(os), "write": no_room})
    write, real = dcp_writer.write, dcp_writer.make_target

    def make_target(root, *, state, loss):
        dcp_writer.write = no_room if state["step"] == 1 else write
        return real(root, state=state, loss=loss)

    dcp_writer.make_target = make_target
    train.train(config, world)


def test_a_save_that_fails_with_a_full_log_is_tried_again(ranks, small_run, tmp_path):
    steps = ["training.steps=2", "training.checkpoint.interval=1", "training.val_interval=9"]
    ranks(1, run_with_all_full, small_run(*steps))
    assert [path.name[:6] for path in (tmp_path / "run").glob("step_*")] == ["step_2"]


def as_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def as_fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "plant", "message"),
    [
        ("log.jsonl", as_link, r"file .*log.jsonl: cannot be opened: Too many levels of symbolic"),
        ("log.jsonl", as_fifo, r"file .*log.jsonl: not a regular file"),
        ("tensorboard", as_link, r"folder .*tensorboard: a symbolic link, which is not followed"),
    ],
)
def test_what_is_planted_under_a_logs_name_is_not_followed(
    small_run, tmp_path, name, plant, message
):
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    (target.mkdir if name == "tensorboard" else target.touch)()
    plant(folder / name, target)
    with pytest.raises(OSError, match=message):
        start(small_run("training.tensorboard=true"), folder)
    assert (list(target.iterdir()) if target.is_dir() else target.read_bytes()) in ([], b"")


class WandbError(Exception):
    pass


class Wandb(types.ModuleType):
    """A W&B that keeps, as the real one does, only what is logged at a step not yet passed."""

    def __init__(self):
        super().__init__("wandb")
        self.kept, self.passed, self.axis = [], -1, None
        self.Error = WandbError

    def init(self, **_):
        return self

    def define_metric(self, name, *, step_metric=None):
        if name == "*":
            self.axis = step_metric

    def log(self, values, step=None):
        number = self.passed + 1 if step is None else step
        if number > self.passed:
            self.kept.append(values)
            self.passed = number

    def finish(self):
        pass


def test_wandb_keeps_what_a_resumed_run_logs_again(small_run, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = small_run("training.wandb.project=p")
    for step in (10, 20, 15):  # killed after 20, resumed from 14
        book = start(config, tmp_path, step=step - 1)
        book.metrics("train", step=step, values={"loss": float(step)})
        book.close()
    assert wandb.kept == [{"train/loss": float(step), "step": step} for step in (10, 20, 15)]
    assert wandb.axis == "step"


def test_a_wandb_that_fails_does_not_end_the_run(small_run, tmp_path, monkeypatch, capfd):
    class Broken(Wandb):
        def log(self, values, step=None):
            raise WandbError("no network")

        def finish(self):
            raise TypeError("not started")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    book = start(small_run("training.wandb.project=p"), tmp_path)
    for step in (1, 2):
        book.metrics("train", step=step, values={"loss": 1.0})
    book.close()
    assert [line for line in capfd.readouterr().err.splitlines() if "W&B" in line] == [
        "warning: W&B cannot be written: no network; the run goes on without",
        "warning: 3 writes to W&B failed",
    ]
    assert len(lines_of(tmp_path)) == 2


def test_a_wandb_that_does_not_start_does_not_end_the_run(small_run, tmp_path, monkeypatch, capfd):
    class Offline(Wandb):
        def init(self, **_):
            raise WandbError("no login")

    monkeypatch.setitem(sys.modules, "wandb", Offline())
    book = start(small_run("training.wandb.project=p"), tmp_path)
    book.metrics("train", step=1, values={"loss": 1.0})
    book.close()
    assert "warning: W&B cannot be written: no login" in capfd.readouterr().err
    assert len(lines_of(tmp_path)) == 1


def test_a_logbook_needs_no_stderr(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    book = start(small_run(), tmp_path)
    book.event("begun")
    book.advance()
    book.close()
    assert len(lines_of(tmp_path)) == 1


def test_tensorboard_gets_each_figure_at_its_step(small_run, tmp_path):
    book = start(small_run("training.tensorboard=true"), tmp_path)
    book.metrics("val", step=7, values={"top1": 12.5})
    book.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val/top1")
    assert [(event.step, event.value) for event in events] == [(7, 12.5)]


def test_square_brackets_in_a_path_are_shown_as_they_are():
    table = as_table("[bold]t", {"log": "/data/[/red]/x :smile:"})
    assert "/data/[/red]/x :smile:" in "\n".join(table)


def test_a_stream_that_was_closed_is_nobodys_error():
    closed = torch.tensor(0)  # anything without a file descriptor
    terminal.give_up(closed)
    terminal.give_up(None)
