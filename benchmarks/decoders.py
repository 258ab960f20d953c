"""How long decoders of JPEG take, ours and others: the floor of a loader."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

from benchmarks.jpegs import QUALITY, SIZE, picture
from images.augment import resize
from images.reading import read_header, rgb, rgb_of_box

LARGE = (1000, 750)
PASSES = 4  # over the files: about as long as a loader's pass
OTHERS = {"simplejpeg": "simplejpeg", "PyTurboJPEG": "turbojpeg"}  # and their modules


class Timing(NamedTuple):
    """Milliseconds per image."""

    wall_ms: float
    cpu_ms: float


def decode_all(files: list, decode: Callable) -> Timing:
    """Time decoding every pixel of every file, several times, in this process."""
    start, used = time.perf_counter(), time.process_time()
    for _ in range(PASSES):
        for data in files:
            decode(data)
    wall_s, used = time.perf_counter() - start, time.process_time() - used
    count = PASSES * len(files)
    return Timing(1000 * wall_s / count, 1000 * used / count)


def decode_in_processes(files: list, decode: Callable, *, count: int) -> Timing:
    """Time the same in `count` processes at once: what a machine's cores really do together."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.SimpleQueue()

    def work() -> None:
        decode(files[0])
        barrier.wait()
        start = time.monotonic()  # the same clock in all processes
        timing = decode_all(files, decode)
        results.put((start, time.monotonic(), timing.cpu_ms))

    workers = [context.Process(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    starts, ends, cpu_ms = zip(*(results.get() for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    wall_s = max(ends) - min(starts)
    return Timing(1000 * wall_s / (PASSES * len(files) * count), statistics.mean(cpu_ms))


def decode_runs(
    files: list[bytes], own: list[str], *, cores: int
) -> dict[str, Callable[[], Timing]]:
    """Return the run of each decoder: `own` are ours, torchvision's, others if installed."""
    runs: dict[str, Callable[[], Timing]] = {}
    for name in own:
        decode = lambda data, name=name: rgb(read_header(data, decoder=name))  # noqa: E731
        runs[f"decode only, {name}"] = partial(decode_all, files, decode)
        together = partial(decode_in_processes, files, decode, count=cores)
        runs[f"decode only, {name}, all cores"] = together
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    theirs = partial(decode_jpeg, mode=ImageReadMode.RGB)
    runs["decode only, torchvision"] = partial(decode_all, encoded, theirs)
    # Into memory used again, as nobody would take fresh pages for each image.
    buffer = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    for name, module_name in OTHERS.items():
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            module = importlib.import_module(module_name)
            if name == "simplejpeg":
                decode = partial(module.decode_jpeg, buffer=buffer)
            else:
                decode = partial(module.TurboJPEG().decode, pixel_format=0, dst=buffer)
            runs[f"decode only, {name}"] = partial(decode_all, files, decode)
    return runs


def scaled_gain(decoder: str, *, repeats: int = 30) -> dict[str, object]:
    """Compare a crop of 900 x 700 of a larger image, decoded whole and at half its size."""
    sink = io.BytesIO()
    picture(0).resize(LARGE, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=QUALITY)
    box, size, mode = (20, 40, 700, 900), (224, 224), InterpolationMode.BILINEAR
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * repeats):
        is_scaled = bool(number % 2)
        start = time.process_time()
        source = read_header(sink.getvalue(), decoder=decoder, is_scaled=is_scaled)
        resize(rgb_of_box(source, box, at_least=size), size, mode=mode)
        times[is_scaled].append(1000 * (time.process_time() - start))
    whole, scaled = (
        resize(
            rgb_of_box(
                read_header(sink.getvalue(), decoder=decoder, is_scaled=is_scaled),
                box,
                at_least=size,
            ),
            size,
            mode=mode,
        ).int()
        for is_scaled in (False, True)
    )
    return {
        "image": LARGE,
        "box": box,
        "whole_ms": round(statistics.median(times[False]), 3),
        "scaled_ms": round(statistics.median(times[True]), 3),
        "mean_levels_apart": round((whole - scaled).abs().double().mean().item(), 3),
        "max_levels_apart": int((whole - scaled).abs().max()),
    }
