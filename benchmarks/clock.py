"""How long something takes: by events on a GPU, by the wall clock on a CPU; the seam of both."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]
# The host queues a step's launches behind this wait, so that its own pace is not measured; a layer
# that waits for the device (its counts, say) still pays for that.
HEAD_START_CYCLES = 6_000_000  # about 3 ms
HOST_REPEATS = 5
WARM_UP = 2
FEWEST_ROUNDS = 3


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


def interleave(
    runs: Mapping[str, Run], clock: Clock, *, repeats: int, limit_s: float = math.inf
) -> dict[str, list[float]]:
    """Return milliseconds of each; rounds alternate forwards and backwards, two warm up.

    After `limit_s` seconds no round is begun if there were three.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.monotonic()
    for number in range(repeats + WARM_UP):
        is_late = time.monotonic() - started > limit_s
        if is_late and number >= FEWEST_ROUNDS + WARM_UP:
            break
        for name in names if number % 2 else names[::-1]:
            ms = clock(runs[name])
            if number >= WARM_UP:
                times[name].append(ms)
    return times
