"""Whole runs under torchrun that are killed at random moments and started again, to their end.

torchrun -> 2 ranks, each with a loader and a worker of saves -> SIGKILL to all, again and again
-> the same command, left alone -> its weights, and what else there is on disk
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train
from tests.support.runs import digest
from weights import verify

ROOT = Path(train.__file__).parent
ARCHIVE = ROOT / "data" / "tiny-imagenet-5.tar.gz"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
MARK = "MOEVIT_TEST_RUN"  # a variable by which the processes of one start are known
STEPS, KEEP_LAST = 12, 2
OPTIONS = [
    *("device=cpu", "model.vit.embed_dim=48", "model.vit.depth=2", "model.moe.num_experts=4"),
    *("dataset.train.batch_size=8", "dataset.subset=0.2", "optimizer.warmup_steps=2"),
    *(f"training.steps={STEPS}", "training.val_interval=6", "training.log_interval=1"),
    *("training.ema_decay=0.9", "training.tensorboard=false", "training.checkpoint.interval=1"),
    *("training.checkpoint.async_save=true", f"training.checkpoint.keep_last={KEEP_LAST}"),
]
END_S = 300.0
# What must be new or changed before a kill, and the most seconds that it comes later.
MOMENTS = {
    "at any time": ("", 8.0),
    "unpacking": ("data/.*staging*", 1.0),
    "indexing": ("data/tiny-imagenet-5/train", 1.0),
    "training": ("run/.lock", 5.0),
    "saving": ("run/.staging*/*", 0.1),
    "saved": ("run/step_*", 1.0),
}


class Life:
    """One start of the run in `home`, from its beginning to its end or to its kill."""

    def __init__(self, home: Path) -> None:
        self.home, self.mark = home, uuid.uuid4().hex
        for name in ("data", "tmp"):
            (home / name).mkdir(parents=True, exist_ok=True)
        if not (home / "data" / ARCHIVE.name).exists():
            shutil.copy(ARCHIVE, home / "data")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        root = f"dataset.train.root={home}/data/{ARCHIVE.name.removesuffix('.tar.gz')}"
        where = [root, f"training.checkpoint.path={home}/run"]
        with (home / "output").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command, "train.py", *OPTIONS, *where],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={**os.environ, MARK: self.mark, "TMPDIR": str(home / "tmp")},
            )

    def processes(self) -> list[int]:
        """All living processes of this start, whoever their parent is by now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
            except OSError:  # ended, or another user's
                continue
            if is_ours:
                found.append(int(folder.name))
        return found

    def times(self, pattern: str) -> set[tuple[Path, int]]:
        """Paths of that pattern, and when they were written."""
        found = set()
        with contextlib.suppress(FileNotFoundError):  # a folder that is renamed in this moment
            for path in self.home.glob(pattern) if pattern else ():
                with contextlib.suppress(FileNotFoundError):
                    found.add((path, path.stat().st_mtime_ns))
        return found

    def wait(self) -> None:
        """Wait for the end, which must be a good one."""
        code = self.process.wait(END_S)
        assert code == 0, (self.home / "output").read_text()
        ends = time.monotonic() + 10
        while left := self.processes():
            assert time.monotonic() < ends, f"still there: {left}"
            time.sleep(0.1)

    def wait_for(self, pattern: str, seconds: float) -> bool:
        """Wait until a path of that pattern has changed, and then `seconds`; False at the end."""
        before, ends = self.times(pattern), time.monotonic() + END_S
        while pattern and self.times(pattern) <= before and self.process.poll() is None:
            assert time.monotonic() < ends, f"no {pattern}: {(self.home / 'output').read_text()}"
            time.sleep(0.01)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self, rng: random.Random) -> None:
        """Kill every process, one after the other in any order, as the kernel would."""
        pids = self.processes()
        while pids:
            rng.shuffle(pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(rng.uniform(0, 0.02))
            pids = self.processes()
        self.process.wait()


def weights(home: Path) -> tuple[str, str]:
    """Name of the last checkpoint, and one digest over its weights, moments and averages."""
    (folder,) = (home / "run").glob(f"step_{STEPS}_*")
    dcp_to_torch_save(folder, home / "all.pt")
    content = torch.load(home / "all.pt", weights_only=True)
    assert {"model", "optimizer", "ema"} <= set(content)
    return folder.name, digest({name: content[name] for name in ("model", "optimizer", "ema")})


def names(home: Path) -> list[str]:
    """What is in the data folder and in the run folder, but for the checkpoints."""
    found = [path for path in (home / "data").rglob("*") if path.suffix != ".npz"]
    found += [path for path in (home / "run").iterdir() if not path.name.startswith("step_")]
    return sorted(str(path.relative_to(home)) for path in found)


def lost_saves(home: Path) -> list[str]:
    """Starts that went on from an earlier step than one that the log had called saved."""
    saved, problems = 0, []
    for line in (home / "run" / "log.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        if event["event"] == "resumed" and event["step"] < saved:
            problems.append(f"resumed at {event['step']}, {saved} had been saved")
        saved = max(saved, event["step"]) if event["event"] == "saved" else saved
    return problems


def shared_memory() -> set[str]:
    """Files in shared memory that no process of this user has mapped."""
    files = {e.name for e in os.scandir(SHARED_MEMORY) if e.is_file(follow_symlinks=False)}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            maps = (folder / "maps").read_text()
        except OSError:
            continue
        files -= {name for name in files if f"{SHARED_MEMORY}/{name}" in maps}
    return files


def problems(home: Path, reference: Path) -> list[str]:
    """What is other than in a run that was never killed."""
    found = lost_saves(home)
    if weights(home) != weights(reference):
        found.append(f"weights differ: {weights(home)}, {weights(reference)}")
    there, expected = set(names(home)), set(names(reference))
    left = there - expected
    found += [f"left: {name}" for name in sorted(left) if str(Path(name).parent) not in left]
    found += [f"missing: {name}" for name in sorted(expected - there)]
    steps = list((home / "run").glob("step_*"))
    if len(steps) > KEEP_LAST + 1:  # and the one that was resumed from
        found.append(f"{len(steps)} checkpoints: {sorted(path.name for path in steps)}")
    for path in steps:
        verify.verify(path)
    return found


def kill_runs(folder: Path, *, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill runs so often; return how often at which moment, and all that was wrong at their ends.

    A run that has come to its end is followed by a new one, which unpacks its data again.
    """
    rng, tally, found = random.Random(seed), Counter[str](), list[str]()
    before = shared_memory()
    reference = folder / "reference"
    Life(reference).wait()
    while tally.total() < kills:
        home, is_over = folder / "killed", False
        while not is_over:
            is_new = not (home / "data" / "tiny-imagenet-5").exists()
            moment = rng.choice(
                [m for m in MOMENTS if is_new or m not in ("unpacking", "indexing")]
            )
            if not tally:  # of any number of kills one lets the next start resume
                moment = "saved"
            pattern, most_s = MOMENTS[moment]
            life = Life(home)
            if tally.total() < kills and life.wait_for(pattern, rng.uniform(0, most_s)):
                life.kill(rng)
                tally[moment] += 1
                print(f"kill {tally.total()}: {moment}", flush=True)
            else:
                life.wait()
                is_over = True
        found += [f"after {tally.total()} kills: {line}" for line in problems(home, reference)]
        shutil.rmtree(home)
    return tally, found + [f"shared memory: {name}" for name in shared_memory() - before]
