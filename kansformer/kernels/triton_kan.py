"""The KAN layer on a GPU: splines by Triton, matrix products by the library torch calls for them.

    y[m, o] = sum_i gate[m, i] * ( base[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

Letters: M rows (tokens), I in, O out, C = G + k functions an edge. With Phi[m, i*C + c] = gate * B_c(x) this is the
matrix product Phi @ W, and its gradients are two more:

    dPhi = dy @ W^T            dW = Phi^T @ dy
    dx[m, i]    = gate * sum_c B_c'(x) dPhi[m, i*C + c]  (+ gate * act'(x) (dy @ base)[m, i])
    dgate[m, i] =        sum_c B_c(x)  dPhi[m, i*C + c]  (+        act(x)  (dy @ base)[m, i])

2 M I C O FLOPs each, what a linear layer of as many parameters costs. One kernel writes Phi, one folds dPhi into dx and
dgate; both move every element once and are bound by that: against the products 3 to 6 bytes per 2 O FLOPs. Phi and dPhi
live for one product, in chunks of rows of at most CHUNK_BYTES, and are never saved; where C is a power of 2, the kernel
that folds dPhi leaves Phi in its place for dW. Only dW adds chunks up, in a fixed order: runs are bit-equal.

Evaluating splines inside a matrix kernel, so that Phi never exists, was built first and measured on an H200: 365 to 409
TFLOP/s in forward and 299 to 350 in dW, where this has 529 to 818 and 504 to 804 (benchmarks/results/LOG.md).

Splines are float32 throughout, Phi and the products in the weights' dtype with float32 accumulation (float32: tf32 or
exact, as `torch.backends.cuda.matmul` says).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kansformer.kernels import torch_kan
from kansformer.kernels.triton_basis import (
    activation,
    activation_derivative,
    clamped,
    first_live,
    grid_scale,
    spline,
    spline_derivative,
)
from kansformer.kernels.triton_decode import decode, use_decode

BASE_ACTIVATIONS = ("silu", "gelu", "relu", "identity")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK_BYTES = 2**30  # of Phi or dPhi: more chunks are as fast in forward and dx, but each adds a float32 dW
# Rows and columns of Phi of a program of four warps, measured on an H200 (benchmarks/results/LOG.md).
PHI_TILE, FOLD_TILE = (4, 1024), (2, 1024)


@triton.jit(do_not_specialize=["M"])
def _phi_kernel(
    phi_ptr, x_ptr, gate_ptr, grid_ptr, M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Phi for C = BLOCK_C, a power of 2: x is read and scaled once an input."""
    pid_i = tl.program_id(0) % tl.cdiv(I, BLOCK_I)
    first_m = (tl.program_id(0) // tl.cdiv(I, BLOCK_I) * BLOCK_M).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_c = tl.arange(0, BLOCK_C)
    inside = (offs_m < M - first_m)[:, None] & (offs_i < I)[None, :]
    x = _load(x_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_xm, stride_xi, inside)
    lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
    t = (x - lo[None, :]) * inverse_width[None, :]
    if not HAS_BASE:
        t = clamped(t, GRID_SIZE)
    phi = spline((t - (1 - ORDER) / 2)[:, :, None] - offs_c[None, None, :], ORDER)
    if HAS_GATE:
        gate = _load(gate_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_gm, stride_gi, inside)
        phi *= gate[:, :, None]
    offs = offs_m[:, None, None] * (I * BLOCK_C) + offs_i[None, :, None] * BLOCK_C + offs_c[None, None, :]
    tl.store(phi_ptr + first_m * I * BLOCK_C + offs, phi.to(phi_ptr.dtype.element_ty), mask=inside[:, :, None])


@triton.jit(do_not_specialize=["M"])
def _phi_flat_kernel(
    phi_ptr, x_ptr, gate_ptr, grid_ptr, M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Phi for any C, columns n = i*C + c: wide stores, though every element reads its x."""
    C: tl.constexpr = GRID_SIZE + ORDER
    pid_n = tl.program_id(0) % tl.cdiv(I * C, BLOCK_N)
    first_m = (tl.program_id(0) // tl.cdiv(I * C, BLOCK_N) * BLOCK_M).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i = offs_n // C
    inside = (offs_m < M - first_m)[:, None] & (offs_n < I * C)[None, :]
    x = _load(x_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_xm, stride_xi, inside)
    lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
    t = (x - lo[None, :]) * inverse_width[None, :]
    if not HAS_BASE:
        t = clamped(t, GRID_SIZE)
    phi = spline(t - (1 - ORDER) / 2 - (offs_n % C)[None, :], ORDER)
    if HAS_GATE:
        phi *= _load(gate_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_gm, stride_gi, inside)
    offs = offs_m[:, None] * (I * C) + offs_n[None, :]
    tl.store(phi_ptr + first_m * I * C + offs, phi.to(phi_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _fold_kernel(
    dx_ptr, dgate_ptr, dphi_ptr, dbase_ptr, x_ptr, gate_ptr, grid_ptr,
    M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, MAKE_PHI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dx and dgate from dPhi (M, I*C) and, with a base term, dbase = dy @ base (M, I). MAKE_PHI: Phi takes its place.

    Of an input's dPhi the k + 1 live functions are all that count (see `triton_decode`), and all that is read.
    """
    C: tl.constexpr = GRID_SIZE + ORDER
    pid_i = tl.program_id(0) % tl.cdiv(I, BLOCK_I)
    first_m = (tl.program_id(0) // tl.cdiv(I, BLOCK_I) * BLOCK_M).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (offs_m < M - first_m)[:, None] & (offs_i < I)[None, :]
    x = _load(x_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_xm, stride_xi, inside)
    lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
    t = (x - lo[None, :]) * inverse_width[None, :]
    if HAS_GATE:
        gate = _load(gate_ptr, first_m, offs_m[:, None], offs_i[None, :], stride_gm, stride_gi, inside)
    first = first_m * I
    offs = offs_m[:, None] * I + offs_i[None, :]
    dphi_ptr += first * C
    outside = (t < 0) | (t >= GRID_SIZE)
    if not HAS_BASE:
        t = clamped(t, GRID_SIZE)
    live = first_live(t, GRID_SIZE)
    s = t - live - (1 - ORDER) / 2
    dx = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    dgate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for r in tl.static_range(ORDER + 1):
        dphi = tl.load(dphi_ptr + offs * C + live.to(tl.int32) + r, mask=inside, other=0.0).to(tl.float32)
        dx += dphi * spline_derivative(s - r, ORDER)
        dgate += dphi * spline(s - r, ORDER)
    dx *= inverse_width[None, :]
    if not HAS_BASE:
        dx = tl.where(outside, 0.0, dx)
    if HAS_BASE:
        dbase = tl.load(dbase_ptr + first + offs, mask=inside, other=0.0).to(tl.float32)
        dx += dbase * activation_derivative(x, ACTIVATION)
        dgate += dbase * activation(x, ACTIVATION)
    if HAS_GATE:
        dx *= gate
        tl.store(dgate_ptr + first + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + first + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if MAKE_PHI:
        tl.debug_barrier()  # other threads of the program have read what this one overwrites
        offs_c = tl.arange(0, C)
        phi = spline((t - (1 - ORDER) / 2)[:, :, None] - offs_c[None, None, :], ORDER)
        if HAS_GATE:
            phi *= gate[:, :, None]
        phi_offs = offs[:, :, None] * C + offs_c[None, None, :]
        tl.store(dphi_ptr + phi_offs, phi.to(dphi_ptr.dtype.element_ty), mask=inside[:, :, None])


@triton.jit
def _load(ptr, first_m, offs_m, offs_i, stride_m, stride_i, mask):
    offs = (first_m + offs_m) * stride_m + offs_i.to(tl.int64) * stride_i
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


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
    if isinstance(_phi_kernel, triton.JITFunction):
        if not x.is_cuda or torch.version.cuda is None:
            return (
                f"x is on {x.device}; the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1 before triton is imported)"
            )
        capability, _ = _device_properties(x.device.index)
        if capability < 80:
            return f"compute capability {capability / 10} is below 8.0"
    return None


def forward(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
) -> Tensor:
    """x (M, I), gate (M, I) or None, spline_weight (I*C, O), grid (I, 2) or (2,), base_weight (O, I): y (M, O)."""
    M, I = x.shape
    O, C = spline_weight.shape[1], grid_size + spline_order
    if use_decode(M, I, O, C, spline_order):
        _, sms = _device_properties(x.device.index)
        return decode(x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, sms=sms)
    y = spline_weight.new_empty(M, O)
    if base_weight is not None:
        torch.mm(torch_kan.base_input(x, gate, base_activation, y.dtype), base_weight.mT, out=y)
    for rows in _chunks(M, I * C * spline_weight.element_size()):
        parts = x[rows], _part(gate, rows), grid, grid_size, spline_order, y.dtype, base_weight is not None
        y[rows].addmm_(phi(*parts), spline_weight, beta=0 if base_weight is None else 1)
    return y


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
    (M, I), C, dtype = x.shape, grid_size + spline_order, spline_weight.dtype
    inward = needs_x or needs_gate
    dx = x.new_empty(M, I) if inward else None
    dgate = gate.new_empty(M, I) if inward and gate is not None else None
    chunks = _chunks(M, I * C * spline_weight.element_size())
    dweight = None
    if needs_weight and len(chunks) != 1:  # they add up in float32, in a fixed order
        dweight = spline_weight.new_zeros(spline_weight.shape, dtype=torch.float32)
    for rows in chunks:
        parts = x[rows], _part(gate, rows), grid, grid_size, spline_order
        a = None
        if inward:
            a = dy[rows] @ spline_weight.mT
            dinput = None if base_weight is None else dy[rows] @ base_weight
            make_phi = needs_weight and power_of_2(C)
            fold(dx[rows], _part(dgate, rows), a, dinput, *parts, base_activation, make_phi)
            a = a if make_phi else None
        if needs_weight:
            a = phi(*parts, dtype, base_weight is not None) if a is None else a
            dweight = a.mT @ dy[rows] if len(chunks) == 1 else dweight.add_(a.mT @ dy[rows])
    dbase = dy.mT @ torch_kan.base_input(x, gate, base_activation, dtype) if needs_base else None
    return dx if needs_x else None, dgate if needs_gate else None, dweight.to(dtype) if needs_weight else None, dbase


def phi(
    x: Tensor,
    gate: Tensor | None,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    dtype: torch.dtype,
    based: bool,
) -> Tensor:
    """Phi (M, I*C) in `dtype`; without a base term, of the grid's closest point to x."""
    (M, I), C = x.shape, grid_size + spline_order
    out = x.new_empty(M, I * C, dtype=dtype)
    if out.numel() == 0:
        return out
    grid, gate_or_x = _ranges(grid), x if gate is None else gate
    arguments = out, x, gate_or_x, grid, M, I, *x.stride(), *gate_or_x.stride(), _stride(grid), grid_size, spline_order
    with torch.cuda.device_of(x):
        if power_of_2(C):
            sides = _tile(PHI_TILE, I, C)
            _phi_kernel[_programs(M, I, *sides)](*arguments, gate is not None, based, *sides, C)
        else:
            _phi_flat_kernel[_programs(M, I * C, *PHI_TILE)](*arguments, gate is not None, based, *PHI_TILE)
    return out


def fold(
    dx: Tensor,
    dgate: Tensor | None,
    dphi: Tensor,
    dbase: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    make_phi: bool = False,
) -> None:
    """Write dx and dgate (M, I) from dphi (M, I*C) and dbase (M, I); with `make_phi` (C a power of 2) Phi into dphi."""
    (M, I), C = x.shape, grid_size + spline_order
    if dx.numel() == 0:
        return
    grid, gate_or_x = _ranges(grid), x if gate is None else gate
    sides = _tile(FOLD_TILE, I, triton.next_power_of_2(C))
    with torch.cuda.device_of(x):
        _fold_kernel[_programs(M, I, *sides)](
            dx, dx if dgate is None else dgate, dphi, dphi if dbase is None else dbase, x, gate_or_x, grid,
            M, I, *x.stride(), *gate_or_x.stride(), _stride(grid), grid_size, spline_order, base_activation,
            gate is not None, dbase is not None, make_phi, *sides,
            enable_fp_fusion=False,  # t - live in one rounding would leave the live interval, where slopes jump
        )  # fmt: skip


def power_of_2(count: int) -> bool:
    return count & (count - 1) == 0


def _tile(tile: tuple[int, int], I: int, count: int) -> tuple[int, int]:
    """Rows and inputs of a tile of Phi with `count` functions an input; more rows where there are few inputs."""
    rows, columns = tile
    inputs = max(1, min(columns // count, triton.next_power_of_2(I)))
    return max(1, rows * columns // (inputs * count)), inputs


def _programs(rows: int, columns: int, block_rows: int, block_columns: int) -> tuple[int]:
    return (triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)


def _chunks(size: int, bytes_each: int) -> list[slice]:
    """As few chunks of about the same length as CHUNK_BYTES allows."""
    count = max(1, triton.cdiv(size * bytes_each, CHUNK_BYTES))
    step = max(1, triton.cdiv(size, count))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _ranges(grid: Tensor) -> Tensor:
    return grid.to(torch.float32).contiguous()


def _stride(grid: Tensor) -> int:
    return 0 if grid.dim() == 1 else 2
