"""How long something takes: by events on a GPU, by the wall clock on a CPU; the seam of both."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]
# The host queues a step's launches behind this wait, so that its own pace is not measured; a layer
# that waits for the device (its counts, say) still pays for that.
HEAD_START_CYCLES = 6_000_000  # about 3 ms
HOST_REPEATS = 5
WARM_UP = 2


def wall_clock(run: Run) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def cuda_clock() -> Clock:
    """Return a clock of the current CUDA device; before each call the L2 cache is emptied."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(4 * cache_bytes, dtype=torch.uint8, device="cuda")

    def clock(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device for single kernels and layers."""
    return cuda_clock() if device.type == "cuda" else wall_clock


def step_clock(device: torch.device, *, steps: int) -> Clock:
    """Return a clock of whole training steps: the mean of `steps` calls in a row.

    No head start and no wait between the calls: where the host is slower than the device, that is
    what a step costs.
    """

    def on_cuda(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps

    def on_cpu(run: Run) -> float:
        return sum(wall_clock(run) for _ in range(steps)) / steps

    return on_cuda if device.type == "cuda" else on_cpu


def host_ms(run: Run, device: torch.device) -> float:
    """Return the median milliseconds until the host is done with a call, the device may not be."""
    times = []
    for _ in range(HOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(wall_clock(run))
    return statistics.median(times)


def process_age_s() -> float:
    """Return the seconds since this process was started, its imports included."""
    fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def end_of(limit_s: float) -> float:
    """Return when `time.monotonic()` has it that a program was `limit_s` seconds old."""
    return time.monotonic() + limit_s - process_age_s()


def rounds(count: int, *, warm_up: int, end_s: float) -> Iterator[bool]:
    """Yield for each round whether it is measured; the first `warm_up` are not.

    Past `end_s` of time.monotonic() no round is begun if one was measured, and none but the first
    warms up: on a slow day there are fewer rounds, but there is a result.
    """
    number, measured = 0, 0
    while measured < count:
        is_late = time.monotonic() > end_s
        if is_late and measured:
            return
        is_measured = number >= warm_up or (is_late and number > 0)
        yield is_measured
        number, measured = number + 1, measured + is_measured


def interleave(
    runs: Mapping[str, Run], clock: Clock, *, repeats: int, end_s: float = math.inf
) -> dict[str, list[float]]:
    """Return milliseconds of each; rounds alternate forwards and backwards, two warm up.

    Past `end_s` there are as few rounds as `rounds` says.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    planned = rounds(repeats, warm_up=WARM_UP, end_s=end_s)
    for number, is_measured in enumerate(planned):
        for name in names if number % 2 else names[::-1]:
            ms = clock(runs[name])
            if is_measured:
                times[name].append(ms)
    return times
