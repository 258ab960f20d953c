"""The MoE feed-forward in Triton: what is launched when, with which tiles.

    forward   schedule -> up: gather x @ w_in, bias, activation -> down: h @ w_out -> combine
    backward  hidden_grad: gather dy @ w_out, dgate, dz -> rows_matmul: dz @ w_in -> combine
              weight_grad: dw_in, dw_out over ragged rows; column_sum: db_in, db_out

The row tiles are listed on the device and their number is bounded on the host, so nothing waits for
the device. The plain-torch reference of all functions here is torch_kernels.py.
"""

import dataclasses

import torch
from torch import Tensor

from moe_kernels import triton_matmul, triton_rows
from moe_kernels.tiles import Tile, Tiles, layer_size, power_of_2, tiles_for
from moe_kernels.triton_seam import Constant, Launcher, is_interpreted, launch, num_programs

__all__ = [
    "Layer",
    "backward",
    "column_sum",
    "combine",
    "combine_backward",
    "forward",
    "gate_grad",
    "hidden_grad",
    "is_interpreted",
    "make_layer",
    "rows_matmul",
    "up",
    "weight_grad",
]

ROW_TILES_PER_PROGRAM = 64
TOKEN_BLOCK = {"block_tokens": 8, "block_columns": 256, "num_warps": 4}
COLUMN_SUM_BLOCK = {"block_rows": 64, "block_columns": 64, "num_warps": 4}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call's rows and sizes, and the list of its row tiles on the device."""

    weight_Tk: Tensor
    order_R: Tensor
    inverse_R: Tensor
    offset_E1: Tensor
    row_tile: Tensor
    max_row_tiles: int
    tiles: Tiles
    sizes: dict[str, Constant]  # what `up` and `hidden_grad` have in common
    width: int
    hidden: int
    is_gated: bool
    launch: Launcher

    @property
    def num_choices(self) -> int:
        """Return k."""
        return self.weight_Tk.shape[1]

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.offset_E1.numel() - 1

    def grid(self, num_columns: int, tile: Tile) -> tuple[int]:
        """Return a persistent grid, no larger than the tiles there can be."""
        num_tiles = self.max_row_tiles * _blocks(num_columns, tile.n)
        return _persistent(self.order_R.device, tile, num_tiles=num_tiles)


def _persistent(device: torch.device, tile: Tile, *, num_tiles: int) -> tuple[int]:
    return (max(1, min(num_programs(device, per_sm=tile.programs_per_sm), num_tiles)),)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _schedule(
    offset_E1: Tensor, num_rows: int, *, block_m: int, launcher: Launcher
) -> tuple[Tensor, int]:
    num_experts = offset_E1.numel() - 1
    # Each expert ends in at most one tile that is not full.
    max_tiles = num_rows // block_m + min(num_experts, num_rows)
    row_tile = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=offset_E1.device)
    constants: dict[str, Constant] = {
        "num_experts": num_experts,
        "block_experts": power_of_2(num_experts),
        "block_m": block_m,
        "block_tiles": ROW_TILES_PER_PROGRAM,
    }
    grid = (max(1, _blocks(max_tiles, ROW_TILES_PER_PROGRAM)),)
    launcher(triton_rows.schedule, grid, (offset_E1, row_tile), constants)
    return row_tile, max_tiles


def make_layer(
    x_TD: Tensor,
    weight_Tk: Tensor,
    *,
    order_R: Tensor,
    inverse_R: Tensor,
    offset_E1: Tensor,
    hidden: int,
    function: str,
    is_gated: bool,
    allow_tf32: bool,
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
            is_gated=is_gated,
            num_experts=offset_E1.numel() - 1,
            dtype=x_TD.dtype,
            num_rows=order_R.numel(),
        )
        tiles = tiles_for(size)
    row_tile, max_row_tiles = _schedule(
        offset_E1, order_R.numel(), block_m=tiles.up.m, launcher=launcher
    )
    sizes: dict[str, Constant] = {
        "num_choices": weight_Tk.shape[1],
        "width": width,
        "hidden": hidden,
        "function": function,
        "is_gated": is_gated,
        "precision": "tf32" if allow_tf32 else "ieee",
    }
    rows = (weight_Tk, order_R, inverse_R, offset_E1)
    return Layer(*rows, row_tile, max_row_tiles, tiles, sizes, width, hidden, is_gated, launcher)


def up(layer: Layer, x_TD: Tensor, w_in: Tensor, b_in: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the pre-activation z_RF, gate half first if gated, and h_RF = activation(z)."""
    num_rows, halves = layer.order_R.numel(), 2 if layer.is_gated else 1
    z_RF = x_TD.new_empty(num_rows, layer.hidden * halves)
    h_RF = x_TD.new_empty(num_rows, layer.hidden)
    values = (x_TD, w_in, b_in, layer.order_R, layer.row_tile, z_RF, h_RF)
    constants = {**layer.sizes, "has_bias": b_in is not None, **layer.tiles.up.constants()}
    layer.launch(triton_matmul.up, layer.grid(layer.hidden, layer.tiles.up), values, constants)
    return z_RF, h_RF


def rows_matmul(
    layer: Layer, left_RX: Tensor, weight: Tensor, *, bias: Tensor | None, is_transposed: bool
) -> Tensor:
    """Return each sorted row times its expert's weight: [F, D], or [D, F] if transposed."""
    out_RD = left_RX.new_empty(left_RX.shape[0], layer.width)
    constants: dict[str, Constant] = {
        "depth": left_RX.shape[1],
        "width": layer.width,
        "has_bias": bias is not None,
        "is_transposed": is_transposed,
        "precision": layer.sizes["precision"],
        **layer.tiles.rows.constants(),
    }
    values = (left_RX, weight, bias, layer.row_tile, out_RD)
    grid = layer.grid(layer.width, layer.tiles.rows)
    layer.launch(triton_matmul.rows_matmul, grid, values, constants)
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
    constants: dict[str, Constant] = {
        "num_choices": num_choices,
        "width": width,
        "has_weight": weight_Tk is not None,
        **TOKEN_BLOCK,
    }
    blocks_of_columns = _blocks(width, TOKEN_BLOCK["block_columns"])
    grid = (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]), blocks_of_columns)
    values = (y_RD, weight_Tk, inverse_R, out_TD, num_tokens)
    launch(triton_rows.combine_rows, grid, values, constants)
    return out_TD


def combine_backward(
    dy_TD: Tensor, y_RD: Tensor, weight_Tk: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of y_RD and of weight_Tk."""
    num_tokens, num_choices = weight_Tk.shape
    dy_RD, dweight_Tk = torch.zeros_like(y_RD), torch.empty_like(weight_Tk)
    if num_tokens == 0:
        return dy_RD, dweight_Tk
    sizes: dict[str, Constant] = {"num_choices": num_choices, "width": y_RD.shape[1]}
    grid = (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]),)
    values = (dy_TD, y_RD, weight_Tk, inverse_R, dy_RD, dweight_Tk, num_tokens)
    launch(triton_rows.combine_rows_backward, grid, values, {**sizes, **TOKEN_BLOCK})
    return dy_RD, dweight_Tk


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
    """Return y_TD and the pre-activation z_RF, whose rows without an expert are not set."""
    with torch.cuda.device_of(x_TD):
        layer = make_layer(
            x_TD,
            weight_Tk,
            order_R=order_R,
            inverse_R=inverse_R,
            offset_E1=offset_E1,
            hidden=w_out.shape[1],
            function=function,
            is_gated=is_gated,
            allow_tf32=allow_tf32,
        )
        z_RF, h_RF = up(layer, x_TD, w_in, b_in)
        y_RD = rows_matmul(layer, h_RF, w_out, bias=b_out, is_transposed=True)
        return combine(y_RD, weight_Tk, inverse_R, num_choices=layer.num_choices), z_RF


def hidden_grad(
    layer: Layer, dy_TD: Tensor, *, z_RF: Tensor, w_out: Tensor, keeps_h: bool, keeps_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dz, weight * h, and dgate's shares per block of hidden columns."""
    tile, num_rows = layer.tiles.hidden_grad, z_RF.shape[0]
    shape_NR = (_blocks(layer.hidden, tile.n), num_rows)
    dz_RF = torch.empty_like(z_RF)
    h_RF = z_RF.new_empty(num_rows, layer.hidden) if keeps_h else None
    share_NR = z_RF.new_empty(shape_NR, dtype=torch.float32) if keeps_gate else None
    keeps: dict[str, Constant] = {"keeps_h": keeps_h, "keeps_gate": keeps_gate}
    rows = (layer.weight_Tk, layer.order_R, layer.row_tile)
    values = (dy_TD, w_out, z_RF, *rows, dz_RF, h_RF, share_NR, num_rows)
    constants = {**layer.sizes, **keeps, **tile.constants()}
    layer.launch(triton_matmul.hidden_grad, layer.grid(layer.hidden, tile), values, constants)
    return dz_RF, h_RF, share_NR


def gate_grad(layer: Layer, dy_TD: Tensor, *, share_NR: Tensor, b_out: Tensor | None) -> Tensor:
    """Return the gradient of the weights from the shares that hidden_grad stored."""
    dweight_Tk, num_tokens = torch.empty_like(layer.weight_Tk), dy_TD.shape[0]
    if num_tokens == 0:
        return dweight_Tk
    constants: dict[str, Constant] = {
        "num_shares": share_NR.shape[0],
        "num_choices": layer.num_choices,
        "num_experts": layer.num_experts,
        "width": layer.width,
        "has_bias": b_out is not None,
        "block_experts": power_of_2(layer.num_experts),
        **TOKEN_BLOCK,
    }
    values = (share_NR, dy_TD, b_out, layer.inverse_R, layer.offset_E1, dweight_Tk, num_tokens)
    grid = (_blocks(num_tokens, TOKEN_BLOCK["block_tokens"]),)
    layer.launch(triton_rows.gate_grad, grid, values, constants)
    return dweight_Tk


def weight_grad(layer: Layer, left: Tensor, right: Tensor, *, is_left_gathered: bool) -> Tensor:
    """Return left^T @ right over each expert's rows; one of both is by token, not sorted."""
    tile, (left_width, right_width) = layer.tiles.weight_grad, (left.shape[1], right.shape[1])
    out = left.new_empty(layer.num_experts * left_width, right_width)
    constants: dict[str, Constant] = {
        "num_choices": layer.num_choices,
        "num_experts": layer.num_experts,
        "left_width": left_width,
        "right_width": right_width,
        "is_left_gathered": is_left_gathered,
        "precision": layer.sizes["precision"],
        **tile.constants(),
    }
    num_tiles = layer.num_experts * _blocks(left_width, tile.m) * _blocks(right_width, tile.n)
    values = (left, right, layer.order_R, layer.offset_E1, out)
    grid = _persistent(left.device, tile, num_tiles=num_tiles)
    layer.launch(triton_matmul.weight_grad, grid, values, constants)
    return out


def column_sum(layer: Layer, value: Tensor, *, is_of_tokens: bool) -> Tensor:
    """Return the sum of each expert's rows, of tokens times their weights if `is_of_tokens`."""
    width = value.shape[1]
    out = value.new_empty(layer.num_experts, width)
    constants: dict[str, Constant] = {
        "num_choices": layer.num_choices,
        "width": width,
        "is_of_tokens": is_of_tokens,
        **COLUMN_SUM_BLOCK,
    }
    values = (value, layer.weight_Tk, layer.order_R, layer.offset_E1, out)
    grid = (layer.num_experts, _blocks(width, COLUMN_SUM_BLOCK["block_columns"]))
    layer.launch(triton_rows.column_sum, grid, values, constants)
    return out


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
    of_x, of_weight, of_w_in, of_b_in, of_w_out, of_b_out = needs
    grads: list[Tensor | None] = [None] * len(needs)
    with torch.cuda.device_of(x_TD):
        layer = make_layer(
            x_TD,
            weight_Tk,
            order_R=order_R,
            inverse_R=inverse_R,
            offset_E1=offset_E1,
            hidden=w_out.shape[1],
            function=function,
            is_gated=is_gated,
            allow_tf32=allow_tf32,
        )
        dz_RF, h_RF, share_NR = hidden_grad(
            layer, dy_TD, z_RF=z_RF, w_out=w_out, keeps_h=of_w_out, keeps_gate=of_weight
        )
        if of_x:
            dx_RD = rows_matmul(layer, dz_RF, w_in, bias=None, is_transposed=False)
            grads[0] = combine(dx_RD, None, inverse_R, num_choices=layer.num_choices)
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
