"""In which order images are seen, as a function of position, seed and epoch alone.

    microbatch -> step_positions -> position -> Order.place -> (epoch, place, repeat)
    epoch_permutation(epoch)[place] -> image

Not here: which images there are, what is made of them.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from parallel.seeds import stable_seed

REPEATED_UNIT = 256  # an epoch of repeated augmentation is cut to a multiple of this many images


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
