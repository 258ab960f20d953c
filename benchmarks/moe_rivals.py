"""The expert layers that moe_gpu.py times: ours, plain PyTorch's, and other libraries'.

    Problem (one set of tensors) -> CONTENDERS[name] -> Contender (a function and its leaves)

All compute y[t] = sum_j weight[t, j] * w_out[e] @ act(w_in[e] @ x[t]) of the same given choices,
each with its own sorting of rows. An adapter only changes how the same numbers are laid out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels import ops

ROUTINGS = ("balanced", "lognormal", "one empty")
LOGNORMAL_SIGMA = 0.5


class UnsupportedError(ValueError):
    """The library does not have this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, how many tokens it gets, and how they are routed."""

    dim: int
    hidden: int
    num_experts: int
    num_choices: int
    num_tokens: int
    routing: str = "balanced"
    activation: str = "gelu"

    @property
    def label(self) -> str:
        """Return the case in a line."""
        sizes = f"{self.dim}x{self.hidden} E{self.num_experts} k{self.num_choices}"
        return f"{sizes} T{self.num_tokens} {self.routing} {self.activation}"

    @property
    def num_rows(self) -> int:
        """Return T*k."""
        return self.num_tokens * self.num_choices

    @property
    def is_gated(self) -> bool:
        """Return whether w_in has a gate and a value half."""
        return ops.ACTIVATIONS[self.activation][1]

    @property
    def forward_flops(self) -> int:
        """Return the FLOPs of the products, 2 per multiplication and addition."""
        return (6 if self.is_gated else 4) * self.num_rows * self.dim * self.hidden


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; weights with the expert first, as in moe.Experts."""

    case: Case
    x_TD: Tensor
    weight_Tk: Tensor
    expert_id_Tk: Tensor
    w_in_EFD: Tensor
    w_out_EDF: Tensor
    dy_TD: Tensor

    def activate(self, z_RF: Tensor) -> Tensor:
        """Return act(z), gate half first."""
        name, is_gated = ops.ACTIVATIONS[self.case.activation]
        function = getattr(functional, name)
        if not is_gated:
            return function(z_RF)
        gate_RF, value_RF = z_RF.chunk(2, dim=-1)
        return function(gate_RF) * value_RF

    def in_fp32(self) -> Problem:
        """Return the same numbers in fp32."""
        values = {name: getattr(self, name).float() for name in ("x_TD", "w_in_EFD", "w_out_EDF")}
        return dataclasses.replace(self, **values, dy_TD=self.dy_TD.float())


@dataclass(frozen=True)
class Contender:
    """A layer ready to run.

    leaves: x, weight, w_in, w_out in this order, and biases if it has them.
    w_in_grad: what makes the gradient of its w_in ours; None where the layer is not the same
        function (a dense one) and its numbers are not compared.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    dy: Tensor
    w_in_grad: Callable[[Tensor], Tensor] | None = torch.Tensor.contiguous

    def step(self) -> tuple[Tensor, ...]:
        """Run forward and backward; return the gradients of the leaves."""
        return torch.autograd.grad(self.forward(), self.leaves, self.dy)


def choose(case: Case, generator: torch.Generator) -> Tensor:
    """Return k different experts per token, drawn as the case's routing says."""
    new = functools.partial(torch.ones, device=generator.device)
    wait_TE = new(case.num_tokens, case.num_experts).exponential_(generator=generator)
    speed_E = new(case.num_experts)
    if case.routing == "lognormal":
        speed_E.log_normal_(0, LOGNORMAL_SIGMA, generator=generator)
    elif case.routing == "one empty":
        speed_E[-1] = 0
    # The first of exponential arrivals is expert e with probability speed[e] / sum of speeds.
    return (wait_TE / speed_E).topk(case.num_choices, largest=False).indices


def draw(case: Case, *, device: torch.device, dtype: torch.dtype) -> Problem:
    """Return random tensors of a case."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    expert_id_Tk = choose(case, generator)
    weight_Tk = torch.rand(expert_id_Tk.shape, generator=generator, device=device)
    halves = 2 if case.is_gated else 1
    return Problem(
        case,
        normal(case.num_tokens, case.dim),
        weight_Tk / weight_Tk.sum(1, keepdim=True),
        expert_id_Tk,
        normal(case.num_experts, halves * case.hidden, case.dim, scale=case.dim**-0.5),
        normal(case.num_experts, case.dim, case.hidden, scale=case.hidden**-0.5),
        normal(case.num_tokens, case.dim),
    )


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _usual_leaves(p: Problem) -> list[Tensor]:
    return _leaves(p.x_TD, p.weight_Tk, p.w_in_EFD, p.w_out_EDF)


def moevit(p: Problem, *, backend: str, has_biases: bool) -> Contender:
    """Our layer, from the choices on: the plan, and the custom op."""
    leaves = _usual_leaves(p)
    if has_biases:
        new = p.x_TD.new_zeros
        leaves += _leaves(new(p.w_in_EFD.shape[:2]), new(p.w_out_EDF.shape[:2]))
    b_in, b_out = leaves[4:] if has_biases else (None, None)
    x_TD, weight_Tk, w_in, w_out = leaves[:4]

    def forward() -> Tensor:
        plan = ops.plan_rows(p.expert_id_Tk, p.case.num_experts)
        flat_in, flat_out = w_in.flatten(0, 1), w_out.flatten(0, 1)
        return ops.moe_ffn(
            x_TD,
            weight_Tk,
            plan,
            ops.Weights(flat_in, b_in, flat_out, b_out),
            activation=p.case.activation,
            backend=backend,
        )

    return Contender(forward, leaves, p.dy_TD)


def dense(p: Problem) -> Contender:
    """One expert on T*k rows through cuBLAS: the same FLOPs without routing or combining."""
    k = p.case.num_choices
    leaves = _leaves(p.x_TD.repeat(k, 1), p.w_in_EFD[0].clone(), p.w_out_EDF[0].clone())
    x_RD, w_in, w_out = leaves

    def forward() -> Tensor:
        return functional.linear(p.activate(functional.linear(x_RD, w_in)), w_out)

    return Contender(forward, leaves, p.dy_TD.repeat(k, 1), w_in_grad=None)


def python_loop(p: Problem) -> Contender:
    """Expert by expert: select its rows, two products, add to the tokens."""
    leaves = _usual_leaves(p)
    x_TD, weight_Tk, w_in, w_out = leaves

    def forward() -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e in range(p.case.num_experts):
            token, choice = torch.where(p.expert_id_Tk == e)
            h = p.activate(functional.linear(x_TD[token], w_in[e]))
            y = functional.linear(h, w_out[e]) * weight_Tk[token, choice, None]
            y_TD.index_add_(0, token, y.to(y_TD.dtype))
        return y_TD

    return Contender(forward, leaves, p.dy_TD)


def grouped_mm(p: Problem) -> Contender:
    """torch._grouped_mm on sorted rows; our plan, since it is the one without a host sync."""
    leaves = _usual_leaves(p)
    x_TD, weight_Tk, w_in, w_out = leaves
    k = p.case.num_choices

    def forward() -> Tensor:
        plan = ops.plan_rows(p.expert_id_Tk, p.case.num_experts)
        ends_E = plan.offset_E1[1:]
        x_RD = x_TD[plan.order_R // k]
        h_RF = p.activate(torch._grouped_mm(x_RD, w_in.transpose(1, 2), offs=ends_E))
        y_RD = torch._grouped_mm(h_RF, w_out.transpose(1, 2), offs=ends_E)
        y_TkD = y_RD[plan.inverse_R].unflatten(0, (-1, k))
        return (weight_Tk[:, None].to(y_TkD.dtype) @ y_TkD)[:, 0]

    return Contender(forward, leaves, p.dy_TD)


def scattermoe(p: Problem, library: ModuleType) -> Contender:
    """ScatterMoE (arXiv 2403.08245), as its mlp.MLP calls parallel_linear."""
    leaves = _usual_leaves(p)
    x_TD, weight_Tk, w_in, w_out = leaves

    def forward() -> Tensor:
        order = library.flatten_sort_count(p.expert_id_Tk, num_experts=p.case.num_experts)
        w_up, w_down = w_in.transpose(1, 2), w_out.transpose(1, 2)
        z_RF = library.parallel_linear(x_TD, w_up, p.case.num_choices, *order, grouped_out=True)
        h_RF, gates = p.activate(z_RF), weight_Tk.to(z_RF.dtype)
        return library.parallel_linear(h_RF, w_down, 1, *order, grouped_in=True, gates=gates)

    return Contender(forward, leaves, p.dy_TD)


def sonicmoe(p: Problem, library: ModuleType) -> Contender:
    """SonicMoE (arXiv 2512.14080); gates and values interleaved, and GELU approximated by tanh."""
    if p.case.dim < 512:
        raise UnsupportedError("needs a width of 512 or more")
    case, (x_TD, weight_Tk, w_in, w_out) = p.case, _usual_leaves(p)
    halves = 2 if case.is_gated else 1

    def turned(w: Tensor, *, rows: int, columns: int) -> Tensor:
        return w.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)

    w_in = _leaves(turned(w_in, rows=halves, columns=case.hidden).contiguous())[0]
    enums = importlib.import_module("sonicmoe.enums")
    token_R = torch.arange(case.num_tokens, device=x_TD.device, dtype=torch.int32)
    token_R = token_R.repeat_interleave(case.num_choices)

    def forward() -> Tensor:
        return library.moe_general_routing_inputs(
            x_TD,
            weight_Tk.flatten(),
            token_R,
            p.expert_id_Tk.flatten().int(),
            w_in.permute(1, 2, 0),
            None,
            w_out.permute(1, 2, 0),
            None,
            E=case.num_experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=getattr(enums.ActivationType, case.activation.upper()),
        )[0]

    leaves = [x_TD, weight_Tk, w_in, w_out]
    back = lambda grad: turned(grad, rows=case.hidden, columns=halves)  # noqa: E731
    return Contender(forward, leaves, p.dy_TD, w_in_grad=back)


def megablocks(p: Problem, library: ModuleType) -> Contender:
    """MegaBlocks (arXiv 2211.15841), its dropless layer with mlp_impl=grouped."""
    megablocks_ops, gemm = library, importlib.import_module("grouped_gemm.ops")
    leaves, case = _usual_leaves(p), p.case
    x_TD, weight_Tk, w_in, w_out = leaves

    def forward() -> Tensor:
        expert_R = p.expert_id_Tk.flatten().int()
        bin_R, order_R = megablocks_ops.sort(expert_R, max(case.num_experts - 1, 1).bit_length())
        count_E = megablocks_ops.histogram(expert_R, case.num_experts)
        bins_E = megablocks_ops.inclusive_cumsum(count_E, 0)
        x_RD = megablocks_ops.gather(x_TD, order_R, bin_R, bins_E, case.num_choices)
        sizes_E = count_E.cpu().long()
        h_RF = p.activate(gemm.gmm(x_RD, w_in, sizes_E, trans_b=True))
        y_RD = gemm.gmm(h_RF, w_out, sizes_E, trans_b=True)
        gates = weight_Tk.flatten().to(y_RD.dtype)
        return megablocks_ops.scatter(y_RD, order_R, bin_R, gates, bins_E, case.num_choices)

    return Contender(forward, leaves, p.dy_TD)


def liger(p: Problem, library: ModuleType) -> Contender:
    """Liger's fused MoE, which has SwiGLU only."""
    if p.case.activation != "swiglu":
        raise UnsupportedError("has swiglu only")
    leaves = _usual_leaves(p)
    x_TD, weight_Tk, w_in, w_out = leaves
    expert_id_Tk = p.expert_id_Tk.int()
    apply = library.LigerFusedMoEFunction.apply
    return Contender(lambda: apply(x_TD, w_in, w_out, expert_id_Tk, weight_Tk), leaves, p.dy_TD)


# Layers that need nothing but PyTorch.
PLAIN = {"dense": dense, "python loop": python_loop, "torch._grouped_mm": grouped_mm}
# name -> (module that it is in, adapter)
LIBRARIES = {
    "ScatterMoE": ("scattermoe.parallel_experts", scattermoe),
    "SonicMoE": ("sonicmoe.functional", sonicmoe),
    "MegaBlocks": ("megablocks.ops", megablocks),
    "Liger": ("liger_kernel.ops.fused_moe", liger),
}


def load_libraries() -> tuple[dict[str, Callable[[Problem], Contender]], dict[str, str]]:
    """Return the adapters of the libraries that import, and why the others do not."""
    adapters: dict[str, Callable[[Problem], Contender]] = {}
    missing = {}
    for name, (module, adapter) in LIBRARIES.items():
        try:
            library = importlib.import_module(module)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
        else:
            adapters[name] = functools.partial(adapter, library=library)
    return adapters, missing
