"""Every Triton kernel is compiled with every tile that is shipped, and fits the GPU.

What is compiled is what the launchers launch: their calls are recorded on meta tensors. Launches
that differ in sizes only are compiled once, at the largest, where registers are scarcest. That is
done for one generation of GPU; for the others each product is compiled with its largest tile.
"""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import moe_kernels, moe_rivals, tune_tiles
from benchmarks.tune_tiles import PRODUCTS, SHARED_MEMORY_BYTES, faults
from moe_kernels import ops, triton_ffn
from moe_kernels.tiles import SQUARE, TABLE, LayerSize, Tile, Tiles, read_table
from moe_kernels.triton_seam import is_interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing"),
]

NUM_EXPERTS, NUM_TOKENS, NUM_CHOICES = 8, 4096, 2
SIZES = ("width", "hidden", "depth", "left_width", "right_width", "num_shares", "num_experts")
TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
ALL_TILES_ON = 90
# The sizes that `_product` divides by block_n and block_k.
COLUMNS_AND_DEPTH = {
    "up": ("hidden", "width"),
    "hidden_grad": ("hidden", "width"),
    "rows_matmul": ("width", "depth"),
}
# The default tiles at sizes of DESIGN's range that the table has no entry for.
DEFAULTS = [LayerSize(1024, 1024, is_gated) for is_gated in (False, True)]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(monkeypatch, size, tiles=None):
    """Every (kernel, values, constants) of a training step of that size, with those tiles."""
    calls = []
    with monkeypatch.context() as patched:
        patched.setattr(
            triton_ffn, "launch", lambda kernel, _grid, *rest: calls.append((kernel, *rest))
        )
        if tiles is not None:
            patched.setattr(triton_ffn, "tiles_for", lambda _: tiles)
        step(size)
    return calls


def step(size):
    dtype, experts = getattr(torch, size.dtype or "bfloat16"), size.num_experts or NUM_EXPERTS
    rows, z_width = NUM_TOKENS * NUM_CHOICES, size.hidden * (2 if size.is_gated else 1)
    x, y_RD = meta(NUM_TOKENS, size.width, dtype=dtype), meta(rows, size.width, dtype=dtype)
    weight = meta(NUM_TOKENS, NUM_CHOICES, dtype=torch.float32)
    inverse = meta(rows, dtype=torch.int32)
    plan = ops.RowPlan(meta(rows, dtype=torch.int32), inverse, meta(experts + 1, dtype=torch.int32))
    weights = ops.Weights(
        meta(experts * z_width, size.width, dtype=dtype),
        meta(experts, z_width, dtype=dtype),
        meta(experts * size.width, size.hidden, dtype=dtype),
        meta(experts, size.width, dtype=dtype),
    )
    activation = ops.ACTIVATIONS["geglu" if size.is_gated else "gelu"]
    given = {"plan": plan, "weights": weights, "activation": activation}
    y, z = triton_ffn.forward(x, weight, **given)
    triton_ffn.backward(y, x, weight, z, needs=[True] * 6, **given)
    triton_ffn.combine_backward(x, y_RD, weight, inverse)


def kind(call):
    """What makes a launch another program, sizes apart; where blocks are uneven it has masks."""
    kernel, values, constants = call
    blocks = zip(COLUMNS_AND_DEPTH.get(kernel.__name__, ()), ("block_n", "block_k"), strict=False)
    is_even = all(constants[size] % constants[block] == 0 for size, block in blocks)
    rest = {name: value for name, value in constants.items() if name not in SIZES}
    dtypes = [getattr(value, "dtype", type(value)) for value in values]
    return f"{kernel.__name__} {sorted(rest.items())} {is_even} {dtypes}"


def volume(call):
    sizes = [call[2][name] for name in SIZES if name in call[2]]
    return torch.tensor(sizes, dtype=torch.float64).prod().item()


def distinct(calls):
    """One launch of each kind, the largest."""
    return list({kind(call): call for call in sorted(calls, key=volume)}.values())


def largest_tiles(calls):
    """Each product's launch with the most sums per thread, then the most bytes in flight.

    Products that differ in their flags count apart; the tiles of the other kernels are fixed.
    """

    def load(call):
        m, n, k, warps, stages = (call[2][name] for name in TILE)
        return (m * n / warps, stages * k * (m + n))

    largest = {}
    for call in sorted((call for call in calls if call[0].__name__ in PRODUCTS), key=load):
        flags = {name: value for name, value in call[2].items() if name not in (*SIZES, *TILE)}
        largest[f"{call[0].__name__} {sorted(flags.items())}"] = call
    return list(largest.values())


def all_faults(calls, capability):
    # Not in threads: Python 3.11 counts the recursion of ast.parse per interpreter, so where the
    # collector runs in the middle of one thread's parse, another's fails ("depth mismatch").
    return [fault for call in calls for fault in faults(*call, capability=capability)]


def shipped(monkeypatch):
    sizes = [*read_table(TABLE), *DEFAULTS]
    return [call for size in sizes for call in launches(monkeypatch, size)]


@pytest.mark.parametrize("capability", list(SHARED_MEMORY_BYTES))
def test_kernels_fit_the_gpu(monkeypatch, capability):
    calls = distinct(shipped(monkeypatch))
    calls = calls if capability == ALL_TILES_ON else largest_tiles(calls)
    assert {kernel.__name__ for kernel, *_ in calls} >= set(PRODUCTS)
    assert all_faults(calls, capability) == []


def test_fp32_kernels_fit_the_gpu(monkeypatch):
    calls = distinct(launches(monkeypatch, LayerSize(1024, 4096, False, dtype="float32")))
    assert all_faults(calls, 90) == []


def test_every_tile_of_the_table_is_compiled(monkeypatch):
    compiled = {kind(call) for call in distinct(shipped(monkeypatch))}
    for size, tiles in read_table(TABLE).items():
        own = {kind(call) for call in launches(monkeypatch, size, tiles)}
        assert own <= compiled, size


def test_a_tile_too_large_is_found(monkeypatch):
    large = Tile(128, 256, 64, 8, 6)
    tiles = Tiles(large, large, large, large)
    calls = launches(monkeypatch, LayerSize(768, 3072, False), tiles)
    calls = [call for call in calls if call[0].__name__ == "rows_matmul"]
    (fault, *_) = all_faults(calls[:1], 80)
    assert "shared memory" in fault


def test_the_tuner_refuses_what_does_not_fit_every_gpu():
    case = moe_rivals.Case(1024, 4096, 2, NUM_CHOICES, 64)
    problem = moe_rivals.draw(case, device=torch.device("cpu"), dtype=torch.bfloat16)
    fits = tune_tiles.fits_with(moe_kernels.sample_of(problem))
    assert fits("hidden_grad", SQUARE)  # the same programs as above: Triton has them in its cache
    assert not fits("hidden_grad", Tile(128, 256, 64, 8, 4)), "more than an A100 has"
