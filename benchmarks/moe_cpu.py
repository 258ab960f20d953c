"""Time forward + backward of an MoE layer against a dense one and against loops over experts.

    python -m benchmarks.moe_cpu [--shapes 1040,192,384 ...] [--repeats 12] [--clock cpu]

A shape is T,D,F: tokens, width, hidden width of an expert. E=8 experts, k=2 per token, fp32, exact
GELU. All layers with experts share their weights; outputs and every gradient are compared before
anything is timed. Rows alternate in one process; the figures are ratios. Rows:
  dense              layers.Mlp with hidden width k*F: the same active FLOPs, without a router
  moevit             moe.MoE: router, plan, experts, combine
  loop, x[mask]      per expert and choice: rows picked by a boolean mask and written back by it
  loop, index lists  per expert: rows listed by torch.where of a one-hot mask, index_add_ (Mixtral)
  loop, masked sum   per expert: all tokens computed, weights masked; E/k times the FLOPs
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import moe
from benchmarks import common
from benchmarks.clock import Clock, Run, end_of, interleave, wall_clock
from layers.modules import Mlp
from options.command_line import Parser
from options.schema import MoEOptions
from routers.router import Router

NUM_EXPERTS, TOP_K = 8, 2
RIVAL, OURS = "dense", "moevit"
# 65 tokens: `make train` (64 pixels, patch 8); 197: 224 pixels, patch 16.
SHAPES = [
    (8 * 65, 192, 384),
    (16 * 65, 192, 384),
    (64 * 65, 192, 384),
    (16 * 197, 384, 768),
]
WEIGHT_STD = 0.05  # logits of some tenths: uneven but no expert idle, as early in training


def cpu_clock(run: Run) -> float:
    """Return the milliseconds that this process computed: what others take is not counted."""
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


CLOCKS = {"wall": wall_clock, "cpu": cpu_clock}


class Loop(nn.Module):
    """A gate and experts as nn.Linear pairs, run by one of LOOPS."""

    def __init__(
        self, dim: int, hidden_dim: int, *, run: Callable[[Loop, Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
            for _ in range(NUM_EXPERTS)
        )
        self.run = run

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the feed-forward branch: x_BLD -> x_BLD."""
        x_TD = x_BLD.flatten(0, 1)
        weight_Tk, expert_id_Tk = self.gate(x_TD).softmax(-1).topk(TOP_K)
        return self.run(self, x_TD, weight_Tk, expert_id_Tk).view_as(x_BLD)


def boolean_masks(layer: Loop, x_TD: Tensor, weight_Tk: Tensor, expert_id_Tk: Tensor) -> Tensor:
    """Pick and write back the rows of each expert and choice with a boolean mask."""
    y_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(layer.experts):
        for choice in range(TOP_K):
            mask_T = expert_id_Tk[:, choice] == number
            if mask_T.any():
                y_TD[mask_T] += weight_Tk[mask_T, choice, None] * expert(x_TD[mask_T])
    return y_TD


def index_lists(layer: Loop, x_TD: Tensor, weight_Tk: Tensor, expert_id_Tk: Tensor) -> Tensor:
    """List the rows of each expert from a one-hot mask and add its output to them."""
    y_TD = torch.zeros_like(x_TD)
    mask_EkT = functional.one_hot(expert_id_Tk, NUM_EXPERTS).permute(2, 1, 0)
    for number, expert in enumerate(layer.experts):
        choice_R, token_R = torch.where(mask_EkT[number])
        y_RD = expert(x_TD[token_R]) * weight_Tk[token_R, choice_R, None]
        y_TD.index_add_(0, token_R, y_RD)
    return y_TD


def masked_sum(layer: Loop, x_TD: Tensor, weight_Tk: Tensor, expert_id_Tk: Tensor) -> Tensor:
    """Compute every token with every expert and mask the weights."""
    y_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(layer.experts):
        mask_Tk = expert_id_Tk == number
        y_TD = y_TD + (weight_Tk * mask_Tk).sum(1, keepdim=True) * expert(x_TD)
    return y_TD


LOOPS = {
    "loop, x[mask]": boolean_masks,
    "loop, index lists": index_lists,
    "loop, masked sum": masked_sum,
}


def by_expert(layer: moe.MoE, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of an MoE's parameters under the names and in the shapes of a Loop's."""
    result = {"gate.weight": values["router.gate.weight"]}
    for ours, theirs in (("in", "0"), ("out", "2")):
        weights = values[f"experts.w_{ours}"].chunk(NUM_EXPERTS)
        for number, (w, b) in enumerate(zip(weights, values[f"experts.b_{ours}"], strict=True)):
            result[f"experts.{number}.{theirs}.weight"] = w
            result[f"experts.{number}.{theirs}.bias"] = b
    return result


def fill(layer: nn.Module) -> nn.Module:
    """Draw the parameters of a layer and return it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=WEIGHT_STD, generator=generator)
    return layer


def build_layers(dim: int, hidden_dim: int) -> dict[str, nn.Module]:
    """Return the layer of each row; those with experts have the same weights."""
    # Half a unit more: the width is int(dim * mlp_ratio).
    ratio = (hidden_dim + 0.5) / dim
    options = MoEOptions(num_experts=NUM_EXPERTS, top_k=TOP_K, mlp_ratio=ratio, switch_coef=0)
    ours = moe.MoE(
        dim,
        options,
        router=Router(dim, options),
        kernel_backend="torch",
        sum_over_ranks=lambda total: total,
    )
    layers = {RIVAL: fill(Mlp(dim, TOP_K * hidden_dim)), OURS: fill(ours)}
    weights = by_expert(ours, {name: p.detach() for name, p in ours.named_parameters()})
    for name, run in LOOPS.items():
        layers[name] = Loop(dim, hidden_dim, run=run)
        layers[name].load_state_dict(weights)
    return layers


def differentiate(layer: nn.Module, x_BLD: Tensor, dy_BLD: Tensor) -> dict[str, Tensor]:
    """Return the layer's output and the gradients of its input and parameters, by name."""
    y_BLD = layer(x_BLD)
    wanted = {"x": x_BLD, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y_BLD, list(wanted.values()), dy_BLD)
    return {"y": y_BLD.detach(), **dict(zip(wanted, grads, strict=True))}


def check(layers: dict[str, nn.Module], x_BLD: Tensor, dy_BLD: Tensor) -> None:
    """Refuse to time loops that compute something else than our layer.

    Raises:
        ValueError: An output or a gradient is more than 1e-5 off, norm-wise.
    """
    ours = layers[OURS]
    assert isinstance(ours, moe.MoE), "the row of our layer is our layer"
    values = differentiate(ours, x_BLD, dy_BLD)
    expected = {"x": values["x"], "y": values["y"], **by_expert(ours, values)}
    for name in LOOPS:
        for key, found in differentiate(layers[name], x_BLD, dy_BLD).items():
            error = ((found - expected[key]).norm() / expected[key].norm()).item()
            if not error <= 1e-5:
                raise ValueError(f"{name}: {key} is {error:.1e} off that of {OURS}")


def rows_of(
    shape: tuple[int, int, int], *, repeats: int, clock: Clock, end_s: float = math.inf
) -> list[common.Row]:
    """Return a row per layer for tokens of one shape (T, D, F)."""
    num_tokens, dim, hidden_dim = shape
    generator = torch.Generator().manual_seed(1)
    x_BLD, dy_BLD = torch.randn(2, 1, num_tokens, dim, generator=generator).unbind()
    x_BLD.requires_grad_()
    layers = build_layers(dim, hidden_dim)
    check(layers, x_BLD, dy_BLD)
    steps: dict[str, Run] = {
        name: functools.partial(differentiate, layer, x_BLD, dy_BLD)
        for name, layer in layers.items()
    }
    times = interleave(steps, clock, repeats=repeats, end_s=end_s)
    rows = common.summarise(times, rival=RIVAL)
    for row, values in zip(rows, times.values(), strict=True):
        row["of_ours"] = common.ratio(values, times[OURS])
    rounds = len(times[OURS])
    place = {"tokens": num_tokens, "dim": dim, "hidden": hidden_dim, "rounds": rounds}
    return [{**place, **row} for row in rows]


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return T, D, F of `T,D,F`."""
    num_tokens, dim, hidden_dim = (int(part) for part in text.split(","))
    return num_tokens, dim, hidden_dim


def main() -> None:
    """Measure, print a table and write it, after each shape, with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=SHAPES, metavar="T,D,F")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-moe.json")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu: needs --threads 1, waiting threads count as busy")
    torch.set_num_threads(arguments.threads)
    rows, share_s = [], arguments.limit_s / len(arguments.shapes)
    conditions = {
        "experts": NUM_EXPERTS,
        "choices": TOP_K,
        "clock": arguments.clock,
        "repeats": arguments.repeats,
    }
    for number, shape in enumerate(arguments.shapes, 1):
        clock, end_s = CLOCKS[arguments.clock], end_of(number * share_s)
        rows += rows_of(shape, repeats=arguments.repeats, clock=clock, end_s=end_s)
        common.print_rows(rows[-len(LOOPS) - 2 :])
        common.write("moe", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
