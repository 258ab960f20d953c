"""Time whole training steps on one GPU: ours and its rivals, dense and with experts.

    python -m benchmarks.step_gpu [--match 'dense B16'] [--limit-s 500] [--out FILE]
    python -m benchmarks.step_gpu --profile --match 'dense B16 b256'   # kernels of a step, by time
    python -m benchmarks.step_gpu --dry         # the same code on a CPU with tiny sizes

A group is one kind of comparison, size and batch ("dense B16 b256"); its contenders are made in one
process, must have the same first loss, and are timed in turns, by events around STEPS steps in a
row. `percent` is of an H200's 790 TFLOP/s (dense bf16), for the FLOPs of forward and twice that;
`floor_ms` is the time at that rate. What does not import, fails or computes something else is a row
that says so. The result is written after each group; groups for which there was no time are listed.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common, folders, step_cases, steps
from benchmarks.clock import host_ms, interleave, step_clock
from benchmarks.moe_check import library_errors
from benchmarks.moe_kernels import PEAK_BYTES, PEAK_FLOPS
from benchmarks.step_cases import Group, Made, Setting
from options.command_line import Parser
from parallel import distributed
from parallel.terminal import show_result

STEPS = 3
GIB = 2**30
KERNELS_SHOWN = 25


@dataclass
class Ready:
    """A contender that works: its step, FLOPs and what was found at its first steps."""

    made: Made
    row: common.Row


def all_groups(*, is_dry: bool) -> list[Group]:
    """Return every group, the most telling first."""
    grid = step_cases.DRY_GRID if is_dry else step_cases.GRID
    return [Group(*place) for place in grid]


def choose(match: str, groups: list[Group]) -> list[Group]:
    """Return the groups whose label `match` is found in.

    Raises:
        ValueError: None.
    """
    chosen = [group for group in groups if re.search(match, group.label)]
    if not chosen:
        allowed = ", ".join(group.label for group in groups)
        raise ValueError(f"--match {match}: matches no group (there are: {allowed})")
    return chosen


def choose_contenders(names: list[str] | None) -> list[str] | None:
    """Return the contenders asked for, None for all.

    Raises:
        ValueError: There is no such contender.
    """
    allowed = list(dict.fromkeys(name for row in step_cases.GROUPS.values() for name in row))
    for name in names or ():
        if name not in allowed:
            raise ValueError(f"--contenders {name}: no such (there are: {'; '.join(allowed)})")
    return names


def allocated_gib(device: torch.device) -> float:
    """Return the memory in use by tensors; 0 on a CPU, where it is not known."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def free() -> None:
    """Give back the memory of contenders that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make(
    make_it: Callable[[Group, Setting], Made], group: Group, setting: Setting
) -> tuple[Made, common.Row, float]:
    """Return a contender after two steps, what they cost, and the first loss."""
    device = setting.world.device
    before_gib = allocated_gib(device)
    started = time.perf_counter()
    made = make_it(group, setting)
    loss = made.step().item()
    first_step_s = time.perf_counter() - started
    made.step()
    own_gib = allocated_gib(device) - before_gib
    row: common.Row = {"first_step_s": round(first_step_s, 2), "state_gib": round(own_gib, 2)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        made.step()
        torch.cuda.synchronize()
        peak_gib = torch.cuda.max_memory_allocated(device) / GIB
        row["peak_gib"] = round(peak_gib - before_gib, 2)
    return made, row, loss


def fault_row(group: Group, name: str, error: Exception) -> common.Row:
    """Return the row of what does not work, with the reason."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {"group": group.label, "loop": name, "status": "error", "reason": reason}


def attempt(
    name: str, group: Group, setting: Setting, *, reference: dict[bool, float]
) -> Ready | common.Row:
    """Return a contender that works and has the loss of the others, or the row that says why not.

    reference: the first loss of dense networks and of those with experts (True), once known.
    """
    try:
        made, row, loss = make(step_cases.makers()[name], group, setting)
        if not math.isfinite(loss):
            raise ValueError(f"first loss {loss}")
        first = reference.setdefault(step_cases.is_of_experts(name), loss)
        if why := steps.loss_fault(loss, first, dtype=setting.dtype):
            raise ValueError(f"{why} of the others")
    except library_errors(setting.kernels) as error:
        return fault_row(group, name, error)
    return Ready(made, row)


def prepare(
    group: Group, names: list[str], setting: Setting
) -> tuple[dict[str, Ready], list[common.Row]]:
    """Return the contenders that work, and rows of those that do not, with the reason."""
    ready: dict[str, Ready] = {}
    failed: list[common.Row] = []
    reference: dict[bool, float] = {}
    for name in names:
        outcome = attempt(name, group, setting, reference=reference)
        if isinstance(outcome, Ready):
            ready[name] = outcome
        else:
            failed.append(outcome)
            free()  # of what the failed one had made
    return ready, failed


def row_of(
    group: Group, name: str, ready: Ready, times: dict[str, list[float]], *, rival: str
) -> common.Row:
    """Return a contender's row."""
    flops = 3 * ready.made.flops_per_image * group.batch
    figures = common.spread(times[name], digits=3)
    ms, floor_ms = float(figures["median_ms"]), 1000 * flops / PEAK_FLOPS
    return {
        "group": group.label,
        "loop": name,
        "status": "ok",
        "batch": group.batch,
        "rounds": len(times[name]),
        **figures,
        "images_per_s": round(1000 * group.batch / ms, 1),
        "percent": round(100 * floor_ms / ms, 2),
        "floor_ms": float(f"{floor_ms:.4g}"),
        "over_floor": round(ms / floor_ms, 2),
        "rival": rival,
        "ratio": common.ratio(times[name], times[rival]),
        **ready.row,
    }


def measure(
    group: Group, names: list[str], setting: Setting, *, repeats: int, limit_s: float
) -> list[common.Row]:
    """Return the rows of a group."""
    ready, failed = prepare(group, names, setting)
    if not ready:
        return failed
    device = setting.world.device
    runs = {name: contender.made.step for name, contender in ready.items()}
    clock = step_clock(device, steps=1 if setting.is_dry else STEPS)
    try:
        times = interleave(runs, clock, repeats=repeats, end_s=time.monotonic() + limit_s)
    except library_errors(setting.kernels) as error:  # all at once may be too much memory
        return [*failed, fault_row(group, "all of them in turns", error)]
    for contender in ready.values():
        contender.row["host_ms"] = round(host_ms(contender.made.step, device), 3)
    rows: list[common.Row] = []
    for name in ready:
        rival = step_cases.rival_of(group, name, ready)
        rows.append(row_of(group, name, ready[name], times, rival=rival))
    return rows + failed


def profile_step(group: Group, name: str, made: Made, setting: Setting) -> list[common.Row]:
    """Return the kernels that take most of a step, by their own time.

    busy_ms is that of all kernels, step_ms the step's without the profiler: what is between them is
    time in which the device waits. On a CPU operators take the place of kernels.
    """
    device = setting.world.device
    is_cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    step_ms = step_clock(device, steps=1 if setting.is_dry else STEPS)(made.step)
    with torch.profiler.profile(activities=activities) as profiler:
        made.step().item()
    events = profiler.key_averages()
    if is_cuda:  # what the host does, and named spans, carry the time of their kernels
        device_type = torch._C._autograd.DeviceType.CUDA
        events = [
            event
            for event in events
            if event.device_type == device_type and not getattr(event, "is_user_annotation", False)
        ]
    if not events:
        return [fault_row(group, name, RuntimeError("the profiler saw no kernel"))]
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    times_us = {event: getattr(event, key) for event in events}
    busy_us = sum(times_us.values())
    return [
        {
            "group": group.label,
            "loop": name,
            "kernel": event.key[:160],
            "calls": event.count,
            "ms": round(times_us[event] / 1000, 4),
            "share": round(times_us[event] / busy_us, 4),
            "busy_ms": round(busy_us / 1000, 3),
            "step_ms": round(step_ms, 3),
        }
        for event in sorted(events, key=times_us.__getitem__, reverse=True)[:KERNELS_SHOWN]
    ]


def profile(group: Group, names: list[str], setting: Setting) -> list[common.Row]:
    """Return the kernels of a step of each contender, and rows of those that do not work."""
    ready, rows = prepare(group, names, setting)
    for name, contender in ready.items():
        rows += profile_step(group, name, contender.made, setting)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--match", default="", help="regex of groups, as 'dense B16 b256'")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these of a group")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of a group")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no group after this")
    parser.add_argument("--profile", action="store_true", help="kernels by time instead of rows")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: tests this file")
    parser.add_argument("--out", type=Path, help="default: results/<date>-gpu-step_gpu.json")
    return parser.parse_args(argv)


def device_of(*, is_dry: bool) -> str:
    """Return the device to measure on.

    Raises:
        ValueError: There is no GPU and this is no dry run.
    """
    if not is_dry and not torch.cuda.is_available():
        raise ValueError("no CUDA device: --dry runs the same code with tiny sizes on a CPU")
    return "cpu" if is_dry else "cuda"


def run_groups(options: argparse.Namespace, groups: list[Group], setting: Setting) -> None:
    """Measure or profile group by group, and write after each."""
    started, device = time.monotonic(), setting.world.device
    name = "profile" if options.profile else "step_gpu"
    rows: list[common.Row] = []
    for number, group in enumerate(groups):
        left_s = options.limit_s - (time.monotonic() - started)
        cut = [group.label for group in groups[number:]] if left_s <= 0 else []
        if not cut:
            wanted = step_cases.GROUPS[group.kind]
            names = [n for n in wanted if options.contenders is None or n in options.contenders]
            if options.profile:
                found = profile(group, names, setting)
            else:
                found = measure(group, names, setting, repeats=options.repeats, limit_s=left_s / 3)
            free()
            # Or the graphs of one group would count towards the recompilations of the next.
            torch.compiler.reset()
            common.print_rows(found)
            show_result(f"{group.label}: {allocated_gib(device):.2f} GiB still in use")
            rows += found
        conditions = {
            "is_dry": options.dry,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "steps_per_time": STEPS,
            "peak": {"tflops_per_s": PEAK_FLOPS / 1e12, "tb_per_s": PEAK_BYTES / 1e12},
            "unavailable": {} if (why := steps.te_reason()) is None else {"TE": why},
            "cut": cut,
        }
        common.write(name, out=options.out, conditions=conditions, rows=rows, device=device)
        if cut:
            show_result(f"out of time before: {', '.join(cut)}")
            break


def main(argv: list[str] | None = None) -> None:
    """Measure the groups that were asked for."""
    options = parse(argv)
    groups = choose(options.match, all_groups(is_dry=options.dry))
    options.contenders = choose_contenders(options.contenders)
    device = device_of(is_dry=options.dry)
    if device == "cuda":
        # As a training script has it; the loops' fp32 products are none of the measured ones.
        torch.set_float32_matmul_precision("high")
    num_classes = 3 if options.dry else folders.CLASSES
    with (
        folders.images(num_classes=num_classes) as root,
        distributed.process_group(device, timeout_s=600) as world,
    ):
        dtype = torch.float32 if options.dry else torch.bfloat16
        run_groups(options, groups, Setting(world, dtype, root, num_classes, options.dry))


if __name__ == "__main__":
    main()
