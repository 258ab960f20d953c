"""Compare training on images from a loader with training on one batch that is on the device.

    python -m benchmarks.fed [--config-name vit_small_patch16_224] [--batch 256] [--workers 14]
    python -m benchmarks.fed --dry          # the same code on a CPU with tiny sizes

JPEGs of 500 x 375 pixels, decoded, cropped and flipped by our loader's workers and normalised on
the device. The first batches, as many as workers hold ready, are not counted: what is measured is
what the loader keeps up. Blocks of the three ways follow each other in turns. Rows:
  synthetic      the step on a batch that is there already
  loader alone   the batches, nothing done with them: what these cores can deliver
  fed            the step on the loader's batches
The floor of fed is the slower of the other two: `of_floor` is its rate over that one's.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import train
from benchmarks import common, jpegs, steps
from images.batches import Batch
from options import compose
from options.command_line import Parser
from parallel import distributed
from training import loaders, prepare
from training.run import Run

SYNTHETIC, ALONE, FED = "synthetic", "loader alone", "fed"
PREFETCHED = 2  # batches that each worker holds ready, at most
FEWEST_BLOCKS = 2
Block = Callable[[int], None]


def make_images(root: Path, count: int) -> None:
    """Write an ImageFolder of JPEGs, training and validation, on all cores."""
    paths = [
        root / split / f"n{number % jpegs.CLASSES:08d}" / f"{number}.JPEG"
        for split, images in (("train", count), ("val", jpegs.CLASSES))
        for number in range(images)
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write, paths, range(len(paths)), chunksize=16))


def _write(path: Path, seed: int) -> None:
    jpegs.picture(seed).save(path, quality=jpegs.QUALITY)


def wait(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def blocks_of(run: Run, batches: Iterator[Batch]) -> dict[str, Block]:
    """Return what each way does for a number of steps."""
    device = run.world.device
    synthetic = steps.sharded_step(run, steps.make_batch(run.config, device))
    meter = train.Meter.start(device)

    def alone(count: int) -> None:
        for _ in range(count):
            next(batches)

    def fed(count: int) -> None:
        for number in range(count):
            train.train_step(run, batches, step=number, meter=meter)

    def still(count: int) -> None:
        for _ in range(count):
            synthetic()

    return {SYNTHETIC: still, ALONE: alone, FED: fed}


def measure(run: Run, *, block_steps: int, blocks: int, limit_s: float) -> dict[str, list[float]]:
    """Return milliseconds per step of each way and block."""
    device, num_ready = run.world.device, PREFETCHED * run.config.dataset.num_workers
    ways = blocks_of(run, loaders.train_batches(run, start_step=0))
    times: dict[str, list[float]] = {name: [] for name in ways}
    started = time.monotonic()
    for number in range(blocks + 1):
        for name, block in ways.items():
            # While another way ran, the workers filled their queues.
            if name != SYNTHETIC:
                block(num_ready)
            wait(device)
            start = time.perf_counter()
            block(block_steps)
            wait(device)
            if number:
                times[name].append(1000 * (time.perf_counter() - start) / block_steps)
        if time.monotonic() - started > limit_s and number >= FEWEST_BLOCKS:
            break
    return times


def rows_of(times: dict[str, list[float]], *, batch: int) -> list[common.Row]:
    """Return a row per way."""
    rows = common.summarise(times, rival=SYNTHETIC)
    slower = [max(pair) for pair in zip(times[SYNTHETIC], times[ALONE], strict=True)]
    for row, values in zip(rows, times.values(), strict=True):
        row["images_per_s"] = round(1000 * batch / statistics.median(values), 1)
        if row["loop"] == FED:
            row["of_floor"] = common.ratio(slower, values)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--block-steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer blocks after this")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: tests this file")
    parser.add_argument("--out", type=Path, help="default: results/<date>-<device>-fed.json")
    parser.add_argument("overrides", nargs="*")
    o = parser.parse_intermixed_args(argv)
    if o.dry:
        o.batch, o.workers, o.images, o.block_steps, o.blocks = 2, 1, 20, 2, 2
    elif not torch.cuda.is_available():
        raise ValueError("no CUDA device: --dry runs the same code with tiny sizes on a CPU")
    device = "cpu" if o.dry else "cuda"
    num_ready = PREFETCHED * o.workers
    overrides = [
        f"device={device}",
        "model.backend=torch",
        f"model.compile={str(not o.dry).lower()}",
        f"model.vit.num_classes={jpegs.CLASSES}",
        f"dataset.train.batch_size={o.batch}",
        "dataset.train.mixup=0",
        "dataset.train.auto_augment=null",
        f"dataset.num_workers={o.workers}",
        "training.tensorboard=false",
        "optimizer.warmup_steps=0",
        # Batches until the loader has given what is measured, and more.
        f"training.steps={2 * (o.blocks + 2) * (o.block_steps + num_ready)}",
        f"training.val_interval={o.block_steps}",
        *o.overrides,
    ]
    if o.dry:
        overrides += ["model.vit.embed_dim=32", "model.vit.depth=2", "model.vit.num_heads=2"]
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), o.images)
        overrides.append(f"dataset.train.root={folder}")
        config = compose.compose(o.config_name, overrides)
        with distributed.process_group(device, timeout_s=600) as world:
            run, _ = prepare.prepare(config, world)
            times = measure(run, block_steps=o.block_steps, blocks=o.blocks, limit_s=o.limit_s)
            rows = rows_of(times, batch=o.batch)
            common.print_rows(rows)
            conditions = {
                "config": o.config_name,
                "overrides": o.overrides,
                "is_dry": o.dry,
                "batch": o.batch,
                "images": o.images,
                "workers": o.workers,
                "cores": os.cpu_count(),
                "blocks": len(times[FED]),
                "steps_per_block": o.block_steps,
            }
            common.write("fed", out=o.out, conditions=conditions, rows=rows, device=world.device)


if __name__ == "__main__":
    main()
