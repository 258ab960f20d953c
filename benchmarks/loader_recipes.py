"""Time the loader of whole recipes against DeiT's own: ImageFolder, timm's transform, DataLoader.

    python -m benchmarks.loader_recipes [--images 256] [--epochs 4] [--rounds 4] [--out FILE]

The JPEGs and the clocks are those of benchmarks/loader.py; both sides give normalised float32
batches of 64. Left out: mixup and CutMix, the same code on both, and repeats, which only order the
files. tests/test_augment.py and tests/test_mixing.py compare policies and erasing with timm's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from benchmarks import common
from benchmarks.clock import end_of, rounds
from benchmarks.decoders import Timing
from benchmarks.jpegs import QUALITY, SIZE, make_images
from benchmarks.loader import BATCH, measure, ours, parse, ratio, rival, timed
from images import augment
from images.batches import Batch
from images.mixing import Eraser
from images.reading import pick_decoder
from options import compose
from options.schema import Config
from training import loaders, prepare

RECIPES = ("deit_base", "deit3_base")


def theirs(config: Config) -> Callable:
    """Return timm's transform of a recipe, as DeiT calls it."""
    data, train = config.dataset, config.dataset.train
    whole = create_transform(
        input_size=config.model.vit.img_size,
        is_training=True,
        scale=tuple(train.crop_scale),
        ratio=tuple(train.crop_ratio),
        hflip=train.hflip,
        color_jitter=train.color_jitter or None,
        auto_augment=(train.auto_augment or "").replace("3aug", "3a"),
        interpolation=train.interpolation or data.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        re_prob=train.reprob,
        re_mode=train.remode,
        re_count=train.recount,
    )
    for transform in whole.transforms:
        for operation in getattr(transform, "ops", ()):
            if operation.name.startswith("Posterize"):  # it would fail with this Pillow
                operation.aug_fn = augment.posterize
    return whole


def erase(eraser: Eraser, batch: Batch) -> None:
    """Do what our loader leaves to the device."""
    eraser(batch.image_BCHW, batch.position_B)


def build(root: Path, workers: int, *, steps: int) -> dict[str, Callable[[], Timing]]:
    """Return the timed run of each row."""
    runs: dict[str, Callable[[], Timing]] = {}
    for name in RECIPES:
        config = compose.compose(name, [])
        images = ImageFolder(root / "train", theirs(config))
        runs[f"timm, {name}"] = partial(timed, rival(images, workers, steps=steps))
        feed = ours(
            root,
            workers,
            decoder=pick_decoder("auto")[0],
            steps=steps,
            transform=loaders.train_transform(config),
        )
        eraser = prepare.build_eraser(config, torch.device("cpu"))
        finish = partial(erase, eraser) if eraser else None
        runs[f"moevit, {name}"] = partial(timed, feed, finish)
    return runs


def summarise(found: dict[str, list[Timing]]) -> list[common.Row]:
    """Return a row per loader: medians, and ratios to timm's within a round."""
    rows: list[common.Row] = []
    for name, pairs in found.items():
        wall_ms, cpu_ms = (statistics.median(values) for values in zip(*pairs, strict=True))
        rival_ms = found[f"timm, {name.split(', ')[1]}"]
        rows.append(
            {
                "loader": name,
                "images_per_s": round(1000 / wall_ms),
                "cpu_ms": round(cpu_ms, 3),
                "over_timm": ratio(rival_ms, pairs, 0),
                "over_timm_cpu": ratio(rival_ms, pairs, 1),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    arguments = parse(argv, "loader_recipes", __doc__, images=256, epochs=4, rounds=4)
    torch.set_num_threads(1)
    steps = arguments.images * arguments.epochs // BATCH
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), arguments.images)
        runs = build(Path(folder), arguments.workers, steps=steps)
        planned = rounds(arguments.rounds, warm_up=1, end_s=end_of(arguments.limit_s))
        *_, found = measure(runs, planned)
    rows = summarise(found)
    common.print_rows(rows)
    conditions = {
        "images": arguments.images,
        "epochs": arguments.epochs,
        "size": SIZE,
        "quality": QUALITY,
        "workers": arguments.workers,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": len(found[f"timm, {RECIPES[0]}"]),
    }
    common.write("loader_recipes", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
