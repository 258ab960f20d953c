"""Train the same network on the bundled images with our loop and with a plain timm loop.

    python -m benchmarks.fidelity [name=value ...] [--loops ours timm] [--seeds 0 1 2 3 4]

Loops, each once per seed, and after the last update top-1 on all validation images:
  ours  `python train.py` as a user types it: one rank, 64 images per update, which are those of two
        ranks with the config's 32
  timm  what a timm user would write: timm's VisionTransformer with its own initial values and its
        parameter groups, torchvision's ImageFolder and transforms, torch's DataLoader, AdamW,
        clip_grad_norm_ and timm's CosineLRScheduler

The plain loop reads its numbers from the composed options, so that the two cannot drift, and uses
nothing else of this repository; an option that it does not know is an error. What differs is chance
(initial values, order and augmentation are drawn by other rules) and the end of an epoch: ours is
one stream of images, DataLoader drops the 16 images that do not fill an update.

A finished run is written at once and not repeated, so this can be stopped and continued, and two
processes can share out the runs. Ours is to be no worse than timm's mean less one standard error of
the difference of the two means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import inspect
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode

from benchmarks import common
from options import compose
from options.command_line import Parser
from options.schema import Config, walk
from parallel.terminal import show_result

LOOPS = ("ours", "timm")
# One rank has the images of an update that the config gives to two.
OVERRIDES = ["dataset.train.batch_size=64", "training.tensorboard=false", "device=cpu"]
# What the plain loop reads, besides timm's arguments of the network.
KNOWN = {
    *(f"dataset.{name}" for name in ("num_workers", "interpolation", "mean", "std")),
    *(f"dataset.train.{name}" for name in ("root", "batch_size", "crop_scale", "crop_ratio")),
    *("dataset.train.hflip", "dataset.val.batch_size", "dataset.val.crop_ratio"),
    *(f"optimizer.{name}" for name in ("lr", "min_lr", "warmup_steps", "weight_decay")),
    *(f"optimizer.{name}" for name in ("betas", "eps", "clip_norm")),
    *(f"training.{name}" for name in ("steps", "label_smoothing", "seed")),
}
# What does not change the weights that a run ends with.
WITHOUT_EFFECT = {
    *("training.val_interval", "training.log_interval", "training.tensorboard"),
    *("training.checkpoint.path", "device", "fsdp.zero_dp_strategy"),
}


def network_options(config: Config) -> dict[str, object]:
    """Return the keyword arguments of timm's VisionTransformer."""
    accepted = inspect.signature(VisionTransformer).parameters
    options = dataclasses.asdict(config.model.vit)
    return {name: value for name, value in options.items() if name in accepted}


def check(config: Config) -> None:
    """Refuse options that only one of the loops would follow.

    Raises:
        ValueError: One that the plain loop does not read is not at its default.
    """
    read = {*KNOWN, *WITHOUT_EFFECT, *(f"model.vit.{name}" for name in network_options(config))}
    defaults = {name: value for name, _, value in walk(Config())}
    for name, _, value in walk(config):
        if name not in read and value != defaults[name]:
            raise ValueError(
                f"config {name}={value}: the plain timm loop has no such option, so it must be "
                f"{defaults[name]}"
            )


class AnnotatedImages(Dataset):
    """The validation images of the Tiny-ImageNet layout, whose classes are in a text file."""

    def __init__(
        self, folder: Path, *, label_of: Mapping[str, int], transform: transforms.Compose
    ) -> None:
        lines = (folder / "val_annotations.txt").read_text().splitlines()
        names = [line.split("\t")[:2] for line in lines]
        self.samples = [(folder / "images" / file, label_of[wnid]) for file, wnid in names]
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """Return image_CHW and its label."""
        path, label = self.samples[number]
        return self.transform(default_loader(str(path))), label


def plain_loaders(config: Config, root: Path) -> tuple[DataLoader, DataLoader]:
    """Return torch's loaders of the training and the validation images."""
    data, train, val = config.dataset, config.dataset.train, config.dataset.val
    size, mode = config.model.vit.img_size, InterpolationMode(data.interpolation)
    last = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    crop = transforms.RandomResizedCrop(size, train.crop_scale, train.crop_ratio, mode)
    flip = transforms.RandomHorizontalFlip(train.hflip)
    resize = transforms.Resize(round(size / val.crop_ratio), mode)
    train_images = ImageFolder(str(root / "train"), transforms.Compose([crop, flip, *last]))
    val_images = AnnotatedImages(
        root / "val",
        label_of=train_images.class_to_idx,
        transform=transforms.Compose([resize, transforms.CenterCrop(size), *last]),
    )
    train_loader = DataLoader(
        train_images,
        train.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
    )
    return train_loader, DataLoader(val_images, val.batch_size, num_workers=data.num_workers)


def plain_optimizer(config: Config, model: VisionTransformer) -> torch.optim.Optimizer:
    """Return AdamW with no decay of norms, biases and what timm's network names."""
    o = config.optimizer
    groups = param_groups_weight_decay(
        model, o.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps)


class Schedule:
    """The learning rate by timm: linear warm-up, then a cosine to the end of the run."""

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer) -> None:
        o = config.optimizer
        self.warmup_steps = o.warmup_steps
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=config.training.steps - o.warmup_steps,
            lr_min=o.min_lr,
            warmup_t=o.warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, step: int) -> None:
        """Set the learning rate of update `step`, from 0."""
        # timm's warm-up spends an update on a learning rate of 0; the recipe begins one further.
        self.scheduler.step_update(step + (step < self.warmup_steps))


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after the other."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


@torch.no_grad()
def top1_percent(model: nn.Module, loader: DataLoader) -> float:
    """Return how many of the images get their own class."""
    model.eval()
    right = [model(image_BCHW).argmax(dim=1) == label_B for image_BCHW, label_B in loader]
    return 100 * torch.cat(right).double().mean().item()


def train_timm(config: Config, folder: Path) -> float:
    """Train the plain loop on the bundled images, unpacked into `folder`; return its top-1."""
    t = config.training
    root = Path(config.dataset.train.root)
    shutil.unpack_archive(common.ROOT / f"{root}.tar.gz", folder, filter="data")
    torch.manual_seed(t.seed)
    model = VisionTransformer(**network_options(config))
    train_loader, val_loader = plain_loaders(config, folder / root.name)
    optimizer = plain_optimizer(config, model)
    schedule = Schedule(config, optimizer)
    loss_of = nn.CrossEntropyLoss(label_smoothing=t.label_smoothing)
    model.train()
    for step, (image_BCHW, label_B) in enumerate(itertools.islice(endless(train_loader), t.steps)):
        schedule.set(step)
        optimizer.zero_grad()
        loss_of(model(image_BCHW), label_B).backward()
        if config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
    return top1_percent(model, val_loader)


def train_ours(config_name: str, overrides: list[str], folder: Path) -> float:
    """Train with train.py's command line into `folder`; return the top-1 that it logs last."""
    command = [sys.executable, "train.py", "--config-name", config_name, *overrides]
    path = folder / "run"
    subprocess.run(
        [*command, f"training.checkpoint.path={path}"],
        cwd=common.ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [line["top1"] for line in lines if "top1" in line][-1]


def run(loop: str, seed: int, *, config_name: str, overrides: list[str]) -> common.Row:
    """Train one loop with one seed and return its row."""
    options = [*OVERRIDES, *overrides, f"training.seed={seed}"]
    config = compose.compose(config_name, options)
    check(config)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
        if loop == "ours":
            top1 = train_ours(config_name, options, Path(folder))
        else:
            top1 = train_timm(config, Path(folder))
    minutes = (time.perf_counter() - started) / 60
    return {"loop": loop, "seed": seed, "top1": round(top1, 2), "minutes": round(minutes, 1)}


def summarise(rows: list[common.Row]) -> dict[str, dict[str, float]]:
    """Return mean and standard error of each loop's top-1, and of ours less timm's."""
    values = {loop: [float(row["top1"]) for row in rows if row["loop"] == loop] for loop in LOOPS}
    if min(map(len, values.values())) < 2:
        return {}
    summary = {
        loop: {
            "mean": statistics.mean(tops),
            "standard_error": statistics.stdev(tops) / math.sqrt(len(tops)),
        }
        for loop, tops in values.items()
    }
    ours, timm = summary["ours"], summary["timm"]
    summary["difference"] = {
        "mean": ours["mean"] - timm["mean"],
        "standard_error": math.hypot(ours["standard_error"], timm["standard_error"]),
    }
    return {
        name: {key: round(value, 3) for key, value in figures.items()}
        for name, figures in summary.items()
    }


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Let one process at a time read and write `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_rows(out: Path, conditions: Mapping[str, object]) -> list[common.Row]:
    """Return the rows that were written before, none if there is no such file.

    Raises:
        ValueError: They were measured under other conditions.
    """
    if not out.exists():
        return []
    result = json.loads(out.read_text())
    for name, value in conditions.items():
        if result[name] != value:
            raise ValueError(
                f"{out}: has {name}={result[name]}, this is {value}; give another --out"
            )
    rows: list[common.Row] = result["rows"]
    return rows


def add_row(out: Path, row: common.Row, *, conditions: Mapping[str, object]) -> None:
    """Put `row` into the file beside those of other processes, with the figures of all."""
    with locked(out):
        rows = [*read_rows(out, conditions), row]
        rows.sort(key=lambda row: (LOOPS.index(str(row["loop"])), row["seed"]))
        with_summary = {**conditions, "summary": summarise(rows)}
        common.write("fidelity", out=out, conditions=with_summary, rows=rows)


def main() -> None:
    """Run what is not in the file yet, print a table and the comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="vit_tiny_patch8_64")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-fidelity.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    out = arguments.out or common.ROOT / "benchmarks" / "results" / f"{date}-cpu-fidelity.json"
    names = {"config_name": arguments.config_name, "overrides": arguments.overrides}
    conditions = {"config": arguments.config_name, "overrides": [*OVERRIDES, *arguments.overrides]}
    for seed, loop in itertools.product(arguments.seeds, arguments.loops):
        done = {(row["loop"], row["seed"]) for row in read_rows(out, conditions)}
        if (loop, seed) not in done:
            add_row(out, run(loop, seed, **names), conditions=conditions)
    rows = read_rows(out, conditions)
    common.print_rows(rows)
    for name, figures in summarise(rows).items():
        show_result(f"{name}: {figures['mean']} +- {figures['standard_error']}")


if __name__ == "__main__":
    main()
