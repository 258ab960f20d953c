"""The GPU benchmark of the MoE layer, run dry on a CPU, and its adapters on stand-in libraries."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from benchmarks import moe_check, moe_gpu, moe_kernels, moe_rivals
from benchmarks.moe_check import LayerRow
from benchmarks.moe_gpu import CaseResult, KernelRow
from benchmarks.moe_rivals import Case, Contender, UnsupportedError

CPU, FP32 = torch.device("cpu"), torch.float32
LIBRARIES = set(moe_rivals.LIBRARIES)
PRODUCTS = {"up", "down", "hidden_grad", "dx", "dw_in", "dw_out"}


def names(dataclass):
    return {field.name for field in dataclasses.fields(dataclass)}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry") / "result.json"
    moe_gpu.main(["--dry", "--repeats", "3", "--out", str(out)])
    return json.loads(out.read_text())


def test_dry_run_writes_every_case_in_the_same_form(dry):
    assert len(dry["cases"]) == len(moe_gpu.all_cases("dry"))
    for case in dry["cases"]:
        assert set(case) == names(CaseResult)
        assert all(set(row) == names(LayerRow) for row in case["layers"])
        assert all(set(row) == names(KernelRow) for row in case["kernels"])
        assert case["floor_ms"] > 0
    assert (dry["benchmark"], dry["is_dry"], dry["device"]) == ("moe_gpu", True, "cpu")
    assert {"commit", "versions", "peak", "repeats", "dtype", "backend"} <= set(dry)


def test_times_are_ratios_to_ours(dry):
    for case in dry["cases"]:
        rows = {row["layer"]: row for row in case["layers"]}
        assert rows["moevit"]["time_over_ours"] == 1
        assert all(row["step_ms"] > 0 for row in rows.values() if row["status"] == "ok")
        best = rows[case["best_rival"]]
        assert best["time_over_ours"] == case["best_rival_time_over_ours"]
        assert case["best_rival"] not in ("dense", "moevit", "moevit, biases")


def test_a_library_that_does_not_import_is_listed_with_the_reason(dry):
    missing = {name for name in LIBRARIES if not importable(moe_rivals.LIBRARIES[name][0])}
    assert set(dry["unavailable"]) == missing
    assert all("No module named" in reason for reason in dry["unavailable"].values())
    for case in dry["cases"]:
        assert {row["layer"] for row in case["layers"]} >= LIBRARIES - missing


def importable(module):
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def test_a_target_is_judged():
    rows = [LayerRow("moevit", percent=54.0, time_over_ours=1.0)]
    rows += [LayerRow("dense", time_over_ours=0.5), LayerRow("b", time_over_ours=1.2)]
    result = moe_gpu.judge(Case(768, 3072, 8, 1, 100), rows, [])
    assert (result.target_percent, result.meets_target) == (55, False)
    assert (result.best_rival, result.best_rival_time_over_ours) == ("b", 1.2)


def prepared(build, errors=(RuntimeError, ValueError)):
    problem = moe_rivals.draw(Case(16, 24, 4, 2, 20), device=CPU, dtype=FP32)
    return moe_check.prepare(problem, build, errors=errors)


def changed(change):
    """python_loop with its forward replaced by change(forward)."""

    def build(problem):
        right = moe_rivals.python_loop(problem)
        return dataclasses.replace(right, forward=change(right.forward))

    return build


def wrong_gradient(forward):
    def run():
        y = forward()
        return y.detach() + 2 * (y - y.detach())

    return run


def failing(_):
    raise RuntimeError("no kernel for this")


def unsupported(_):
    raise UnsupportedError("has no GELU")


def test_a_wrong_rival_is_an_error_row_and_is_not_timed():
    build = {
        "loop": moe_rivals.python_loop,
        "wrong output": changed(lambda forward: lambda: 1.01 * forward()),
        "wrong gradient": changed(wrong_gradient),
        "not a number": changed(lambda forward: lambda: forward() * float("nan")),
        "failing": failing,
        "without": unsupported,
    }
    right, rows = prepared(build)
    assert set(right) == {"loop"}
    found = {row.layer: row for row in rows}
    assert [row.status for row in rows] == ["ok", *["error"] * 4, "unsupported"]
    assert "relative error 1.0e-02" in found["wrong output"].reason
    assert "relative error 1.0e+00" in found["wrong gradient"].reason
    assert found["not a number"].error is None
    assert "no kernel for this" in found["failing"].reason


def test_ours_wrong_stops_the_benchmark():
    with pytest.raises(ValueError, match=r"moevit, 16x24 E4 k2.*relative error"):
        prepared({"moevit": changed(lambda forward: lambda: 1.01 * forward())})


def test_without_a_gpu_only_a_dry_run_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device: --dry"):
        moe_gpu.main([])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["--match", "E9 "], "matches no case"), (["--tune"], "give one of both")],
)
def test_a_run_without_effect_is_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        moe_gpu.main(["--dry", *arguments])


def test_only_cases_that_match_are_measured(tmp_path):
    out = tmp_path / "result.json"
    moe_gpu.main(["--dry", "--repeats", "2", "--match", "swiglu", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert case["case"]["activation"] == "swiglu"


def test_floors_are_those_of_peak_and_bandwidth():
    works = moe_kernels.works(Case(768, 3072, 8, 1, 50176))
    assert works["up"].flops == 2 * 50176 * 768 * 3072
    assert works["up"].floor_ms == pytest.approx(1e3 * works["up"].flops / 790e12)
    assert works["combine"].floor_ms == pytest.approx(1e3 * 4 * 50176 * 768 / 4.3e12)
    assert moe_kernels.layer_floor_ms(Case(768, 3072, 8, 1, 50176)) == pytest.approx(1.88, abs=0.1)


@pytest.mark.parametrize("routing", moe_rivals.ROUTINGS)
def test_routing(routing):
    case = Case(8, 8, 8, 2, 4000, routing)
    id_Tk = moe_rivals.choose(case, torch.Generator().manual_seed(0))
    rows_E = id_Tk.flatten().bincount(minlength=8)
    assert (id_Tk[:, 0] != id_Tk[:, 1]).all()
    assert (rows_E[-1] == 0) == (routing == "one empty")
    unevenness = (rows_E[:-1].max() / rows_E[:-1].min()).item()
    assert (unevenness > 1.3) == (routing == "lognormal")


def fake_scattermoe():
    """parallel_experts: rows sorted by expert in and out, or by token and choice."""

    def flatten_sort_count(expert_id_Tk, num_experts):
        sorted_R, order_R = expert_id_Tk.flatten().sort(stable=True)
        return sorted_R, order_R, sorted_R.bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(x, w_EXY, k, sorted_R, order_R, _, gates=None, **grouped):
        x_RX = x if grouped.get("grouped_in") else x[order_R // k]
        y_RY = torch.einsum("rx,rxy->ry", x_RX, w_EXY[sorted_R])
        if grouped.get("grouped_out"):
            return y_RY
        return (gates[..., None] * y_RY[order_R.argsort()].unflatten(0, gates.shape)).sum(1)

    return {"scattermoe.parallel_experts": SimpleNamespace(**locals())}


def fake_liger():
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up, down, index, weights):
            assert index.dtype == torch.int32
            gate, up = torch.einsum("td,tkfd->tkf", x, gate_up[index]).chunk(2, -1)
            y = torch.einsum("tkf,tkdf->tkd", functional.silu(gate) * up, down[index])
            return (weights[..., None] * y).sum(1)

    return {"liger_kernel.ops.fused_moe": SimpleNamespace(**locals())}


def fake_sonicmoe():
    def moe_general_routing_inputs(
        x, scores, token, expert, w1, b1, w2, b2, *, E, stream_id, activation_type
    ):
        assert (token.dtype, expert.dtype) == (torch.int32, torch.int32)
        assert w1.stride()[1] == w2.stride()[1] == 1, "stride order 2, 0, 1"
        z = torch.einsum("rd,rfd->rf", x[token], w1.permute(2, 0, 1)[expert])
        is_gated = activation_type == "swiglu"
        h = functional.silu(z[:, ::2]) * z[:, 1::2] if is_gated else functional.gelu(z)
        y = torch.einsum("rf,rdf->rd", h, w2.permute(2, 0, 1)[expert]) * scores[:, None]
        return torch.zeros_like(x).index_add(0, token, y), None

    kinds = SimpleNamespace(GELU="gelu", SWIGLU="swiglu")
    return {
        "sonicmoe.functional": SimpleNamespace(**locals()),
        "sonicmoe.enums": SimpleNamespace(ActivationType=kinds),
    }


def fake_megablocks():
    def sort(x, end_bit):
        assert x.max() < 2**end_bit
        return x.sort(stable=True)

    def histogram(x, num_bins):
        return x.bincount(minlength=num_bins).int()

    def inclusive_cumsum(x, dim):
        return x.cumsum(dim)

    def gather(x, order, bin_ids, bins, k):
        return x[order // k]

    def scatter(x, order, bin_ids, weights, bins, k):
        y = x * weights[order][:, None]
        return torch.zeros(len(weights) // k, x.shape[1]).index_add(0, order // k, y)

    def gmm(a, b, sizes, trans_b=False):
        assert sizes.dtype == torch.int64
        pairs = zip(a.split(sizes.tolist()), b.transpose(1, 2) if trans_b else b, strict=True)
        return torch.cat([rows @ weight for rows, weight in pairs])

    ops = SimpleNamespace(**locals())
    return {"megablocks.ops": ops, "grouped_gemm.ops": ops}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_adapters_call_the_libraries_as_documented(monkeypatch, activation):
    """The stand-ins have the documented signatures and layouts."""
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for fake in (fake_scattermoe, fake_liger, fake_sonicmoe, fake_megablocks):
        for name, module in fake().items():
            monkeypatch.setitem(sys.modules, name, module)
    build, missing = moe_gpu.builders("torch")
    assert missing == {}
    case = Case(512, 24, 4, 2, 20, "lognormal", activation)
    problem = moe_rivals.draw(case, device=CPU, dtype=FP32)
    _, rows = moe_check.prepare(problem, build, errors=())
    statuses = {row.layer: row.status for row in rows}
    assert statuses.pop("Liger") == ("ok" if activation == "swiglu" else "unsupported")
    assert set(statuses.values()) == {"ok"}
    narrow = moe_rivals.draw(Case(16, 24, 4, 2, 20), device=CPU, dtype=FP32)
    with pytest.raises(UnsupportedError):
        build["SonicMoE"](narrow)


def test_contenders_own_their_leaves():
    """A gradient of one layer must not end up in another's tensors."""
    problem = moe_rivals.draw(Case(16, 24, 4, 2, 20), device=CPU, dtype=FP32)
    contender = moe_rivals.python_loop(problem)
    assert isinstance(contender, Contender)
    assert not problem.x_TD.requires_grad
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in contender.leaves)


@pytest.mark.slow
def test_kernels_are_timed_one_by_one_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "result.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.moe_gpu", "--dry", "--repeats", "2"]
    command += ["--match", "swiglu"]
    subprocess.run([*command, "--out", str(out)], env=environment, check=True)
    result = json.loads(out.read_text())
    assert result["backend"] == "triton"
    for case in result["cases"]:
        rows = {row["kernel"]: row for row in case["kernels"]}
        others = {"router", "plan", "schedule", "combine", "combine dx", "gate_grad"}
        assert set(rows) == PRODUCTS | others | {"db_in", "db_out"}
        assert all(set(rows[name]["time_over"]) == {"bmm", "grouped_mm"} for name in PRODUCTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [*moe_gpu.SHAPES, (192, 768)])
def test_tiles_of_the_table_are_right_in_bf16(shape, activation):
    case = Case(*shape, 8, 2, 3000, "one empty", activation)
    problem = moe_rivals.draw(case, device=torch.device("cuda"), dtype=torch.bfloat16)
    build = moe_gpu.builders("triton")[0]
    ours = {name: make for name, make in build.items() if name.startswith("moevit")}
    right, _ = moe_check.prepare(problem, ours, errors=())
    assert set(right) == set(ours)
