"""What a loader's worker hands over: samples laid into one batch, in memory that is used again.

    Sample, Sample, ... -> Collate -> Parcel (in a worker) -> Batch (in the main process)

Not here: which images, how they are decoded and augmented, the device.
"""

from __future__ import annotations

import math
import uuid
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

NOT_COUNTED = -1  # label of an image that only fills up a validation batch


PREFETCHED = 2  # batches that a worker makes ahead


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

    Images are uint8 as decoded, or float32 and normalised, channels last in memory. Those in `bad`
    were replaced.
    """

    image_BCHW: Tensor
    label_B: Tensor
    position_B: Tensor
    bad: tuple[BadImage, ...] = ()


class Slot(NamedTuple):
    """Where the images of a batch lie in a BatchMemory."""

    memory: str
    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Parcel(NamedTuple):
    """A batch as a worker sends it, by value where it can: each tensor would take a handshake.

    What the main process gets is the Batch.
    """

    images: Slot | Tensor
    labels: list[int]
    positions: list[int]
    bad: tuple[BadImage, ...]

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple]:
        """Pickle as what makes the Batch."""
        return _unpacked, tuple(self)


def _unpacked(
    images: Slot | Tensor, labels: list[int], positions: list[int], bad: tuple[BadImage, ...]
) -> Batch:
    if isinstance(images, Slot):
        buffer = _memory[images.memory].buffers[images.number]
        images = _laid(buffer, images.shape, images.strides, images.dtype)
    return Batch(images, torch.tensor(labels), torch.tensor(positions), bad)


def _laid(
    buffer: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return buffer[:size].view(dtype).as_strided(shape, strides)


class BatchMemory:
    """Buffers of one batch each for every worker, made before there are workers to share them.

    A batch may be asked for again, be made and wait, or be in the hands of the consumer, who copies
    it before asking for the next: so many buffers each worker has.

    Raises:
        OSError: There is not enough shared memory.
    """

    EACH = PREFETCHED + 2

    def __init__(self, batch_bytes: int, *, workers: int) -> None:
        self.name = uuid.uuid4().hex
        take = torch.UntypedStorage._new_shared if workers else torch.UntypedStorage
        count = max(1, workers) * self.EACH
        try:
            storages = [take(batch_bytes) for _ in range(count)]
        except RuntimeError as error:
            raise OSError(
                f"config dataset.num_workers={workers}: {count * batch_bytes / 2**30:.2f} GiB of "
                f"batches do not fit into shared memory (docker run --shm-size): {error}"
            ) from error
        self.buffers = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages]
        _memory[self.name] = self


# By name, those that a loader of this process has.
_memory: weakref.WeakValueDictionary[str, BatchMemory] = weakref.WeakValueDictionary()


class Collate:
    """Makes samples one after the other and lays them into one batch, in their memory format.

    With `memory` they go into its buffers in turn, so a batch has to be copied before the next one
    is asked for: fresh memory costs as much as to resize the images.
    """

    def __init__(self, memory: BatchMemory | None) -> None:
        self.memory = memory
        self._count = 0

    def __call__(self, asked: tuple[int, Iterator[Sample]]) -> Batch | Parcel:
        """Return the batch, in a worker what becomes the batch on its way."""
        count, samples = asked
        first = next(samples)
        images, image_BCHW = self._images(count, first.image_CHW)
        labels, positions = [], []
        bad: list[BadImage] = []
        for image_CHW, sample in zip(image_BCHW, chain((first,), samples), strict=True):
            image_CHW.copy_(sample.image_CHW)  # while it is in the CPU's cache
            labels.append(sample.label)
            positions.append(sample.position)
            bad.extend(sample.bad)
        parcel = Parcel(images, labels, positions, tuple(bad))
        return parcel if get_worker_info() else _unpacked(*parcel)

    def _images(self, count: int, like_CHW: Tensor) -> tuple[Slot | Tensor, Tensor]:
        """Return where a batch goes, as the main process knows it and as a tensor."""
        shape = (count, *like_CHW.shape)
        strides = (like_CHW.numel(), *torch.empty_like(like_CHW).stride())
        worker, size = get_worker_info(), count * like_CHW.nbytes
        if self.memory and size <= len(self.memory.buffers[0]):
            self._count = (self._count + 1) % BatchMemory.EACH
            number = (worker.id if worker else 0) * BatchMemory.EACH + self._count
            slot = Slot(self.memory.name, number, shape, strides, like_CHW.dtype)
            return slot, _laid(self.memory.buffers[number], *slot[2:])
        fresh = torch.empty(size, dtype=torch.uint8)
        fresh = fresh.share_memory_() if worker else fresh
        image_BCHW = _laid(fresh, shape, strides, like_CHW.dtype)
        return image_BCHW, image_BCHW
