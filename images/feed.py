"""Move a loader's batches to the device, and decide what a bad image or a lost worker means.

    DataLoader -> Batch (uint8, with bad images) -> Feed -> Batch (float32, normalised, on device)

The loader has already replaced a bad image: here it stops the run, or is counted and reported. A
worker that dies or hangs stops the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from images.augment import Normaliser
from images.batches import BadImage, Batch
from parallel.terminal import warn

Gather = Callable[[list[BadImage]], list[list[BadImage]]]
AGREE_EVERY = 32  # batches between two counts over all ranks
LOADER = "DataLoader"  # what torch's messages about its workers begin with


@contextlib.contextmanager
def worker_losses() -> Iterator[None]:
    """Turn the RuntimeError with which torch interrupts this process into an OSError.

    Torch raises it when a worker dies, in a signal handler, hence wherever the process happens to
    be.

    Raises:
        ChildProcessError: A worker died while nobody was waiting for a batch.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(LOADER):
            raise
        raise ChildProcessError(f"data: {str(error).splitlines()[0].rstrip(' .')}") from error


class Tolerance:
    """How many images of a split may be bad, each counted once over all ranks.

    With `at_most` None the first one stops the run. `gather` returns what every rank found, given
    what this one did, and is called by every rank after the same batches. `seen` holds the images
    already counted, and grows.
    """

    def __init__(
        self, at_most: int | None, *, gather: Gather | None = None, seen: set[int] | None = None
    ) -> None:
        self.at_most = at_most
        self.gather = gather
        self.seen = set() if seen is None else seen
        self._new: list[BadImage] = []

    def note(self, found: tuple[BadImage, ...]) -> None:
        """Count the bad images of one batch.

        Raises:
            ValueError: No bad image is allowed, or, on one rank alone, no more of them.
        """
        for bad in found:
            if self.at_most is None:
                raise ValueError(bad.line)
            if bad.image in self.seen:
                continue
            self.seen.add(bad.image)
            self._new.append(bad)
            line = f"{bad.line}; skipped {len(self.seen)} of at most {self.at_most}"
            warn(line)
        if self.gather is None:  # several ranks stop together, in agree()
            self._check()

    def agree(self) -> None:
        """Count what the other ranks found. Collective where there are several.

        Raises:
            ValueError: All ranks together found more than allowed.
        """
        if self.gather is not None and self.at_most is not None:
            self.seen |= {bad.image for found in self.gather(self._new) for bad in found}
            self._new = []
            self._check()

    def _check(self) -> None:
        if self.at_most is not None and len(self.seen) > self.at_most:
            raise ValueError(
                f"config dataset.max_bad={self.at_most}: {len(self.seen)} images cannot be used, "
                "the last are named above"
            )


class Feed:
    """Iterates a loader; yields the same batches every time it is iterated."""

    def __init__(
        self,
        loader: DataLoader,
        *,
        split: str,
        device: torch.device,
        normaliser: Normaliser,
        tolerance: Tolerance,
    ) -> None:
        self.loader = loader
        self.split = split
        self.device = device
        self.normaliser = normaliser
        self.tolerance = tolerance

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        assert self.loader.batch_sampler is not None, "imagenet_dataset makes them"
        for number, positions in enumerate(self.loader.batch_sampler):
            try:
                batch = next(batches)
            except RuntimeError as error:
                if not str(error).startswith(LOADER):
                    raise
                raise self._lost_worker(error, number, positions) from error
            self.tolerance.note(batch.bad)
            if (number + 1) % AGREE_EVERY == 0 or number + 1 == len(self):
                self.tolerance.agree()
            yield self._on_device(batch)

    def _lost_worker(self, error: RuntimeError, number: int, positions: list[int]) -> OSError:
        """Say which worker is lost, and which positions it or another was working on."""
        count = self.loader.num_workers
        where = f"asked for positions {positions[0]} to {positions[-1]}"
        what = str(error).splitlines()[0].rstrip(" .")
        if "timed out" in what:
            limit = f"dataset.timeout_s={self.loader.timeout:g}"
            worker = f"worker {number % count} of {count}"
            message = f"data {self.split}: no batch within {limit} from {worker}, {where}"
            return TimeoutError(message)
        return ChildProcessError(f"data {self.split}: {what} ({count} workers, {where})")

    def _on_device(self, batch: Batch) -> Batch:
        image_BCHW, label_B = (value.to(self.device, non_blocking=True) for value in batch[:2])
        # Positions stay on the host, which reads them to draw what is erased and mixed.
        return batch._replace(image_BCHW=self.normaliser.batch(image_BCHW), label_B=label_B)
