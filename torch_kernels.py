"""The MoE feed-forward in plain torch: the backend of CPU and the reference of the Triton kernels.

    x_TD -> per expert: its rows, two products on contiguous slices -> y_RD -> combine -> y_TD

Rows are sorted by expert, so no expert looks at another's tokens. The bounds of the experts are
read by the host: on CUDA that waits for the device, which the Triton kernels never do.
"""

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn import functional


def activate(z_RF: Tensor, function: str, *, is_gated: bool) -> Tensor:
    """Return the activation of z; the gated kinds halve the last dimension (gate half first)."""
    if not is_gated:
        return getattr(functional, function)(z_RF)
    gate_RF, value_RF = z_RF.chunk(2, dim=-1)
    return getattr(functional, function)(gate_RF).mul_(value_RF)


def _slope_times_(function: str, grad: Tensor, z: Tensor) -> Tensor:
    if function == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)
    return getattr(torch.ops.aten, f"{function}_backward").grad_input(grad, z, grad_input=grad)


def activate_grad(grad_RF: Tensor, z_RF: Tensor, function: str, *, is_gated: bool) -> Tensor:
    """Return the gradient of z, given that of activate(z); may write over the latter."""
    if not is_gated:
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

    Numerics: sums in fp32 or wider. Adds rows where they stand: a third of the time of a sum that
    copies them choice by choice, on CPU.
    """
    wide, is_kept_Tk = _sum_dtype(y_RD), inverse_R.view(-1, num_choices) >= 0
    if y_RD.shape[0] == 0:
        return y_RD.new_zeros((len(is_kept_Tk), y_RD.shape[1]))
    # Left out and not multiplied by zero, which would let a NaN of another token through.
    flat_R = torch.nonzero(is_kept_Tk.view(-1))[:, 0]
    count_T = is_kept_Tk.sum(1)
    scale_R = y_RD.new_ones(len(flat_R), dtype=wide)
    if weight_Tk is not None:
        scale_R = weight_Tk.reshape(-1).index_select(0, flat_R).to(wide)
    sum_TD = functional.embedding_bag(
        inverse_R.index_select(0, flat_R).long(),
        y_RD.to(wide),
        offsets=count_T.cumsum(0) - count_T,
        per_sample_weights=scale_R,
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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The sorted rows that experts own: their tokens, and each expert's (id, first, end)."""

    token_R: Tensor
    order_R: Tensor
    ranges: list[tuple[int, int, int]]


def _rows(order_R: Tensor, offset_E1: Tensor, num_choices: int) -> _Rows:
    offset = offset_E1.tolist()
    order_R = order_R[: offset[-1]]
    token_R = order_R if num_choices == 1 else order_R // num_choices
    spans = [(i, *span) for i, span in enumerate(itertools.pairwise(offset))]
    return _Rows(token_R, order_R, [span for span in spans if span[1] < span[2]])


def _linear(x_RX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, *, out_RY: Tensor) -> None:
    if bias_Y is None:
        torch.mm(x_RX, weight_YX.t(), out=out_RY)
    else:
        torch.addmm(bias_Y, x_RX, weight_YX.t(), out=out_RY)


def _by_expert(weight: Tensor, offset_E1: Tensor) -> Tensor:
    return weight.unflatten(0, (offset_E1.numel() - 1, -1))


def forward(
    x_TD: Tensor,
    weight_Tk: Tensor,
    *,
    order_R: Tensor,
    inverse_R: Tensor,
    offset_E1: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    function: str,
    is_gated: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Return y_TD and the pre-activation z_RF, with zeros in the rows without an expert."""
    w_in_EFD, w_out_EDF = _by_expert(w_in, offset_E1), _by_expert(w_out, offset_E1)
    rows = _rows(order_R, offset_E1, weight_Tk.shape[1])
    z_RF = x_TD.new_empty(order_R.numel(), w_in_EFD.shape[1])
    z_RF[rows.order_R.numel() :].zero_()
    y_RD = x_TD.new_empty(rows.order_R.numel(), x_TD.shape[1])
    for expert, first, end in rows.ranges:
        x_rows, z_rows = x_TD.index_select(0, rows.token_R[first:end]), z_RF[first:end]
        _linear(x_rows, w_in_EFD[expert], None if b_in is None else b_in[expert], out_RY=z_rows)
        h_rows = activate(z_rows, function, is_gated=is_gated)
        bias_D = None if b_out is None else b_out[expert]
        _linear(h_rows, w_out_EDF[expert], bias_D, out_RY=y_RD[first:end])
    return combine(y_RD, weight_Tk, inverse_R, num_choices=weight_Tk.shape[1]), z_RF


@dataclasses.dataclass(frozen=True)
class _Grads:
    """Where the gradients go, by expert or by sorted row; None: not asked for."""

    x_RD: Tensor | None
    gate_R: Tensor | None
    w_in_EFD: Tensor | None
    b_in_EF: Tensor | None
    w_out_EDF: Tensor | None
    b_out_ED: Tensor | None

    def hidden_is_needed(self) -> bool:
        return any(g is not None for g in (self.x_RD, self.w_in_EFD, self.b_in_EF))


def _output_grads(
    grads: _Grads, expert: int, *, dy_rows: Tensor, weight_rows: Tensor, h_rows: Tensor
) -> None:
    if grads.w_out_EDF is None and grads.b_out_ED is None:
        return
    scaled_rows = (dy_rows * weight_rows).to(dy_rows.dtype)
    if grads.w_out_EDF is not None:
        torch.mm(scaled_rows.t(), h_rows, out=grads.w_out_EDF[expert])
    if grads.b_out_ED is not None:
        torch.sum(scaled_rows, 0, out=grads.b_out_ED[expert])


def _input_grads(
    grads: _Grads, span: tuple[int, int, int], *, dz_rows: Tensor, x_rows: Tensor, w_in: Tensor
) -> None:
    expert, first, end = span
    if grads.w_in_EFD is not None:
        torch.mm(dz_rows.t(), x_rows, out=grads.w_in_EFD[expert])
    if grads.b_in_EF is not None:
        torch.sum(dz_rows, 0, out=grads.b_in_EF[expert])
    if grads.x_RD is not None:
        torch.mm(dz_rows, w_in, out=grads.x_RD[first:end])


def _place_for_grads(
    rows: _Rows, x_TD: Tensor, weight_Tk: Tensor, values: list[Tensor | None], needs: list[bool]
) -> _Grads:
    num_rows = rows.order_R.numel()
    x_RD = x_TD.new_empty(num_rows, x_TD.shape[1]) if needs[0] else None
    gate_R = weight_Tk.new_empty(num_rows) if needs[1] else None
    pairs = zip(values, needs[2:], strict=True)
    by_expert = [torch.empty_like(v) if need and v is not None else None for v, need in pairs]
    busy = {expert for expert, _, _ in rows.ranges}
    for grad in (g for g in by_expert if g is not None):
        for expert in set(range(len(grad))) - busy:
            grad[expert].zero_()
    return _Grads(x_RD, gate_R, *by_expert)


def _by_token(
    grads: _Grads, rows: _Rows, weight_Tk: Tensor, inverse_R: Tensor
) -> list[Tensor | None]:
    dx_TD = dweight_Tk = None
    if grads.x_RD is not None:
        dx_TD = combine(grads.x_RD, None, inverse_R, num_choices=weight_Tk.shape[1])
    if grads.gate_R is not None:
        dweight_R = weight_Tk.new_zeros(weight_Tk.numel())
        dweight_Tk = dweight_R.index_copy_(0, rows.order_R.long(), grads.gate_R).view_as(weight_Tk)
    return [dx_TD, dweight_Tk]


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_Tk: Tensor,
    *,
    z_RF: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offset_E1: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    function: str,
    is_gated: bool,
    allow_tf32: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, weight, w_in, b_in, w_out, b_out: None where not `needs`."""
    w_in_EFD, w_out_EDF = _by_expert(w_in, offset_E1), _by_expert(w_out, offset_E1)
    rows = _rows(order_R, offset_E1, weight_Tk.shape[1])
    weight_R1 = weight_Tk.reshape(-1, 1).index_select(0, rows.order_R)
    places = [w_in_EFD, b_in, w_out_EDF, b_out]
    grads = _place_for_grads(rows, x_TD, weight_Tk, places, needs)
    for span in rows.ranges:
        expert, first, end = span
        token_rows, z_rows = rows.token_R[first:end], z_RF[first:end]
        dy_rows, weight_rows = dy_TD.index_select(0, token_rows), weight_R1[first:end]
        h_rows = activate(z_rows, function, is_gated=is_gated)
        _output_grads(grads, expert, dy_rows=dy_rows, weight_rows=weight_rows, h_rows=h_rows)
        if grads.gate_R is None and not grads.hidden_is_needed():
            continue
        dh_rows = dy_rows @ w_out_EDF[expert]
        if grads.gate_R is not None:
            # <dy, w_out h + b_out>, without the y that forward did not keep.
            gate_rows = _row_dot(dh_rows, h_rows)
            bias_rows = 0 if b_out is None else dy_rows @ b_out[expert]
            grads.gate_R[first:end] = gate_rows + bias_rows
        if grads.hidden_is_needed():
            dh_rows.mul_(weight_rows)
            dz_rows = activate_grad(dh_rows, z_rows, function, is_gated=is_gated)
            x_rows = x_TD.index_select(0, token_rows)
            _input_grads(grads, span, dz_rows=dz_rows, x_rows=x_rows, w_in=w_in_EFD[expert])
    of_tokens = _by_token(grads, rows, weight_Tk, inverse_R)
    of_weights = [grads.w_in_EFD, grads.b_in_EF, grads.w_out_EDF, grads.b_out_ED]
    like = [w_in, b_in, w_out, b_out]
    pairs = zip(of_weights, like, strict=True)
    return [*of_tokens, *(g if g is None or v is None else g.view_as(v) for g, v in pairs)]
