"""The index of a dataset for all ranks: unpacked and made once, read by each.

rank 0: index_cache.refresh -> its place and digest -> first rank of each node -> every rank
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from images import archives, duplicates
from images import cache as index_cache
from images import index as image_index
from images.batches import BadImage
from images.cache import Cached
from images.feed import Tolerance
from images.index import ImageIndex, Split
from parallel import collectives
from parallel.distributed import World


def unpack_once(root: Path, world: World) -> None:
    """Unpack a bundled archive on first use, once per node; the other ranks wait. Collective.

    Raises:
        ValueError: On every rank, if the archive cannot be unpacked on any node.
    """
    problem: str | None = None
    if world.local_rank == 0:
        try:
            archives.unpack_archive(root)
        except (ValueError, OSError) as error:
            problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    found = next((item for item in problems if item is not None), None)
    if found is not None:
        raise ValueError(found)


def find_index(
    root: Path, split: Split, world: World, *, folder: Path | None, prints_s: float = 0.0
) -> ImageIndex:
    """Return a split's index; only rank 0 looks at the images, unless a node has its own disk.

    Collective. `folder` is where the index is kept, None for beside the images. `prints_s` are the
    seconds in which missing fingerprints are taken, those for finding the images included.

    Raises:
        ValueError, OSError: On every rank, if any cannot index the images.
    """
    refresh = partial(_try_refresh, root, split, folder, prints_s)
    first = collectives.from_main(refresh() if world.is_main else None)
    mine: Cached | Exception | None = first if isinstance(first, Exception) else None
    if mine is None and world.local_rank == 0:
        assert isinstance(first, Cached), "rank 0 made it"
        mine = first if index_cache.is_kept(first) else refresh()
    every: list[Cached | Exception | None] = [None] * world.size
    dist.all_gather_object(every, mine)
    nodes: list[Cached] = []
    for rank, found in enumerate(every):
        if isinstance(found, Exception):
            raise found
        if found is not None and rank <= world.rank:
            nodes.append(found)
    return index_cache.load(nodes[-1])  # the ranks of a node follow each other, its first before


def _try_refresh(
    root: Path, split: Split, folder: Path | None, prints_s: float
) -> Cached | Exception:
    try:
        return index_cache.refresh(root, split, folder=folder, prints_s=prints_s)
    except (ValueError, OSError) as error:
        return error


def check_splits(train: ImageIndex, val: ImageIndex, world: World, *, copies: str) -> None:
    """Refuse splits that do not belong together. Collective.

    `copies` of images are a reason to "stop" or "warn"; to "ignore" them needs no fingerprints.

    Raises:
        ValueError: On every rank.
    """
    image_index.check_separate(train, val)
    image_index.check_same_classes(train, val)
    image_index.check_every_class(train)
    image_index.check_every_class(val)
    if copies == "ignore":
        return
    lines = collectives.from_main(_copies(train, val) if world.is_main else [])
    if lines and copies == "stop":
        raise ValueError(f"config dataset.duplicates=stop: {'; '.join(lines)}")
    for line in lines if world.is_main else []:
        print(f"data: {line}", file=sys.stderr, flush=True)


def _copies(train: ImageIndex, val: ImageIndex) -> list[str]:
    """Return what is to be said of images that are there more than once."""
    lines = duplicates.find_twins(train, val)
    if missing := duplicates.num_unknown(train) + duplicates.num_unknown(val):
        lines.append(
            f"{missing} images are not yet compared: the next start goes on with them, if the "
            "index can be written"
        )
    return lines


def make_tolerance(at_most: int | None, world: World, *, seen: set[int]) -> Tolerance:
    """Return what counts unreadable images over all ranks, those in `seen` already counted."""
    return Tolerance(at_most, gather=gather_bad if world.size > 1 else None, seen=seen)


def union(found: set[int]) -> set[int]:
    """Return what is in the set of any rank. Collective."""
    every: list[set[int]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, found)
    return set().union(*every)


def gather_bad(found: list[BadImage]) -> list[BadImage]:
    """Return the bad images that all ranks found. Collective."""
    every: list[list[BadImage]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, found)
    return [bad for part in every for bad in part]
