"""Time our training loader against torchvision's ImageFolder + DataLoader on the same JPEGs.

    python -m benchmarks.loader [--images 640] [--epochs 8] [--rounds 5] [--workers 2] [--out FILE]

Both crop at random to 224 x 224 (bilinear), flip and normalise, in batches of 64 float32 images, by
as many worker processes; rounds alternate forwards and backwards. A pass takes each image --epochs
times; by the wall clock only its middle counts, from the 8th batch to the 8th from the end, where
no worker waits for another, as in a long epoch. Before anything is timed, both are shown the same
crop of every file and must agree within the difference of their resizing.
Rows:
  torchvision            ImageFolder + DataLoader as its tutorials have it, Pillow
  moevit, <decoder>      Feed over train_loader; "tar": the same images in shards
  decode only, <decoder> all pixels of each file, one process: the floor times the number of cores

`images_per_s` is by the wall clock, `cpu_ms` the time of all processes per image, which other work
on the machine disturbs less; `of_floor` is the decoder's own cpu_ms / cpu_ms, and by the wall clock
images_per_s / (cores x decode-only images_per_s).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

from augment import Normaliser, Transform, train_transform
from benchmarks import common
from cropping import resize
from decoding import pick_decoder, read_header, rgb, rgb_of_box
from feed import Feed, Tolerance
from image_reader import ImageReader
from imagenet_dataset import train_loader
from layouts import index_images

LARGE = (1000, 750)
SIZE, QUALITY, CLASSES, BATCH, CROP = (500, 375), 90, 10, 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OCTAVES = {4: 60, 16: 40, 64: 30, 250: 14}  # cells across -> amplitude, about as in photographs
GRAIN = 13  # levels of noise: with it a file has 100 kB, about as in ImageNet (110 kB)
EDGE = 8  # batches at both ends of a pass that are not timed


class Timing(NamedTuple):
    """Milliseconds per image."""

    wall_ms: float
    cpu_ms: float


def picture(seed: int) -> Image.Image:
    """Return noise with the falling spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.full((SIZE[1], SIZE[0], 3), 128.0)
    for cells, amplitude in OCTAVES.items():
        coarse = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(smooth, dtype=float) - 128) * (amplitude / 100)
    pixels_HWC += rng.normal(0, GRAIN, (SIZE[1], SIZE[0], 1))
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def make_images(root: Path, count: int) -> None:
    """Write an ImageFolder of `count` JPEGs."""
    for number in range(count):
        path = root / "train" / f"n{number % CLASSES:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, quality=QUALITY)


def rival(root: Path, workers: int, *, steps: int) -> DataLoader:
    """Return torchvision's loader."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = ImageFolder(root / "train", transform)
    return DataLoader(
        images,
        batch_size=BATCH,
        sampler=RandomSampler(images, num_samples=steps * BATCH),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def our_transform(*, hflip: float) -> Transform:
    """Return our crop and flip."""
    return train_transform(
        img_size=(CROP, CROP),
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=hflip,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
    )


def ours(root: Path, workers: int, *, decoder: str, steps: int) -> Feed:
    """Return our loader for as many batches, on the CPU."""
    loader = train_loader(
        ImageReader(index_images(root, "train"), decoder=decoder),
        transform=our_transform(hflip=0.5),
        batch_size=BATCH,
        grad_accum_steps=1,
        start_step=0,
        num_steps=steps,
        rank=0,
        world=1,
        seed=0,
        num_workers=workers,
        pin_memory=False,
        is_reused=True,
    )
    return Feed(
        loader,
        split="train",
        device=torch.device("cpu"),
        normaliser=Normaliser(MEAN, STD),
        tolerance=Tolerance(None),
    )


def check(root: Path) -> dict[str, float]:
    """Compare both pipelines' pixels on the same crops; return the difference in levels.

    Raises:
        ValueError: They differ by more than their resizing does.
    """
    index = index_images(root, "train")
    theirs, transform = transforms.RandomResizedCrop(CROP), our_transform(hflip=0.0)
    reader = ImageReader(index, decoder=pick_decoder("auto")[0])
    differences = []
    for image, path in enumerate(index.paths[:32]):
        torch.manual_seed(image)
        wanted_HWC = np.asarray(theirs(Image.open(index.root / path).convert("RGB")), dtype=int)
        torch.manual_seed(image)
        found_CHW = transform(reader(image))
        differences.append(np.abs(found_CHW.permute(1, 2, 0).numpy() - wanted_HWC))
    levels = {
        "mean": float(np.mean(differences)),
        "max": float(max(item.max() for item in differences)),
    }
    if levels["max"] > 1:
        raise ValueError(f"the loaders' pixels differ by up to {levels['max']} levels")
    return levels


def cpu_s() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def workers_cpu_s(iterator: object) -> float:
    """Return the CPU time of a loader's living workers."""
    total = 0.0
    for worker in getattr(iterator, "_workers", ()):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / 100  # in ticks of 10 ms
    return total


def timed(loader: DataLoader | Feed) -> Timing:
    """Time one pass: all of it by the CPU's clock, its middle by the wall's."""
    inner = loader.loader if isinstance(loader, Feed) else loader
    used = cpu_s() + workers_cpu_s(inner._iterator)
    moments, count = [time.perf_counter()], 0
    for batch in loader:
        moments.append(time.perf_counter())
        count += len(batch[0])
    used = cpu_s() + workers_cpu_s(inner._iterator) - used
    edge = min(EDGE, len(moments) // 4)
    middle = moments[edge : len(moments) - edge]
    wall_s = (middle[-1] - middle[0]) / (len(middle) - 1) / BATCH
    return Timing(1000 * wall_s, 1000 * used / count)


def decode_all(files: list[bytes], decoder: str) -> Callable[[], Timing]:
    """Return a run that decodes every pixel of every file in this process."""

    def run() -> Timing:
        start, used = time.perf_counter(), time.process_time()
        for data in files:
            rgb(read_header(data, decoder=decoder))
        wall_s, used = time.perf_counter() - start, time.process_time() - used
        return Timing(1000 * wall_s / len(files), 1000 * used / len(files))

    return run


def decode_all_by_torchvision(files: list[bytes]) -> Callable[[], Timing]:
    """Return the same with torchvision's own decoder, for comparison."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

    def run() -> Timing:
        start, used = time.perf_counter(), time.process_time()
        for data in encoded:
            decode_jpeg(data, mode=ImageReadMode.RGB)
        wall_s, used = time.perf_counter() - start, time.process_time() - used
        return Timing(1000 * wall_s / len(files), 1000 * used / len(files))

    return run


def scaled_gain(decoder: str, *, repeats: int = 30) -> dict[str, object]:
    """Compare a crop of 900 x 700 of a larger image, decoded whole and at half its size."""
    sink = io.BytesIO()
    picture(0).resize(LARGE, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=QUALITY)
    box, size, mode = (20, 40, 700, 900), (CROP, CROP), InterpolationMode.BILINEAR
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * repeats):
        is_scaled = bool(number % 2)
        start = time.process_time()
        source = read_header(sink.getvalue(), decoder=decoder, is_scaled=is_scaled)
        resize(rgb_of_box(source, box, at_least=size), size, mode=mode)
        times[is_scaled].append(1000 * (time.process_time() - start))
    whole, scaled = (
        resize(
            rgb_of_box(
                read_header(sink.getvalue(), decoder=decoder, is_scaled=is_scaled),
                box,
                at_least=size,
            ),
            size,
            mode=mode,
        ).int()
        for is_scaled in (False, True)
    )
    return {
        "image": LARGE,
        "box": box,
        "whole_ms": round(statistics.median(times[False]), 3),
        "scaled_ms": round(statistics.median(times[True]), 3),
        "mean_levels_apart": round((whole - scaled).abs().double().mean().item(), 3),
        "max_levels_apart": int((whole - scaled).abs().max()),
    }


def build(root: Path, shards: Path, *, workers: int, steps: int) -> dict[str, Callable[[], Timing]]:
    """Return the timed run of each row."""
    best = pick_decoder("auto")[0]
    decoders = sorted({best, "pillow"})
    loaders: dict[str, DataLoader | Feed] = {"torchvision": rival(root, workers, steps=steps)}
    for decoder in decoders:
        loaders[f"moevit, {decoder}"] = ours(root, workers, decoder=decoder, steps=steps)
    loaders[f"moevit, {best}, tar"] = ours(shards, workers, decoder=best, steps=steps)
    runs: dict[str, Callable[[], Timing]] = {}
    for name, loader in loaders.items():
        runs[name] = partial(timed, loader)
    paths = sorted((root / "train").rglob("*.JPEG"))
    files = [path.read_bytes() for path in paths]
    for decoder in decoders:
        runs[f"decode only, {decoder}"] = decode_all(files, decoder)
    runs["decode only, torchvision"] = decode_all_by_torchvision(files)
    return runs


def measure(runs: dict[str, Callable[[], Timing]], *, rounds: int) -> dict[str, list[Timing]]:
    """Return the times of each run and round; one round warms up."""
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            timing = runs[name]()
            if number:
                found[name].append(timing)
    return found


def summarise(found: dict[str, list[Timing]], *, workers: int) -> list[common.Row]:
    """Return a row per loader: medians, and ratios within a round."""
    rows: list[common.Row] = []
    rival_ms = found["torchvision"]
    for name, pairs in found.items():
        wall_ms, cpu_ms = (statistics.median(values) for values in zip(*pairs, strict=True))
        row: common.Row = {
            "loader": name,
            "images_per_s": round(1000 / wall_ms),
            "cpu_ms": round(cpu_ms, 3),
        }
        if not name.startswith("decode"):
            decoder = name.split(", ")[1] if "," in name else "pillow"
            floor_ms = found[f"decode only, {decoder}"]
            row["over_torchvision"] = _ratio(rival_ms, pairs, 0)
            row["over_torchvision_cpu"] = _ratio(rival_ms, pairs, 1)
            row["of_floor"] = round(_ratio(floor_ms, pairs, 0) / workers, 3)
            row["of_floor_cpu"] = _ratio(floor_ms, pairs, 1)
        rows.append(row)
    return rows


def _ratio(theirs: list[Timing], ours: list[Timing], clock: int) -> float:
    pairs = zip(theirs, ours, strict=True)
    return round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, shards = Path(folder) / "images", Path(folder) / "shards"
        make_images(root, arguments.images)
        options = ["--root", str(root), "--out", str(shards), "--side", "0", "--splits", "train"]
        subprocess.run(
            [sys.executable, str(common.ROOT / "data" / "pack.py"), *options], check=True
        )
        levels = check(root)
        file_bytes = [path.stat().st_size for path in (root / "train").rglob("*.JPEG")]
        steps = arguments.images * arguments.epochs // BATCH
        runs = build(root, shards, workers=arguments.workers, steps=steps)
        found = measure(runs, rounds=arguments.rounds)
    rows = summarise(found, workers=arguments.workers)
    common.print_rows(rows)
    conditions = {
        "images": arguments.images,
        "epochs": arguments.epochs,
        "mean_bytes": round(statistics.mean(file_bytes)),
        "size": SIZE,
        "quality": QUALITY,
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "pixel_levels_apart": levels,
        "scaled_decode": scaled_gain(pick_decoder("auto")[0]),
        "decoders": {name: _version(name) for name in ("nvidia-nvimgcodec-cu13", "pillow")},
    }
    common.write("loader", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
