"""Triton kernels that multiply: persistent grouped matrix products whose tiles stay in an expert.

    up: z = x[token] @ w_in, h = act(z)      rows_matmul: y = h @ w_out, dx = dz @ w_in
    hidden_grad: dz, weight * h, dgate       weight_grad: dw_in, dw_out over ragged rows

A program walks tiles in steps of the grid, column blocks first: the programs in flight share their
rows and one expert's weight, which stay in L2. The list of row tiles is triton_rows.schedule's.
Every element of an output is one program's, so nothing is added with atomics and bits repeat.
Sums are fp32 and rounded once, when they are stored; bias, activation and slope see the fp32 sum.
"""

# ruff: noqa: PLR0917  (a kernel takes its arguments by position)
# mypy: disable-error-code="untyped-decorator"

from moe_kernels.triton_seam import tl, triton

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _apply(z: tl.tensor, function: tl.constexpr) -> tl.tensor:
    if function == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif function == "silu":
        return z * tl.sigmoid(z)
    else:
        return tl.maximum(z, 0.0)


@triton.jit
def _slope(z: tl.tensor, function: tl.constexpr) -> tl.tensor:
    if function == "gelu":
        density = INV_SQRT_2PI * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * density
    elif function == "silu":
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1.0 + z * (1.0 - sigmoid))
    else:
        return (z > 0.0).to(tl.float32)


@triton.jit
def _product(
    left_ptr: tl.tensor,
    row: tl.tensor,
    weight_ptr: tl.tensor,
    column: tl.tensor,
    num_columns: tl.constexpr,
    depth: tl.constexpr,
    is_transposed: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> tl.tensor:
    """Return left[row] @ weight[:, column]; `row` is int64 and in bounds, columns need not be."""
    is_column = column < num_columns
    depth_K = tl.arange(0, block_k)
    left_ptrs = left_ptr + row[:, None] * depth + depth_K[None, :]
    if is_transposed:
        weight_ptrs = weight_ptr + column[None, :] * depth + depth_K[:, None]
    else:
        weight_ptrs = weight_ptr + depth_K[:, None] * num_columns + column[None, :]
    step: tl.constexpr = block_k if is_transposed else block_k * num_columns
    # Where blocks divide the sizes no load needs a mask in the inner loop.
    is_even: tl.constexpr = depth % block_k == 0 and num_columns % block_n == 0
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, depth, block_k):
        if is_even:
            left, weight = tl.load(left_ptrs), tl.load(weight_ptrs)
        else:
            # Both sides: what is beyond the depth may be a NaN, which times zero is one, too.
            is_depth = depth_K < depth - start
            left = tl.load(left_ptrs, mask=is_depth[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_depth[:, None] & is_column[None, :], other=0.0)
        # Not Triton's default, tf32, which cuts fp32 inputs down to 10 bits of mantissa.
        total = tl.dot(left, weight, total, input_precision="ieee")
        left_ptrs += block_k
        weight_ptrs += step
    return total


@triton.jit
def _add_bias(
    total: tl.tensor,
    bias_ptr: tl.tensor,
    start: tl.tensor,
    column: tl.tensor,
    num_columns: tl.constexpr,
) -> tl.tensor:
    bias = tl.load(bias_ptr + start + column, mask=column < num_columns, other=0.0)
    return total + bias.to(tl.float32)[None, :]


@triton.jit
def _store_tile(
    out_ptr: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.constexpr,
    stride: tl.constexpr,
) -> None:
    # The last tile of an expert reaches into the next one's rows, which are another program's.
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    out_ptrs = out_ptr + row[:, None] * stride + column[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _halves(tile: tl.tensor) -> tl.tuple:
    """Return the left and right columns: an epilogue on a whole tile overflows the registers."""
    shape: tl.constexpr = (tile.shape[0], 2, tile.shape[1] // 2)
    return tl.split(tl.permute(tl.reshape(tile, shape), (0, 2, 1)))


@triton.jit
def _quarters(tile: tl.tensor) -> tl.tuple:
    left, right = _halves(tile)
    return _halves(left) + _halves(right)


@triton.jit
def up(
    x_ptr: tl.tensor,
    w_in_ptr: tl.tensor,
    b_in_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    z_ptr: tl.tensor,
    h_ptr: tl.tensor,
    num_choices: tl.constexpr,
    width: tl.constexpr,
    hidden: tl.constexpr,
    has_bias: tl.constexpr,
    function: tl.constexpr,
    is_gated: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Store z = x[token] @ w_in[e]^T + b_in[e] and h = activation(z) of each sorted row.

    Shapes: x_TD, w_in [E*F, D] (gated: [E*2F, D]), b_in [E, F or 2F] -> z [R, F or 2F], h_RF
    Cost: 2*R*D*F FLOPs (gated twice); reads R*D + E*D*F, writes 2*R*F elements.
    """
    z_width: tl.constexpr = 2 * hidden if is_gated else hidden
    quarter: tl.constexpr = block_n // 4
    blocks_n: tl.constexpr = (hidden + block_n - 1) // block_n
    # Persistent: the number of tiles is known to the device only, so the grid is of a fixed size
    # and each program takes every num_programs-th tile until the list of this call ends.
    for index in range(tl.program_id(0), tl.load(tile_ptr) * blocks_n, tl.num_programs(0)):
        tile = tile_ptr + 1 + 3 * (index // blocks_n)
        # int64, as the expert's weight may begin beyond 2**31 elements.
        expert, first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
        row = first + tl.arange(0, block_m)
        is_row = row < end
        # Rows past the expert's end read its last row again, which needs no mask in the products;
        # what is computed for them is not stored.
        token = tl.load(order_ptr + tl.minimum(row, end - 1)).to(tl.int64) // num_choices
        row = row.to(tl.int64)
        column = (index % blocks_n) * block_n + tl.arange(0, block_n)
        weight, bias = w_in_ptr + expert * z_width * width, expert * z_width
        z = _product(x_ptr, token, weight, column, hidden, width, True, block_n, block_k)
        z_parts = _quarters(z)
        if is_gated:
            # The value half by a second product, so that both halves of a z are in one program.
            weight += hidden * width
            z = _product(x_ptr, token, weight, column, hidden, width, True, block_n, block_k)
            value_parts = _quarters(z)
        # The epilogue goes by quarters of the columns: erf and exp on a whole tile would spill.
        column = (index % blocks_n) * block_n + tl.arange(0, quarter)
        for part in tl.static_range(4):
            z = z_parts[part]
            if has_bias:
                z = _add_bias(z, b_in_ptr, bias, column, hidden)
            _store_tile(z_ptr, z, row, is_row, column, hidden, z_width)
            h = _apply(z, function)
            if is_gated:
                value = value_parts[part]
                if has_bias:
                    value = _add_bias(value, b_in_ptr, bias + hidden, column, hidden)
                _store_tile(z_ptr + hidden, value, row, is_row, column, hidden, z_width)
                h *= value
            _store_tile(h_ptr, h, row, is_row, column, hidden, hidden)
            column += quarter


@triton.jit
def rows_matmul(
    left_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    out_ptr: tl.tensor,
    depth: tl.constexpr,
    width: tl.constexpr,
    has_bias: tl.constexpr,
    is_transposed: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Store left @ weight[e] + bias[e] of each sorted row; the down product, and dx of a row.

    Shapes: left [R, depth], weight [E, depth, width] (transposed: [E, width, depth]) -> [R, width]
    Cost: 2*R*depth*width FLOPs; reads R*depth + E*depth*width, writes R*width elements.
    """
    blocks_n: tl.constexpr = (width + block_n - 1) // block_n
    for index in range(tl.program_id(0), tl.load(tile_ptr) * blocks_n, tl.num_programs(0)):
        tile = tile_ptr + 1 + 3 * (index // blocks_n)
        expert, first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
        row = first + tl.arange(0, block_m)
        inner = tl.minimum(row, end - 1).to(tl.int64)
        column = (index % blocks_n) * block_n + tl.arange(0, block_n)
        weight = weight_ptr + expert * depth * width
        out = _product(
            left_ptr, inner, weight, column, width, depth, is_transposed, block_n, block_k
        )
        if has_bias:
            out = _add_bias(out, bias_ptr, expert * width, column, width)
        _store_tile(out_ptr, out, row.to(tl.int64), row < end, column, width, width)


@triton.jit
def _load_tile(
    ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.constexpr,
    stride: tl.constexpr,
) -> tl.tensor:
    value = tl.load(
        ptr + row[:, None] * stride + column[None, :],
        mask=(column < num_columns)[None, :],
        other=0.0,
    )
    return value.to(tl.float32)


@triton.jit
def _store_hidden_grad(
    dh: tl.tensor,
    z_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    h_ptr: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    hidden: tl.constexpr,
    keeps_h: tl.constexpr,
    function: tl.constexpr,
    is_gated: tl.constexpr,
) -> tl.tensor:
    """Store dz and weight * h of these columns; return <dh, h> of each row over them.

    dh is of w_out h before the gate weight scales it, as dgate needs it; dz and h carry the weight.
    """
    z_width: tl.constexpr = 2 * hidden if is_gated else hidden
    is_row, inner = row < end, tl.minimum(row, end - 1)
    z = _load_tile(z_ptr, inner, column, hidden, z_width)
    # Computed again from z, the only one of the two that forward keeps.
    h = _apply(z, function)
    slope = weight * _slope(z, function)
    if is_gated:
        value = _load_tile(z_ptr + hidden, inner, column, hidden, z_width)
        dvalue = dh * h * weight
        _store_tile(dz_ptr + hidden, dvalue, row, is_row, column, hidden, z_width)
        slope *= value
        h *= value
    _store_tile(dz_ptr, dh * slope, row, is_row, column, hidden, z_width)
    if keeps_h:
        _store_tile(h_ptr, h * weight, row, is_row, column, hidden, hidden)
    return tl.sum(dh * h, 1)


@triton.jit
def hidden_grad(
    dy_ptr: tl.tensor,
    w_out_ptr: tl.tensor,
    z_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    h_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    num_rows: int,
    num_choices: tl.constexpr,
    width: tl.constexpr,
    hidden: tl.constexpr,
    keeps_h: tl.constexpr,
    keeps_gate: tl.constexpr,
    function: tl.constexpr,
    is_gated: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Store dz, weight * h for dw_out, and each column block's share of <dy @ w_out, h> for dgate.

    Shapes: dy_TD, w_out [E*D, F], z [R, F or 2F] -> dz like z, h_RF, gate [blocks of F, R] fp32
    Cost: 2*R*D*F FLOPs; reads R*D + E*D*F + R*F, writes 2*R*F elements; h is not multiplied out.
    """
    half: tl.constexpr = block_n // 2
    blocks_n: tl.constexpr = (hidden + block_n - 1) // block_n
    for index in range(tl.program_id(0), tl.load(tile_ptr) * blocks_n, tl.num_programs(0)):
        tile = tile_ptr + 1 + 3 * (index // blocks_n)
        expert, first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
        row = first + tl.arange(0, block_m)
        is_row = row < end
        flat = tl.load(order_ptr + tl.minimum(row, end - 1)).to(tl.int64)
        row = row.to(tl.int64)
        column = (index % blocks_n) * block_n + tl.arange(0, block_n)
        w_out = w_out_ptr + expert * width * hidden
        token = flat // num_choices
        dh = _product(dy_ptr, token, w_out, column, hidden, width, False, block_n, block_k)
        weight = tl.load(weight_ptr + flat).to(tl.float32)[:, None]
        # By halves, for the reason that `up` goes by quarters.
        dh_parts = _halves(dh)
        column = (index % blocks_n) * block_n + tl.arange(0, half)
        share = tl.zeros((block_m,), tl.float32)
        for part in tl.static_range(2):
            share += _store_hidden_grad(
                dh_parts[part],
                z_ptr,
                dz_ptr,
                h_ptr,
                weight,
                row,
                end,
                column,
                hidden,
                keeps_h,
                function,
                is_gated,
            )
            column += half
        # A row of shares per column block, since the blocks of a row are different programs'.
        if keeps_gate:
            tl.store(gate_ptr + (index % blocks_n) * num_rows + row, share, mask=is_row)


@triton.jit
def weight_grad(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    order_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_choices: tl.constexpr,
    num_experts: tl.constexpr,
    left_width: tl.constexpr,
    right_width: tl.constexpr,
    is_left_gathered: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Store left[e's rows]^T @ right[e's rows] of every expert, zeros for one without rows.

    One of the two is read by token, the other by sorted row.
    Shapes: left [R or T, left_width], right [T or R, right_width] -> [E, left_width, right_width]
    Cost: 2*R*left_width*right_width FLOPs; reads R rows of both, writes the weight once.
    """
    blocks_m: tl.constexpr = (left_width + block_m - 1) // block_m
    blocks_n: tl.constexpr = (right_width + block_n - 1) // block_n
    blocks: tl.constexpr = blocks_m * blocks_n
    for index in range(tl.program_id(0), num_experts * blocks, tl.num_programs(0)):
        expert, block = index // blocks, index % blocks
        left_column = (block // blocks_n) * block_m + tl.arange(0, block_m)
        right_column = (block % blocks_n) * block_n + tl.arange(0, block_n)
        is_left, is_right = left_column < left_width, right_column < right_width
        # int32 sizes overflow at 2**31 elements, which many experts of a large model reach.
        out = out_ptr + tl.cast(expert, tl.int64) * left_width * right_width
        end = tl.load(offset_ptr + expert + 1)
        # An expert without rows leaves the loop at once and stores these zeros: its gradient must
        # be zero, and what is in `out` before is not.
        total = tl.zeros((block_m, block_n), tl.float32)
        for start in range(tl.load(offset_ptr + expert), end, block_k):
            row = start + tl.arange(0, block_k)
            is_row = row < end
            token = (tl.load(order_ptr + row, mask=is_row, other=0) // num_choices).to(tl.int64)
            row = row.to(tl.int64)
            left_row = token if is_left_gathered else row
            right_row = row if is_left_gathered else token
            left_ptrs = left_ptr + left_row[:, None] * left_width + left_column[None, :]
            right_ptrs = right_ptr + right_row[:, None] * right_width + right_column[None, :]
            # Here rows are what is summed over: the next expert's must count as zero on both sides.
            left = tl.load(left_ptrs, mask=is_row[:, None] & is_left[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=is_row[:, None] & is_right[None, :], other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        row = left_column.to(tl.int64)
        _store_tile(out, total, row, is_left, right_column, right_width, right_width)
