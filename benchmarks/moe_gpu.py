"""Time our MoE layer and its kernels on one GPU against plain PyTorch and other libraries.

    python -m benchmarks.moe_gpu [--cases quick|full] [--match REGEX] [--limit-s 500] [--out FILE]
    python -m benchmarks.moe_gpu --tune --repeats 10 --match '768x3072 E8 .* gelu' [--table FILE]
    python -m benchmarks.moe_gpu --dry          # the same code on a CPU with tiny sizes

One process, one set of tensors per case; every layer is checked against a loop in fp32, output and
gradients, before it is timed, and all are timed in turns with a cold L2 cache. A library that does
not import is listed with the reason, one that fails or computes something else is a row that says
so. `percent` is of the H200's rate for dense bf16 products, floors are benchmarks/moe_kernels.py's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from benchmarks import common, moe_kernels, moe_rivals
from benchmarks.clock import Clock, Run, clock_of, host_ms, interleave
from benchmarks.moe_check import OURS, Build, Errors, LayerRow, library_errors, prepare
from benchmarks.moe_kernels import PEAK_BYTES, PEAK_FLOPS, layer_floor_ms, works
from benchmarks.moe_rivals import Case, Contender, Problem, draw
from moe_kernels import tiles
from moe_kernels.ops import resolve_kernels
from options.command_line import Parser
from parallel.terminal import show_result

PACKAGES = ("torch", "triton", "scattermoe", "sonic-moe", "megablocks", "liger-kernel")
# Percent of the H200's rate that forward and backward of (dim, hidden) are to reach.
TARGETS = {(768, 3072): 55, (1024, 4096): 58, (384, 1536): 42, (384, 384): 30}
SHAPES = [(d, h) for d in (384, 768, 1024) for h in (4 * d, d)]
EXPERTS_AND_CHOICES = [(8, 1), (32, 2), (64, 2), (64, 1)]
TOKENS = (25088, 50176, 200704)  # 128, 256 and 1024 images of 196 patches


@dataclasses.dataclass
class KernelRow:
    """A part of our layer.

    time_over: its time over that of others' product of the same FLOPs; None where theirs fails.
    """

    kernel: str
    ms: float
    iqr_ms: float
    floor_ms: float
    time_over_floor: float
    percent: float
    time_over: dict[str, float | None]


@dataclasses.dataclass
class CaseResult:
    """A case. best_rival_time_over_ours above 1: the fastest that routes is slower than ours."""

    case: Case
    floor_ms: float
    percent: float
    target_percent: int | None
    meets_target: bool | None
    best_rival: str | None
    best_rival_time_over_ours: float | None
    layers: list[LayerRow]
    kernels: list[KernelRow]


@dataclasses.dataclass(frozen=True)
class Setting:
    """On what, with what and how often to measure."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    clock: Clock
    repeats: int

    def draw(self, case: Case) -> Problem:
        """Return a case's tensors."""
        return draw(case, device=self.device, dtype=self.dtype)


def all_cases(name: str) -> list[Case]:
    """Return the cases of a grid: full, quick (what has a target, and SwiGLU), or dry (tiny)."""
    if name == "dry":
        return [Case(32, 64, 4, 2, 48), Case(32, 32, 4, 1, 40, "one empty", "swiglu")]
    if name == "quick":
        plain = [Case(d, h, e, k, 50176) for d, h in TARGETS for e, k in ((8, 1), (32, 2))]
        return [*plain, *(Case(d, h, 32, 2, 50176, activation="swiglu") for d, h in TARGETS)]
    grid = itertools.product(SHAPES, EXPERTS_AND_CHOICES, TOKENS, moe_rivals.ROUTINGS)
    return [Case(d, h, e, k, t, routing) for (d, h), (e, k), t, routing in grid]


def builders(backend: str) -> tuple[dict[str, Build], dict[str, str]]:
    """Return how to make each layer, ours first, and why a library's layer cannot be made."""
    ours = functools.partial(moe_rivals.moevit, backend=backend)
    libraries, missing = moe_rivals.load_libraries()
    plain: dict[str, Build] = {
        OURS: functools.partial(ours, has_biases=False),
        f"{OURS}, biases": functools.partial(ours, has_biases=True),
        **moe_rivals.PLAIN,
    }
    return plain | libraries, missing


def spread(times: list[float]) -> tuple[float, float]:
    """Return median and interquartile range."""
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median over rounds of times / others."""
    pairs = zip(times, others, strict=True)
    return round(statistics.median(mine / theirs for mine, theirs in pairs), 3)


def percent(flops: int, ms: float) -> float:
    """Return the rate as percent of the H200's."""
    return round(100 * flops / (ms / 1000) / PEAK_FLOPS, 2)


def time_layers(
    case: Case, right: dict[str, Contender], rows: list[LayerRow], setting: Setting
) -> None:
    """Fill in the rows of the layers that are right."""
    runs: dict[str, Run] = {f"{name}, forward": layer.forward for name, layer in right.items()}
    runs |= {f"{name}, step": layer.step for name, layer in right.items()}
    times = interleave(runs, setting.clock, repeats=setting.repeats)
    for row in rows:
        if row.layer not in right:
            continue
        of_step = times[f"{row.layer}, step"]
        forward_ms, _ = spread(times[f"{row.layer}, forward"])
        step_ms, iqr_ms = spread(of_step)
        row.forward_ms, row.step_ms = round(forward_ms, 4), round(step_ms, 4)
        row.step_iqr_ms = round(iqr_ms, 4)
        row.host_ms = round(host_ms(right[row.layer].step, setting.device), 4)
        row.forward_percent = percent(case.forward_flops, forward_ms)
        row.percent = percent(3 * case.forward_flops, step_ms)
        row.time_over_ours = ratio(of_step, times[f"{OURS}, step"])


def runs_here(run: Run, *, errors: Errors) -> bool:
    """Return whether a library's product runs; if not, print why."""
    try:
        run()
    except errors as error:
        show_result(f"{type(error).__name__}: {error}"[:500])
        return False
    return True


def time_kernels(problem: Problem, setting: Setting) -> list[KernelRow]:
    """Return a row per part of the layer."""
    rivals, rows = moe_kernels.rivals(problem), []
    errors = library_errors(setting.backend)
    for name, run in moe_kernels.parts(problem, backend=setting.backend).items():
        work, others = works(problem.case)[name], rivals.get(name, {})
        working = {of: other for of, other in others.items() if runs_here(other, errors=errors)}
        times = interleave({"": run} | working, setting.clock, repeats=setting.repeats)
        ms, iqr_ms = spread(times[""])
        row = KernelRow(
            kernel=name,
            ms=round(ms, 4),
            iqr_ms=round(iqr_ms, 4),
            floor_ms=work.floor_ms,
            time_over_floor=round(ms / work.floor_ms, 2),
            percent=percent(work.flops, ms),
            time_over={of: ratio(times[""], times[of]) if of in working else None for of in others},
        )
        rows.append(row)
    return rows


def judge(case: Case, layers: list[LayerRow], kernels: list[KernelRow]) -> CaseResult:
    """Return a case's rows and what they show; the dense layer is no rival, it does not route."""
    ours = next(row for row in layers if row.layer == OURS)
    assert ours.percent is not None, "prepare() raises where ours does not run"
    rivals = {
        row.time_over_ours: row.layer
        for row in layers
        if row.time_over_ours is not None and row.layer != "dense" and OURS not in row.layer
    }
    fastest = min(rivals, default=None)
    target = None if case.is_gated else TARGETS.get((case.dim, case.hidden))
    return CaseResult(
        case=case,
        floor_ms=layer_floor_ms(case),
        percent=ours.percent,
        target_percent=target,
        meets_target=None if target is None else ours.percent >= target,
        best_rival=None if fastest is None else rivals[fastest],
        best_rival_time_over_ours=fastest,
        layers=layers,
        kernels=kernels,
    )


def measure(case: Case, build: dict[str, Build], setting: Setting) -> CaseResult:
    """Return what a case shows; every layer is checked before any is timed."""
    problem = setting.draw(case)
    right, rows = prepare(problem, build, errors=library_errors(setting.backend))
    time_layers(case, right, rows, setting)
    right.clear()  # before the kernels get tensors of their own
    return judge(case, rows, time_kernels(problem, setting))


def tune(cases: list[Case], setting: Setting, *, table: Path, deadline_s: float) -> None:
    """Write the fastest tiles of each case's size to a table, after each; the others stay."""
    entries = tiles.read_table(tiles.TABLE)
    for case in cases:
        if time.monotonic() > deadline_s:
            show_result(f"out of time before {case.label}")
            break
        size, best = moe_kernels.tuned(setting.draw(case), setting.clock, repeats=setting.repeats)
        entries[size] = best
        tiles.write_table(table, entries)
        show_result(f"{case.label}: {best}")


def versions() -> dict[str, str | None]:
    """Return the versions that decide the figures; None: not installed."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    found = {name: installed.get(name) for name in PACKAGES}
    return {"python": platform.python_version(), "cuda": torch.version.cuda, **found}


def write(path: Path, conditions: dict[str, object], results: list[CaseResult]) -> None:
    """Write what was measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = conditions | {"cases": [dataclasses.asdict(result) for result in results]}
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", "utf-8")


def print_result(result: CaseResult) -> None:
    """Print a case's layers and kernels, a line each."""
    show_result(f"{result.case.label}: target={result.target_percent} best={result.best_rival}")
    for row in result.layers:
        figures = f"{row.step_ms} ms {row.percent} % x{row.time_over_ours} host {row.host_ms} ms"
        show_result(
            f"  {row.layer:18} {figures if row.status == 'ok' else row.status} {row.reason}"
        )
    for kernel in result.kernels:
        rates = f"{kernel.ms} ms {kernel.percent} % floor x{kernel.time_over_floor}"
        show_result(f"    {kernel.kernel:16} {rates} {kernel.time_over}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--cases", choices=("quick", "full"), default="quick")
    parser.add_argument("--match", default="", help="regex of labels as 768x3072 E8 k1 T50176 ...")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no case after this")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: tests this file")
    parser.add_argument("--tune", action="store_true", help="write the table of tiles instead")
    parser.add_argument("--table", type=Path, default=tiles.TABLE)
    parser.add_argument("--out", type=Path, help="default: results/<date>-gpu-moe_gpu.json")
    return parser.parse_args(arguments)


def setting_of(*, is_dry: bool, repeats: int) -> Setting:
    """Return the GPU's setting, or a CPU's with the kernels that run there.

    Raises:
        ValueError: There is no GPU and this is no dry run.
    """
    if not is_dry and not torch.cuda.is_available():
        raise ValueError("no CUDA device: --dry runs the same code with tiny sizes on a CPU")
    device = torch.device("cpu" if is_dry else "cuda")
    dtype = torch.float32 if is_dry else torch.bfloat16
    backend = interpreted_backend() if is_dry else resolve_kernels("triton", device)[0]
    return Setting(device, dtype, backend, clock_of(device), repeats)


def interpreted_backend() -> str:
    """Return triton where its interpreter was asked for (TRITON_INTERPRET=1), else torch."""
    try:
        return resolve_kernels("triton", torch.device("cpu"))[0]
    except (ImportError, ValueError):
        return "torch"


def main(arguments: list[str] | None = None) -> None:
    """Measure or tune case by case, and write after each."""
    options, started_s = parse(arguments), time.monotonic()
    setting = setting_of(is_dry=options.dry, repeats=options.repeats)
    cases = all_cases("dry" if options.dry else options.cases)
    cases = [case for case in cases if re.search(options.match, case.label)]
    if not cases:
        raise ValueError(f"--match {options.match}: matches no case of this grid")
    deadline_s = started_s + options.limit_s
    if options.tune and options.dry:
        raise ValueError("--tune times kernels on a GPU, --dry is without one: give one of both")
    if options.tune:
        tune(cases, setting, table=options.table, deadline_s=deadline_s)
        return
    build, missing = builders(setting.backend)
    stamp = common.stamp(setting.device)
    kind = "dry" if options.dry else "gpu"
    conditions: dict[str, object] = {
        "benchmark": "moe_gpu",
        **stamp,
        "device": "cpu" if options.dry else torch.cuda.get_device_name(),
        "is_dry": options.dry,
        "backend": setting.backend,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "repeats": setting.repeats,
        "peak": {"tflops_per_s": PEAK_FLOPS / 1e12, "tb_per_s": PEAK_BYTES / 1e12},
        "versions": versions(),
        "unavailable": missing,
    }
    out = options.out or common.RESULTS / f"{str(stamp['date'])[:10]}-{kind}-moe_gpu.json"
    for name, reason in missing.items():
        show_result(f"{name} is not here: {reason}")
    results: list[CaseResult] = []
    for case in cases:
        if time.monotonic() > deadline_s:
            show_result(f"out of time before {case.label}")
            break
        results.append(measure(case, build, setting))
        print_result(results[-1])
        write(out, conditions, results)
    show_result(f"written to {out}")


if __name__ == "__main__":
    main()
