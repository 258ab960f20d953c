"""Turn indexed images into batches, in an order that one integer resumes.

    step -> positions -> (epoch, image, repeat) -> ImageReader -> transform -> Sample -> Batch

Order and augmentation are pure functions of (seed, epoch, image), not of RNG state, worker or rank.
Not here: transforms, collectives (rank and world arrive as values), mixup, the device.
"""

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from augment import Transform, drawing_from
from decoding import UnreadableError
from image_reader import ImageReader, describe
from seeds import stable_seed

NOT_COUNTED = -1  # label of an image that only fills up a validation batch
PREFETCHED = 2  # batches that a worker makes ahead
REPLACEMENTS = 8  # tried for an image that cannot be read
REPEATED_UNIT = 256  # an epoch of repeated augmentation is cut to a multiple of this many images


class BadImage(NamedTuple):
    """An image that cannot be used: its number in the index, and the line that says why."""

    image: int
    line: str


class Sample(NamedTuple):
    """An image at a position of the stream, and the bad ones that it was taken instead of."""

    image_CHW: Tensor
    label: int
    position: int
    bad: tuple[BadImage, ...] = ()


class Batch(NamedTuple):
    """One microbatch of one rank: images, int64 labels and int64 stream positions.

    Images are uint8 as decoded, or float32 and normalised. Those in `bad` were replaced.
    """

    image_BCHW: Tensor
    label_B: Tensor
    position_B: Tensor
    bad: tuple[BadImage, ...] = ()


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


class Place(NamedTuple):
    """Where a position of the stream is: the epoch, the place in its order, the repeat."""

    epoch: int
    place: int
    repeat: int


@dataclasses.dataclass(frozen=True)
class Order:
    """How positions of the endless stream follow the epochs' permutations of the images.

    With one repeat the stream is one permutation after the other. Repeated augmentation takes each
    image `repeats` times in a row, in an epoch of n // 256 * 256 positions for n images, less what
    does not fill an update: so many images as without it, a third of them different.

    DeiT deals that list out to its ranks in turn, so the repeats of an image are on different
    ranks, mixed with different partners. Here it is dealt out in turn to the microbatches of an
    update (`step_images` positions, `batch` a microbatch of one rank). That is the same where each
    rank has one microbatch, and depends on no number of ranks: an update always has the same
    images, and a microbatch too where a rank's batch stays as it is.

    Source: arXiv:1902.05509, section 3.2; DeiT (arXiv:2012.12877), section 6, and its RASampler.
    """

    num_images: int
    repeats: int = 1
    batch: int = 1
    step_images: int = 1

    @property
    def epoch_images(self) -> int:
        """Positions of an epoch."""
        if self.repeats == 1:
            return self.num_images
        return (
            self.num_images // REPEATED_UNIT * REPEATED_UNIT // self.step_images * self.step_images
        )

    def __post_init__(self) -> None:
        """Refuse repeats of fewer images than an update has."""
        if self.epoch_images == 0:
            raise ValueError(
                f"config dataset.train.repeats={self.repeats}: an update of {self.step_images} "
                f"images needs as many, in multiples of {REPEATED_UNIT}, and there are "
                f"{self.num_images} (1: no repeats)"
            )

    def place(self, position: int) -> Place:
        """Return where `position` is."""
        epoch, within = divmod(position, self.epoch_images)
        if self.repeats == 1:
            return Place(epoch, within, 0)
        step, slot = divmod(within, self.step_images)
        group, turn = divmod(slot, self.batch)
        dealt = step * self.step_images + turn * (self.step_images // self.batch) + group
        return Place(epoch, *divmod(dealt, self.repeats))


class TrainImages(Dataset):
    """The endless training stream: a position is an image of an epoch's order, augmented.

    An image that cannot be read is replaced by one that follows from its position alone, and
    reported; whether that is allowed is decided in feed.py.
    """

    def __init__(
        self, reader: ImageReader, *, transform: Transform, order: Order, seed: int
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.order = order
        self.seed = seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> Sample:
        """Decode and augment one image; the caller's RNG state is left as it was."""
        epoch, place, repeat = self.order.place(position)
        first = int(self._permutation(epoch)[place])
        repeats = (repeat,) if self.order.repeats > 1 else ()
        index, bad = self.reader.index, []
        for image in self._candidates(first, position):
            seed = stable_seed(self.seed, "augment", epoch, image, *repeats)
            try:
                with drawing_from(seed):
                    image_CHW = self.transform(self.reader(image))
            except UnreadableError as error:
                bad.append(BadImage(image, describe(index, image, str(error))))
            else:
                return Sample(image_CHW, index.labels[image], position, tuple(bad))
        raise ValueError(bad[0].line)

    def _candidates(self, first: int, position: int) -> Iterator[int]:
        yield first
        for attempt in range(REPLACEMENTS):
            seed = stable_seed(self.seed, "replace", position, attempt)
            yield seed % len(self.reader.index.paths)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            latest = list(self._permutations.items())[-1:]  # a batch may span two epochs
            count = len(self.reader.index.paths)
            order = epoch_permutation(count, seed=self.seed, epoch=epoch)
            self._permutations = dict([*latest, (epoch, order)])
        return self._permutations[epoch]


class ValImages(Dataset):
    """Every image once, in index order; positions past the end repeat image 0, NOT_COUNTED.

    An image that cannot be read is black, NOT_COUNTED and reported.
    """

    def __init__(self, reader: ImageReader, *, transform: Transform) -> None:
        self.reader = reader
        self.transform = transform

    def __getitem__(self, position: int) -> Sample:
        """Decode one image."""
        index = self.reader.index
        image = position if position < len(index.paths) else 0
        label = index.labels[image] if image == position else NOT_COUNTED
        try:
            return Sample(self.transform(self.reader(image)), label, position)
        except UnreadableError as error:
            bad = BadImage(image, describe(index, image, str(error)))
        return Sample(self.transform(Image.new("RGB", (1, 1))), NOT_COUNTED, position, (bad,))


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


class Collate:
    """Stacks samples into one Batch.

    In a worker images go right into memory that the main process sees. With `is_reused` that is one
    of a few buffers in turn, so a batch has to be copied before the next one is asked for: fresh
    memory costs as much as to resize the images.
    """

    def __init__(self, *, is_reused: bool) -> None:
        self.is_reused = is_reused
        self._buffers: list[Tensor] = []
        self._count = 0

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch."""
        images, labels, positions, bad = zip(*samples, strict=True)
        batch = torch.tensor(labels), torch.tensor(positions), tuple(chain.from_iterable(bad))
        if get_worker_info() is None:
            return Batch(torch.stack(images), *batch)
        size = len(images) * images[0].nbytes
        memory = self._buffer(size)[:size].view(images[0].dtype)
        image_BCHW = memory.view(len(images), *images[0].shape)
        return Batch(torch.stack(images, out=image_BCHW), *batch)

    def _buffer(self, size: int) -> Tensor:
        """Return a shared buffer of at least `size` bytes."""
        if not self.is_reused:
            return torch.empty(size, dtype=torch.uint8).share_memory_()
        # In use may be: one that the consumer copies, and those that the loader asked for ahead.
        self._count = (self._count + 1) % (PREFETCHED + 2)
        while len(self._buffers) <= self._count:
            self._buffers.append(torch.empty(size, dtype=torch.uint8).share_memory_())
        if len(self._buffers[self._count]) < size:
            self._buffers[self._count] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._buffers[self._count]


def _leave_process_group(_worker: int) -> None:
    # Launchers signal the whole group at preemption, and the main process has yet to save: a killed
    # worker would stop it. Ignoring SIGTERM instead hangs the exit, which terminates the workers.
    os.setpgrp()


def _loader(
    dataset: Dataset,
    sampler: Sampler[list[int]],
    *,
    num_workers: int,
    pin_memory: bool,
    timeout_s: float,
    is_reused: bool,
) -> DataLoader:
    # The platform's start method is fine. Fork is: workers use Pillow and torch's CPU ops on one
    # thread (DataLoader sees to that), never CUDA, a collective or a lock of the main process.
    # So is spawn: all that is handed over can be pickled.
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=Collate(is_reused=is_reused),
        prefetch_factor=PREFETCHED if num_workers else None,
        timeout=timeout_s if num_workers else 0,
        worker_init_fn=_leave_process_group,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each iterator draws from the model's RNG
    )


def train_loader(
    reader: ImageReader,
    *,
    transform: Transform,
    order: Order | None = None,
    batch_size: int,
    grad_accum_steps: int,
    start_step: int,
    num_steps: int,
    rank: int,
    world: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0.0,
    is_reused: bool = False,
) -> DataLoader:
    """Yield one Batch per microbatch of this rank for steps start_step..num_steps-1, in order.

    `order` is None for one permutation of the images after the other.
    """
    numbers = range(start_step * grad_accum_steps, num_steps * grad_accum_steps)
    sampler = MicrobatchSampler(numbers, rank=rank, world=world, batch=batch_size)
    order = order or Order(len(reader.index.paths))
    dataset = TrainImages(reader, transform=transform, order=order, seed=seed)
    return _loader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout_s=timeout_s,
        is_reused=is_reused,
    )


def val_loader(
    reader: ImageReader,
    *,
    transform: Transform,
    batch_size: int,
    rank: int,
    world: int,
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0.0,
    is_reused: bool = False,
) -> DataLoader:
    """Yield images rank::world; padding gives every rank as many batches of the same sizes."""
    per_rank = -(-len(reader.index.paths) // world)
    sampler = BatchSampler(range(rank, per_rank * world, world), batch_size, drop_last=False)
    dataset = ValImages(reader, transform=transform)
    return _loader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout_s=timeout_s,
        is_reused=is_reused,
    )
