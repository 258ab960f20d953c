"""Time our training loader against torchvision's ImageFolder + DataLoader on the same JPEGs.

    python -m benchmarks.loader [--images 640] [--epochs 8] [--rounds 5] [--workers 2] [--limit-s S]

Both crop at random to 224 x 224 (bilinear), flip and normalise, in batches of 64 float32 images, by
as many worker processes; rounds alternate forwards and backwards. A pass takes each image --epochs
times; by the wall clock only its middle counts, from the 8th batch to the 8th from the end, where
no worker waits for another, as in a long epoch. Before anything is timed, both are shown the same
crop of every file and must agree within the difference of their resizing. Where --limit-s is too
short for all that, there are fewer images, shorter passes and fewer rounds, as `conditions` say.
Rows:
  torchvision            ImageFolder + DataLoader as its tutorials have it, Pillow
  torchvision, tensors   the same with torchvision's decode_image and transforms.v2
  moevit, <decoder>      Feed over train_loader; "tar": the same images in shards
  decode only, <decoder> all pixels of each file, one process: the floor times the number of cores;
                         simplejpeg and PyTurboJPEG where they are installed; "all cores": as many
                         processes at once, what is left of that floor on this machine

`images_per_s` is by the wall clock, `cpu_ms` the time of all processes per image, which other work
on the machine disturbs less; `of_floor` is the decoder's own cpu_ms / cpu_ms, and by the wall clock
images_per_s / (cores x decode-only images_per_s).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks import common
from benchmarks.clock import end_of, rounds
from benchmarks.decoders import Timing, decode_runs, scaled_gain
from benchmarks.jpegs import QUALITY, SIZE, make_images
from imagenet_dataset import LoaderOptions, TrainImages, train_loader
from images.augment import Normaliser, Transform, train_transform
from images.cache import index_images
from images.feed import Feed, Tolerance
from images.reading import ImageReader, pick_decoder
from options.command_line import Parser
from parallel.terminal import show_result

BATCH, CROP = 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKED = 32  # files whose pixels are compared
# What an image costs in a round of all rows, for each epoch and apart from these, in times that
# torchvision's loader takes it alone; measured with two busy cores.
OF_LOADERS, OF_DECODERS = 4, 14
FEWEST_IMAGES = 2 * BATCH  # below, epochs are fewer instead
EDGE = 8  # batches at both ends of a pass that are not timed
PACKAGES = ("nvidia-nvimgcodec-cu13", "pillow", "torchvision", "simplejpeg", "PyTurboJPEG")
DECODERS = {"torchvision": "pillow", "torchvision, tensors": "torchvision"}  # of the rivals


def of_pillow() -> Callable:
    """Return torchvision's transform as its tutorials have it."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def of_tensors() -> Callable:
    """Return torchvision's fastest: of uint8 tensors, which become float at the end."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(CROP, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def read_tensor(path: str) -> torch.Tensor:
    """Read an image as torchvision does without Pillow."""
    return decode_image(path, mode=ImageReadMode.RGB)


def rival(images: ImageFolder, workers: int, *, steps: int) -> DataLoader:
    """Return torchvision's loader."""
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


def ours(
    root: Path, workers: int, *, decoder: str, steps: int, transform: Transform | None = None
) -> Feed:
    """Return our loader for as many batches, on the CPU."""
    images = TrainImages(
        ImageReader(index_images(root, "train"), decoder=decoder),
        transform=transform or our_transform(hflip=0.5),
        seed=0,
    )
    options = LoaderOptions(batch_size=BATCH, num_workers=workers, reuses_memory=True)
    loader = train_loader(images, range(steps), options=options)
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
    for image, path in enumerate(index.paths[:CHECKED]):
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


def timed(loader: DataLoader | Feed, finish: Callable | None = None) -> Timing:
    """Time one pass: all of it by the CPU's clock, its middle by the wall's.

    `finish` is what is left to do to a batch.
    """
    inner = loader.loader if isinstance(loader, Feed) else loader
    used = cpu_s() + workers_cpu_s(inner._iterator)
    moments, count = [time.perf_counter()], 0
    for batch in loader:
        if finish is not None:
            finish(batch)
        moments.append(time.perf_counter())
        count += len(batch[0])
    used = cpu_s() + workers_cpu_s(inner._iterator) - used
    edge = min(EDGE, len(moments) // 4)
    middle = moments[edge : len(moments) - edge]
    wall_s = (middle[-1] - middle[0]) / (len(middle) - 1) / BATCH
    return Timing(1000 * wall_s, 1000 * used / count)


def build(
    root: Path, shards: Path, *, workers: int, cores: int, steps: int
) -> dict[str, Callable[[], Timing]]:
    """Return the timed run of each row."""
    best = pick_decoder("auto")[0]
    decoders = sorted({best, "pillow"})
    folder = ImageFolder(root / "train", of_pillow())
    tensors = ImageFolder(root / "train", of_tensors(), loader=read_tensor)
    loaders: dict[str, DataLoader | Feed] = {
        "torchvision": rival(folder, workers, steps=steps),
        "torchvision, tensors": rival(tensors, workers, steps=steps),
    }
    for decoder in decoders:
        loaders[f"moevit, {decoder}"] = ours(root, workers, decoder=decoder, steps=steps)
    loaders[f"moevit, {best}, tar"] = ours(shards, workers, decoder=best, steps=steps)
    runs: dict[str, Callable[[], Timing]] = {}
    for name, loader in loaders.items():
        runs[name] = partial(timed, loader)
    paths = sorted((root / "train").rglob("*.JPEG"))
    runs |= decode_runs([path.read_bytes() for path in paths], decoders, cores=cores)
    # What is compared follows one another: a shared machine's speed changes within seconds.
    first = ["torchvision, tensors", "torchvision", f"moevit, {best}", f"decode only, {best}"]
    first += [f"decode only, {best}, all cores", f"moevit, {best}, tar"]
    first += ["moevit, pillow", "decode only, pillow"]
    return {name: runs[name] for name in dict.fromkeys([*first, *runs])}


def cost_s(root: Path) -> float:
    """Return the seconds of one image in torchvision's loader, alone."""
    transform, paths = of_pillow(), sorted((root / "train").rglob("*.JPEG"))[:CHECKED]
    started = time.perf_counter()
    for path in paths:
        transform(Image.open(path).convert("RGB"))
    return (time.perf_counter() - started) / len(paths)


def measure(
    runs: dict[str, Callable[[], Timing]], planned: Iterable[bool]
) -> Iterator[dict[str, list[Timing]]]:
    """Yield after each round the times of each run in the rounds so far.

    `planned` says of each round whether it is measured, or warms up.
    """
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for number, is_measured in enumerate(planned):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            timing = runs[name]()
            if is_measured:
                found[name].append(timing)
        if is_measured:
            yield found


def fitting(
    images: int, epochs: int, *, make_s: float, image_s: float, limit_s: float
) -> tuple[int, int]:
    """Return how many images and epochs a pass can have, so that two rounds end in time.

    Fewer images first, which leaves the passes long. `make_s` and `image_s` are the seconds to make
    an image, and that it costs torchvision's loader alone.
    """
    for fewer in range(epochs, 0, -1) if limit_s < math.inf else ():
        a_round_s = image_s * (OF_LOADERS * fewer + OF_DECODERS)
        found = int(limit_s / (make_s + 2 * a_round_s))
        if found >= FEWEST_IMAGES or fewer == 1:
            return min(images, max(found, BATCH)), fewer
    return images, epochs


def summarise(found: dict[str, list[Timing]], *, cores: int) -> list[common.Row]:
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
        is_decoder = name.startswith("decode")
        if not is_decoder:
            row["over_torchvision"] = ratio(rival_ms, pairs, 0)
            row["over_torchvision_cpu"] = ratio(rival_ms, pairs, 1)
        if not is_decoder or name.endswith("all cores"):
            floor_ms = found[f"decode only, {DECODERS.get(name) or name.split(', ')[1]}"]
            row["of_floor"] = round(ratio(floor_ms, pairs, 0) / cores, 3)
            row["of_floor_cpu"] = ratio(floor_ms, pairs, 1)
        rows.append(row)
    return rows


def ratio(theirs: list[Timing], ours: list[Timing], clock: int) -> float:
    """Return the median over rounds of theirs / ours, by a clock: 0 the wall's, 1 the CPU's."""
    pairs = zip(theirs, ours, strict=True)
    return round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def parse(
    argv: list[str] | None, name: str, about: str | None, *, images: int, epochs: int, rounds: int
) -> argparse.Namespace:
    """Return the arguments of a benchmark of loaders, with its own defaults."""
    parser = Parser(description=about)
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="measure less after this")
    parser.add_argument("--out", type=Path, help=f"default: results/<date>-cpu-{name}.json")
    arguments = parser.parse_args(argv)
    if arguments.images * arguments.epochs < BATCH:
        parser.error(f"--images x --epochs must be at least a batch, {BATCH}")
    return arguments


def left_out(arguments: argparse.Namespace, **done: int) -> list[str]:
    """Say of how many images, epochs or rounds there was no time for all."""
    asked = {name: getattr(arguments, name) for name in done}
    return [
        f"{asked[name] - n} of {asked[name]} {name}" for name, n in done.items() if n < asked[name]
    ]


def conditions_of(
    arguments: argparse.Namespace, root: Path, *, epochs: int, cores: int
) -> dict[str, object]:
    """Return what is needed to repeat a run, but for its rounds; compares the pixels first."""
    levels = check(root)
    file_bytes = [path.stat().st_size for path in (root / "train").rglob("*.JPEG")]
    return {
        "images": len(file_bytes),
        "epochs": epochs,
        "mean_bytes": round(statistics.mean(file_bytes)),
        "size": SIZE,
        "quality": QUALITY,
        "workers": arguments.workers,
        "cores": cores,
        "pixel_levels_apart": levels,
        "scaled_decode": scaled_gain(pick_decoder("auto")[0]),
        "decoders": {name: _version(name) for name in PACKAGES},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, write after each round what is needed to repeat it, and print a table."""
    arguments = parse(argv, "loader", __doc__, images=640, epochs=8, rounds=5)
    torch.set_num_threads(1)
    started, end_s = time.monotonic(), end_of(arguments.limit_s)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root, shards = Path(folder) / "images", Path(folder) / "shards"
        first = min(BATCH, arguments.images)
        make_images(root, first)
        make_s = (time.monotonic() - started) / first
        image_s = cost_s(root)
        left_s = end_s - time.monotonic()
        images, epochs = fitting(
            arguments.images, arguments.epochs, make_s=make_s, image_s=image_s, limit_s=left_s
        )
        make_images(root, images, first=first)
        options = ["--root", str(root), "--out", str(shards), "--side", "0", "--splits", "train"]
        subprocess.run(
            [sys.executable, str(common.ROOT / "data" / "pack.py"), *options], check=True
        )
        steps = images * epochs // BATCH
        conditions = conditions_of(arguments, root, epochs=epochs, cores=cores)
        runs = build(root, shards, workers=arguments.workers, cores=cores, steps=steps)
        for found in measure(runs, rounds(arguments.rounds, warm_up=1, end_s=end_s)):
            rows, done = summarise(found, cores=cores), len(found["torchvision"])
            cut = left_out(arguments, images=images, epochs=epochs, rounds=done)
            measured = {"rounds": done, "cut": cut}
            common.write("loader", out=arguments.out, conditions=conditions | measured, rows=rows)
    common.print_rows(rows)
    if cut:
        show_result(f"no time for: {', '.join(cut)}")


if __name__ == "__main__":
    main()
