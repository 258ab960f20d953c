"""The tiles of the Triton kernels by the size of a layer: the shipped table and its lookup.

benchmarks/tune_tiles.py -> tiles.json -> tiles_for(LayerSize) -> Tiles -> triton_ffn

An entry with nulls serves any number of experts, dtype and number of rows. One that names them was
measured for them by `python -m benchmarks.moe_gpu --tune` and takes precedence. Nothing is timed
during training.
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tiles.json")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block sizes of a matrix product (rows, columns, depth) and how it is pipelined.

    programs_per_sm: programs of the persistent grid per multiprocessor; where two fit, one computes
        during the other's prologue and epilogue.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2

    def constants(self) -> dict[str, int | str | bool]:
        """Return the tile as the kernels take it: constants and compiler options."""
        blocks = {"block_m": self.m, "block_n": self.n, "block_k": self.k}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One tile per kernel; those of `up`, `rows` and `hidden_grad` share the list of row tiles."""

    up: Tile
    rows: Tile
    hidden_grad: Tile
    weight_grad: Tile

    def __post_init__(self) -> None:
        assert self.up.m == self.rows.m == self.hidden_grad.m, "one list of row tiles serves three"


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """What tiles depend on. None, in the table, stands for any; `max_rows` is a power of two."""

    width: int
    hidden: int
    is_gated: bool
    num_experts: int | None = None
    dtype: str | None = None
    max_rows: int | None = None

    def general(self) -> "LayerSize":
        """Return the key of the entry for any number of experts, dtype and rows."""
        return LayerSize(self.width, self.hidden, self.is_gated)


# fp32 products run outside the tensor cores, whose fp32 is tf32. Small tiles fit in registers; on
# sm_90 `rows` of the largest layers does only with 8 warps.
FP32_TILE = Tile(64, 64, 32, 4, 2)
FP32_TILES = Tiles(FP32_TILE, Tile(64, 64, 32, 8, 2), FP32_TILE, FP32_TILE)
# A larger tile reads fewer bytes from L2 per FLOP: (m+n)/(m*n). 128 x 128 fits in the registers
# with any epilogue but a gate and a value side by side, which take twice the registers: there `up`
# has a shallower pipeline (with a depth of 64 it spills on sm_100), `hidden_grad` half the columns.
SQUARE, SHALLOW, SLIM = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 64, 8, 3),
)
DEFAULT_TILES = Tiles(SQUARE, SQUARE, SQUARE, SQUARE)
GATED_TILES = Tiles(SHALLOW, SQUARE, SLIM, SQUARE)


def power_of_2(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def layer_size(
    width: int, hidden: int, *, is_gated: bool, num_experts: int, dtype: torch.dtype, num_rows: int
) -> LayerSize:
    """Return the key of a call; its number of rows counts as the next power of two."""
    name = str(dtype).removeprefix("torch.")
    return LayerSize(width, hidden, is_gated, num_experts, name, power_of_2(num_rows))


def read_table(path: Path) -> dict[LayerSize, Tiles]:
    """Return the entries of a table file.

    Raises:
        ValueError: An entry lacks a field or has one too many.
    """
    sizes = [field.name for field in dataclasses.fields(LayerSize)]
    kernels = [field.name for field in dataclasses.fields(Tiles)]
    table = {}
    for entry in json.loads(path.read_text("utf-8")):
        if set(entry) != {*sizes, *kernels}:
            raise ValueError(f"{path}: entry {entry}: must have {[*sizes, *kernels]}")
        tiles = Tiles(**{name: Tile(*entry[name]) for name in kernels})
        table[LayerSize(**{name: entry[name] for name in sizes})] = tiles
    return table


def _order(size: LayerSize) -> tuple[int, int, bool, int, str, int]:
    of_call = (size.num_experts or 0, size.dtype or "", size.max_rows or 0)
    return (size.width, size.hidden, size.is_gated, *of_call)


def write_table(path: Path, table: dict[LayerSize, Tiles]) -> None:
    """Write the entries, one per line, a layer's general entry first."""
    lines = []
    for size in sorted(table, key=_order):
        tiles = {name: dataclasses.astuple(tile) for name, tile in vars(table[size]).items()}
        lines.append(json.dumps(vars(size) | tiles))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


@functools.cache
def _shipped() -> dict[LayerSize, Tiles]:
    return read_table(TABLE)


def tiles_for(size: LayerSize) -> Tiles:
    """Return the tiles of a call's own entry, else of its general entry, else the default."""
    if size.dtype in ("float32", "float64"):
        return FP32_TILES
    default = GATED_TILES if size.is_gated else DEFAULT_TILES
    table = _shipped()
    return table.get(size, table.get(size.general(), default))
