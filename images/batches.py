"""What a loader's worker hands over: samples copied into one batch, in memory that is reused.

    Sample, Sample, ... -> Collate -> PackedBatch (in a worker) -> Batch (in the main process)

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
    """An unusable image: its number in the index, and the line that says why."""

    image: int
    line: str


class Sample(NamedTuple):
    """An image at a position of the stream, and the bad ones that it replaces."""

    image_CHW: Tensor
    label: int
    position: int
    bad: tuple[BadImage, ...] = ()


class Batch(NamedTuple):
    """One microbatch of one rank: images, int64 labels and int64 stream positions.

    Images are uint8 as decoded, or float32 and normalised, channels last in memory. `bad` are those
    that were replaced.
    """

    image_BCHW: Tensor
    label_B: Tensor
    position_B: Tensor
    bad: tuple[BadImage, ...] = ()


class Slot(NamedTuple):
    """Where a batch's images lie in a BatchMemory."""

    memory: str
    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class PackedBatch(NamedTuple):
    """A batch as a worker sends it; unpickling it makes the Batch.

    Labels and positions go by value and images as a Slot where possible, because every tensor sent
    between processes costs a handshake over a socket.
    """

    images: Slot | Tensor
    labels: list[int]
    positions: list[int]
    bad: tuple[BadImage, ...]

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple]:
        """Pickle as the call that makes the Batch."""
        return _unpack, tuple(self)


def _unpack(
    images: Slot | Tensor, labels: list[int], positions: list[int], bad: tuple[BadImage, ...]
) -> Batch:
    if isinstance(images, Slot):
        buffer = _memory[images.memory].buffers[images.number]
        images = _view(buffer, images.shape, images.strides, images.dtype)
    return Batch(images, torch.tensor(labels), torch.tensor(positions), bad)


def _view(
    buffer: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return buffer[:size].view(dtype).as_strided(shape, strides)


class BatchMemory:
    """Buffers of one batch each for every worker, made before the workers start, who share them.

    Raises:
        OSError: There is not enough shared memory.
    """

    # A worker has up to PREFETCHED batches in the making or in the queue, and the consumer holds
    # one more, which it copies before it asks for the next. So the buffer whose turn it is again is
    # free, with one to spare.
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


# By name, the memory of this process's loaders; weak, so that it goes when its loader goes.
_memory: weakref.WeakValueDictionary[str, BatchMemory] = weakref.WeakValueDictionary()


class Collate:
    """Makes samples one after the other and copies them into one batch, in their memory format.

    With `memory`, batches go into its buffers in turn, since fresh memory costs as much as resizing
    the images. The consumer then has to copy a batch before it asks for the next one.
    """

    def __init__(self, memory: BatchMemory | None) -> None:
        self.memory = memory
        self._count = 0

    def __call__(self, requested: tuple[int, Iterator[Sample]]) -> Batch | PackedBatch:
        """Return the batch; from a worker, what turns into it on the way."""
        count, samples = requested
        first = next(samples)
        images, image_BCHW = self._allocate(count, first.image_CHW)
        labels, positions = [], []
        bad: list[BadImage] = []
        for image_CHW, sample in zip(image_BCHW, chain((first,), samples), strict=True):
            image_CHW.copy_(sample.image_CHW)  # while the sample is in the CPU's cache
            labels.append(sample.label)
            positions.append(sample.position)
            bad.extend(sample.bad)
        packed = PackedBatch(images, labels, positions, tuple(bad))
        return packed if get_worker_info() else _unpack(*packed)

    def _allocate(self, count: int, like_CHW: Tensor) -> tuple[Slot | Tensor, Tensor]:
        """Return where a batch goes: as the main process finds it, and as a tensor to fill."""
        shape = (count, *like_CHW.shape)
        strides = (like_CHW.numel(), *torch.empty_like(like_CHW).stride())
        worker, size = get_worker_info(), count * like_CHW.nbytes
        if self.memory and size <= len(self.memory.buffers[0]):
            self._count = (self._count + 1) % BatchMemory.EACH
            number = (worker.id if worker else 0) * BatchMemory.EACH + self._count
            slot = Slot(self.memory.name, number, shape, strides, like_CHW.dtype)
            return slot, _view(self.memory.buffers[number], *slot[2:])
        fresh = torch.empty(size, dtype=torch.uint8)
        fresh = fresh.share_memory_() if worker else fresh
        image_BCHW = _view(fresh, shape, strides, like_CHW.dtype)
        return image_BCHW, image_BCHW
