"""Launching, meshes, seeds and decisions taken together."""

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import evaluate
import train
from parallel import collectives, distributed, launch
from training import stopping

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")


def test_without_torchrun_it_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group("cpu", timeout_s=10) as world:
        assert (world.rank, world.size, world.device, world.is_main) == (0, 1, CPU, True)
    assert not torch.distributed.is_initialized()


def test_the_group_is_left_after_an_error(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KeyError), distributed.process_group("cpu", timeout_s=10):
        raise KeyError
    assert not torch.distributed.is_initialized()


# A fresh process takes and frees 96 MiB 12 times and prints the page faults of the last; and again
# when it keeps what it frees. At first glibc hands all of it back at once: by default that depends
# on what lies at the heap's end.
COUNT_PAGE_FAULTS = """
import ctypes, resource, torch
from parallel import launch
def last_of_12():
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**22) for _ in range(6)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
mmap_threshold = -3
ctypes.CDLL(None).mallopt(mmap_threshold, 2**17)
print(last_of_12())
launch.keep_freed_memory()
print(last_of_12())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_freed_memory_is_kept_on_a_cpu():
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    by_default, kept = map(int, result.stdout.split())
    assert by_default > 20_000
    assert kept < 100


@pytest.fixture
def alone(monkeypatch):
    """An environment that no launcher has touched."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", *launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_srun_and_mpirun_do_not_start_four_runs_of_one_process(alone, capsys, name):
    alone.setenv(name, "4")
    alone.setattr(train, "train", None)  # not called
    assert train.main(["device=cpu"]) == 2
    error = capsys.readouterr().err
    assert f"environment {name}=4: so many processes were started, and each would work al" in error
    assert error.count("\n") == 1
    for variable, value in TORCHRUN.items():
        alone.setenv(variable, value)
    assert launch.launch_facts() == (0, 1, 0), "under torchrun they mean nothing"


def test_one_process_of_a_slurm_job_with_more_tasks_says_that_it_is_alone(alone, capsys):
    alone.setenv("SLURM_STEP_NUM_TASKS", "1")
    alone.setenv("SLURM_NTASKS", "1")
    assert launch.launch_facts() == (0, 1, 0)
    assert capsys.readouterr().err == ""
    alone.setenv("SLURM_NTASKS", "8")
    assert launch.launch_facts() == (0, 1, 0)
    said = capsys.readouterr().err
    assert said.startswith("note: one process works alone, though the job has SLURM_NTASKS=8")


def forget_home(monkeypatch):
    """Become a user that a container has no entry for."""

    def getpwuid(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", getpwuid)


def test_a_user_without_a_home_trains(ranks, monkeypatch, small_run, tmp_path):
    forget_home(monkeypatch)
    ranks(1, lambda world: train.train(small_run("training.steps=1"), world))
    assert list((tmp_path / "run").glob("step_1_*"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~/x", "path ~/x: ~ is no folder: HOME is not set and the user is not in passwd"),
        ("~no-such-user/x", "path ~no-such-user/x: ~no-such-user is no folder: no such user"),
    ],
)
def test_a_home_that_is_not_there_is_one_line(alone, capsys, path, reason):
    forget_home(alone)
    assert train.main(["device=cpu", f'training.checkpoint.path="{path}"']) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


# What one finds on clusters, in containers and under cron; none of it is a reason not to train.
JUNK = {
    "TMPDIR": "/no/such/folder",
    "OMP_NUM_THREADS": "abc",
    "COLUMNS": "0",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "LANG": "xx_XX",
    "LC_ALL": "C",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "?",
}


@pytest.mark.slow
def test_junk_in_the_environment_does_not_stop_a_run(alone, image_folder, tmp_path):
    options = [
        *("--config-name", "vit_tiny_patch8_64", "device=cpu", "model.vit.num_classes=3"),
        *("model.vit.depth=1", "optimizer.warmup_steps=0", "training.steps=1"),
        *(f"dataset.train.root={image_folder}", "dataset.train.batch_size=4"),
        *(f"training.checkpoint.path={tmp_path}/run", "dataset.num_workers=1"),
    ]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    without_stdin = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, ROOT / "train.py", *options]
    done = subprocess.run(
        without_stdin, env=kept | JUNK, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "training is complete: 1 steps" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="environment WORLD_SIZE, LOCAL_RANK: not set"):
        launch.launch_facts()


def test_a_host_whose_name_is_not_known_yet_is_looked_for_again(monkeypatch):
    answers = [OSError("no such name"), OSError("no such name"), []]

    def look_up(*_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer

    monkeypatch.setattr(launch.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    assert launch.check_meeting_place() == "127.0.0.1:29555"
    assert answers == []


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, "environment LOCAL_RANK: not set though others"),
        ({"RANK": "x"}, "environment RANK=x: must be a whole number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "environment RANK=3: must be less than WORLD_SIZE=2"),
        ({"MASTER_ADDR": None}, "environment MASTER_ADDR: not set"),
        ({"MASTER_PORT": None}, "environment MASTER_PORT=: must be a whole number"),
        ({"MASTER_PORT": "abc"}, "environment MASTER_PORT=abc: must be a whole number"),
        ({"MASTER_PORT": "99999"}, "environment MASTER_PORT=99999: must be 1 to 65535"),
        ({"MASTER_ADDR": "no-such.invalid"}, "MASTER_ADDR=no-such.invalid: no such host"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("program", [train, evaluate], ids=["train", "evaluate"])
def test_a_wrong_environment_is_one_line_of_the_program(
    monkeypatch, capsys, small_run, tmp_path, program, changes, message
):
    """Whatever it is, the message itself must not ask for what is wrong."""
    monkeypatch.setattr(launch, "FIND_HOST_S", 0)
    for name, value in {**TORCHRUN, **MEETING, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    words = ["device=cpu"]
    if program is evaluate:
        source = SimpleNamespace(config={"x": 1})
        monkeypatch.setattr(evaluate, "read_source", lambda *_: source)
        monkeypatch.setattr(evaluate, "restore", lambda *_: small_run())
        words = ["anything"]
    assert program.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1", "EADDRINUSE|in use")],
)
def test_no_place_to_meet_is_an_error_with_its_variables(monkeypatch, address, reason):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        facts = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
        for name, value in {**facts, "MASTER_ADDR": address}.items():
            monkeypatch.setenv(name, str(value))
        says = rf"MASTER_ADDR:MASTER_PORT={address}:{port}: rank 0 of 1 cannot .*({reason})"
        with pytest.raises(OSError, match=says), distributed.process_group("cpu", timeout_s=2):
            pass


def test_cuda_that_is_missing_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(ValueError, match=r"config device=cuda: local rank 0 has no CUDA device, 0"):
        distributed.pick_device("cuda", 0)
    assert distributed.pick_device("auto", 0) == CPU


@pytest.mark.parametrize(
    ("world_size", "axes", "dense", "expert"),
    [
        (4, {"dp_outer": 1, "dp_shard": None, "ep": 1}, (1, 4, 1), (1, 4, 1)),
        (4, {"dp_outer": 2, "dp_shard": None, "ep": 1}, (2, 2, 1), (2, 2, 1)),
        (4, {"dp_outer": 1, "dp_shard": 2, "ep": 2}, (1, 4, 1), (1, 2, 2)),
    ],
)
def test_meshes_have_the_shapes_of_the_design(ranks, world_size, axes, dense, expert):
    def shapes(world):
        meshes = distributed.build_meshes(**axes, device=CPU)
        return tuple(meshes.dense.shape), tuple(meshes.expert.shape), meshes.dp_outer, meshes.ep

    assert ranks(world_size, shapes)[0] == (dense, expert, axes["dp_outer"], axes["ep"])


def test_a_mesh_that_is_not_the_world_is_refused_with_its_product(ranks):
    def refused(world):
        with pytest.raises(
            ValueError,
            match=r"dp_outer=1 \* dp_shard=3 \* ep=1 = 3, must equal the world size 2",
        ):
            distributed.build_meshes(dp_outer=1, dp_shard=3, ep=1, device=CPU)
        with pytest.raises(ValueError, match=r"dp_outer=4 \* ep=1 = 4, must divide the world"):
            distributed.build_meshes(dp_outer=4, dp_shard=None, ep=1, device=CPU)

    ranks(2, refused)


def test_rank_0_decides_and_differences_are_named(ranks):
    def decide(world):
        chosen = collectives.from_main(f"choice of {world.rank}")
        collectives.require_equal("config", "same")
        with pytest.raises(
            ValueError, match="config differs between ranks: rank 0: a0; rank 1: a1"
        ):
            collectives.require_equal("config", f"a{world.rank}")
        return chosen

    assert ranks(2, decide) == ["choice of 0"] * 2


def test_seeds_depend_on_every_part():
    seeds = {
        distributed.stable_seed(*parts) for parts in [(0, 1), (1, 0), (0, "1x"), (0,), ("01",)]
    }
    assert len(seeds) == 5
    assert distributed.stable_seed(0, "step") == distributed.stable_seed(0, "step")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Some other device", None),
    ],
)
def test_peak_is_known_by_device_name(monkeypatch, name, peak):
    monkeypatch.setattr(distributed, "device_name", lambda _: name)
    assert distributed.peak_tflops(CPU, None) == peak
    assert distributed.peak_tflops(CPU, 5.0) == 5.0


def raising(error):
    def program():
        raise error

    return program


def report_of_torchrun(path, code):
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=code, error_file=str(path))
    return str(ChildFailedError("train.py", {0: failure}))


def test_torchruns_report_shows_our_line(monkeypatch, tmp_path, capsys):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert stopping.exit_code(raising(ValueError("config model.vit.depth=x:\nno number"))) == 2
    line = "error (rank 0): config model.vit.depth=x: no number"
    assert capsys.readouterr().err == f"{line}\n"
    report = report_of_torchrun(path, 2)
    assert f"traceback : {line}\n" in report
    assert "To enable traceback" not in report


def test_torchruns_report_shows_the_traceback_of_a_fault_of_ours(monkeypatch, tmp_path):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(KeyError):
        stopping.exit_code(raising(KeyError("weights")))
    assert "KeyError: 'weights'" in report_of_torchrun(path, 1)


def test_an_error_file_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert stopping.exit_code(raising(ValueError("no"))) == 2
    assert capsys.readouterr().err == "error (rank 0): no\n"


@pytest.mark.slow
def test_torchrun_ends_with_our_line(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "train.py"), "model.vit.depth=x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    (reason,) = [line for line in done.stderr.splitlines() if "traceback :" in line]
    assert "traceback : error (rank 0): config model.vit.depth" in reason
