"""Find identical image files: twice in a split, or in both training and validation.

    ImageIndex -> fingerprints (of size and some bytes) -> equal ones -> files compared as a whole

A fingerprint takes one short read per image, and only once, because the index keeps it. Reading
every file at every start instead would take as long as an epoch. Not here: pictures that merely
look alike, such as the same one at another size or quality.
"""

import hashlib
import os
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from images.index import ImageIndex
from images.reading import PASSING, ImageReader, UnreadableError
from parallel import collectives
from parallel.distributed import World
from parallel.terminal import warn

UNKNOWN, UNREADABLE = 0, 1  # in place of a fingerprint
PROBED_BYTES = 4096  # from the middle: files begin with headers, which are often the same
THREADS = 16  # disks and network file systems answer several requests at once
CHUNK = 1024  # images that a thread takes at a time
MOST_COMPARED = 2_000  # images read as a whole, at each start
Group = tuple[list[int], list[int]]  # identical images of training and of validation


def num_unknown(index: ImageIndex) -> int:
    """Return how many images have no fingerprint yet."""
    return index.prints.count(UNKNOWN) if index.prints else len(index)


def fingerprints(index: ImageIndex, *, ends: float) -> array:
    """Return a uint64 hash of each image's size and some of its bytes, keeping those known already.

    Images not reached before time.monotonic() is past `ends`, or that cannot be read at the moment,
    are UNKNOWN: the next call continues with them. Files that cannot be read at all are UNREADABLE;
    reporting them is another check's business.
    """
    found = array("Q", index.prints or bytes(8 * len(index)))
    missing = [image for image, value in enumerate(found) if value == UNKNOWN]
    chunks = [missing[first : first + CHUNK] for first in range(0, len(missing), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(partial(_chunk, index, ends=ends), chunks)
        for images, values in zip(chunks, parts, strict=True):
            for image, value in zip(images, values, strict=False):
                found[image] = value
    return found


def _chunk(index: ImageIndex, images: Sequence[int], *, ends: float) -> list[int]:
    """Return the fingerprints of as many of the images as there is time for."""
    values: list[int] = []
    for image in images:
        if time.monotonic() > ends:
            break
        values.append(_fingerprint(index, image))
    return values


def _fingerprint(index: ImageIndex, image: int) -> int:
    path = index.shards[index.shard_of[image]] if index.shards else index.paths[image]
    offset, size = index.offsets[image] if index.shards else 0, index.sizes[image]
    count = min(size, PROBED_BYTES)
    try:
        file = os.open(f"{index.root}/{path}", os.O_RDONLY)
        try:
            probe = os.pread(file, count, offset + (size - count) // 2)
        finally:
            os.close(file)
    except OSError as err:
        return UNKNOWN if err.errno in PASSING else UNREADABLE
    if not probe:
        return UNREADABLE
    sha = hashlib.blake2b(size.to_bytes(8, "little") + probe, digest_size=8)
    return max(int.from_bytes(sha.digest(), "little"), UNREADABLE + 1)


def find_twins(train: ImageIndex, val: ImageIndex) -> list[str]:
    """Say which images occur more than once: a sentence with an example for each kind.

    Images without a fingerprint are left out.
    """
    suspects = _suspects(train, val)
    groups = _compare(suspects[:MOST_COMPARED], train, val)
    at_least = "at least " if len(suspects) > MOST_COMPARED else ""
    found = [_leaks(groups, train, val), _copies(groups, 0, train), _copies(groups, 1, val)]
    return [at_least + line for line in found if line]


def _suspects(train: ImageIndex, val: ImageIndex) -> list[int]:
    """Return the images that share a fingerprint, equal ones next to each other.

    Validation images are numbered after the training images.
    """
    prints = np.concatenate(
        [np.asarray(index.prints or [UNKNOWN] * len(index), np.uint64) for index in (train, val)]
    )
    order = np.argsort(prints, kind="stable")
    ordered = prints[order]
    is_next = np.concatenate([ordered[1:] == ordered[:-1], [False]])
    is_twin = (is_next | np.roll(is_next, 1)) & (ordered > UNREADABLE)
    return order[is_twin].tolist()


def _compare(suspects: Sequence[int], train: ImageIndex, val: ImageIndex) -> list[Group]:
    """Group the suspects that are the same in every byte."""
    readers = ImageReader(train), ImageReader(val)
    groups: dict[bytes, Group] = {}
    for number in suspects:
        split = int(number >= len(train))
        image = number - split * len(train)
        try:
            data = readers[split](image).data
        except UnreadableError:
            continue  # the loader reports it
        groups.setdefault(hashlib.sha256(data).digest(), ([], []))[split].append(image)
    return list(groups.values())


def _leaks(groups: Sequence[Group], train: ImageIndex, val: ImageIndex) -> str:
    """Say how many validation images are also training images."""
    both = [group for group in groups if all(group)]
    if not both:
        return ""
    images, others = both[0][1], both[0][0]
    count = sum(len(group[1]) for group in both)
    return (
        f"{count} of {len(val)} validation images are training images, too; the first: "
        f"{_name(val, images[0])} is {_name(train, others[0])}"
    )


def _copies(groups: Sequence[Group], split: int, index: ImageIndex) -> str:
    """Say how many images of a split are copies of others in it."""
    more = [group[split] for group in groups if len(group[split]) > 1]
    if not more:
        return ""
    count = sum(len(images) - 1 for images in more)
    differ = [images for images in more if len({index.labels[image] for image in images}) > 1]
    first = (differ or more)[0]
    labels = f" ({len(differ)} times under several labels)" if differ else ""
    return (
        f"{count} of {len(index)} {index.split} images are copies of others{labels}; the first: "
        f"{_name(index, first[1])} is {_name(index, first[0])}"
    )


def _name(index: ImageIndex, image: int) -> str:
    return f"{index.split}/{index.paths[image]}"


def check_copies(train: ImageIndex, val: ImageIndex, world: World, *, duplicates: str) -> None:
    """Report images that occur more than once; duplicates="stop" refuses them. Collective.

    Raises:
        ValueError: On every rank.
    """
    lines = collectives.from_main(_report(train, val) if world.is_main else [])
    if lines and duplicates == "stop":
        raise ValueError(f"config dataset.duplicates=stop: {'; '.join(lines)}")
    for line in lines if world.is_main else []:
        warn(f"data: {line}")


def _report(train: ImageIndex, val: ImageIndex) -> list[str]:
    lines = find_twins(train, val)
    if missing := num_unknown(train) + num_unknown(val):
        lines.append(
            f"{missing} images have not been compared yet: the next start continues with them, if "
            "the index can be written"
        )
    return lines
