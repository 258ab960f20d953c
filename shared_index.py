"""The index of a dataset for all ranks: unpacked and made once, read by each.

rank 0: index_cache.refresh -> its place and digest -> first rank of each node -> every rank
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

import archives
import distributed
import index_cache
from distributed import World
from image_index import ImageIndex, Split
from imagenet_dataset import BadImage
from index_cache import Cached


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


def find_index(root: Path, split: Split, world: World, *, folder: Path | None) -> ImageIndex:
    """Return a split's index; only rank 0 looks at the images, unless a node has its own disk.

    Collective. `folder` is where the index is kept, None for beside the images.

    Raises:
        ValueError, OSError: On every rank, if any cannot index the images.
    """
    first = distributed.from_main(_try_refresh(root, split, folder) if world.is_main else None)
    mine: Cached | Exception | None = first if isinstance(first, Exception) else None
    if mine is None and world.local_rank == 0:
        assert isinstance(first, Cached), "rank 0 made it"
        mine = first if index_cache.is_kept(first) else _try_refresh(root, split, folder)
    every: list[Cached | Exception | None] = [None] * world.size
    dist.all_gather_object(every, mine)
    nodes: list[Cached] = []
    for rank, found in enumerate(every):
        if isinstance(found, Exception):
            raise found
        if found is not None and rank <= world.rank:
            nodes.append(found)
    return index_cache.load(nodes[-1])  # the ranks of a node follow each other, its first before


def _try_refresh(root: Path, split: Split, folder: Path | None) -> Cached | Exception:
    try:
        return index_cache.refresh(root, split, folder=folder)
    except (ValueError, OSError) as error:
        return error


def gather_bad(found: list[BadImage]) -> list[BadImage]:
    """Return the bad images that all ranks found. Collective."""
    every: list[list[BadImage]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, found)
    return [bad for part in every for bad in part]
