"""Turn indexed images into batches, in an order that one integer resumes.

    step -> positions -> (epoch, image, repeat) -> ImageReader -> transform -> Sample -> Batch

Order and augmentation are pure functions of (seed, epoch, image), not of RNG state, worker or rank.
Not here: transforms, collectives (rank and world arrive as values), mixup, the device.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from images.augment import CropAndFlip, Transform, drawing_from
from images.batches import (
    NOT_COUNTED,
    PREFETCHED,
    BadImage,
    Batch,
    BatchMemory,
    Collate,
    Parcel,
    Sample,
)
from images.decoding import Encoded, UnreadableError
from images.image_order import MicrobatchSampler, Order, epoch_permutation
from images.image_reader import ImageReader, describe
from parallel.seeds import stable_seed

READ_AHEAD = 64  # images of a batch: while the code to read and draw is in the CPU's cache
REPLACEMENTS = 8  # tried for an image that cannot be read


class Images(Dataset[Sample]):
    """Samples by their positions, made when they are laid into a batch."""

    def __getitems__(self, positions: list[int]) -> tuple[int, Iterator[Sample]]:
        """Return how many are asked for, and what makes them."""
        return len(positions), self._samples(positions)

    def _samples(self, positions: list[int]) -> Iterator[Sample]:
        return map(self.__getitem__, positions)


class TrainImages(Images):
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
        index, bad = self.reader.index, []
        for image in self._candidates(position):
            try:
                image_CHW = self._begun(image, position)()
            except UnreadableError as error:
                bad.append(BadImage(image, describe(index, image, str(error))))
            else:
                return Sample(image_CHW, index.labels[image], position, tuple(bad))
        raise ValueError(bad[0].line)

    def _samples(self, positions: list[int]) -> Iterator[Sample]:
        for first in range(0, len(positions), READ_AHEAD):
            group = positions[first : first + READ_AHEAD]
            for finish in [self._ahead(position) for position in group]:
                yield finish()

    def _ahead(self, position: int) -> Callable[[], Sample]:
        image = next(self._candidates(position))
        try:
            finish = self._begun(image, position)
        except UnreadableError:
            return partial(self.__getitem__, position)
        return partial(self._finished, image, position, finish)

    def _finished(self, image: int, position: int, finish: Callable[[], Tensor]) -> Sample:
        try:
            return Sample(finish(), self.reader.index.labels[image], position)
        except UnreadableError:
            return self[position]  # names it and takes another

    def _begun(self, image: int, position: int) -> Callable[[], Tensor]:
        """Read an image and return what makes the rest of it."""
        place = self.order.place(position)
        repeats = (place.repeat,) if self.order.repeats > 1 else ()
        seed = stable_seed(self.seed, "augment", place.epoch, image, *repeats)
        source = self.reader(image)
        if isinstance(self.transform, CropAndFlip):
            return self.transform.drawn(source, seed=seed)
        return partial(self._transformed, source, seed)

    def _transformed(self, source: Encoded, seed: int) -> Tensor:
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


def _leave_process_group(_worker: int) -> None:
    # Launchers signal the whole group at preemption, and the main process has yet to save: a killed
    # worker would stop it. Ignoring SIGTERM instead hangs the exit, which terminates the workers.
    os.setpgrp()


def _loader(
    dataset: TrainImages | ValImages,
    sampler: Sampler[list[int]],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    timeout_s: float,
    is_reused: bool,
) -> DataLoader:
    # The platform's start method is fine. Fork is: workers use Pillow and torch's CPU ops on one
    # thread (DataLoader sees to that), never CUDA, a collective or a lock of the main process.
    # So is spawn: all that is handed over can be pickled.
    memory = None
    if is_reused:
        with drawing_from(0):
            image_CHW = dataset.transform(Image.new("RGB", (1, 1)))
        memory = BatchMemory(batch_size * image_CHW.nbytes, workers=num_workers)
    collate: Callable[..., Batch | Parcel] = Collate(memory)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
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
        batch_size=batch_size,
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
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout_s=timeout_s,
        is_reused=is_reused,
    )
