"""From a loader's batches to batches on the device; decides what a bad image or worker means.

    DataLoader -> Batch (uint8, with bad images) -> Feed -> Batch (float32, normalised, on device)

A bad image was replaced by the loader already: here it stops the run, or is counted and named. A
worker that dies or hangs stops the run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from images.augment import Normaliser
from images.batches import BadImage, Batch

Gather = Callable[[list[BadImage]], list[BadImage]]
AGREE_EVERY = 32  # batches between two counts over all ranks
LOADER = "DataLoader"  # how messages of torch about its workers begin


@contextlib.contextmanager
def worker_losses() -> Iterator[None]:
    """Turn what torch raises wherever this process is when a loader's worker dies into an OSError.

    Raises:
        ChildProcessError: A worker died while no batch was waited for.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(LOADER):
            raise
        raise ChildProcessError(f"data: {str(error).splitlines()[0].rstrip(' .')}") from error


class Tolerance:
    """How many images of a split may be bad, counted once each over all ranks.

    `at_most` None stops at the first. `gather` returns what all ranks found, for what this one
    found; it is called on every rank after the same batches. `seen` are those counted already, and
    more are added to it.
    """

    def __init__(
        self, at_most: int | None, *, gather: Gather | None = None, seen: set[int] | None = None
    ) -> None:
        self.at_most = at_most
        self.gather = gather
        self.seen = set() if seen is None else seen
        self._new: list[BadImage] = []

    def note(self, found: tuple[BadImage, ...]) -> None:
        """Take over what a batch reports.

        Raises:
            ValueError: None, or no more, are allowed.
        """
        for bad in found:
            if self.at_most is None:
                raise ValueError(bad.line)
            if bad.image in self.seen:
                continue
            self.seen.add(bad.image)
            self._new.append(bad)
            line = f"{bad.line}; skipped {len(self.seen)} of at most {self.at_most}"
            print(line, file=sys.stderr, flush=True)
        if self.gather is None:  # with others, all stop together
            self._check()

    def agree(self) -> None:
        """Count what the other ranks found. Collective where there are several.

        Raises:
            ValueError: All together are more than allowed.
        """
        if self.gather is not None and self.at_most is not None:
            self.seen |= {bad.image for bad in self.gather(self._new)}
            self._new = []
            self._check()

    def _check(self) -> None:
        if self.at_most is not None and len(self.seen) > self.at_most:
            raise ValueError(
                f"config dataset.max_bad={self.at_most}: {len(self.seen)} images cannot be used, "
                "the last are named above"
            )


class Feed:
    """Iterates a loader; the same batches each time that it is iterated."""

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
                raise self._loss(error, number, positions) from error
            self.tolerance.note(batch.bad)
            if (number + 1) % AGREE_EVERY == 0 or number + 1 == len(self):
                self.tolerance.agree()
            yield self._on_device(batch)

    def _loss(self, error: RuntimeError, number: int, positions: list[int]) -> OSError:
        """Say which worker is lost, and which images it or others were at."""
        count = self.loader.num_workers
        where = f"asked for positions {positions[0]} to {positions[-1]}"
        what = str(error).splitlines()[0].rstrip(" .")
        if "timed out" in what:
            limit = f"dataset.timeout_s={self.loader.timeout:g}"
            worker = f"worker {number % count} of {count}"
            return TimeoutError(
                f"data {self.split}: no batch within {limit} from {worker}, {where}"
            )
        return ChildProcessError(f"data {self.split}: {what} ({count} workers, {where})")

    def _on_device(self, batch: Batch) -> Batch:
        image_BCHW, label_B = (value.to(self.device, non_blocking=True) for value in batch[:2])
        # Positions stay on the host, which reads them to know what is erased and mixed.
        return batch._replace(image_BCHW=self.normaliser.batch(image_BCHW), label_B=label_B)
