"""Find the tiles of a layer size by timing, on the GPU that it is to be trained on.

    sample, tile -> step_kernels -> timer -> best_tiles -> moe_kernels/tiles.json
    (kernel, values, constants) -> source_of -> Triton, ptxas -> faults: shared memory, spills

Not part of training: `python -m benchmarks.moe_gpu --tune` runs it and writes the table. There is
one table for all GPUs, so a tile is taken only if its kernels fit every generation: they are
compiled for those that are not here, which needs no GPU, and the limits are read from the result.
"""

import dataclasses
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels import triton_ffn
from moe_kernels.plan import Activation, RowPlan, Weights
from moe_kernels.tiles import Tile, Tiles
from moe_kernels.triton_seam import (
    Constant,
    KernelInterface,
    Launcher,
    OutOfResources,
    Values,
    launch_options,
    triton,
)

# Bytes that a program may have, by compute capability: A100, H100 and H200, B200.
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = ("up", "rows_matmul", "hidden_grad", "weight_grad")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
# kernel -> the field of Tiles that decides it
FIELDS = {
    "up": "up",
    "down": "rows",
    "hidden_grad": "hidden_grad",
    "dx": "rows",
    "dw_in": "weight_grad",
    "dw_out": "weight_grad",
}
ROW_FIELDS = ("up", "rows", "hidden_grad")  # these share the rows of a tile
BLOCKS = [(m, n, k) for m in (64, 128) for n in (64, 128, 256) for k in (32, 64)]
STAGES, WARPS, PROGRAMS_PER_SM = (3, 4), (4, 8), (1, 2)
# The pipeline's buffers must leave the epilogue some of A100's shared memory, the smallest.
PIPELINE_BYTES = 150 * 1024
# fp32 sums of a thread: above, they do not fit in its 255 registers; below, it has too little work.
SUMS_PER_THREAD = (64, 128)
LEAST_DEPTH = 128  # of all stages together, to hide the latency of a load

Launch = tuple[KernelInterface, Values, dict[str, Constant]]
Run = Callable[[], object]
Timer = Callable[[Run], float]
Measure = Callable[[str, Tile], float]
Fits = Callable[[str, Tile], bool]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The tensors of one training step of a layer without biases, real or on device meta.

    z_RF and h_RF also stand for their gradients: what they hold does not matter to the time.
    """

    x_TD: Tensor
    dy_TD: Tensor
    weight_Tk: Tensor
    z_RF: Tensor
    h_RF: Tensor
    plan: RowPlan
    weights: Weights
    activation: Activation

    def to(self, device: torch.device) -> "Sample":
        """Return the sample with its tensors on `device`."""
        rows = (self.x_TD, self.dy_TD, self.weight_Tk, self.z_RF, self.h_RF)
        x_TD, dy_TD, weight_Tk, z_RF, h_RF = (x.to(device) for x in rows)
        plan = RowPlan(*(x.to(device) for x in self.plan))
        w_in, w_out = self.weights.w_in.to(device), self.weights.w_out.to(device)
        weights = Weights(w_in, None, w_out, None)
        return Sample(x_TD, dy_TD, weight_Tk, z_RF, h_RF, plan, weights, self.activation)


def layer_of(
    sample: Sample, tiles: Tiles | None, *, launcher: Launcher | None = None
) -> triton_ffn.Layer:
    """Return what a step's kernels share; lists the row tiles. None: the table's tiles."""
    s, hidden = sample, sample.h_RF.shape[1]
    rows = (s.x_TD, s.weight_Tk, s.plan)
    return triton_ffn.make_layer(*rows, s.activation, hidden=hidden, tiles=tiles, launcher=launcher)


def step_kernels(sample: Sample, layer: triton_ffn.Layer) -> dict[str, Run]:
    """Return a function per product of a step that launches it."""
    s, k, (w_in, _, w_out, _) = sample, triton_ffn, sample.weights
    return {
        "up": lambda: k.up(layer, s.x_TD, s.weights),
        "down": lambda: k.rows_matmul(layer, s.h_RF, w_out, bias=None, is_transposed=True),
        "hidden_grad": lambda: k.hidden_grad(
            layer, s.dy_TD, z_RF=s.z_RF, w_out=w_out, keeps_h=True, keeps_gate=True
        ),
        "dx": lambda: k.rows_matmul(layer, s.z_RF, w_in, bias=None, is_transposed=False),
        "dw_in": lambda: k.weight_grad(layer, s.z_RF, s.x_TD, is_left_gathered=False),
        "dw_out": lambda: k.weight_grad(layer, s.dy_TD, s.h_RF, is_left_gathered=True),
    }


def candidates(field: str, *, is_gated: bool) -> list[Tile]:
    """Return the tiles that are worth timing for a field's kernels, in 16-bit products."""
    least, most = SUMS_PER_THREAD
    # A gate and a value are two sums side by side.
    halves = 2 if is_gated and field in ("up", "hidden_grad") else 1
    found = []
    for (m, n, k), warps, stages in itertools.product(BLOCKS, WARPS, STAGES):
        is_deep, pipeline_bytes = stages * k >= LEAST_DEPTH, 2 * stages * k * (m + n)
        sums = halves * m * n // (32 * warps)
        if is_deep and least <= sums <= most and pipeline_bytes <= PIPELINE_BYTES:
            found += [Tile(m, n, k, warps, stages, programs) for programs in PROGRAMS_PER_SM]
    return found


def measure_with(sample: Sample, timer: Timer) -> Measure:
    """Return a function of (field, tile): its kernels' time, inf if they do not run."""

    def measure(field: str, tile: Tile) -> float:
        kernels = step_kernels(sample, layer_of(sample, Tiles(tile, tile, tile, tile)))
        try:
            return sum(timer(kernels[name]) for name, of in FIELDS.items() if of == field)
        except OutOfResources:
            return math.inf

    return measure


def launches(sample: Sample, field: str, tiles: Tiles | None) -> list[Launch]:
    """Return what a field's kernels launch, without launching it."""
    calls: list[Launch] = []

    def record(
        kernel: KernelInterface,
        grid: tuple[int, ...],
        values: Values,
        constants: dict[str, Constant],
    ) -> None:
        calls.append((kernel, values, constants))

    meta = sample.to(torch.device("meta"))
    layer = layer_of(meta, tiles, launcher=record)
    calls.clear()  # of `schedule`, which belongs to no field
    for name, run in step_kernels(meta, layer).items():
        if FIELDS[name] == field:
            run()
    return calls


def source_of(
    kernel: KernelInterface, values: Values, constants: dict[str, Constant]
) -> "triton.compiler.ASTSource":
    """Return what Triton specialises a launch on: dtypes, multiples of 16, and the constants."""
    names, signature, divisible = kernel.arg_names, {}, {}
    fixed: dict[str, Constant | None] = {n: v for n, v in constants.items() if n in names}
    for index, (name, value) in enumerate(zip(names, values, strict=False)):
        if value is None:
            fixed[name] = None
        else:
            signature[name] = "i32" if isinstance(value, int) else TYPES[value.dtype]
            if not isinstance(value, int) or value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(fixed, "constexpr")
    signature = {name: signature[name] for name in names}
    return triton.compiler.ASTSource(kernel, signature, fixed, divisible)


def stack_bytes(program: "triton.compiler.CompiledKernel") -> int:
    """Return the bytes of stack per thread: spills, in a kernel without calls and arrays."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(program.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [re.search(rf"{name}:(\d+)", report) for name in ("STACK", "LOCAL")]
    assert all(found), report
    return sum(int(match[1]) for match in found if match)


def faults(
    kernel: KernelInterface, values: Values, constants: dict[str, Constant], *, capability: int
) -> Iterator[str]:
    """Yield why a launch would fail, or be very slow, on a GPU of that compute capability."""
    source = source_of(kernel, values, constants)
    options = {n: v for n, v in constants.items() if n not in kernel.arg_names} | launch_options()
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    program = triton.compile(source, target=target, options=options)
    where = f"{kernel.__name__} {constants} sm_{capability}"
    if program.metadata.shared > SHARED_MEMORY_BYTES[capability]:
        yield f"{where}: {program.metadata.shared} bytes of shared memory"
    if spilled := stack_bytes(program):
        yield f"{where}: {spilled} bytes spilled per thread"
    is_16_bit = isinstance(values[0], Tensor) and values[0].dtype.itemsize == 2
    is_product = kernel.__name__ in PRODUCTS and is_16_bit
    if capability == 90 and is_product and "wgmma.mma_async" not in program.asm["ptx"]:
        yield f"{where}: no wgmma"


def fits_with(sample: Sample) -> Fits:
    """Return a function of (field, tile): whether the field's kernels fit every GPU generation."""

    def fits(field: str, tile: Tile) -> bool:
        calls = launches(sample, field, Tiles(tile, tile, tile, tile))
        pairs = itertools.product(calls, SHARED_MEMORY_BYTES)
        found = (faults(*call, capability=capability) for call, capability in pairs)
        return not any(itertools.chain.from_iterable(found))

    return fits


def _fastest(times: dict[Tile, float], field: str, fits: Fits) -> Tile | None:
    ranked = sorted((ms, number, tile) for number, (tile, ms) in enumerate(times.items()))
    return next((tile for ms, _, tile in ranked if ms < math.inf and fits(field, tile)), None)


def best_tiles(measure: Measure, *, fits: Fits, is_gated: bool) -> Tiles:
    """Return the fastest tiles that fit; three of the fields must have the same rows of a tile.

    Raises:
        ValueError: No candidate both runs here and fits every GPU.
    """
    times = {
        field: {tile: measure(field, tile) for tile in candidates(field, is_gated=is_gated)}
        for field in (*ROW_FIELDS, "weight_grad")
    }

    def of_rows(field: str, m: int) -> dict[Tile, float]:
        return {tile: ms for tile, ms in times[field].items() if tile.m == m}

    def total(m: int) -> float:
        return sum(min(of_rows(field, m).values(), default=math.inf) for field in ROW_FIELDS)

    weight_grad = _fastest(times["weight_grad"], "weight_grad", fits)
    for m in sorted({tile.m for tile in times["up"]}, key=total):
        up, rows, hidden_grad = (_fastest(of_rows(field, m), field, fits) for field in ROW_FIELDS)
        if up and rows and hidden_grad and weight_grad:
            return Tiles(up, rows, hidden_grad, weight_grad)
    raise ValueError("tuning: no tiles run here and fit every GPU")


def tune(sample: Sample, timer: Timer) -> Tiles:
    """Return the fastest tiles for a sample's sizes on its device."""
    return best_tiles(
        measure_with(sample, timer), fits=fits_with(sample), is_gated=sample.activation.is_gated
    )
