"""The KAN layer for a few rows: read the k + 1 live coefficient rows of every input and nothing else.

    y[m, :] = sum_i gate[m, i] * ( base[:, i] * act(x[m, i]) + sum_{r=0..k} B_{f+r}(x[m, i]) W[i*C + f + r, :] )

f = floor((x - lo)/h) clamped to [0, G - 1]: inside the grid every other spline is zero, outside it those that still
reach x are among the outermost k + 1. The live rows i*C + f .. i*C + f + k are adjacent. Few rows are bound by reading
weights, and this reads (k + 1 + base) / (C + base) of their bytes.

Without a base term x is taken as the grid's closest point. A program owns BLOCK_O outputs of one row m and a share of
I; shares are summed by a second kernel in a fixed order.
Letters as in `triton_kan`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kansformer.kernels.triton_basis import activation, ceil_div, clamped, first_live, grid_scale, ranges, spline

# A share of I per program is at least this long: one partial sum written and read (8 bytes, in L2) per 2 * (k + 1) * 16
# bytes of 16-bit weights read.
LEAST_SHARE = 16
# Programs wanted for each multiprocessor, so that enough loads are in flight. With BLOCK_I, BLOCK_O and num_warps of
# `decode` the best of 24 choices for weights out of cache on an H200: 0.90, 0.71 and 0.64 of the dense product's time
# for 1360 -> 1024, 2736 -> 2048 and 5456 -> 4096, k = 1, C = 4 (benchmarks/results/LOG.md).
PROGRAMS_PER_SM = 16


def use_decode(M: int, I: int, O: int, C: int, spline_order: int) -> bool:
    """Whether `decode` moves fewer bytes than the matrix product: each of M rows reads k + 1 of C coefficient rows.

    Measured for one row; for more a prediction from bytes alone, which counts every row's reads as misses.
    """
    return 0 < M <= 64 and M * (spline_order + 1) <= C


@triton.jit(do_not_specialize=["M", "I_SPLIT"])
def _kan_decode_kernel(
    y_ptr, partial_ptr, x_ptr, gate_ptr, w_ptr, scale_ptr, base_ptr, grid_ptr,
    M, I, O, I_SPLIT, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GRID_SIZE + ORDER
    first_o = (tl.program_id(0) * BLOCK_O).to(tl.int64)
    m = tl.program_id(2).to(tl.int64)
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    in_o = (offs_o < O - first_o)[None, :]
    begin = tl.program_id(1) * I_SPLIT
    end = tl.minimum(begin + I_SPLIT, I)
    w_ptr += first_o + offs_o[None, :]
    base_ptr += first_o * I + offs_o[None, :] * I

    acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    acc_base = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for i0 in range(begin, end, BLOCK_I):
        i = (i0 + offs_i).to(tl.int64)
        in_i = i < end
        x = tl.load(x_ptr + m * stride_xm + i * stride_xi, mask=in_i, other=0.0).to(tl.float32)
        gate = tl.full((BLOCK_I,), 1.0, tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + m * stride_gm + i * stride_gi, mask=in_i, other=0.0).to(tl.float32)
        lo, inverse_width = grid_scale(grid_ptr, i, stride_grid, I, GRID_SIZE)
        t = (x - lo) * inverse_width
        if not HAS_BASE:
            t = clamped(t, 0.0, GRID_SIZE * 1.0)
        first = first_live(t, GRID_SIZE)
        row = i * C + first.to(tl.int64)
        rows_ptr = w_ptr + (row * O)[:, None]
        s = t - first - (1 - ORDER) / 2
        for r in tl.static_range(ORDER + 1):
            w = tl.load(rows_ptr + r * O, mask=in_i[:, None] & in_o, other=0.0).to(tl.float32)
            phi = gate * spline(s - r, ORDER)
            if HAS_SCALE:
                phi *= tl.load(scale_ptr + row + r, mask=in_i, other=0.0).to(tl.float32)
            acc += phi[:, None] * w
        if HAS_BASE:
            w = tl.load(base_ptr + i[:, None], mask=in_i[:, None] & in_o, other=0.0).to(tl.float32)
            acc_base += (gate * activation(x, ACTIVATION))[:, None] * w
    y = tl.sum(acc, axis=0)
    if HAS_BASE:
        y += tl.sum(acc_base, axis=0)

    y_offs = m * O + first_o + offs_o
    in_y = offs_o < O - first_o
    if tl.num_programs(1) == 1:
        tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=in_y)
    else:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M * O + y_offs, y, mask=in_y)


def decode(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    scale: Tensor | None = None,
    BLOCK_I: int = 8,
    BLOCK_O: int = 64,
    num_warps: int = 2,
    sms: int = 132,
) -> Tensor:
    """As `triton_kan.forward`, for few rows; the same sums in another order.

    With `scale` (I*C,) the weights are spline_weight * scale[:, None], spline_weight int8; y has the scale's dtype.
    """
    M, I = x.shape
    O = spline_weight.shape[1]
    y = (spline_weight if scale is None else scale).new_empty(M, O)
    if y.numel() == 0 or I == 0:
        return y.zero_()
    blocks = ceil_div(O, BLOCK_O)
    splits = min(ceil_div(PROGRAMS_PER_SM * sms, blocks * M), ceil_div(I, LEAST_SHARE))
    per_split = ceil_div(ceil_div(I, splits), BLOCK_I) * BLOCK_I
    splits = ceil_div(I, per_split)
    grid, stride_grid = ranges(grid)
    partial = y.new_empty(splits, M, O, dtype=torch.float32) if splits > 1 else grid
    weight = spline_weight.contiguous()
    gate_or_x = x if gate is None else gate
    with torch.cuda.device_of(x):
        _kan_decode_kernel[blocks, splits, M](
            y, partial, x, gate_or_x, weight, weight if scale is None else scale.contiguous(),
            weight if base_weight is None else base_weight.contiguous(), grid,
            M, I, O, per_split, *x.stride(), *gate_or_x.stride(), stride_grid,
            GRID_SIZE=grid_size, ORDER=spline_order, ACTIVATION=base_activation, HAS_GATE=gate is not None,
            HAS_BASE=base_weight is not None, HAS_SCALE=scale is not None, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_partials(partial, y) if splits > 1 else y


@triton.jit(do_not_specialize=["N", "splits"])
def _sum_kernel(out_ptr, partial_ptr, N, splits, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    offs_rows = rows[:, None].to(tl.int64) * N + offs[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, splits, ROWS):
        mask = (rows < splits - first)[:, None] & (offs < N)[None, :]
        acc += tl.load(partial_ptr + tl.cast(first, tl.int64) * N + offs_rows, mask=mask, other=0.0)
    tl.store(out_ptr + offs, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=offs < N)


def sum_partials(partial: Tensor, out: Tensor) -> Tensor:
    """out = partial.sum(0) for a float32 partial (splits, *out.shape), in an order that depends on the splits alone."""
    BLOCK, ROWS = 256, 16  # what waits is latency: a row at a time, four were in flight
    with torch.cuda.device_of(out):
        _sum_kernel[(ceil_div(out.numel(), BLOCK),)](
            out, partial, out.numel(), len(partial), BLOCK=BLOCK, ROWS=ROWS, enable_fp_fusion=True
        )
    return out
