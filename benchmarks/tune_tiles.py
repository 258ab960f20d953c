"""Find the tiles of a layer size by timing, on the GPU that it is to be trained on.

    sample, tile -> step_kernels -> timer -> best_tiles -> triton_tiles.json

Not part of training: `python -m benchmarks.moe_gpu --tune` runs it and writes the table. A tile is
taken only if its kernels fit every generation of GPU of triton_compile.py, for the table is one.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import triton_compile
from moe_kernels import triton_ffn
from moe_kernels.tiles import Tile, Tiles
from moe_kernels.triton_seam import Constant, KernelInterface, Launcher, OutOfResources, Values

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
    order_R: Tensor
    inverse_R: Tensor
    offset_E1: Tensor
    w_in: Tensor
    w_out: Tensor
    z_RF: Tensor
    h_RF: Tensor
    function: str
    is_gated: bool

    def to(self, device: torch.device) -> "Sample":
        """Return the sample with its tensors on `device`."""
        return dataclasses.replace(
            self,
            x_TD=self.x_TD.to(device),
            dy_TD=self.dy_TD.to(device),
            weight_Tk=self.weight_Tk.to(device),
            order_R=self.order_R.to(device),
            inverse_R=self.inverse_R.to(device),
            offset_E1=self.offset_E1.to(device),
            w_in=self.w_in.to(device),
            w_out=self.w_out.to(device),
            z_RF=self.z_RF.to(device),
            h_RF=self.h_RF.to(device),
        )


def layer_of(
    sample: Sample, tiles: Tiles | None, *, launcher: Launcher | None = None
) -> triton_ffn.Layer:
    """Return what a step's kernels share; lists the row tiles. None: the table's tiles."""
    return triton_ffn.make_layer(
        sample.x_TD,
        sample.weight_Tk,
        order_R=sample.order_R,
        inverse_R=sample.inverse_R,
        offset_E1=sample.offset_E1,
        hidden=sample.h_RF.shape[1],
        function=sample.function,
        is_gated=sample.is_gated,
        allow_tf32=False,
        tiles=tiles,
        launcher=launcher,
    )


def step_kernels(sample: Sample, layer: triton_ffn.Layer) -> dict[str, Run]:
    """Return a function per product of a step that launches it."""
    s, k = sample, triton_ffn
    return {
        "up": lambda: k.up(layer, s.x_TD, s.w_in, None),
        "down": lambda: k.rows_matmul(layer, s.h_RF, s.w_out, bias=None, is_transposed=True),
        "hidden_grad": lambda: k.hidden_grad(
            layer, s.dy_TD, z_RF=s.z_RF, w_out=s.w_out, keeps_h=True, keeps_gate=True
        ),
        "dx": lambda: k.rows_matmul(layer, s.z_RF, s.w_in, bias=None, is_transposed=False),
        "dw_in": lambda: k.weight_grad(layer, s.z_RF, s.x_TD, is_left_gathered=False),
        "dw_out": lambda: k.weight_grad(layer, s.dy_TD, s.h_RF, is_left_gathered=True),
    }


def candidates(field: str, *, is_gated: bool) -> list[Tile]:
    """Return the tiles of 16-bit products worth timing for the kernels of a field of Tiles."""
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
    """Return a function of (field, tile): the time of the field's kernels; inf: they do not run."""

    def measure(field: str, tile: Tile) -> float:
        kernels = step_kernels(sample, layer_of(sample, Tiles(tile, tile, tile, tile)))
        try:
            return sum(timer(kernels[name]) for name, of in FIELDS.items() if of == field)
        except OutOfResources:
            return math.inf

    return measure


def launches(sample: Sample, field: str, tiles: Tiles | None) -> list[triton_compile.Launch]:
    """Return what a field's kernels launch, without launching it."""
    calls: list[triton_compile.Launch] = []

    def record(
        kernel: KernelInterface,
        grid: tuple[int, ...],
        values: Values,
        constants: dict[str, Constant],
    ) -> None:
        calls.append((kernel, values, constants))

    meta = sample.to(torch.device("meta"))
    layer = layer_of(meta, tiles, launcher=record)
    calls.clear()  # the list of row tiles is no field's
    for name, run in step_kernels(meta, layer).items():
        if FIELDS[name] == field:
            run()
    return calls


def fits_with(sample: Sample) -> Fits:
    """Return a function of (field, tile): whether the field's kernels fit every GPU generation."""

    def fits(field: str, tile: Tile) -> bool:
        calls = launches(sample, field, Tiles(tile, tile, tile, tile))
        pairs = itertools.product(calls, triton_compile.SHARED_MEMORY_BYTES)
        found = (triton_compile.faults(*call, capability=capability) for call, capability in pairs)
        return not any(itertools.chain.from_iterable(found))

    return fits


def _fastest(times: dict[Tile, float], field: str, fits: Fits) -> Tile | None:
    ranked = sorted((ms, number, tile) for number, (tile, ms) in enumerate(times.items()))
    return next((tile for ms, _, tile in ranked if ms < math.inf and fits(field, tile)), None)


def best_tiles(measure: Measure, *, fits: Fits, is_gated: bool) -> Tiles:
    """Return the fastest tile of each field that fits, where three of them share their rows.

    Raises:
        ValueError: No candidates run and fit.
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
    return best_tiles(measure_with(sample, timer), fits=fits_with(sample), is_gated=sample.is_gated)
