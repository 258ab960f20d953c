"""The table of tiles and the search that fills it, with made-up times: no kernel runs here."""

import json
import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import moe_gpu, moe_kernels, moe_rivals, tune_tiles
from moe_kernels import ops, tiles, triton_ffn
from moe_kernels.tiles import DEFAULT_TILES, FP32_TILES, LayerSize, Tile, Tiles
from moe_kernels.triton_seam import OutOfResources

KEY = {"num_experts": 8, "dtype": torch.bfloat16}


def size(width=384, hidden=1536, *, is_gated=False, num_rows=50176, **of_call):
    of_call = KEY | of_call
    return tiles.layer_size(width, hidden, is_gated=is_gated, num_rows=num_rows, **of_call)


def with_table(monkeypatch, tmp_path, table):
    tiles.write_table(tmp_path / "tiles.json", table)
    entries = tiles.read_table(tmp_path / "tiles.json")
    monkeypatch.setattr(tiles, "_shipped", lambda: entries)


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = tiles.read_table(tiles.TABLE) | {size(): DEFAULT_TILES}
    tiles.write_table(tmp_path / "tiles.json", table)
    assert tiles.read_table(tmp_path / "tiles.json") == table


def test_the_shipped_table_is_as_the_tuner_writes_it(tmp_path):
    tiles.write_table(tmp_path / "again.json", tiles.read_table(tiles.TABLE))
    assert (tmp_path / "again.json").read_text() == tiles.TABLE.read_text()


def test_a_malformed_entry_is_refused(tmp_path):
    (entry, *_) = json.loads(tiles.TABLE.read_text())
    del entry["up"]
    (tmp_path / "tiles.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"tiles.json: entry .*: must have"):
        tiles.read_table(tmp_path / "tiles.json")


def test_the_entry_of_the_call_comes_before_the_general_one(monkeypatch, tmp_path):
    own, general = (Tiles(t, t, t, t) for t in (Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)))
    with_table(monkeypatch, tmp_path, {size(): own, LayerSize(384, 1536, False): general})
    assert tiles.tiles_for(size()) == own
    others = [{"num_experts": 16}, {"dtype": torch.float16}, {"num_rows": 65537}]
    assert all(tiles.tiles_for(size(**other)) == general for other in others)
    assert tiles.tiles_for(size(384, 384)) == DEFAULT_TILES
    assert tiles.tiles_for(size(is_gated=True)) == tiles.GATED_TILES
    assert tiles.tiles_for(size(dtype=torch.float32)) == FP32_TILES


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (1024, 1024), (1025, 2048)])
def test_rows_count_by_the_next_power_of_two(rows, bucket):
    assert size(num_rows=rows).max_rows == bucket


def sample_on_meta(case):
    problem = moe_rivals.draw(case, device=torch.device("cpu"), dtype=torch.bfloat16)
    return moe_kernels.sample_of(problem).to(torch.device("meta"))


def test_a_step_launches_the_tiles_of_its_rows(monkeypatch, tmp_path):
    """On meta tensors: the choice reads nothing from the device."""
    tile = Tile(64, 128, 64, 4, 3, 1)
    with_table(monkeypatch, tmp_path, {size(16, 24, num_rows=70): Tiles(tile, tile, tile, tile)})
    for num_tokens, expected in ((70, tile), (64, DEFAULT_TILES.up)):
        sample = sample_on_meta(moe_rivals.Case(16, 24, 8, 1, num_tokens))
        (launch,) = tune_tiles.launches(sample, "up", None)
        assert {k: launch[2][k] for k in expected.constants()} == expected.constants()


def test_programs_per_sm_set_the_size_of_the_grid(monkeypatch):
    grids, asked = [], []

    def num_programs(_, *, per_sm):
        asked.append(per_sm)
        return 5 * per_sm

    monkeypatch.setattr(triton_ffn, "num_programs", num_programs)
    sample = sample_on_meta(moe_rivals.Case(16, 256, 8, 1, 6400))
    for per_sm in (1, 2):
        tile = Tile(64, 64, 64, 4, 3, per_sm)
        layer = tune_tiles.layer_of(
            sample, Tiles(tile, tile, tile, tile), launcher=lambda _, grid, *__: grids.append(grid)
        )
        grids.clear()
        for run in tune_tiles.step_kernels(sample, layer).values():
            run()
        assert set(grids) <= {(5 * per_sm,), (8,)}, "or all tiles that there are"
        assert (5 * per_sm,) in grids
    assert set(asked) == {1, 2}


@pytest.mark.parametrize("field", ["up", "weight_grad"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_candidates_fit_the_registers_and_the_smallest_shared_memory(field, is_gated):
    tiles = tune_tiles.candidates(field, is_gated=is_gated)
    assert len(tiles) == len(set(tiles)) >= 10
    assert {tile.m for tile in tiles} == {64, 128}
    halves = 2 if is_gated and field == "up" else 1
    for tile in tiles:
        assert halves * tile.m * tile.n <= 128 * 32 * tile.num_warps
        assert 2 * tile.num_stages * tile.k * (tile.m + tile.n) < 163 * 1024


def made_up(fast):
    """Times by field and tile: those of `fast`, and 9 ms for others."""
    return lambda field, tile: fast.get((field, tile), 9.0)


WIDE, NARROW = Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3)
LOW, DEEP = Tile(64, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)


def test_the_fastest_tile_of_each_kernel_is_found():
    fast = {("up", WIDE): 3.0, ("rows", NARROW): 2.0, ("hidden_grad", WIDE): 4.0}
    fast |= {("weight_grad", LOW): 1.0, ("weight_grad", DEEP): 2.0}
    found = tune_tiles.best_tiles(made_up(fast), fits=lambda *_: True, is_gated=False)
    assert found == Tiles(WIDE, NARROW, WIDE, LOW)


def test_three_kernels_share_the_rows_that_are_fastest_together():
    fast = {("up", LOW): 1.0}  # alone it is the fastest, but the other two are slow with 64 rows
    fast |= {(field, WIDE): 4.0 for field in tune_tiles.ROW_FIELDS}
    found = tune_tiles.best_tiles(made_up(fast), fits=lambda *_: True, is_gated=False)
    assert (found.up, found.rows, found.hidden_grad) == (WIDE, WIDE, WIDE)


def test_what_does_not_fit_every_gpu_is_passed_over():
    fast = {("rows", WIDE): 1.0, ("rows", NARROW): 2.0, ("weight_grad", LOW): 1.0}
    fast |= {("up", WIDE): 1.0, ("hidden_grad", WIDE): 1.0, ("weight_grad", DEEP): 3.0}
    refused = {("rows", WIDE), ("weight_grad", LOW)}
    found = tune_tiles.best_tiles(made_up(fast), fits=lambda *of: of not in refused, is_gated=False)
    assert found == Tiles(WIDE, NARROW, WIDE, DEEP)


def test_no_tile_that_runs_is_an_error():
    with pytest.raises(ValueError, match="no tiles run here"):
        tune_tiles.best_tiles(lambda *_: math.inf, fits=lambda *_: True, is_gated=False)


def test_a_kernel_is_timed_for_each_of_its_uses(monkeypatch):
    launched = []
    monkeypatch.setattr(triton_ffn, "launch", lambda kernel, *_: launched.append(kernel))
    sample = sample_on_meta(moe_rivals.Case(16, 24, 4, 2, 40))

    def timer(run):
        run()
        return 1.0

    measure = tune_tiles.measure_with(sample, timer)
    times = {field: measure(field, WIDE) for field in vars(DEFAULT_TILES)}
    assert times == {"up": 1, "rows": 2, "hidden_grad": 1, "weight_grad": 2}
    assert [kernel.__name__ for kernel in launched].count("weight_grad") == 2


def test_a_tile_without_room_is_slower_than_any(monkeypatch):
    monkeypatch.setattr(triton_ffn, "launch", lambda *_: None)

    def timer(_):
        raise OutOfResources(300000, 232448, "shared memory")

    sample = sample_on_meta(moe_rivals.Case(16, 24, 4, 2, 40))
    assert tune_tiles.measure_with(sample, timer)("up", WIDE) == math.inf


def test_tuning_adds_an_entry_and_keeps_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(tune_tiles, "tune", lambda sample, timer: DEFAULT_TILES)
    table, cases = tmp_path / "tiles.json", moe_gpu.all_cases("dry")
    setting = moe_gpu.setting_of(is_dry=True, repeats=2)
    moe_gpu.tune(cases, setting, table=table, deadline_s=math.inf)
    entries = tiles.read_table(table)
    shipped = tiles.read_table(tiles.TABLE)
    added = {key: tiles for key, tiles in entries.items() if key not in shipped}
    assert {key: entries[key] for key in shipped} == shipped
    expected = LayerSize(32, 64, False, num_experts=4, dtype="float32", max_rows=128)
    assert added[expected] == DEFAULT_TILES
    assert len(added) == len(cases)


def test_a_sample_is_what_the_layer_computes_with():
    case = moe_rivals.Case(16, 24, 4, 2, 40, activation="geglu")
    problem = moe_rivals.draw(case, device=torch.device("cpu"), dtype=torch.float32)
    sample = moe_kernels.sample_of(problem)
    plan = ops.plan_rows(problem.expert_id_Tk, 4)
    assert torch.equal(sample.plan.order_R, plan.order_R)
    assert sample.activation == ("gelu", True)
    w_in, _, w_out, _ = sample.weights
    assert (w_in.shape, w_out.shape) == ((4 * 48, 16), (4 * 16, 24))
    assert (sample.z_RF.shape, sample.h_RF.shape) == ((80, 48), (80, 24))
