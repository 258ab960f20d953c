"""The MoE feed-forward in Triton: what is launched when, with which tiles.

    forward   schedule -> up: gather x @ w_in, bias, activation -> down: h @ w_out -> combine
    backward  hidden_grad: gather dy @ w_out, dgate, dz -> rows_matmul: dz @ w_in -> combine
              weight_grad: dw_in, dw_out over ragged rows; column_sum: db_in, db_out

The row tiles are listed on the device and their number is bounded on the host, so nothing waits for
the device. The plain-torch reference of all functions here is torch_ffn.py.
"""

import dataclasses

import torch
from torch import Tensor

from moe_kernels import triton_matmul, triton_rows
from moe_kernels.plan import Activation, RowPlan, Weights
from moe_kernels.tiles import Tile, Tiles, layer_size, power_of_2, tiles_for
from moe_kernels.triton_seam import Constant, Launcher, launch, num_programs

ROW_TILES_PER_PROGRAM = 64
TOKEN_BLOCK = {"block_tokens": 8, "block_columns": 256, "num_warps": 4}
COLUMN_SUM_BLOCK = {"block_rows": 64, "block_columns": 64, "num_warps": 4}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the kernels of one call share, its row tiles listed on the device."""

    weight_Tk: Tensor
    plan: RowPlan
    row_tile: Tensor
    max_row_tiles: int
    tiles: Tiles
    width: int
    hidden: int
    activation: Activation
    launch: Launcher

    @property
    def num_choices(self) -> int:
        """Return k."""
        return self.weight_Tk.shape[1]

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.plan.offset_E1.numel() - 1

    @property
    def sizes(self) -> dict[str, Constant]:
        """Return the constants that `up` and `hidden_grad` have in common."""
        sizes = {"num_choices": self.num_choices, "width": self.width, "hidden": self.hidden}
        return {**sizes, **self.activation._asdict()}

    def grid(self, num_columns: int, tile: Tile) -> tuple[int]:
        """Return a persistent grid, no larger than the tiles there can be."""
        num_tiles = self.max_row_tiles * _blocks(num_columns, tile.n)
        return _persistent(self.weight_Tk.device, tile, num_tiles=num_tiles)


def _persistent(device: torch.device, tile: Tile, *, num_tiles: int) -> tuple[int]:
    return (max(1, min(num_programs(device, per_sm=tile.programs_per_sm), num_tiles)),)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _schedule(plan: RowPlan, *, block_m: int, launcher: Launcher) -> tuple[Tensor, int]:
    num_rows, num_experts = plan.order_R.numel(), plan.offset_E1.numel() - 1
    # Each expert ends in at most one tile that is not full. The host knows this bound only: how
    # many tiles there are depends on the routing, and reading it back would wait for the device.
    max_tiles = num_rows // block_m + min(num_experts, num_rows)
    row_tile = plan.offset_E1.new_empty(1 + 3 * max_tiles)
    launcher(
        triton_rows.schedule,
        (max(1, _blocks(max_tiles, ROW_TILES_PER_PROGRAM)),),
        (plan.offset_E1, row_tile),
        {
            "num_experts": num_experts,
            "block_experts": power_of_2(num_experts),
            "block_m": block_m,
            "block_tiles": ROW_TILES_PER_PROGRAM,
        },
    )
    return row_tile, max_tiles


def make_layer(
    x_TD: Tensor,
    weight_Tk: Tensor,
    plan: RowPlan,
    activation: Activation,
    *,
    hidden: int,
    tiles: Tiles | None = None,
    launcher: Launcher | None = None,
) -> Layer:
    """Return what the kernels of a call share, its row tiles listed on the device.

    `tiles` are taken instead of the table's; `launcher` gets the launches instead of the device.
    """
    width, launcher = x_TD.shape[1], launcher or launch
    if tiles is None:
        size = layer_size(
            width,
            hidden,
            is_gated=activation.is_gated,
            num_experts=plan.offset_E1.numel() - 1,
            dtype=x_TD.dtype,
            num_rows=plan.order_R.numel(),
        )
        tiles = tiles_for(size)
    schedule = _schedule(plan, block_m=tiles.up.m, launcher=launcher)
    return Layer(weight_Tk, plan, *schedule, tiles, width, hidden, activation, launcher)


def up(layer: Layer, x_TD: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Return the pre-activation z_RF, gate half first if gated, and h_RF = activation(z)."""
    order_R, tile = layer.plan.order_R, layer.tiles.up
    halves = 2 if layer.activation.is_gated else 1
    z_RF = x_TD.new_empty(order_R.numel(), layer.hidden * halves)
    h_RF = x_TD.new_empty(order_R.numel(), layer.hidden)
    layer.launch(
        triton_matmul.up,
        layer.grid(layer.hidden, tile),
        (x_TD, weights.w_in, weights.b_in, order_R, layer.row_tile, z_RF, h_RF),
        {**layer.sizes, "has_bias": weights.b_in is not None, **tile.constants()},
    )
    return z_RF, h_RF


def rows_matmul(
    layer: Layer, left_RX: Tensor, weight: Tensor, *, bias: Tensor | None, is_transposed: bool
) -> Tensor:
    """Return each sorted row times its expert's weight: [F, D], or [D, F] if transposed."""
    out_RD = left_RX.new_empty(left_RX.shape[0], layer.width)
    layer.launch(
        triton_matmul.rows_matmul,
        layer.grid(layer.width, layer.tiles.rows),
        (left_RX, weight, bias, layer.row_tile, out_RD),
        {
            "depth": left_RX.shape[1],
            "width": layer.width,
            "has_bias": bias is not None,
            "is_transposed": is_transposed,
            **layer.tiles.rows.constants(),
        },
    )
    return out_RD


def combine(
    y_RD: Tensor, weight_Tk: Tensor | None, inverse_R: Tensor, *, num_choices: int
) -> Tensor:
    """Return y_TD = sum_j weight[t, j] * y[inverse[t*k+j]], where a negative position adds nothing.

    Numerics: fp32 sums in the order of the choices.
    """
    num_tokens, width = inverse_R.numel() // num_choices, y_RD.shape[1]
    out_TD = y_RD.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out_TD
    blocks_of_columns = _blocks(width, TOKEN_BLOCK["block_columns"])
    launch(
        triton_rows.combine_rows,
        (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]), blocks_of_columns),
        (y_RD, weight_Tk, inverse_R, out_TD, num_tokens),
        {
            "num_choices": num_choices,
            "width": width,
            "has_weight": weight_Tk is not None,
            **TOKEN_BLOCK,
        },
    )
    return out_TD


def combine_backward(
    dy_TD: Tensor, y_RD: Tensor, weight_Tk: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of y_RD and of weight_Tk."""
    num_tokens, num_choices = weight_Tk.shape
    # Zeros, for the kernel writes only the rows that a token uses.
    dy_RD, dweight_Tk = torch.zeros_like(y_RD), torch.empty_like(weight_Tk)
    if num_tokens == 0:
        return dy_RD, dweight_Tk
    launch(
        triton_rows.combine_rows_backward,
        (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]),),
        (dy_TD, y_RD, weight_Tk, inverse_R, dy_RD, dweight_Tk, num_tokens),
        {"num_choices": num_choices, "width": y_RD.shape[1], **TOKEN_BLOCK},
    )
    return dy_RD, dweight_Tk


def forward(
    x_TD: Tensor, weight_Tk: Tensor, plan: RowPlan, weights: Weights, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Return y_TD and the pre-activation z_RF, whose rows without an expert are not set."""
    with torch.cuda.device_of(x_TD):
        layer = make_layer(x_TD, weight_Tk, plan, activation, hidden=weights.w_out.shape[1])
        z_RF, h_RF = up(layer, x_TD, weights)
        y_RD = rows_matmul(layer, h_RF, weights.w_out, bias=weights.b_out, is_transposed=True)
        return combine(y_RD, weight_Tk, plan.inverse_R, num_choices=layer.num_choices), z_RF


def hidden_grad(
    layer: Layer, dy_TD: Tensor, *, z_RF: Tensor, w_out: Tensor, keeps_h: bool, keeps_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dz, weight * h, and dgate's shares per block of hidden columns."""
    tile, num_rows = layer.tiles.hidden_grad, z_RF.shape[0]
    shape_NR = (_blocks(layer.hidden, tile.n), num_rows)
    dz_RF = torch.empty_like(z_RF)
    h_RF = z_RF.new_empty(num_rows, layer.hidden) if keeps_h else None
    # A share per column block, summed later in one order: adding them up here would take atomics.
    share_NR = z_RF.new_empty(shape_NR, dtype=torch.float32) if keeps_gate else None
    rows = (layer.weight_Tk, layer.plan.order_R, layer.row_tile)
    layer.launch(
        triton_matmul.hidden_grad,
        layer.grid(layer.hidden, tile),
        (dy_TD, w_out, z_RF, *rows, dz_RF, h_RF, share_NR, num_rows),
        {**layer.sizes, "keeps_h": keeps_h, "keeps_gate": keeps_gate, **tile.constants()},
    )
    return dz_RF, h_RF, share_NR


def gate_grad(layer: Layer, dy_TD: Tensor, *, share_NR: Tensor, b_out: Tensor | None) -> Tensor:
    """Return the gradient of the weights from the shares that hidden_grad stored."""
    dweight_Tk, num_tokens = torch.empty_like(layer.weight_Tk), dy_TD.shape[0]
    if num_tokens == 0:
        return dweight_Tk
    rows = (layer.plan.inverse_R, layer.plan.offset_E1)
    layer.launch(
        triton_rows.gate_grad,
        (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]),),
        (share_NR, dy_TD, b_out, *rows, dweight_Tk, num_tokens),
        {
            "num_shares": share_NR.shape[0],
            "num_choices": layer.num_choices,
            "num_experts": layer.num_experts,
            "width": layer.width,
            "has_bias": b_out is not None,
            "block_experts": power_of_2(layer.num_experts),
            **TOKEN_BLOCK,
        },
    )
    return dweight_Tk


def weight_grad(layer: Layer, left: Tensor, right: Tensor, *, is_left_gathered: bool) -> Tensor:
    """Return left^T @ right over each expert's rows; one of both is by token, not sorted."""
    tile, left_width, right_width = layer.tiles.weight_grad, left.shape[1], right.shape[1]
    out = left.new_empty(layer.num_experts * left_width, right_width)
    # All experts' tiles, the empty ones' too: `out` is not set until the kernel writes their zeros.
    num_tiles = layer.num_experts * _blocks(left_width, tile.m) * _blocks(right_width, tile.n)
    layer.launch(
        triton_matmul.weight_grad,
        _persistent(left.device, tile, num_tiles=num_tiles),
        (left, right, layer.plan.order_R, layer.plan.offset_E1, out),
        {
            "num_choices": layer.num_choices,
            "num_experts": layer.num_experts,
            "left_width": left_width,
            "right_width": right_width,
            "is_left_gathered": is_left_gathered,
            **tile.constants(),
        },
    )
    return out


def column_sum(layer: Layer, value: Tensor, *, is_of_tokens: bool) -> Tensor:
    """Return the sum of each expert's rows, of tokens times their weights if `is_of_tokens`."""
    width = value.shape[1]
    out = value.new_empty(layer.num_experts, width)
    layer.launch(
        triton_rows.column_sum,
        (layer.num_experts, _blocks(width, COLUMN_SUM_BLOCK["block_columns"])),
        (value, layer.weight_Tk, layer.plan.order_R, layer.plan.offset_E1, out),
        {
            "num_choices": layer.num_choices,
            "width": width,
            "is_of_tokens": is_of_tokens,
            **COLUMN_SUM_BLOCK,
        },
    )
    return out


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
    of_x, of_weight, of_w_in, of_b_in, of_w_out, of_b_out = needs
    grads: list[Tensor | None] = [None] * len(needs)
    w_in, _, w_out, b_out = weights
    with torch.cuda.device_of(x_TD):
        layer = make_layer(x_TD, weight_Tk, plan, activation, hidden=w_out.shape[1])
        dz_RF, h_RF, share_NR = hidden_grad(
            layer, dy_TD, z_RF=z_RF, w_out=w_out, keeps_h=of_w_out, keeps_gate=of_weight
        )
        if of_x:
            dx_RD = rows_matmul(layer, dz_RF, w_in, bias=None, is_transposed=False)
            grads[0] = combine(dx_RD, None, plan.inverse_R, num_choices=layer.num_choices)
        if share_NR is not None:
            grads[1] = gate_grad(layer, dy_TD, share_NR=share_NR, b_out=b_out)
        if of_w_in:
            grads[2] = weight_grad(layer, dz_RF, x_TD, is_left_gathered=False)
        if of_b_in:
            grads[3] = column_sum(layer, dz_RF, is_of_tokens=False)
        if h_RF is not None:
            grads[4] = weight_grad(layer, dy_TD, h_RF, is_left_gathered=True)
        if of_b_out:
            grads[5] = column_sum(layer, dy_TD, is_of_tokens=True)
    return grads
