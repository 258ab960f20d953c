"""The CPU benchmark of the MoE layer: it compares before it times, and writes what it measured."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import moe_cpu


def inputs(num_tokens=40, dim=16):
    generator = torch.Generator().manual_seed(0)
    x_BLD, dy_BLD = torch.randn(2, 1, num_tokens, dim, generator=generator).unbind()
    return x_BLD.requires_grad_(), dy_BLD


def test_every_loop_computes_what_the_layer_does():
    layers = moe_cpu.build_layers(16, 24)
    moe_cpu.check(layers, *inputs())
    assert set(layers) == {moe_cpu.RIVAL, moe_cpu.OURS, *moe_cpu.LOOPS}


def test_every_expert_has_tokens_at_the_measured_shape():
    num_tokens, dim, hidden_dim = moe_cpu.SHAPES[0]
    layer = moe_cpu.build_layers(dim, hidden_dim)[moe_cpu.OURS]
    layer(inputs(num_tokens, dim)[0])
    assert layer.routing.rows_per_expert_E.min() > 0.5 * num_tokens * 2 / 8


@pytest.mark.parametrize("name", moe_cpu.LOOPS)
@pytest.mark.parametrize("parameter", ["gate.weight", "experts.3.0.bias", "experts.7.2.weight"])
def test_a_loop_that_computes_something_else_is_not_timed(name, parameter):
    layers = moe_cpu.build_layers(16, 24)
    with torch.no_grad():
        layers[name].get_parameter(parameter).mul_(1.1).add_(0.01)
    with pytest.raises(ValueError, match="off that of moevit"):
        moe_cpu.check(layers, *inputs())


def test_dense_rival_has_the_active_flops():
    layers = moe_cpu.build_layers(16, 24)
    found = {}
    for name in (moe_cpu.OURS, moe_cpu.RIVAL):
        with FlopCounterMode(display=False) as counter:
            layers[name](torch.randn(1, 10, 16))
        found[name] = counter.get_total_flops() / 10
    router_flops = 2 * 16 * 8
    assert found[moe_cpu.OURS] - router_flops == found[moe_cpu.RIVAL]


def test_it_writes_every_row_of_every_shape(tmp_path, monkeypatch, capsys):
    out, shapes = tmp_path / "result.json", ["24,16,24", "32,8,16"]
    command = ["moe_cpu", "--repeats", "2", "--out", str(out), "--shapes", *shapes]
    # The test process keeps its one thread.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", command)
    moe_cpu.main()
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [f"{r['tokens']},{r['dim']},{r['hidden']}" for r in rows[::5]] == shapes
    assert [r["loop"] for r in rows[:5]] == [moe_cpu.RIVAL, moe_cpu.OURS, *moe_cpu.LOOPS]
    assert all(r["ratio"] == 1 for r in rows if r["loop"] == moe_cpu.RIVAL)
    assert all(r["of_ours"] == 1 for r in rows if r["loop"] == moe_cpu.OURS)
    assert {"date", "commit", "device", "versions", "clock"} <= set(result)
    assert "loop=moevit" in capsys.readouterr().out
