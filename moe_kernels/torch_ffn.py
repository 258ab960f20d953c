"""The MoE feed-forward in plain torch: the backend of CPU and the reference of the Triton kernels.

    x_TD -> per expert: its rows, two products on contiguous slices -> y_RD -> combine -> y_TD

Rows are sorted by expert, so no expert looks at another's tokens. The bounds of the experts are
read by the host: on CUDA that waits for the device, which the Triton kernels never do.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.plan import Activation, RowPlan, Weights


def activate(z_RF: Tensor, activation: Activation) -> Tensor:
    """Return the activation of z; the gated kinds halve the last dimension (gate half first)."""
    function = getattr(functional, activation.function)
    if not activation.is_gated:
        return function(z_RF)
    gate_RF, value_RF = z_RF.chunk(2, dim=-1)
    return function(gate_RF).mul_(value_RF)


def _slope_times_(function: str, grad: Tensor, z: Tensor) -> Tensor:
    if function == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)
    return getattr(torch.ops.aten, f"{function}_backward").grad_input(grad, z, grad_input=grad)


def activate_grad(grad_RF: Tensor, z_RF: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of z, given that of activate(z); may write over the latter."""
    function = activation.function
    if not activation.is_gated:
        return _slope_times_(function, grad_RF, z_RF)
    gate_RF, value_RF = z_RF.chunk(2, dim=-1)
    value_grad_RF = grad_RF * getattr(functional, function)(gate_RF)
    return torch.cat((_slope_times_(function, grad_RF * value_RF, gate_RF), value_grad_RF), dim=-1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def combine(
    y_RD: Tensor, weight_Tk: Tensor | None, inverse_R: Tensor, *, num_choices: int
) -> Tensor:
    """Return y_TD = sum_j weight[t, j] * y[inverse[t*k+j]], where a negative position adds nothing.

    Numerics: sums in fp32 or wider. embedding_bag adds rows where they stand; on CPU that takes a
        third of the time of a sum that copies them choice by choice.
    """
    wide, is_kept_R, position_R = _sum_dtype(y_RD), inverse_R >= 0, inverse_R
    if y_RD.shape[0] == 0:
        return y_RD.new_zeros((inverse_R.numel() // num_choices, y_RD.shape[1]))
    scale_R = None if weight_Tk is None else weight_Tk.reshape(-1)
    offset_T = torch.arange(0, inverse_R.numel(), num_choices, device=y_RD.device)
    if not is_kept_R.all():
        # Left out rather than multiplied by zero, which would let another token's NaN through.
        flat_R = torch.nonzero(is_kept_R)[:, 0]
        count_T = is_kept_R.view(-1, num_choices).sum(1)
        position_R, offset_T = inverse_R.index_select(0, flat_R), count_T.cumsum(0) - count_T
        scale_R = None if scale_R is None else scale_R.index_select(0, flat_R)
    sum_TD = functional.embedding_bag(
        position_R,
        y_RD.to(wide),
        offsets=offset_T.to(position_R.dtype),
        per_sample_weights=None if scale_R is None else scale_R.to(wide),
        mode="sum",
    )
    return sum_TD.to(y_RD.dtype)


def _row_dot(left_RX: Tensor, right_RX: Tensor) -> Tensor:
    wide = _sum_dtype(left_RX)
    return torch.linalg.vecdot(left_RX.to(wide), right_RX.to(wide))


def combine_backward(
    dy_TD: Tensor, y_RD: Tensor, weight_Tk: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of y_RD and of weight_Tk."""
    flat_R = torch.nonzero(inverse_R >= 0)[:, 0]
    position_R = inverse_R.index_select(0, flat_R).long()
    dy_rows = dy_TD.index_select(0, flat_R // weight_Tk.shape[1])
    weight_R1 = weight_Tk.reshape(-1, 1).index_select(0, flat_R)
    gate_R = _row_dot(dy_rows, y_RD.index_select(0, position_R)).to(weight_Tk.dtype)
    dweight_R = weight_Tk.new_zeros(weight_Tk.numel()).index_copy_(0, flat_R, gate_R)
    dy_RD = y_RD.new_zeros(y_RD.shape).index_copy_(
        0, position_R, (dy_rows * weight_R1).to(y_RD.dtype)
    )
    return dy_RD, dweight_R.view_as(weight_Tk)


class _Rows(NamedTuple):
    """The sorted rows that experts own: their flat indices and tokens, and the rows of each."""

    order_R: Tensor
    token_R: Tensor
    sizes: list[int]

    def by_expert(self, x_RX: Tensor) -> tuple[Tensor, ...]:
        """Return each expert's rows; those without an expert, at the end, are left out."""
        return x_RX[: self.token_R.numel()].split(self.sizes)


def _rows(plan: RowPlan, num_choices: int) -> _Rows:
    offset = plan.offset_E1.tolist()
    order_R = plan.order_R[: offset[-1]]
    token_R = order_R if num_choices == 1 else order_R // num_choices
    return _Rows(order_R, token_R, [end - first for first, end in itertools.pairwise(offset)])


def _linear(x_RX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, *, out_RY: Tensor) -> None:
    if bias_Y is None:
        torch.mm(x_RX, weight_YX.t(), out=out_RY)
    else:
        torch.addmm(bias_Y, x_RX, weight_YX.t(), out=out_RY)


def _by_expert(values: Sequence[Tensor | None], count: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield each expert's part of w_in, b_in, w_out and b_out, or of their gradients.

    Parts are views. What is None as a whole is None for each, which the type does not say.
    """
    parts: list[Tensor | list[None]] = []
    for value, is_matrix in zip(values, (True, False, True, False), strict=True):
        if value is None:
            parts.append([None] * count)
        else:
            parts.append(value.unflatten(0, (count, -1)) if is_matrix else value)
    return zip(*parts, strict=True)


def forward(
    x_TD: Tensor, weight_Tk: Tensor, plan: RowPlan, weights: Weights, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Return y_TD and the pre-activation z_RF, with zeros in the rows without an expert."""
    num_experts = plan.offset_E1.numel() - 1
    rows = _rows(plan, weight_Tk.shape[1])
    z_RF = x_TD.new_empty(plan.order_R.numel(), weights.w_in.shape[0] // num_experts)
    z_RF[rows.order_R.numel() :].zero_()
    # Output rows are written over input rows: memory that is in the cache already.
    y_RD = x_TD.index_select(0, rows.token_R)
    for xy_rows, z_rows, (w_in_FD, b_in_F, w_out_DF, b_out_D) in zip(
        rows.by_expert(y_RD), rows.by_expert(z_RF), _by_expert(weights, num_experts), strict=True
    ):
        _linear(xy_rows, w_in_FD, b_in_F, out_RY=z_rows)
        _linear(activate(z_rows, activation), w_out_DF, b_out_D, out_RY=xy_rows)
    return combine(y_RD, weight_Tk, plan.inverse_R, num_choices=weight_Tk.shape[1]), z_RF


def _linear_grads(
    dy_RY: Tensor, x_RX: Tensor, *, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Write sum_r dy[r, y] x[r, x] and sum_r dy[r, y].

    An expert without rows gets zeros, not nothing: its gradient is uninitialised memory until here.
    """
    if weight is not None:
        torch.mm(dy_RY.t(), x_RX, out=weight)
    if bias is not None:
        torch.sum(dy_RY, 0, out=bias)


def _gate_grad(
    dy_rows: Tensor, dh_rows: Tensor, h_rows: Tensor, b_out_D: Tensor | None, *, out_R: Tensor
) -> None:
    """Write the gradient of the gate weights, <dy, w_out h + b_out>.

    As <w_out^T dy, h> + <dy, b_out>, since forward does not keep y.
    """
    gate_rows = _row_dot(dh_rows, h_rows)
    if b_out_D is not None:
        wide = gate_rows.dtype
        gate_rows = torch.addmv(gate_rows, dy_rows.to(wide), b_out_D.to(wide))
    out_R.copy_(gate_rows)


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_Tk: Tensor,
    z_RF: Tensor,
    plan: RowPlan,
    *,
    weights: Weights,
    activation: Activation,
    needs: list[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, weight, w_in, b_in, w_out, b_out: None where not `needs`."""
    rows, num_experts = _rows(plan, weight_Tk.shape[1]), plan.offset_E1.numel() - 1
    weight_R1 = weight_Tk.reshape(-1, 1).index_select(0, rows.order_R)
    gate_R = weight_R1.new_empty(rows.order_R.numel())
    # The gradient of a row of x is written over that row.
    x_RD = x_TD.index_select(0, rows.token_R)
    pairs = zip(weights, needs[2:], strict=True)
    grads = [v.new_empty(v.shape) if need and v is not None else None for v, need in pairs]
    hidden_is_needed = needs[0] or needs[2] or needs[3]
    for x_rows, dy_rows, weight_rows, gate_rows, z_rows, expert, grad in zip(
        rows.by_expert(x_RD),
        rows.by_expert(dy_TD.index_select(0, rows.token_R)),
        rows.by_expert(weight_R1),
        rows.by_expert(gate_R),
        rows.by_expert(z_RF),
        _by_expert(weights, num_experts),
        _by_expert(grads, num_experts),
        strict=True,
    ):
        (w_in, _, w_out, b_out), (dw_in, db_in, dw_out, db_out) = expert, grad
        # h is computed again from z: keeping it would double what forward leaves behind.
        h_rows = activate(z_rows, activation)
        if needs[1] or hidden_is_needed:
            dh_rows = dy_rows @ w_out
        if needs[1]:
            _gate_grad(dy_rows, dh_rows, h_rows, b_out, out_R=gate_rows)
        # After the gate's gradient, which is of dy and dh before the gate weight scales them.
        dy_rows.mul_(weight_rows)
        _linear_grads(dy_rows, h_rows, weight=dw_out, bias=db_out)
        if hidden_is_needed:
            dz_rows = activate_grad(dh_rows.mul_(weight_rows), z_rows, activation)
            _linear_grads(dz_rows, x_rows, weight=dw_in, bias=db_in)
        if needs[0]:
            torch.mm(dz_rows, w_in, out=x_rows)
    dx_TD = dweight_Tk = None
    if needs[0]:
        dx_TD = combine(x_RD, None, plan.inverse_R, num_choices=weight_Tk.shape[1])
    if needs[1]:
        dweight_R = weight_Tk.new_zeros(weight_Tk.numel())
        dweight_Tk = dweight_R.index_copy_(0, rows.order_R.long(), gate_R).view_as(weight_Tk)
    return [dx_TD, dweight_Tk, *grads]
