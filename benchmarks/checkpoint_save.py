"""Time how long training waits for a checkpoint, and how long a load takes, against the disk.

    python -m benchmarks.checkpoint_save [--ranks 1] [--repeats 12] [--device cuda] [name=value ...]

Saves the weights and AdamW moments of a model under Megatron-FSDP into new folders on one disk, in
several ways that take turns. Every load is compared with what was saved. Rows:
  disk, write and sync   as many bytes of noise, one file, one thread: the floor of a save
  stock DCP, at once     torch.distributed.checkpoint.save: no digests, no commit, one thread
  moevit, at once        checkpoint.save
  moevit, background     the call and all polls until the checkpoint is on disk, training between
  ... until on disk      the same save from the call to the commit
  disk, read             that file again, once the system has dropped it from memory: a load's floor
  stock DCP, load        torch.distributed.checkpoint.load
  moevit, load           checkpoint.find_newest, which reads and verifies all, and checkpoint.load
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import checkpoint
from benchmarks import common, folders
from benchmarks.clock import end_of, rounds
from options import compose
from options.command_line import Parser
from parallel import collectives, distributed
from training import prepare
from weights import dcp_writer
from weights.background import AsyncSaver, Committed
from weights.dcp_writer import TensorTree

RIVAL = "moevit, at once"
STOCK, BACKGROUND, ON_DISK = "stock DCP, at once", "moevit, background", "... until on disk"
WRITE, READ = "disk, write and sync", "disk, read"
STOCK_LOAD, LOAD = "stock DCP, load", "moevit, load"
STATE = {"step": 1, "metrics": {}}
PAUSE_S = 0.02  # stands for a training step, which needs another core than the disk does
WARM_UP = 2
CHUNK_BYTES = 2**22
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Place:
    """Where to write, what, and how often."""

    root: Path
    tensors: TensorTree
    num_bytes: int
    device: torch.device
    repeats: int
    limit_s: float


def timed(times: list[float], call: Callable[[], object], device: torch.device) -> None:
    """Add the milliseconds of `call` to `times`; all ranks start together."""
    dist.barrier()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    times.append(1000 * (time.perf_counter() - started))


def write_file(path: Path, num_bytes: int) -> None:
    """Write a file of noise and wait until it is on the disk."""
    chunk = os.urandom(CHUNK_BYTES)
    with path.open("wb") as file:
        for start in range(0, num_bytes, CHUNK_BYTES):
            file.write(chunk[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path) -> None:
    """Read a file from its beginning to its end."""
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(root: Path) -> None:
    """Ask the system to drop the files from memory, so that the disk is read."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stock(root: Path, tensors: TensorTree) -> None:
    """Save as torch does."""
    writer = FileSystemWriter(root / "stock", thread_count=1)
    state_dict_saver.save(dict(tensors), storage_writer=writer)


def stock_load(root: Path, tensors: TensorTree) -> None:
    """Load that as torch does."""
    state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(root / "stock"))


def our_load(folder: Path, tensors: TensorTree) -> None:
    """Find the newest checkpoint, verify every byte, and load it."""
    found, _ = checkpoint.find_newest(folder)
    assert found is not None, "it was saved before"
    checkpoint.load(found, tensors)


def background(saver: AsyncSaver, root: Path, tensors: TensorTree) -> tuple[float, float]:
    """Save in the background; return (milliseconds that training waited, until it was on disk)."""
    dist.barrier()
    started = time.perf_counter()
    keep_all = functools.partial(dict.fromkeys, ())  # the worker imports what it is sent
    saver.begin(root, tensors, state=STATE, loss=1.0, retention=keep_all)  # type: ignore[arg-type]
    waited = time.perf_counter() - started
    outcome = None
    while outcome is None:
        time.sleep(PAUSE_S)
        asked = time.perf_counter()
        outcome = saver.poll()
        waited += time.perf_counter() - asked
    if not isinstance(outcome, Committed):
        raise outcome
    return 1000 * waited, 1000 * (time.perf_counter() - started)


def _local(tensors: TensorTree) -> dict[str, Tensor]:
    flat, _ = flatten_state_dict(dict(tensors))
    return {
        name: value._local_tensor if isinstance(value, DTensor) else value
        for name, value in flat.items()
        if isinstance(value, Tensor)
    }


def check_load(load: Callable[[], None], tensors: TensorTree, *, name: str) -> None:
    """Overwrite the tensors, load, and compare.

    Raises:
        ValueError: A tensor is not as it was saved.
    """
    kept = {key: value.clone() for key, value in _local(tensors).items()}
    for value in _local(tensors).values():
        value.zero_()
    load()
    for key, value in _local(tensors).items():
        if not torch.equal(value, kept[key]):
            raise ValueError(f"{name}: {key} is not as it was saved")


def one_round(place: Place, saver: AsyncSaver, times: Times, *, is_checked: bool) -> None:
    """Save and load in every way once, and delete it all."""
    root, tensors, device = place.root, place.tensors, place.device
    run, noise = root / "run", root / f"noise{dist.get_rank()}"
    run.mkdir(exist_ok=True)
    share = place.num_bytes // dist.get_world_size()
    timed(times[WRITE], lambda: write_file(noise, share), device)
    timed(times[STOCK], lambda: stock(root, tensors), device)
    save = functools.partial(checkpoint.save, run, tensors, state=STATE, loss=1.0)
    timed(times[RIVAL], save, device)
    loads = {
        STOCK_LOAD: functools.partial(stock_load, root, tensors),
        LOAD: functools.partial(our_load, run, tensors),
    }
    if is_checked:
        for name, load in loads.items():
            check_load(load, tensors, name=name)
    forget(root)
    timed(times[READ], lambda: read_file(noise), device)
    for name, load in loads.items():
        forget(root)
        timed(times[name], load, device)
    waited_ms, on_disk_ms = background(saver, run, tensors)
    times[BACKGROUND].append(waited_ms)
    times[ON_DISK].append(on_disk_ms)
    dist.barrier()
    noise.unlink()
    if dist.get_rank() == 0:
        shutil.rmtree(run)
        shutil.rmtree(root / "stock")
    dist.barrier()


def measure(place: Place) -> Times:
    """Save and load in every way, in turns, and a few times before to warm up."""
    names = (WRITE, STOCK, RIVAL, BACKGROUND, ON_DISK, READ, STOCK_LOAD, LOAD)
    times: Times = {name: [] for name in names}
    warming_up: Times = {name: [] for name in names}
    saver, is_first = AsyncSaver(timeout_s=600), True
    try:
        saver.prepare(place.tensors)
        assert saver.worker is not None, "prepare() has made it"
        saver.worker.wait_ready()
        planned = rounds(place.repeats, warm_up=WARM_UP, end_s=end_of(place.limit_s))
        # Rank 0 decides for all: by their own clocks ranks would end in different rounds.
        while (is_measured := collectives.from_main(next(planned, None))) is not None:
            one_round(place, saver, times if is_measured else warming_up, is_checked=is_first)
            is_first = False
    finally:
        saver.close()
    return times


def rows_of(times: Times) -> list[common.Row]:
    """Return a row per way; a save is also compared with writing, a load with reading."""
    rows = common.summarise(times, rival=RIVAL)
    for row, (name, values) in zip(rows, times.items(), strict=True):
        floor = READ if "load" in name or name == READ else WRITE
        row["over_disk"] = common.ratio(values, times[floor])
    return rows


def run_rank(rank: int, arguments: argparse.Namespace, root: Path) -> None:
    """Measure as one of the ranks; rank 0 prints and writes the result."""
    if arguments.ranks > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(arguments.port))
    with (
        folders.images(num_classes=folders.CLASSES) as images,
        distributed.process_group(arguments.device, timeout_s=600) as world,
    ):
        options = folders.options(collectives.from_main(images))
        config = compose.compose(arguments.config_name, [*options, *arguments.overrides])
        run, _ = prepare.prepare(config, world)
        tensors = run.tensors()
        num_bytes = dcp_writer.num_bytes(tensors)
        times = measure(
            Place(root, tensors, num_bytes, world.device, arguments.repeats, arguments.limit_s)
        )
        if rank == 0:
            rows = rows_of(times)
            common.print_rows(rows)
            conditions = {
                "config": arguments.config_name,
                "overrides": arguments.overrides,
                "ranks": arguments.ranks,
                "rounds": len(times[RIVAL]),
                "checkpoint_mib": round(num_bytes / 2**20, 1),
            }
            common.write(
                "checkpoint_save",
                out=arguments.out,
                conditions=conditions,
                rows=rows,
                device=world.device,
            )


def main(argv: list[str] | None = None) -> None:
    """Start the ranks in a folder on the disk to measure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="vit_small_patch16_224")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--port", type=int, default=29561, help="where several ranks meet")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-checkpoint_save.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = (arguments, Path(folder).absolute())
        if arguments.ranks == 1:
            run_rank(0, *work)
        else:
            spawn(run_rank, args=work, nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
