"""The parts of a MoE layer one by one: what each must do at least, and how to run it alone.

FLOPs and bytes (16-bit numbers) of a part give its floor on an H200, by peak and by bandwidth.
"""

from __future__ import annotations

import importlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.clock import Clock, Run, interleave
from benchmarks.moe_rivals import Case, Problem
from moe_kernels import ops
from moe_kernels.tiles import LayerSize, Tiles, layer_size
from options.schema import MoEOptions
from routers.router import Router

if TYPE_CHECKING:
    from benchmarks.tune_tiles import Sample

# Measured rates of an H200: dense bf16 products, and copies.
PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12
# The choices are given to the layer, and no rival has biases.
NOT_IN_LAYER = ("router", "db_in", "db_out")


@dataclass(frozen=True)
class Work:
    """What a part cannot do without."""

    flops: int
    bytes: int

    @property
    def floor_ms(self) -> float:
        """Return the time at the peak rates."""
        return 1000 * max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def works(case: Case) -> dict[str, Work]:
    """Return the work of each part of a training step; z has a gate and a value half if gated."""
    n, d, h, e = case.num_rows, case.dim, case.hidden, case.num_experts
    t, z = case.num_tokens, case.hidden * (2 if case.is_gated else 1)
    return {
        "router": Work(2 * t * d * e, 2 * t * d + 4 * t * e),
        "plan": Work(0, 16 * n),
        "up": Work(2 * n * d * z, 2 * (n * d + e * d * z + n * z + n * h)),
        "down": Work(2 * n * d * h, 2 * (n * h + e * d * h + n * d)),
        "combine": Work(2 * n * d, 2 * (n * d + t * d)),
        "hidden_grad": Work(2 * n * d * h, 2 * (n * d + e * d * h + 2 * n * z + n * h)),
        "dx": Work(2 * n * d * z, 2 * (n * z + e * d * z + n * d)),
        "combine dx": Work(n * d, 2 * (n * d + t * d)),
        "schedule": Work(0, 4 * (e + 1)),
        "gate_grad": Work(0, 12 * n),
        "db_in": Work(0, 2 * (n * z + e * z)),
        "db_out": Work(0, 2 * (n * d + e * d)),
        "dw_in": Work(2 * n * d * z, 2 * (n * d + n * z + e * d * z)),
        "dw_out": Work(2 * n * d * h, 2 * (n * d + n * h + e * d * h)),
    }


def layer_floor_ms(case: Case) -> float:
    """Return the sum of the floors of a step's parts, without router and biases."""
    return sum(work.floor_ms for name, work in works(case).items() if name not in NOT_IN_LAYER)


def sample_of(p: Problem) -> Sample:
    """Return the tensors that the products of a step work on."""
    plan = ops.plan_rows(p.expert_id_Tk, p.case.num_experts)
    w_in, w_out = p.w_in_EFD.flatten(0, 1), p.w_out_EDF.flatten(0, 1)
    return importlib.import_module("benchmarks.tune_tiles").Sample(
        p.x_TD,
        p.dy_TD,
        p.weight_Tk,
        z_RF=_normal(p, p.case.num_rows, p.w_in_EFD.shape[1]),
        h_RF=_normal(p, p.case.num_rows, p.case.hidden),
        plan=plan,
        weights=ops.Weights(w_in, None, w_out, None),
        activation=ops.ACTIVATIONS[p.case.activation],
    )


def _normal(p: Problem, *shape: int) -> Tensor:
    return torch.randn(shape, device=p.x_TD.device, dtype=p.x_TD.dtype)


def _rivals_of_rows(p: Problem, ends_E: Tensor, *, depth: int, columns: int) -> dict[str, Run]:
    """Return a product of sorted rows with their experts, and E equal ones of its FLOPs."""
    num_experts = p.case.num_experts
    left_RX = _normal(p, p.case.num_rows, depth)
    weight_EXY = _normal(p, num_experts, depth, columns)
    even_ERX = left_RX[: p.case.num_rows // num_experts * num_experts]
    even_ERX = even_ERX.unflatten(0, (num_experts, -1))
    return {
        "bmm": lambda: torch.bmm(even_ERX, weight_EXY),
        "grouped_mm": lambda: torch._grouped_mm(left_RX, weight_EXY, offs=ends_E),
    }


def _rivals_of_weights(p: Problem, ends_E: Tensor, *, left: int, right: int) -> dict[str, Run]:
    """Return the same for a product over rows, the gradient of a weight."""
    num_experts = p.case.num_experts
    num_even = p.case.num_rows // num_experts * num_experts
    both = [_normal(p, p.case.num_rows, columns) for columns in (left, right)]
    even_left, even_right = (x[:num_even].unflatten(0, (num_experts, -1)) for x in both)
    return {
        "bmm": lambda: torch.bmm(even_left.transpose(1, 2), even_right),
        "grouped_mm": lambda: torch._grouped_mm(both[0].t(), both[1], offs=ends_E),
    }


def rivals(p: Problem) -> dict[str, dict[str, Run]]:
    """Return by product how cuBLAS (E equal products) and torch._grouped_mm do one of its size."""
    case, ends_E = p.case, ops.plan_rows(p.expert_id_Tk, p.case.num_experts).offset_E1[1:]
    d, h, z = case.dim, case.hidden, p.w_in_EFD.shape[1]
    of_rows = {"up": (d, z), "down": (h, d), "hidden_grad": (d, h), "dx": (z, d)}
    of_weights = {"dw_in": (z, d), "dw_out": (d, h)}
    return {
        **{
            name: _rivals_of_rows(p, ends_E, depth=depth, columns=columns)
            for name, (depth, columns) in of_rows.items()
        },
        **{
            name: _rivals_of_weights(p, ends_E, left=left, right=right)
            for name, (left, right) in of_weights.items()
        },
    }


def parts(p: Problem, *, backend: str) -> dict[str, Run]:
    """Return each part of a step that runs by itself; products do in Triton only."""
    case, plan = p.case, ops.plan_rows(p.expert_id_Tk, p.case.num_experts)
    options = MoEOptions(num_experts=case.num_experts, top_k=case.num_choices, switch_coef=0)
    router = Router(case.dim, options).to(p.x_TD.device)
    for weight in router.parameters():
        nn.init.normal_(weight, std=0.02)
    y_RD, combine = _normal(p, case.num_rows, case.dim), torch.ops.moevit.combine
    rows = (plan.inverse_R, case.num_choices, backend)
    found: dict[str, Run] = {
        "router": lambda: router(p.x_TD, sum_over_ranks=lambda total: total),
        "plan": lambda: ops.plan_rows(p.expert_id_Tk, case.num_experts),
        "combine": lambda: combine(y_RD, p.weight_Tk, *rows),
        "combine dx": lambda: combine(y_RD, None, *rows),
    }
    return found | triton_parts(p) if backend == "triton" else found


def triton_parts(p: Problem) -> dict[str, Run]:
    """Return the Triton kernels of a step, with the tiles of the table."""
    tune, k = (
        importlib.import_module(name)
        for name in ("benchmarks.tune_tiles", "moe_kernels.triton_ffn")
    )
    sample = sample_of(p)
    layer = tune.layer_of(sample, None)
    num_shares = -(-p.case.hidden // layer.tiles.hidden_grad.n)
    share_NR = torch.rand(num_shares, p.case.num_rows, device=p.x_TD.device)
    return tune.step_kernels(sample, layer) | {
        "schedule": lambda: tune.layer_of(sample, None),
        "gate_grad": lambda: k.gate_grad(layer, p.dy_TD, share_NR=share_NR, b_out=None),
        "db_in": lambda: k.column_sum(layer, sample.z_RF, is_of_tokens=False),
        "db_out": lambda: k.column_sum(layer, p.dy_TD, is_of_tokens=True),
    }


def tuned(p: Problem, clock: Clock, *, repeats: int) -> tuple[LayerSize, Tiles]:
    """Return the key of the table that a problem falls under, and its fastest tiles here."""
    size = layer_size(
        p.case.dim,
        p.case.hidden,
        is_gated=p.case.is_gated,
        num_experts=p.case.num_experts,
        dtype=p.x_TD.dtype,
        num_rows=p.case.num_rows,
    )

    def timer(run: Run) -> float:
        return statistics.median(interleave({"": run}, clock, repeats=repeats)[""])

    return size, importlib.import_module("benchmarks.tune_tiles").tune(sample_of(p), timer)
