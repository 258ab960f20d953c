"""Triton kernels over rows: the list of row tiles, the gather-sum of tokens and column sums.

Nothing here multiplies matrices; every kernel is bound by memory. A program owns the tokens or
columns that it writes and sums them in fp32 in one order: no atomics, the same bits every time.
"""

# ruff: noqa: PLR0917  (a kernel takes its arguments by position)
# mypy: disable-error-code="untyped-decorator"

from moe_kernels.triton_seam import tl, triton


@triton.jit
def schedule(
    offset_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    num_experts: tl.constexpr,
    block_experts: tl.constexpr,
    block_m: tl.constexpr,
    block_tiles: tl.constexpr,
) -> None:
    """List the row tiles: tile_ptr[0] their number, then (expert, first row, end) of each.

    Cost: one small program per `block_tiles` tiles; reads E + 1 offsets.
    """
    expert_E = tl.arange(0, block_experts)
    is_expert_E = expert_E < num_experts
    start_E = tl.load(offset_ptr + expert_E, mask=is_expert_E, other=0)
    end_E = tl.load(offset_ptr + expert_E + 1, mask=is_expert_E, other=0)
    tiles_E = (end_E - start_E + block_m - 1) // block_m
    tile_end_E = tl.cumsum(tiles_E, 0)
    total = tl.sum(tiles_E, 0)
    tile = tl.program_id(0) * block_tiles + tl.arange(0, block_tiles)
    # A tile is of the one expert whose tiles' range holds it; one without rows has an empty range.
    # The sum over experts then picks that expert's numbers, where a gather would need a search.
    is_mine = (tile[:, None] >= (tile_end_E - tiles_E)[None, :]) & (
        tile[:, None] < tile_end_E[None, :]
    )
    expert = tl.sum(tl.where(is_mine, expert_E[None, :], 0), 1)
    end = tl.sum(tl.where(is_mine, end_E[None, :], 0), 1)
    before = (start_E - (tile_end_E - tiles_E) * block_m)[None, :]
    first = tl.sum(tl.where(is_mine, before, 0), 1) + tile * block_m
    is_tile = tile < total
    tl.store(tile_ptr + 1 + 3 * tile, expert, mask=is_tile)
    tl.store(tile_ptr + 2 + 3 * tile, first, mask=is_tile)
    tl.store(tile_ptr + 3 + 3 * tile, end, mask=is_tile)
    if tl.program_id(0) == 0:
        tl.store(tile_ptr, total)


@triton.jit
def column_sum(
    value_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    order_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_choices: tl.constexpr,
    width: tl.constexpr,
    is_of_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Store the sum of each expert's rows: of value[row], or of weight[row] * value[token].

    Shapes: value [R, width] or [T, width] -> [E, width]. Cost: reads R*width elements.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    is_column = column < width
    end = tl.load(offset_ptr + expert + 1)
    total = tl.zeros((block_rows, block_columns), tl.float32)
    for start in range(tl.load(offset_ptr + expert), end, block_rows):
        row = start + tl.arange(0, block_rows)
        is_row = row < end
        source = row.to(tl.int64)
        if is_of_tokens:
            flat = tl.load(order_ptr + row, mask=is_row, other=0).to(tl.int64)
            source = flat // num_choices
        value_ptrs = value_ptr + source[:, None] * width + column[None, :]
        value = tl.load(value_ptrs, mask=is_row[:, None] & is_column[None, :], other=0.0)
        value = value.to(tl.float32)
        if is_of_tokens:
            weight = tl.load(weight_ptr + flat, mask=is_row, other=0.0).to(tl.float32)
            value *= weight[:, None]
        total += value
    # Zeros for an expert without rows, whose loop ran no time: `out` was not set before.
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert * width + column, out, mask=is_column)


@triton.jit
def combine_rows(
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: int,
    num_choices: tl.constexpr,
    width: tl.constexpr,
    has_weight: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Store sum_j weight[t, j] * y[inverse[t*k+j]] of each token, skipping negative positions.

    Shapes: y [any, width], weight_Tk, inverse [T*k] -> [T, width]
    Cost: reads T*k*width, writes T*width elements.
    """
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    is_token, is_column = token < num_tokens, column < width
    total = tl.zeros((block_tokens, block_columns), tl.float32)
    for choice in tl.static_range(num_choices):
        flat = token * num_choices + choice
        position = tl.load(inverse_ptr + flat, mask=is_token, other=-1).to(tl.int64)
        # A dropped choice is not loaded: its weight times a NaN in some other row would be one.
        is_kept = (position >= 0)[:, None] & is_column[None, :]
        y_ptrs = y_ptr + position[:, None] * width + column[None, :]
        y = tl.load(y_ptrs, mask=is_kept, other=0.0).to(tl.float32)
        if has_weight:
            y *= tl.load(weight_ptr + flat, mask=is_token, other=0.0).to(tl.float32)[:, None]
        total += y
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
    is_inside = is_token[:, None] & is_column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def combine_rows_backward(
    dout_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    num_tokens: int,
    num_choices: tl.constexpr,
    width: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Store weight[t, j] * dout[t] in each row's place, and dweight[t, j] = <dout[t], y[row]>.

    Cost: reads 2*T*k*width (dout mostly from cache), writes T*k*width elements.
    """
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    is_token = token < num_tokens
    for choice in tl.static_range(num_choices):
        flat = token * num_choices + choice
        position = tl.load(inverse_ptr + flat, mask=is_token, other=-1).to(tl.int64)
        weight = tl.load(weight_ptr + flat, mask=is_token, other=0.0).to(tl.float32)[:, None]
        dot = tl.zeros((block_tokens, block_columns), tl.float32)
        for start in range(0, width, block_columns):
            column = start + tl.arange(0, block_columns)
            is_kept = (position >= 0)[:, None] & (column < width)[None, :]
            dout_ptrs = dout_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
            dout = tl.load(dout_ptrs, mask=is_kept, other=0.0).to(tl.float32)
            place = position[:, None] * width + column[None, :]
            dot += dout * tl.load(y_ptr + place, mask=is_kept, other=0.0).to(tl.float32)
            tl.store(dy_ptr + place, (dout * weight).to(dy_ptr.dtype.element_ty), mask=is_kept)
        dweight = tl.sum(dot, 1).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + flat, dweight, mask=is_token)


@triton.jit
def gate_grad(
    share_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    b_out_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    num_tokens: int,
    num_shares: tl.constexpr,
    num_choices: tl.constexpr,
    num_experts: tl.constexpr,
    width: tl.constexpr,
    has_bias: tl.constexpr,
    block_experts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Store dweight[t, j] = the row's shares of <dout @ w_out, h>, summed, + <dout[t], b_out[e]>.

    Shapes: share [num_shares, T*k], dout_TD, b_out_ED -> dweight_Tk. Cost: reads T*k*width.
    """
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    is_token = token < num_tokens
    expert_E = tl.arange(0, block_experts)
    is_expert_E = expert_E < num_experts
    for choice in tl.static_range(num_choices):
        flat = token * num_choices + choice
        position = tl.load(inverse_ptr + flat, mask=is_token, other=-1)
        is_kept = position >= 0
        total = tl.zeros((block_tokens,), tl.float32)
        for index in range(num_shares):
            share = share_ptr + index * num_tokens * num_choices + position
            total += tl.load(share, mask=is_kept, other=0.0)
        if has_bias:
            # A row's expert is the number of experts that end at or before it; the lanes beyond the
            # experts never do.
            end_E = tl.load(offset_ptr + 1 + expert_E, mask=is_expert_E, other=2147483647)
            expert = tl.sum((end_E[None, :] <= position[:, None]).to(tl.int32), 1)
            dot = tl.zeros((block_tokens, block_columns), tl.float32)
            for start in range(0, width, block_columns):
                column = start + tl.arange(0, block_columns)
                is_inside = is_kept[:, None] & (column < width)[None, :]
                dout_ptrs = dout_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
                bias_ptrs = b_out_ptr + expert[:, None] * width + column[None, :]
                dout = tl.load(dout_ptrs, mask=is_inside, other=0.0).to(tl.float32)
                dot += dout * tl.load(bias_ptrs, mask=is_inside, other=0.0).to(tl.float32)
            total += tl.sum(dot, 1)
        tl.store(dweight_ptr + flat, total.to(dweight_ptr.dtype.element_ty), mask=is_token)
