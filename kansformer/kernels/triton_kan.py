"""The KAN layer in Triton: forward, gradient of the inputs, gradient of the weights.

    y[m, o] = sum_i gate[m, i] * ( base[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

Letters: M rows (tokens), I in, O out, C = G + k functions an edge, BLOCK_M, BLOCK_I, BLOCK_O, BLOCK_C tile sides.
With Phi[m, (i, c)] = gate * B_c(x) this is the matrix product Phi @ W, and its gradients are two more:

    dPhi = dy @ W^T            dW = Phi^T @ dy
    dx[m, i]    = gate * sum_c B_c'(x) dPhi[m, (i, c)]  (+ gate * act'(x) (dy @ base)[m, i])
    dgate[m, i] =        sum_c B_c(x)  dPhi[m, (i, c)]  (+        act(x)  (dy @ base)[m, i])

2 M I C O FLOPs each, what a linear layer of as many parameters costs, if neither Phi nor dPhi (M*I*C numbers) is ever
written to memory:

forward  A program owns (BLOCK_M, BLOCK_O) of y. It holds a tile of t = (x - lo)/h in registers while c runs over the
         C functions: B_c(t) is computed, rounded, brought into the layout of the tensor core's left operand through
         shared memory (the compiler's choice) and multiplied with W[i*C + c, :], at fixed c a plain 2-D tile of row
         stride C*O. Phi is evaluated once per block of O, so BLOCK_O must be wide: on sm_90 a step issues 9 (k = 1) to
         17 (k = 3) instructions an element of Phi, 5 more with a gate, under 2 BLOCK_O FLOPs of tensor core, and the
         two take about as long. One loop runs over (block of I, c), so that the pipeline never drains; c stays a
         run-time variable (unrolled, every weight tile would be a stage of its own). The base term is one more
         function, in a loop of its own.
dx       The product runs over O alone, with both operands straight from shared memory as in any matrix product; the
         columns of the tile are (c, i) for BLOCK_C functions of BLOCK_I features. B_c'(x) enters in the epilogue,
         once per element of dPhi, and with i the faster index the sum over c stays within a thread. The
         alternative, one c at a time with a (BLOCK_M, BLOCK_I) product each, needs a second accumulator as large as
         the first, so tiles half as wide: 64 instead of 48 bytes a clock and SM for operands at the full bf16 rate.
dW       A program owns the (BLOCK_I, BLOCK_O) gradient of one function c and runs over tokens; Phi^T is computed in
         registers and changes its layout like Phi in forward. c = C is the base weight. Programs of one x and dy tile
         are neighbours.

Programs never add into each other's memory: where too few tiles would fill the chip the reduction is split, partial
sums are written in float32 and added in a fixed order by a second kernel. Runs are bit-equal.

Accumulation is float32, products are in the weights' dtype (float32: tf32 or exact, as
`torch.backends.cuda.matmul` says), splines are float32 throughout.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kansformer.kernels.triton_basis import (
    activation,
    activation_derivative,
    grid_scale,
    spline,
    spline_derivative,
    tile_ids,
)
from kansformer.kernels.triton_config import Config, choose, split_count
from kansformer.kernels.triton_decode import decode, sum_partials, use_decode

BASE_ACTIVATIONS = ("silu", "gelu", "relu", "identity")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["M", "BLOCKS_SPLIT"])
def _kan_fwd_kernel(
    y_ptr, partial_ptr, x_ptr, gate_ptr, w_ptr, base_ptr, grid_ptr,
    M, I, O, BLOCKS_SPLIT, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GRID_SIZE + ORDER
    pid_m, pid_o = tile_ids(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O), GROUP)
    first_m = (pid_m * BLOCK_M).to(tl.int64)
    first_o = (pid_o * BLOCK_O).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    in_m = (offs_m < M - pid_m * BLOCK_M)[:, None]
    in_o = (offs_o < O - pid_o * BLOCK_O)[None, :]
    # This program's share of I, as if there were no other: features 0 .. share - 1.
    first_i = tl.program_id(1) * BLOCKS_SPLIT * BLOCK_I
    share = tl.minimum(I - first_i, BLOCKS_SPLIT * BLOCK_I)
    x_ptr += first_m * stride_xm + tl.cast(first_i, tl.int64) * stride_xi
    gate_ptr += first_m * stride_gm + tl.cast(first_i, tl.int64) * stride_gi
    w_ptr += tl.cast(first_i, tl.int64) * C * O + first_o
    base_ptr += first_o * I + first_i
    grid_ptr += first_i * stride_grid
    x_offs = offs_m[:, None] * stride_xm + offs_i[None, :] * stride_xi
    gate_offs = offs_m[:, None] * stride_gm + offs_i[None, :] * stride_gi
    w_offs = offs_i[:, None] * (C * O) + offs_o[None, :]
    base_offs = offs_o[None, :] * I + offs_i[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_I), gate_ptr.dtype.element_ty)
    for step in range(tl.cdiv(share, BLOCK_I) * C):
        c = step % C
        i0 = step // C * BLOCK_I
        in_i = i0 + offs_i < share
        # Masked off but for c = 0, and outside the branch: so the pipeline carries them, and they cost no bandwidth. Of
        # the grid every thread would copy its own features into it, 16 words a step: it is loaded where it is used.
        fresh = in_i & (tl.zeros((BLOCK_I,), tl.int32) == c)
        in_x = in_m & fresh[None, :]
        x = tl.load(x_ptr + tl.cast(i0, tl.int64) * stride_xi + x_offs, mask=in_x, other=0.0)
        if HAS_GATE:
            fresh_gate = tl.load(gate_ptr + tl.cast(i0, tl.int64) * stride_gi + gate_offs, mask=in_x, other=0.0)
        if c == 0:
            lo, inverse_width = grid_scale(grid_ptr, i0 + offs_i, stride_grid, share, GRID_SIZE)
            t = (x.to(tl.float32) - lo[None, :]) * inverse_width[None, :] - (1 - ORDER) / 2
            if HAS_GATE:
                gate = fresh_gate
        w_tile_ptr = w_ptr + (tl.cast(i0, tl.int64) * C + c) * O
        w = tl.load(w_tile_ptr + w_offs, mask=in_i[:, None] & in_o, other=0.0)
        phi = spline(t - c, ORDER)
        if HAS_GATE:
            phi *= gate.to(tl.float32)
        acc = tl.dot(phi.to(w.dtype), w, acc, input_precision=PRECISION)
    if HAS_BASE:
        for i0 in tl.range(0, share, BLOCK_I):
            in_i = i0 + offs_i < share
            in_x = in_m & in_i[None, :]
            x = tl.load(x_ptr + tl.cast(i0, tl.int64) * stride_xi + x_offs, mask=in_x, other=0.0).to(tl.float32)
            phi = activation(x, ACTIVATION)
            if HAS_GATE:
                gate = tl.load(gate_ptr + tl.cast(i0, tl.int64) * stride_gi + gate_offs, mask=in_x, other=0.0)
                phi *= gate.to(tl.float32)
            w = tl.load(base_ptr + i0 + base_offs, mask=in_i[:, None] & in_o, other=0.0)
            acc = tl.dot(phi.to(w.dtype), w, acc, input_precision=PRECISION)

    first_y = first_m * O + first_o
    y_offs = offs_m[:, None] * O + offs_o[None, :]
    if tl.num_programs(1) == 1:
        tl.store(y_ptr + first_y + y_offs, acc.to(y_ptr.dtype.element_ty), mask=in_m & in_o)
    else:
        partial_ptr += tl.program_id(1).to(tl.int64) * M * O + first_y
        tl.store(partial_ptr + y_offs, acc, mask=in_m & in_o)


@triton.jit(do_not_specialize=["M"])
def _kan_bwd_x_kernel(
    dx_ptr, dgate_ptr, dy_ptr, x_ptr, gate_ptr, w_ptr, base_ptr, grid_ptr,
    M, I, O, stride_dym, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GRID_SIZE + ORDER
    pid_m, pid_i = tile_ids(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(I, BLOCK_I), GROUP)
    first_m = (pid_m * BLOCK_M).to(tl.int64)
    first_i = (pid_i * BLOCK_I).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    in_m = (offs_m < M - pid_m * BLOCK_M)[:, None]
    in_i = offs_i < I - pid_i * BLOCK_I
    dy_ptr += first_m * stride_dym
    dy_offs = offs_m[:, None] * stride_dym + offs_o[None, :]

    offs_n = tl.arange(0, BLOCK_C * BLOCK_I)  # columns of dPhi: n = c * BLOCK_I + i
    n_i = offs_n % BLOCK_I
    n_c = offs_n // BLOCK_I
    w_ptr += first_i * C * O
    w_offs = (n_i * C + n_c)[None, :] * O + offs_o[:, None]
    lo, inverse_width = grid_scale(grid_ptr, pid_i * BLOCK_I + offs_i, stride_grid, I, GRID_SIZE)
    in_x = in_m & in_i[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    dgate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        in_n = ((n_i < I - pid_i * BLOCK_I) & (n_c < C - c0))[None, :]
        dphi = tl.zeros((BLOCK_M, BLOCK_C * BLOCK_I), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            in_o = offs_o < O - o0
            dy = tl.load(dy_ptr + o0 + dy_offs, mask=in_m & in_o[None, :], other=0.0)
            w = tl.load(w_ptr + c0 * O + o0 + w_offs, mask=in_n & in_o[:, None], other=0.0)
            dphi = tl.dot(dy.to(w.dtype), w, dphi, input_precision=PRECISION)
        dphi = tl.reshape(dphi, (BLOCK_M, BLOCK_C, BLOCK_I))
        x = _load_rows(x_ptr, first_m, first_i, offs_m, offs_i, stride_xm, stride_xi, in_x)
        t = (x - lo[None, :]) * inverse_width[None, :] - (1 - ORDER) / 2
        s = t[:, None, :] - (c0 + tl.arange(0, BLOCK_C))[None, :, None]
        dx += tl.sum(dphi * spline_derivative(s, ORDER), axis=1)
        if HAS_GATE:
            dgate += tl.sum(dphi * spline(s, ORDER), axis=1)
    dx *= inverse_width[None, :]
    if HAS_BASE:
        base_ptr += first_i
        base_offs = offs_o[:, None] * I + offs_i[None, :]
        dphi = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            in_o = offs_o < O - o0
            dy = tl.load(dy_ptr + o0 + dy_offs, mask=in_m & in_o[None, :], other=0.0)
            w = tl.load(base_ptr + tl.cast(o0, tl.int64) * I + base_offs, mask=in_i[None, :] & in_o[:, None], other=0.0)
            dphi = tl.dot(dy.to(w.dtype), w, dphi, input_precision=PRECISION)
        x = _load_rows(x_ptr, first_m, first_i, offs_m, offs_i, stride_xm, stride_xi, in_x)
        dx += dphi * activation_derivative(x, ACTIVATION)
        if HAS_GATE:
            dgate += dphi * activation(x, ACTIVATION)

    first = first_m * I + first_i
    offs = offs_m[:, None] * I + offs_i[None, :]
    if HAS_GATE:
        dx *= _load_rows(gate_ptr, first_m, first_i, offs_m, offs_i, stride_gm, stride_gi, in_x)
        tl.store(dgate_ptr + first + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=in_x)
    tl.store(dx_ptr + first + offs, dx.to(dx_ptr.dtype.element_ty), mask=in_x)


@triton.jit
def _load_rows(ptr, first_m, first_i, offs_m, offs_i, stride_m, stride_i, mask):
    ptr += first_m * stride_m + first_i * stride_i
    return tl.load(ptr + offs_m[:, None] * stride_m + offs_i[None, :] * stride_i, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M", "M_SPLIT", "first_c"])
def _kan_bwd_w_kernel(
    dw_ptr, dbase_ptr, dw_partial_ptr, dbase_partial_ptr, dy_ptr, x_ptr, gate_ptr, grid_ptr,
    M, I, O, M_SPLIT, first_c, stride_dym, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = GRID_SIZE + ORDER
    tiles = tl.cdiv(I, BLOCK_I) * tl.cdiv(O, BLOCK_O)
    functions = tl.num_programs(0) // tiles
    c = first_c + tl.program_id(0) % functions
    pid_i, pid_o = tile_ids(tl.program_id(0) // functions, tl.cdiv(I, BLOCK_I), tl.cdiv(O, BLOCK_O), GROUP)
    first_i = (pid_i * BLOCK_I).to(tl.int64)
    first_o = (pid_o * BLOCK_O).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    in_i = (offs_i < I - pid_i * BLOCK_I)[:, None]
    in_o = (offs_o < O - pid_o * BLOCK_O)[None, :]
    x_ptr += first_i * stride_xi
    gate_ptr += first_i * stride_gi
    dy_ptr += first_o
    x_offs = offs_i[:, None] * stride_xi + offs_m[None, :] * stride_xm
    gate_offs = offs_i[:, None] * stride_gi + offs_m[None, :] * stride_gm
    dy_offs = offs_m[:, None] * stride_dym + offs_o[None, :]
    # This program's share of the rows, as if there were no other: rows 0 .. share - 1.
    split = tl.program_id(1).to(tl.int64)
    share = tl.minimum(M - tl.program_id(1) * M_SPLIT, M_SPLIT)
    x_ptr += split * M_SPLIT * stride_xm
    gate_ptr += split * M_SPLIT * stride_gm
    dy_ptr += split * M_SPLIT * stride_dym

    acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    if c < C:
        lo, inverse_width = grid_scale(grid_ptr, pid_i * BLOCK_I + offs_i, stride_grid, I, GRID_SIZE)
        centre = c + (1 - ORDER) / 2
        for m0 in range(0, share, BLOCK_M):
            in_m = m0 + offs_m < share
            in_x = in_i & in_m[None, :]
            x = tl.load(x_ptr + tl.cast(m0, tl.int64) * stride_xm + x_offs, mask=in_x, other=0.0).to(tl.float32)
            phi = spline((x - lo[:, None]) * inverse_width[:, None] - centre, ORDER)
            if HAS_GATE:
                gate = tl.load(gate_ptr + tl.cast(m0, tl.int64) * stride_gm + gate_offs, mask=in_x, other=0.0)
                phi *= gate.to(tl.float32)
            dy = tl.load(dy_ptr + tl.cast(m0, tl.int64) * stride_dym + dy_offs, mask=in_m[:, None] & in_o, other=0.0)
            acc = tl.dot(phi.to(DOT_DTYPE), dy.to(DOT_DTYPE), acc, input_precision=PRECISION)
        first = (first_i * C + c) * O + first_o
        offs = offs_i[:, None] * (C * O) + offs_o[None, :]
        if tl.num_programs(1) == 1:
            tl.store(dw_ptr + first + offs, acc.to(dw_ptr.dtype.element_ty), mask=in_i & in_o)
        else:
            tl.store(dw_partial_ptr + split * I * C * O + first + offs, acc, mask=in_i & in_o)
    else:
        for m0 in range(0, share, BLOCK_M):
            in_m = m0 + offs_m < share
            in_x = in_i & in_m[None, :]
            x = tl.load(x_ptr + tl.cast(m0, tl.int64) * stride_xm + x_offs, mask=in_x, other=0.0).to(tl.float32)
            phi = activation(x, ACTIVATION)
            if HAS_GATE:
                gate = tl.load(gate_ptr + tl.cast(m0, tl.int64) * stride_gm + gate_offs, mask=in_x, other=0.0)
                phi *= gate.to(tl.float32)
            dy = tl.load(dy_ptr + tl.cast(m0, tl.int64) * stride_dym + dy_offs, mask=in_m[:, None] & in_o, other=0.0)
            acc = tl.dot(phi.to(DOT_DTYPE), dy.to(DOT_DTYPE), acc, input_precision=PRECISION)
        first = first_o * I + first_i
        offs = offs_o[None, :] * I + offs_i[:, None]
        if tl.num_programs(1) == 1:
            tl.store(dbase_ptr + first + offs, acc.to(dbase_ptr.dtype.element_ty), mask=in_i & in_o)
        else:
            tl.store(dbase_partial_ptr + split * I * O + first + offs, acc, mask=in_i & in_o)


@functools.cache
def _device_properties(index: int | None) -> tuple[int, int]:
    """Compute capability as in 90, and the number of multiprocessors."""
    if index is None:  # interpreted on the CPU
        return 90, 132
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def unsupported(x: Tensor, spline_weight: Tensor, *, spline_order: int, base_activation: str) -> str | None:
    """Why these kernels cannot run this case, or None if they can."""
    if spline_order not in (1, 2, 3):
        return f"the kernels have spline_order 1, 2 and 3, not {spline_order}"
    if base_activation not in BASE_ACTIVATIONS:
        return f"the kernels have no base_activation {base_activation!r}"
    for name, dtype in (("x", x.dtype), ("spline_weight", spline_weight.dtype)):
        if dtype not in DTYPES:
            return f"{name} is {dtype}; the kernels take bfloat16, float16 and float32"
    if isinstance(_kan_fwd_kernel, triton.JITFunction):
        if not x.is_cuda or torch.version.cuda is None:
            return (
                f"x is on {x.device}; the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1 before triton is imported)"
            )
        capability, _ = _device_properties(x.device.index)
        if capability < 80:
            return f"compute capability {capability / 10} is below 8.0"
    return None


def precision(dtype: torch.dtype) -> str:
    """How float32 products run: "tf32" or "ieee", as torch.backends.cuda.matmul says."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; reading allow_tf32 raises once this one was set
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def forward(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    config: Config | None = None,
) -> Tensor:
    """x (M, I), gate (M, I) or None, spline_weight (I*C, O), grid (I, 2) or (2,), base_weight (O, I): y (M, O)."""
    M, I = x.shape
    O, C = spline_weight.shape[1], grid_size + spline_order
    if config is None and use_decode(M, I, O, C, spline_order):
        _, sms = _device_properties(x.device.index)
        return decode(x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, sms=sms)
    y = spline_weight.new_empty(M, O)
    if y.numel() == 0 or I == 0:
        return y.zero_()
    capability, sms = _device_properties(x.device.index)
    config = config or choose(
        "forward", M, I, O, C, spline_weight.dtype, gate is not None, base_weight is not None, capability,
        precision(spline_weight.dtype) == "tf32", _input_bytes(x, gate), spline_order,
    )  # fmt: skip
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(O, config.BLOCK_O)
    blocks = triton.cdiv(I, config.BLOCK_I)
    per_split = triton.cdiv(blocks, split_count(tiles, I * C, sms))
    splits = triton.cdiv(blocks, per_split)
    grid = _ranges(grid)
    partial = y.new_empty(splits, M, O, dtype=torch.float32) if splits > 1 else grid
    weight, base = spline_weight.contiguous(), _contiguous(base_weight)
    with torch.cuda.device_of(x):
        _kan_fwd_kernel[tiles, splits](
            y, partial, x, _or(gate, x), weight, _or(base, weight), grid,
            M, I, O, per_split, *x.stride(), *_or(gate, x).stride(), _stride(grid),
            GRID_SIZE=grid_size, ORDER=spline_order, ACTIVATION=base_activation, HAS_GATE=gate is not None,
            HAS_BASE=base is not None, PRECISION=precision(weight.dtype), BLOCK_M=config.BLOCK_M,
            BLOCK_I=config.BLOCK_I, BLOCK_O=config.BLOCK_O, GROUP=config.GROUP,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_partials(partial, y) if splits > 1 else y


def use_decode_int8(M: int, I: int, O: int, C: int, spline_order: int) -> bool:
    """As `use_decode`: dequantised, all C rows are read once more and written twice over."""
    return 0 < M <= 64 and M * (spline_order + 1) <= 5 * C


def decode_int8(
    x: Tensor,
    gate: Tensor | None,
    quantized: Tensor,
    scale: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
) -> Tensor:
    """`forward` with spline_weight = quantized * scale[:, None], (I*C, O) int8 and (I*C,), for few rows."""
    _, sms = _device_properties(x.device.index)
    return decode(x, gate, quantized, grid, base_weight, grid_size, spline_order, base_activation, scale, sms=sms)


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gate, spline_weight and base_weight, each where `needs` asks for it, else None."""
    needs_x, needs_gate, needs_weight, needs_base = needs
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = dgate = dweight = dbase = None
    if needs_x or needs_gate:
        dx, dgate = backward_x(dy, x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation)
    if needs_weight or needs_base:
        dweight, dbase = backward_w(
            dy, x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation,
            needs_weight, needs_base,
        )  # fmt: skip
    return dx if needs_x else None, dgate if needs_gate else None, dweight, dbase


def backward_x(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx (M, I) and dgate (M, I) or None; dy (M, O) with unit stride in O."""
    M, I = x.shape
    O, C = spline_weight.shape[1], grid_size + spline_order
    dx = x.new_empty(M, I)
    dgate = None if gate is None else gate.new_empty(M, I)
    if dx.numel() == 0 or O == 0:
        return dx.zero_(), None if gate is None else dgate.zero_()
    capability, _ = _device_properties(x.device.index)
    config = config or choose(
        "backward_x", M, I, O, C, spline_weight.dtype, gate is not None, base_weight is not None, capability,
        precision(spline_weight.dtype) == "tf32", _input_bytes(x, gate), spline_order,
    )  # fmt: skip
    grid, weight, base = _ranges(grid), spline_weight.contiguous(), _contiguous(base_weight)
    with torch.cuda.device_of(x):
        _kan_bwd_x_kernel[(triton.cdiv(M, config.BLOCK_M) * triton.cdiv(I, config.BLOCK_I),)](
            dx, _or(dgate, dx), dy, x, _or(gate, x), weight, _or(base, weight), grid,
            M, I, O, dy.stride(0), *x.stride(), *_or(gate, x).stride(), _stride(grid),
            GRID_SIZE=grid_size, ORDER=spline_order, ACTIVATION=base_activation, HAS_GATE=gate is not None,
            HAS_BASE=base is not None, PRECISION=precision(weight.dtype), BLOCK_M=config.BLOCK_M,
            BLOCK_I=config.BLOCK_I, BLOCK_O=config.BLOCK_O, BLOCK_C=config.BLOCK_C, GROUP=config.GROUP,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dgate


def backward_w(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    needs_weight: bool = True,
    needs_base: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dspline_weight (I*C, O) and dbase_weight (O, I), each where needed; dy (M, O) with unit stride in O."""
    M, I = x.shape
    O, C = spline_weight.shape[1], grid_size + spline_order
    dtype = spline_weight.dtype
    dweight = spline_weight.new_empty(I * C, O) if needs_weight else None
    dbase = base_weight.new_empty(O, I) if needs_base else None
    outputs = [out for out in (dweight, dbase) if out is not None]
    if M == 0 or I == 0 or O == 0:
        for out in outputs:
            out.zero_()
        return dweight, dbase
    capability, sms = _device_properties(x.device.index)
    config = config or choose(
        "backward_w", M, I, O, C, dtype, gate is not None, needs_base, capability, precision(dtype) == "tf32"
    )
    functions = C * needs_weight + needs_base
    programs = functions * triton.cdiv(I, config.BLOCK_I) * triton.cdiv(O, config.BLOCK_O)
    per_split = _round_up(triton.cdiv(M, split_count(programs, M, sms)), config.BLOCK_M)
    splits = triton.cdiv(M, per_split)
    grid = _ranges(grid)
    partials = [out.new_empty(splits, *out.shape, dtype=torch.float32) for out in outputs] if splits > 1 else []
    partial_weight = partials[0] if splits > 1 and needs_weight else grid
    partial_base = partials[-1] if splits > 1 and needs_base else grid
    with torch.cuda.device_of(x):
        _kan_bwd_w_kernel[programs, splits](
            _or(dweight, dbase), _or(dbase, dweight), partial_weight, partial_base, dy, x, _or(gate, x), grid,
            M, I, O, per_split, 0 if needs_weight else C,
            dy.stride(0), *x.stride(), *_or(gate, x).stride(), _stride(grid),
            GRID_SIZE=grid_size, ORDER=spline_order, ACTIVATION=base_activation, HAS_GATE=gate is not None,
            PRECISION=precision(dtype), DOT_DTYPE=TRITON_DTYPE[dtype], BLOCK_M=config.BLOCK_M,
            BLOCK_I=config.BLOCK_I, BLOCK_O=config.BLOCK_O, GROUP=config.GROUP,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
        )  # fmt: skip
    for out, partial in zip(outputs, partials):
        sum_partials(partial, out)
    return dweight, dbase


TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel argument that is not read where the tensor is None."""
    return other if tensor is None else tensor


def _input_bytes(x: Tensor, gate: Tensor | None) -> int:
    return max(x.element_size(), _or(gate, x).element_size())


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _ranges(grid: Tensor) -> Tensor:
    return grid.to(torch.float32).contiguous()


def _stride(grid: Tensor) -> int:
    return 0 if grid.dim() == 1 else 2


def _round_up(n: int, multiple: int) -> int:
    return triton.cdiv(n, multiple) * multiple
