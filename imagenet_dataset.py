"""Turn indexed images into batches, in an order that one integer resumes.

    microbatch -> step_positions -> position -> Order.place -> (epoch, place, repeat)
    epoch_permutation(epoch)[place] -> image -> ImageReader -> transform -> Sample -> Batch

Order and augmentation are pure functions of (seed, epoch, image), not of RNG state, worker or rank.
Not here: transforms, collectives (rank and world arrive as values), mixup, the device.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from images.augment import CropAndFlip, Transform, drawing_from
from images.batches import NOT_COUNTED, PREFETCHED, BadImage, BatchMemory, Collate, Sample
from images.reading import Encoded, ImageReader, UnreadableError, describe
from parallel.seeds import stable_seed

READ_AHEAD = 64  # images read and drawn in a row, while that code is in the CPU's cache
REPLACEMENTS = 8  # images tried in place of one that cannot be read
REPEATED_UNIT = 256  # repeated augmentation cuts an epoch to a multiple of this many images


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
    """What a position of the stream stands for: an epoch, a place in its order, a repeat."""

    epoch: int
    place: int
    repeat: int


@dataclass(frozen=True)
class Order:
    """How positions of the endless stream follow the epochs' permutations of the images.

    With one repeat the stream is one permutation after the other. Repeated augmentation takes each
    image `repeats` times in a row, in an epoch of n // 256 * 256 positions for n images, less what
    does not fill an update. With three repeats an epoch is thus about as long as without, and shows
    a third of the images.

    DeiT deals that list out to its ranks in turn, so the repeats of an image are on different
    ranks, mixed with different partners. Here it is dealt out in turn to the microbatches of an
    update (`step_images` positions, `batch` in a microbatch of one rank). With one microbatch per
    rank that is the same. It does not depend on the number of ranks: an update always has the same
    images, and so does a microbatch as long as a rank's batch size does not change.

    Source: arXiv:1902.05509, section 3.2; DeiT (arXiv:2012.12877), section 6, and its RASampler.
    """

    num_images: int
    repeats: int = 1
    batch: int = 1
    step_images: int = 1

    def __post_init__(self) -> None:
        """Refuse repeats of fewer images than an update has."""
        if self.epoch_images == 0:
            raise ValueError(
                f"config dataset.train.repeats={self.repeats}: an update of {self.step_images} "
                f"images needs as many, in multiples of {REPEATED_UNIT}, and there are "
                f"{self.num_images} (1: no repeats)"
            )

    @property
    def epoch_images(self) -> int:
        """Positions of an epoch."""
        if self.repeats == 1:
            return self.num_images
        whole_units = self.num_images // REPEATED_UNIT * REPEATED_UNIT
        return whole_units // self.step_images * self.step_images

    def place(self, position: int) -> Place:
        """Return what `position` stands for."""
        epoch, within = divmod(position, self.epoch_images)
        if self.repeats == 1:
            return Place(epoch, within, 0)
        step, slot = divmod(within, self.step_images)
        group, turn = divmod(slot, self.batch)
        dealt = step * self.step_images + turn * (self.step_images // self.batch) + group
        return Place(epoch, *divmod(dealt, self.repeats))


class MicrobatchSampler(Sampler[list[int]]):
    """Positions of one rank's microbatches, numbered through the whole run, made on demand."""

    def __init__(self, numbers: range, *, rank: int, world: int, batch: int) -> None:
        self.numbers = numbers
        # Numbered through, microbatches are steps without accumulation.
        self.positions_of = partial(
            step_positions, microbatch=0, rank=rank, world=world, batch=batch, accum=1
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.positions_of(number)) for number in self.numbers)


class Images(Dataset[Sample]):
    """Samples by their positions; Collate makes them one by one, as it copies them into a batch."""

    def __getitems__(self, positions: list[int]) -> tuple[int, Iterator[Sample]]:
        """Return how many samples are requested, and what makes them."""
        return len(positions), self._samples(positions)

    def _samples(self, positions: list[int]) -> Iterator[Sample]:
        return map(self.__getitem__, positions)


class TrainImages(Images):
    """The endless training stream: a position is an image of an epoch's order, augmented.

    An image that cannot be read is replaced by one that depends on its position alone, and is
    reported; feed.py decides whether that is allowed.
    """

    def __init__(
        self, reader: ImageReader, *, transform: Transform, order: Order | None = None, seed: int
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.order = order or Order(len(reader.index.paths))
        self.seed = seed
        self._permutations: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> Sample:
        """Decode and augment one image; the caller's RNG state does not change."""
        index, bad = self.reader.index, []
        for image in self._candidates(position):
            try:
                image_CHW = self._draw(image, position)()
            except UnreadableError as error:
                bad.append(BadImage(image, describe(index, image, str(error))))
            else:
                return Sample(image_CHW, index.labels[image], position, tuple(bad))
        raise ValueError(bad[0].line)

    def _samples(self, positions: list[int]) -> Iterator[Sample]:
        # Files are read and crops drawn for a group of images before the first of them is decoded,
        # because pixels evict everything else from the CPU's cache.
        for first in range(0, len(positions), READ_AHEAD):
            group = positions[first : first + READ_AHEAD]
            for finish in [self._read_ahead(position) for position in group]:
                yield finish()

    def _read_ahead(self, position: int) -> Callable[[], Sample]:
        image = next(self._candidates(position))
        try:
            decode = self._draw(image, position)
        except UnreadableError:
            return partial(self.__getitem__, position)  # reads it again, to report and replace it
        return partial(self._finish, image, position, decode)

    def _finish(self, image: int, position: int, decode: Callable[[], Tensor]) -> Sample:
        try:
            return Sample(decode(), self.reader.index.labels[image], position)
        except UnreadableError:
            return self[position]

    def _draw(self, image: int, position: int) -> Callable[[], Tensor]:
        """Read an image's file; calling what is returned decodes and augments it."""
        place = self.order.place(position)
        repeats = (place.repeat,) if self.order.repeats > 1 else ()
        seed = stable_seed(self.seed, "augment", place.epoch, image, *repeats)
        source = self.reader(image)
        if isinstance(self.transform, CropAndFlip):
            return self.transform.draw_from(seed, source)
        return partial(self._transform, source, seed)

    def _transform(self, source: Encoded, seed: int) -> Tensor:
        with drawing_from(seed):
            return self.transform(source)

    def _candidates(self, position: int) -> Iterator[int]:
        epoch, place, _ = self.order.place(position)
        yield int(self._permutation(epoch)[place])
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


class ValImages(Images):
    """Every image once, in index order; positions past the end repeat image 0, NOT_COUNTED.

    An image that cannot be read becomes black, NOT_COUNTED, and is reported.
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


@dataclass(frozen=True)
class LoaderOptions:
    """Which rank's share of the images a loader makes, and how.

    `timeout_s` is how long to wait for a worker, 0 for ever. With `reuses_memory` the consumer must
    copy a batch before it asks for the next one.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    timeout_s: float = 0.0
    reuses_memory: bool = False


def train_loader(
    dataset: TrainImages, steps: range, *, grad_accum_steps: int = 1, options: LoaderOptions
) -> DataLoader:
    """Yield one Batch per microbatch of this rank, for each of the consecutive `steps` in order."""
    numbers = range(steps.start * grad_accum_steps, steps.stop * grad_accum_steps)
    rank, world, batch = options.rank, options.world, options.batch_size
    sampler = MicrobatchSampler(numbers, rank=rank, world=world, batch=batch)
    return _loader(dataset, sampler, options)


def val_loader(dataset: ValImages, *, options: LoaderOptions) -> DataLoader:
    """Yield images rank::world; padding gives every rank as many batches of the same sizes."""
    per_rank = -(-len(dataset.reader.index.paths) // options.world)
    positions = range(options.rank, per_rank * options.world, options.world)
    sampler = BatchSampler(positions, options.batch_size, drop_last=False)
    return _loader(dataset, sampler, options)


def _loader(
    dataset: TrainImages | ValImages, sampler: Sampler[list[int]], options: LoaderOptions
) -> DataLoader:
    # Any start method will do. Fork is safe because workers only use Pillow and torch's CPU ops on
    # one thread (DataLoader sees to that), never CUDA, a collective or a lock of the main process.
    # Spawn works because everything handed over can be pickled.
    num_workers, memory = options.num_workers, None
    if options.reuses_memory:
        with drawing_from(0):  # an image shows how large they all are
            image_CHW = dataset.transform(Image.new("RGB", (1, 1)))
        memory = BatchMemory(options.batch_size * image_CHW.nbytes, workers=num_workers)
    collate: Callable[..., object] = Collate(memory)  # DataLoader's types expect a list of samples
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=options.pin_memory,
        collate_fn=collate,
        prefetch_factor=PREFETCHED if num_workers else None,
        timeout=options.timeout_s if num_workers else 0,
        worker_init_fn=_leave_process_group,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each iterator draws from the model's RNG
    )


def _leave_process_group(_worker: int) -> None:
    # Launchers signal the whole group at preemption, when the main process has yet to save and a
    # killed worker would stop it. Ignoring SIGTERM instead would hang the exit, which ends workers.
    os.setpgrp()
