"""Tools to hurt a save: processes killed at random moments, and the naive schemes to compare."""

import os
import pickle
import random
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import checkpoint
from training import run_folder

NAMES = ("a", "b", "c")
SHAPE = (64, 64)
SAVES = 2  # of a life


def tensors(value: float) -> dict:
    """Three tensors that all hold one number, so that a mixture shows."""
    return {"model": {name: torch.full(SHAPE, value) for name in NAMES}}


def value_of(content: dict) -> float:
    """The one number in all tensors; a mixture of checkpoints raises."""
    found = {x for tensor in content["model"].values() for x in tensor.unique().tolist()}
    if len(found) != 1:
        raise ValueError(f"mixture of {sorted(found)}")
    return found.pop()


class Ours:
    """Staging, manifest, rename; the newest verified wins."""

    @staticmethod
    def save(root: Path, step: int, value: float) -> None:
        state = {"step": step, "metrics": {"loss": 1.0}}
        folder = checkpoint.save(root, tensors(value), state=state, loss=1.0)
        nothing = {"known": frozenset(), "protected": frozenset()}
        keep = {"keep_last": 2, "keep_best": 0, "metric": "-val_loss"}
        run_folder.Retention(**nothing, **keep).sweep_after(folder)

    @staticmethod
    def resume(root: Path) -> float | None:
        found, _ = checkpoint.find_newest(root)
        if found is None:
            return None
        content = tensors(-1.0)
        checkpoint.load(found, content)
        return value_of(content)


class Naive:
    """Plain DCP into a folder of the step; the newest that `is_candidate` wins."""

    def __init__(self, is_candidate: Callable[[Path], bool]) -> None:
        self.is_candidate = is_candidate

    def save(self, root: Path, step: int, value: float) -> None:
        writer = FileSystemWriter(root / f"step_{step:06d}", thread_count=1)
        state_dict_saver.save(tensors(value), storage_writer=writer)

    def resume(self, root: Path) -> float | None:
        folders = [path for path in sorted(root.iterdir()) if self.is_candidate(path)]
        if not folders:
            return None
        content = tensors(-1.0)
        state_dict_loader.load(content, storage_reader=FileSystemReader(folders[-1]))
        return value_of(content)


BY_NAME = Naive(lambda path: path.is_dir())
BY_METADATA = Naive(lambda path: (path / ".metadata").exists())


@dataclass
class Tally:
    """What the resumes after kills found."""

    trials: int = 0
    failed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    mid_save: int = 0


def _send(pipe: int, kind: str, value: object) -> None:
    content = pickle.dumps((kind, value))
    os.write(pipe, struct.pack("I", len(content)) + content)


def _receive(pipe: int, timeout_s: float) -> tuple[str, object] | None:
    if not select.select([pipe], [], [], timeout_s)[0]:
        return None
    head = os.read(pipe, 4)
    if not head:
        return None
    return pickle.loads(os.read(pipe, struct.unpack("I", head)[0]))


def _life(scheme, root: Path, is_same_step: bool, value: int, pipe: int) -> None:
    """Resume, then save SAVES times and say so each time; killed somewhere on the way."""
    try:
        dist.init_process_group(
            "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
        )
        try:
            _send(pipe, "resumed", scheme.resume(root))
        except BaseException as error:
            _send(pipe, "failed", f"{type(error).__name__}: {str(error)[:200]}")
            os._exit(1)
        for value_now in range(value + 1, value + 1 + SAVES):
            _send(pipe, "begin", value_now)
            scheme.save(root, 1 if is_same_step else value_now, float(value_now))
            _send(pipe, "saved", value_now)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def kill_saves(scheme, root: Path, *, trials: int, is_same_step: bool, seed: int) -> Tally:
    """Save in a forked process, kill it, resume, `trials` times; each life resumes from the last.

    A resume must give the last save that returned, or the one that was being made.
    """
    rng = random.Random(seed)
    tally = Tally()
    acknowledged, attempted, window_s = 0, 0, 0.02
    fresh = root / "0"
    fresh.mkdir(parents=True)
    for trial in range(trials + 1):
        receiver, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receiver)
            _life(scheme, fresh, is_same_step, attempted, sender)
        os.close(sender)
        kind, value = _receive(receiver, 60) or ("died", None)
        if trial:
            tally.trials += 1
        if kind != "resumed":
            tally.failed.append(f"trial {trial}: {value}")
            fresh = root / str(trial + 1)  # nothing can be continued here
            fresh.mkdir()
            acknowledged = 0
        elif (value or 0) < acknowledged:
            tally.lost.append(f"trial {trial}: {value}, acknowledged {acknowledged}")
        started = time.monotonic()
        if trial and kind == "resumed":
            time.sleep(rng.uniform(0, window_s))
            os.kill(pid, signal.SIGKILL)
        last, num_saved = kind, 0
        while message := _receive(receiver, 60):
            last, value = message
            attempted = max(attempted, value) if last == "begin" else attempted
            acknowledged = max(acknowledged, value) if last == "saved" else acknowledged
            num_saved += last == "saved"
        os.close(receiver)
        os.waitpid(pid, 0)
        tally.mid_save += last == "begin"
        if not trial:
            window_s = 0.7 * (time.monotonic() - started)  # the rest is the end of the process
        else:  # how long a life takes changes with the machine's load: some 3 of 10 kills come late
            window_s *= 0.95 if num_saved == SAVES else 1.02
    return tally
