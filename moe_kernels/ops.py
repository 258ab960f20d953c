"""MoE feed-forward over rows sorted by expert: the custom ops and the choice of backend.

    expert_id_Tk -> plan_rows -> RowPlan
    x_TD --gather--> x_RD @ w_in -> z_RF -> activation @ w_out -> y_RD --combine--> y_TD

A custom op per direction: torch.compile sees one node, and nothing waits for the device. Kept for
backward: x, z, the gate weights and the plan. The arithmetic is in torch_ffn.py and triton_ffn.py;
no router, no parameters and no communication here.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import flop_counter

from moe_kernels import torch_ffn
from moe_kernels.plan import ACTIVATIONS, Activation, RowPlan, Weights, plan_rows

__all__ = ["ACTIVATIONS", "RowPlan", "Weights", "plan_rows"]  # the other files' door to them, too

BACKENDS = ("torch", "triton")
OPS = torch.library.Library("moevit", "FRAGMENT")


def _triton(module: str) -> ModuleType:
    # By name and when it is first used, for Triton is not installed everywhere.
    return importlib.import_module(f"moe_kernels.triton_{module}")


def _kernels_of(backend: str) -> ModuleType:
    return torch_ffn if backend == "torch" else _triton("ffn")


def resolve_kernels(backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend to use on `device`, and the reason for the choice, to be logged.

    Raises:
        ValueError: The backend is unknown, or is `triton` off CUDA without Triton's interpreter.
        ImportError: `triton` was asked for by name and does not import.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"config model.moe.kernels={backend}: must be auto, torch or triton")
    if backend == "torch":
        return "torch", "as configured"
    if backend == "auto" and device.type != "cuda":
        return "torch", f"auto: the Triton kernels need CUDA, device is {device}"
    try:
        is_interpreted = _triton("seam").is_interpreted()
    except ImportError as error:
        if backend == "triton":
            raise
        return "torch", f"auto: {error}"
    if device.type != "cuda" and not is_interpreted:
        raise ValueError(
            f"config model.moe.kernels=triton: needs CUDA, device is {device} (use torch or auto; "
            "TRITON_INTERPRET=1 runs the kernels on CPU, for tests)"
        )
    return "triton", "as configured" if backend == "triton" else "auto: CUDA, and Triton imports"


class _Context(Protocol):
    """What autograd hands to setup_context and backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    options: tuple[str, str]
    num_choices: int
    backend: str

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The seam between a custom op, which takes no tuples, and the code inside it, which takes nothing
# else: what both directions have in common, as a schema, as a type, and taken apart.
FLAT = (
    "Tensor order_R, Tensor inverse_R, Tensor offset_E1, "
    "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, str backend"
)
_Flat = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str, str]


def _unflatten(flat: _Flat) -> tuple[RowPlan, Weights, Activation]:
    return RowPlan(*flat[:3]), Weights(*flat[3:7]), ACTIVATIONS[flat[7]]


def _define(
    schema: str, function: Callable[..., object], fake: Callable[..., object]
) -> torch._ops.OpOverload:
    """Return the op moevit::<schema>, without a gradient yet.

    torch.library.custom_op does the same, but its wrappers take as long as one expert's matrix
    product of a small layer does on a CPU.
    """
    name = OPS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    OPS.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moevit::{name}", fake, lib=OPS)
    return getattr(torch.ops.moevit, name).default


def _moe_ffn(x_TD: Tensor, weight_Tk: Tensor, *flat: *_Flat) -> tuple[Tensor, Tensor]:
    kernels = _kernels_of(flat[-1])
    return kernels.forward(x_TD.contiguous(), weight_Tk.contiguous(), *_unflatten(flat))


def _moe_ffn_fake(x_TD: Tensor, weight_Tk: Tensor, *flat: *_Flat) -> tuple[Tensor, Tensor]:
    plan, weights, _ = _unflatten(flat)
    z_width = weights.w_in.shape[0] // (plan.offset_E1.shape[0] - 1)
    return _new_like(x_TD), x_TD.new_empty(plan.order_R.shape[0], z_width)


def _moe_ffn_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_Tk: Tensor,
    z_RF: Tensor,
    *flat_needs: *tuple[*_Flat, list[bool]],
) -> list[Tensor]:
    flat, needs = flat_needs[:-1], flat_needs[-1]
    plan, weights, activation = _unflatten(flat)
    rows = (dy_TD.contiguous(), x_TD.contiguous(), weight_Tk.contiguous(), z_RF)
    grads = _kernels_of(flat[-1]).backward(
        *rows, plan, weights=weights, activation=activation, needs=needs
    )
    # An op cannot return None within a list, so what was not asked for is left out.
    return [grad for grad in grads if grad is not None]


def _moe_ffn_backward_fake(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_Tk: Tensor,
    z_RF: Tensor,
    *flat_needs: *tuple[*_Flat, list[bool]],
) -> list[Tensor]:
    _, weights, _ = _unflatten(flat_needs[:-1])
    pairs = zip((x_TD, weight_Tk, *weights), flat_needs[-1], strict=True)
    return [_new_like(value) for value, needed in pairs if needed and value is not None]


_forward_op = _define(
    f"moe_ffn(Tensor x_TD, Tensor weight_Tk, {FLAT}) -> (Tensor, Tensor)", _moe_ffn, _moe_ffn_fake
)
_backward_op = _define(
    "moe_ffn_backward(Tensor dy_TD, Tensor x_TD, Tensor weight_Tk, Tensor z_RF, "
    f"{FLAT}, bool[] needs) -> Tensor[]",
    _moe_ffn_backward,
    _moe_ffn_backward_fake,
)


class _MoeFfn(torch.autograd.Function):
    """The forward op with the backward op as its gradient."""

    @staticmethod
    def forward(
        ctx: _Context, *inputs: *tuple[*tuple[Tensor | None, ...], str, str]
    ) -> tuple[Tensor, Tensor]:
        *tensors, activation, backend = inputs
        with torch._C._AutoDispatchBelowAutograd():
            y_TD, z_RF = _forward_op(*inputs)
        ctx.options = (activation, backend)
        ctx.mark_non_differentiable(z_RF)
        ctx.save_for_backward(*tensors, z_RF)
        return y_TD, z_RF

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_Tk, *plan_and_weights, z_RF = ctx.saved_tensors
        # Order of the gradients: x, weight, w_in, b_in, w_out, b_out; the plan has none.
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 5, 6, 7, 8)]
        rows = (grads[0], x_TD, weight_Tk, z_RF)
        wanted = iter(_backward_op(*rows, *plan_and_weights, *ctx.options, needs))
        of_inputs = [next(wanted) if needed else None for needed in needs]
        return (*of_inputs[:2], None, None, None, *of_inputs[2:], None, None)


OPS.impl("moe_ffn", _MoeFfn.apply, "Autograd")


def moe_ffn(
    x_TD: Tensor,
    weight_Tk: Tensor,
    plan: RowPlan,
    weights: Weights,
    *,
    activation: str,
    backend: str,
) -> Tensor:
    """Return y[t] = sum_j weight[t, j] * FFN_e(x[t]) over the experts e that token t was sent to.

    FFN_e(x) = w_out[e] @ activation(w_in[e] @ x + b_in[e]) + b_out[e].

    Shapes: x_TD, weight_Tk, the plan of T*k rows, the weights of E experts -> y_TD
    Numerics: fp32 sums; the same bits every time; x and the weights share a dtype, weight_Tk may
        be wider.
    """
    dtypes = (x_TD.dtype, weights.w_in.dtype, weights.w_out.dtype)
    assert len(set(dtypes)) == 1, f"{dtypes}"
    assert plan.order_R.numel() == weight_Tk.numel(), "the plan is not of these choices"
    return _forward_op(x_TD, weight_Tk, *plan, *weights, activation, backend)[0]


@torch.library.custom_op("moevit::combine", mutates_args=())
def _combine(
    y_RD: Tensor, weight_Tk: Tensor | None, inverse_R: Tensor, num_choices: int, backend: str
) -> Tensor:
    weight_Tk = None if weight_Tk is None else weight_Tk.contiguous()
    return _kernels_of(backend).combine(
        y_RD.contiguous(), weight_Tk, inverse_R, num_choices=num_choices
    )


@_combine.register_fake
def _combine_fake(
    y_RD: Tensor, _: Tensor | None, inverse_R: Tensor, num_choices: int, __: str
) -> Tensor:
    return y_RD.new_empty(inverse_R.shape[0] // num_choices, y_RD.shape[1])


@torch.library.custom_op("moevit::combine_backward", mutates_args=())
def _combine_backward(
    dy_TD: Tensor, y_RD: Tensor, weight_Tk: Tensor, inverse_R: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels_of(backend).combine_backward(
        dy_TD.contiguous(), y_RD.contiguous(), weight_Tk.contiguous(), inverse_R
    )


@_combine_backward.register_fake
def _combine_backward_fake(
    _: Tensor, y_RD: Tensor, weight_Tk: Tensor, __: Tensor, ___: str
) -> tuple[Tensor, Tensor]:
    return _new_like(y_RD), _new_like(weight_Tk)


def _keep_for_combine(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, int, str], output: Tensor
) -> None:
    y_RD, weight_Tk, inverse_R, _, ctx.backend = inputs
    ctx.save_for_backward(y_RD, weight_Tk, inverse_R)


def _differentiate_combine(ctx: _Context, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    return (*_combine_backward(dy_TD, *ctx.saved_tensors, ctx.backend), None, None, None)


_combine.register_autograd(_differentiate_combine, setup_context=_keep_for_combine)


def combine(y_RD: Tensor, weight_Tk: Tensor, inverse_R: Tensor, *, backend: str) -> Tensor:
    """Return y[t] = sum_j weight[t, j] * y[inverse[t*k+j]]; a negative position adds nothing.

    Each row of y_RD is used at most once; its gradient is zero where it is not used.

    Shapes: y_RD (any number of rows), weight_Tk, inverse_R [T*k] -> y_TD
    Numerics: fp32 sums in the order of the choices, without atomics.
    """
    return _combine(y_RD, weight_Tk, inverse_R, weight_Tk.shape[1], backend)


@torch.library.custom_op("moevit::gather_rows", mutates_args=())
def _gather_rows(
    x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, num_choices: int, backend: str
) -> Tensor:
    return x_TD.index_select(0, order_R // num_choices)


@_gather_rows.register_fake
def _gather_rows_fake(x_TD: Tensor, order_R: Tensor, _: Tensor, __: int, ___: str) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


def _keep_for_gather(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, int, str], output: Tensor
) -> None:
    _, _, inverse_R, ctx.num_choices, ctx.backend = inputs
    ctx.save_for_backward(inverse_R)


def _differentiate_gather(ctx: _Context, dx_RD: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_R,) = ctx.saved_tensors
    dx_TD = _combine(dx_RD, None, inverse_R, ctx.num_choices, ctx.backend)
    return dx_TD, None, None, None, None


_gather_rows.register_autograd(_differentiate_gather, setup_context=_keep_for_gather)


def gather_rows(x_TD: Tensor, plan: RowPlan, *, num_choices: int, backend: str) -> Tensor:
    """Return each sorted row's token, dropped rows last; its gradient is a gather-sum, no atomics.

    Shapes: x_TD -> x_RD with R = T*k, where k is `num_choices`
    """
    return _gather_rows(x_TD, plan.order_R, plan.inverse_R, num_choices, backend)


@flop_counter.register_flop_formula(torch.ops.moevit.moe_ffn)
def _flops(
    _x: Sequence[int],
    _weight: Sequence[int],
    order: Sequence[int],
    _inverse: Sequence[int],
    offset: Sequence[int],
    w_in: Sequence[int],
    _b_in: Sequence[int] | None,
    w_out: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    """Return the FLOPs of both matrix products of every row: what FlopCounterMode counts."""
    num_rows, num_experts = order[0], offset[0] - 1
    return 2 * num_rows * (math.prod(w_in) + math.prod(w_out)) // num_experts
