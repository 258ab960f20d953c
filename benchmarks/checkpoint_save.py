"""Time what training waits for a checkpoint, written at once and in the background, on CPU ranks.

    python -m benchmarks.checkpoint_save [--ranks 1] [--repeats 12] [name=value ...]

The weights and AdamW moments of a model under Megatron-FSDP, into new folders on one disk; the ways
take turns. Rows:
  stock DCP, at once     torch.distributed.checkpoint.save: no digests, no commit, one thread
  moevit, at once        checkpoint.save
  moevit, background     the call and all polls until the checkpoint is on disk, training between
  ... until on disk      the same save from the call to the commit
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.multiprocessing.spawn import spawn

import assemble
import checkpoint
import compose
import dcp_writer
import distributed
from async_checkpoint import AsyncSaver, Committed
from benchmarks import common
from dcp_writer import TensorTree
from run_folder import Swept

RIVAL = "moevit, at once"
STOCK, BACKGROUND, ON_DISK = "stock DCP, at once", "moevit, background", "... until on disk"
STATE = {"step": 1, "metrics": {}}
PAUSE_S = 0.02  # stands for a training step, which needs another core than the disk does
WARM_UP = 2
# The bundled images: they are indexed, not read.
OVERRIDES = ["model.vit.num_classes=5", "dataset.train.root=data/tiny-imagenet-5"]
Times = dict[str, list[float]]


def timed(times: list[float], call: Callable[[], object]) -> None:
    """Add the milliseconds of `call` to `times`; all ranks start together."""
    dist.barrier()
    started = time.perf_counter()
    call()
    times.append(1000 * (time.perf_counter() - started))


def stock(root: Path, tensors: TensorTree) -> None:
    """Save with what torch has."""
    writer = FileSystemWriter(root / "stock", thread_count=1)
    state_dict_saver.save(dict(tensors), storage_writer=writer)


def background(saver: AsyncSaver, root: Path, tensors: TensorTree) -> tuple[float, float]:
    """Save in the background; return (milliseconds that training waited, until it was on disk)."""
    dist.barrier()
    started = time.perf_counter()
    keep = functools.partial(Swept, failed={})
    saver.begin(root, tensors, state=STATE, loss=1.0, retention=keep)  # type: ignore[arg-type]
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


def measure(root: Path, tensors: TensorTree, *, repeats: int) -> Times:
    """Save in every way, in turns, `repeats` times and a few to warm up."""
    times: Times = {RIVAL: [], STOCK: [], BACKGROUND: [], ON_DISK: []}
    saver = AsyncSaver(timeout_s=600)
    try:
        saver.prepare(tensors)
        assert saver.worker is not None, "prepare() has made it"
        saver.worker.wait_ready()
        for _ in range(repeats + WARM_UP):
            folder = root / "run"
            folder.mkdir(exist_ok=True)
            timed(times[STOCK], lambda: stock(root, tensors))
            save = functools.partial(checkpoint.save, folder, tensors, state=STATE, loss=1.0)
            timed(times[RIVAL], save)
            for name, ms in zip((BACKGROUND, ON_DISK), background(saver, folder, tensors)):  # noqa: B905
                times[name].append(ms)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
                shutil.rmtree(root / "stock")
            dist.barrier()
    finally:
        saver.close()
    return {name: values[WARM_UP:] for name, values in times.items()}


def run_rank(rank: int, arguments: argparse.Namespace, root: Path) -> None:
    """Measure as one of the ranks; rank 0 prints and writes the result."""
    config = compose.compose(arguments.config_name, [*OVERRIDES, *arguments.overrides])
    store = dist.FileStore(str(root / "ranks"), arguments.ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    world = distributed.World(rank, arguments.ranks, rank, torch.device("cpu"))
    run, _ = assemble.prepare(config, world)
    tensors = run.tensors()
    num_bytes = dcp_writer.num_bytes(tensors)
    times = measure(root, tensors, repeats=arguments.repeats)
    if rank == 0:
        rows = common.summarise(times, rival=RIVAL)
        common.print_rows(rows)
        conditions = {
            "config": arguments.config_name,
            "overrides": arguments.overrides,
            "ranks": arguments.ranks,
            "repeats": arguments.repeats,
            "checkpoint_mib": round(num_bytes / 2**20, 1),
        }
        common.write("checkpoint_save", out=arguments.out, conditions=conditions, rows=rows)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks in a folder beside the results, so that the disk is a real one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-name", default="vit_small_patch16_224")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-checkpoint_save.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = (arguments, Path(folder).absolute())
        spawn(run_rank, args=work, nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
