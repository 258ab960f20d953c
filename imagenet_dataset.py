"""Turn a folder of images into batches, in an order that one integer resumes.

    image_index.index_images -> ImageIndex
    step -> step_positions -> position -> (epoch, image) -> load_image -> transform -> Batch

Order and augmentation are pure functions of (seed, epoch, image), not of RNG state, worker or rank.
Not here: collectives (rank and world arrive as values), mixup, the device.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from image_index import ImageIndex
from seeds import stable_seed

Size = tuple[int, int]  # height, width
Rgb = tuple[float, float, float]
Transform = Callable[[Image.Image], Tensor]
Sample = tuple[Tensor, int, int]  # image_CHW, label, position

MAX_IMAGE_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb
NOT_COUNTED = -1  # label of an image that only fills up a validation batch
# What Pillow raises on damaged files; SyntaxError is its word for a broken PNG chunk.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


class Batch(NamedTuple):
    """One microbatch of one rank: float32 images, int64 labels and int64 stream positions."""

    image_BCHW: Tensor
    label_B: Tensor
    position_B: Tensor


def decode_rgb(path: Path) -> Image.Image:
    """Decode a JPEG or PNG of any mode to 8-bit RGB; alpha and EXIF rotation are ignored."""
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:  # known before a pixel is decoded
            raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_IMAGE_PIXELS}")
        if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, convert would clip
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def load_image(index: ImageIndex, image: int) -> Image.Image:
    """Decode image number `image`; a ValueError names it and says why it cannot be read."""
    path = index.root / index.paths[image]
    try:
        return decode_rgb(path)
    except (*DAMAGED, Image.DecompressionBombError) as err:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        where = f"dataset.{index.split}: image {image}, {path} ({size})"
        raise ValueError(f"{where}: cannot be read: {err}") from err


def train_transform(
    *,
    img_size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    color_jitter: float,
    interpolation: str,
    mean: Rgb,
    std: Rgb,
) -> Transform:
    """Crop at random to (height, width), flip, jitter and normalise; draws from torch's RNG."""
    mode = InterpolationMode(interpolation)
    steps: list[Callable] = [transforms.RandomResizedCrop(img_size, scale, ratio, mode)]
    if hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if color_jitter > 0:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    return transforms.Compose([*steps, _normaliser(mean, std)])


def val_transform(
    *, img_size: Size, crop_ratio: float, interpolation: str, mean: Rgb, std: Rgb
) -> Transform:
    """Resize to cover img_size / crop_ratio, cut (height, width) from the centre, normalise."""
    mode = InterpolationMode(interpolation)
    cover = (round(img_size[0] / crop_ratio), round(img_size[1] / crop_ratio))
    resize = partial(_resize_to_cover, size=cover, mode=mode)
    return transforms.Compose([resize, transforms.CenterCrop(img_size), _normaliser(mean, std)])


def _resize_to_cover(image: Image.Image, *, size: Size, mode: InterpolationMode) -> Image.Image:
    height = max(size[0], size[1] * image.height // image.width)
    width = max(size[1], size[0] * image.width // image.height)
    return functional.resize(image, [height, width], mode)  # the same size is returned untouched


def _normaliser(mean: Rgb, std: Rgb) -> Transform:
    # (x / 255 - mean) / std as one multiply and one add.
    mean_C11, std_C11 = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    gain_C11, offset_C11 = 1 / (255 * std_C11), -mean_C11 / std_C11
    return partial(_normalise, gain_C11=gain_C11.float(), offset_C11=offset_C11.float())


def _normalise(image: Image.Image, *, gain_C11: Tensor, offset_C11: Tensor) -> Tensor:
    image_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    image_CHW = image_CHW.to(torch.float32, memory_format=torch.contiguous_format)
    return image_CHW.mul_(gain_C11).add_(offset_C11)


def epoch_permutation(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """Order of the images in one epoch, as int64 image numbers."""
    generator = torch.Generator().manual_seed(stable_seed(seed, "order", epoch))
    return torch.randperm(num_images, generator=generator)


def step_positions(
    step: int, *, microbatch: int, rank: int, world: int, batch: int, accum: int
) -> range:
    """Stream positions of one microbatch of one rank; a step covers the same ones at any world."""
    first = ((step * accum + microbatch) * world + rank) * batch
    return range(first, first + batch)


class TrainImages(Dataset):
    """The endless training stream: position p is image permutation(p // n)[p % n], augmented."""

    def __init__(self, index: ImageIndex, *, transform: Transform, seed: int) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> Sample:
        """Decode and augment one image; the caller's RNG state is left as it was."""
        epoch, place = divmod(position, len(self.index.paths))
        image = int(self._permutation(epoch)[place])
        decoded = load_image(self.index, image)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it also reseeds CUDA, and with it the dropout of the model.
            torch.default_generator.manual_seed(stable_seed(self.seed, "augment", epoch, image))
            return self.transform(decoded), self.index.labels[image], position

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            latest = list(self._permutations.items())[-1:]  # a batch may span two epochs
            order = epoch_permutation(len(self.index.paths), seed=self.seed, epoch=epoch)
            self._permutations = dict([*latest, (epoch, order)])
        return self._permutations[epoch]


class ValImages(Dataset):
    """Every image once, in index order; positions past the end repeat image 0, NOT_COUNTED."""

    def __init__(self, index: ImageIndex, *, transform: Transform) -> None:
        self.index = index
        self.transform = transform

    def __getitem__(self, position: int) -> Sample:
        """Decode one image."""
        is_real = position < len(self.index.paths)
        image_CHW = self.transform(load_image(self.index, position if is_real else 0))
        return image_CHW, self.index.labels[position] if is_real else NOT_COUNTED, position


class MicrobatchSampler(Sampler[list[int]]):
    """Positions of one rank's microbatches, numbered through the whole run, made when asked for."""

    def __init__(self, numbers: range, *, rank: int, world: int, batch: int) -> None:
        self.numbers = numbers
        # Without accumulation a step is one microbatch, so a microbatch's number does for a step.
        self.positions_of = partial(
            step_positions, microbatch=0, rank=rank, world=world, batch=batch, accum=1
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.positions_of(number)) for number in self.numbers)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into one Batch."""
    images, labels, positions = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(positions))


def _leave_process_group(_worker: int) -> None:
    # Launchers signal the whole group at preemption, and the main process has yet to save: a killed
    # worker would stop it. Ignoring SIGTERM instead hangs the exit, which terminates the workers.
    os.setpgrp()


def _loader(
    dataset: Dataset, sampler: Sampler[list[int]], *, num_workers: int, pin_memory: bool
) -> DataLoader:
    # The platform's start method is fine. Fork is: workers use Pillow and torch's CPU ops on one
    # thread (DataLoader sees to that), never CUDA, a collective or a lock of the main process.
    # So is spawn: all that is handed over can be pickled.
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=_leave_process_group,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each iterator draws from the model's RNG
    )


def train_loader(
    index: ImageIndex,
    *,
    transform: Transform,
    batch_size: int,
    grad_accum_steps: int,
    start_step: int,
    num_steps: int,
    rank: int,
    world: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Yield one Batch per microbatch of this rank for steps start_step..num_steps-1, in order."""
    numbers = range(start_step * grad_accum_steps, num_steps * grad_accum_steps)
    sampler = MicrobatchSampler(numbers, rank=rank, world=world, batch=batch_size)
    dataset = TrainImages(index, transform=transform, seed=seed)
    return _loader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)


def val_loader(
    index: ImageIndex,
    *,
    transform: Transform,
    batch_size: int,
    rank: int,
    world: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Yield images rank::world; padding gives every rank as many batches of the same sizes."""
    per_rank = -(-len(index.paths) // world)
    sampler = BatchSampler(range(rank, per_rank * world, world), batch_size, drop_last=False)
    dataset = ValImages(index, transform=transform)
    return _loader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)
