"""The KAN layer on a GPU: splines by Triton, matrix products by the library torch calls for them.

    y[m, o] = sum_i gate[m, i] * ( base[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

Letters: M rows (tokens), I in, O out, C = G + k functions an edge. With Phi[m, i*C + c] = gate * B_c(x) this is the
matrix product Phi @ W, and its gradients are two more:

    dPhi = dy @ W^T            dW = Phi^T @ dy
    dx[m, i]    = gate * sum_c B_c'(x) dPhi[m, i*C + c]  (+ gate * act'(x) (dy @ base)[m, i])
    dgate[m, i] =        sum_c B_c(x)  dPhi[m, i*C + c]  (+        act(x)  (dy @ base)[m, i])

2 M I C O FLOPs each, what a linear layer of as many parameters costs. One kernel writes Phi, one folds dPhi into dx and
dgate; both move every element once and are bound by that: against the products 3 to 6 bytes per 2 O FLOPs. Phi and dPhi
live for one product, in chunks of rows of at most CHUNK_BYTES, and are never saved; in 16 bits with C = 4, 8 or 16 the
kernel that folds dPhi leaves Phi in its place for dW. Only weights' gradients add chunks up, in a fixed order: runs are
bit-equal. With `norm_eps` x is RMS-normalised in the same two kernels, which go over its rows twice and three times, at
best in cache.

Evaluating splines inside a matrix kernel, so that Phi never exists, was built first and measured on an H200: 365 to 409
TFLOP/s in forward and 299 to 350 in dW, where Phi and cuBLAS had 529 to 818 and 504 to 804 (benchmarks/results/LOG.md).

Splines are float32 throughout, Phi and the products in the weights' dtype with float32 accumulation (float32: tf32 or
exact, as `torch.backends.cuda.matmul` says).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kansformer.kernels import torch_kan
from kansformer.kernels.triton_basis import (
    activation,
    activation_derivative,
    ceil_div,
    clamped,
    device_properties,
    grid_scale,
    live_interval,
    live_slope,
    live_spline,
    load_row,
    power_of_2,
    program_tile,
    programs,
    ranges,
    spline,
    unsupported_tensors,
)
from kansformer.kernels.triton_decode import decode, use_decode

BASE_ACTIVATIONS = ("silu", "gelu", "relu", "identity")
CHUNK_BYTES = 2**30  # of Phi or dPhi: more chunks are as fast in forward and dx, but each adds a float32 dW
# Rows and warps of a program, measured on an H200 (benchmarks/results/LOG.md). With a norm it has one row, and warps by
# the row's length.
PHI, FOLD = (4, 4), (2, 4)


@triton.jit(do_not_specialize=["M", "rows"])
def _phi_kernel(
    phi_ptr, base_ptr, x_ptr, gate_ptr, grid_ptr,
    M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid, eps, rows,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Phi of 16 bits in whole words, C = 4, 8 or 16: the k + 1 live functions, shifted to their places among zeros.

    With a norm a program goes along a row, BLOCK_I inputs a step; without one down `rows` rows, BLOCK_I inputs of each.
    With a base term gate * act(x) goes to base_ptr (M, I).
    """
    WORDS: tl.constexpr = (GRID_SIZE + ORDER) // 4
    m, offs_i, steps = program_tile(M, I, rows, HAS_NORM, BLOCK_I)
    words_ptr = phi_ptr.to(tl.pointer_type(tl.uint64)) + m * I * WORDS
    base_ptr += m * I
    x_ptr += m * stride_xm
    gate_ptr += m * stride_gm
    scale = _inverse_rms(x_ptr, I, stride_xi, eps, 4 * BLOCK_I) if HAS_NORM else 1.0
    lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
    if HAS_NORM:
        x, gate = _inputs(x_ptr, gate_ptr, offs_i, stride_xi, stride_gi, offs_i < I, HAS_GATE)
    for _ in range(steps):
        inside = offs_i < I
        if HAS_NORM:  # the next step's loads are in flight while this one computes
            offs = offs_i + BLOCK_I
            next_x, next_gate = _inputs(x_ptr, gate_ptr, offs, stride_xi, stride_gi, offs < I, HAS_GATE)
            next_lo, next_inverse_width = grid_scale(grid_ptr, offs, stride_grid, I, GRID_SIZE)
            x *= scale
        else:
            x, gate = _inputs(x_ptr, gate_ptr, offs_i, stride_xi, stride_gi, inside, HAS_GATE)
        live, u = live_interval((x - lo) * inverse_width, GRID_SIZE, ORDER, not HAS_BASE)
        functions = tl.zeros(x.shape, tl.uint64)
        for r in tl.static_range(ORDER + 1):
            functions |= _lane(live_spline(u, r, ORDER) * gate, r, phi_ptr.dtype.element_ty)
        _store_words(_words(words_ptr, offs_i, WORDS), functions, live, inside, WORDS, HAS_BASE)
        if HAS_BASE:
            base = activation(x, ACTIVATION) * gate
            tl.store(base_ptr + offs_i, base.to(base_ptr.dtype.element_ty), mask=inside)
        if HAS_NORM:
            offs_i, x, gate, lo, inverse_width = offs, next_x, next_gate, next_lo, next_inverse_width
        else:
            words_ptr += I * WORDS
            base_ptr += I
            x_ptr += stride_xm
            gate_ptr += stride_gm


@triton.jit(do_not_specialize=["M", "rows"])
def _phi_flat_kernel(
    phi_ptr, base_ptr, x_ptr, gate_ptr, grid_ptr,
    M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid, eps, rows,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Phi for any C, columns n = i*C + c: wide stores, though every element reads its x."""
    C: tl.constexpr = GRID_SIZE + ORDER
    m, offs_n, steps = program_tile(M, I * C, rows, HAS_NORM, BLOCK_N)
    phi_ptr += m * I * C
    base_ptr += m * I
    x_ptr += m * stride_xm
    gate_ptr += m * stride_gm
    scale = _inverse_rms(x_ptr, I, stride_xi, eps, BLOCK_N) if HAS_NORM else 1.0
    for _ in range(steps):
        offs_i = offs_n // C
        inside = offs_n < I * C
        lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
        x, gate = _inputs(x_ptr, gate_ptr, offs_i, stride_xi, stride_gi, inside, HAS_GATE)
        x *= scale
        t = (x - lo) * inverse_width
        if not HAS_BASE:
            t = clamped(t, 0.0, GRID_SIZE * 1.0)
        phi = spline(t - (1 - ORDER) / 2 - offs_n % C, ORDER) * gate
        tl.store(phi_ptr + offs_n, phi.to(phi_ptr.dtype.element_ty), mask=inside)
        if HAS_BASE:
            base = activation(x, ACTIVATION) * gate
            tl.store(base_ptr + offs_i, base.to(base_ptr.dtype.element_ty), mask=inside & (offs_n % C == 0))
        if HAS_NORM:
            offs_n += BLOCK_N
        else:
            phi_ptr += I * C
            base_ptr += I
            x_ptr += stride_xm
            gate_ptr += stride_gm


@triton.jit(do_not_specialize=["M", "rows"])
def _fold_kernel(
    dx_ptr, dgate_ptr, dphi_ptr, dbase_ptr, x_ptr, gate_ptr, grid_ptr,
    M, I, stride_xm, stride_xi, stride_gm, stride_gi, stride_grid, eps, rows,
    GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr, IN_WORDS: tl.constexpr, MAKE_PHI: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dx and dgate from dPhi (M, I*C) and, with a base term, dbase = dy @ base (M, I).

    Of an input's dPhi the k + 1 live functions are all that count (`live_interval`), and all that is read: by words
    where `_phi_kernel` writes words, and MAKE_PHI then leaves Phi in place of dPhi, and gate * act(x) in that of dbase.
    With a norm dx waits where it will stand until the row's mean of dx * x is known.
    """
    C: tl.constexpr = GRID_SIZE + ORDER
    WORDS: tl.constexpr = C // 4 if IN_WORDS else 0
    m, offs_i, steps = program_tile(M, I, rows, HAS_NORM, BLOCK_I)
    words_ptr = dphi_ptr.to(tl.pointer_type(tl.uint64)) + m * I * WORDS
    dphi_ptr += m * I * C
    dbase_ptr += m * I
    dx_ptr += m * I
    dgate_ptr += m * I
    x_ptr += m * stride_xm
    gate_ptr += m * stride_gm
    scale = _inverse_rms(x_ptr, I, stride_xi, eps, 4 * BLOCK_I) if HAS_NORM else 1.0
    lo, inverse_width = grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE)
    product = tl.zeros((BLOCK_I,), tl.float32)
    if HAS_NORM:
        x, gate = _inputs(x_ptr, gate_ptr, offs_i, stride_xi, stride_gi, offs_i < I, HAS_GATE)
        words = _load_words(words_ptr, offs_i, offs_i < I, WORDS) if WORDS else 0
    for _ in range(steps):
        inside = offs_i < I
        if HAS_NORM:  # the next step's loads are in flight while this one computes
            offs = offs_i + BLOCK_I
            next_x, next_gate = _inputs(x_ptr, gate_ptr, offs, stride_xi, stride_gi, offs < I, HAS_GATE)
            next_words = _load_words(words_ptr, offs, offs < I, WORDS) if WORDS else 0
            next_lo, next_inverse_width = grid_scale(grid_ptr, offs, stride_grid, I, GRID_SIZE)
            x *= scale
        else:
            x, gate = _inputs(x_ptr, gate_ptr, offs_i, stride_xi, stride_gi, inside, HAS_GATE)
            words = _load_words(words_ptr, offs_i, inside, WORDS) if WORDS else 0
        t = (x - lo) * inverse_width
        live, u = live_interval(t, GRID_SIZE, ORDER, not HAS_BASE)
        dx = tl.zeros((BLOCK_I,), tl.float32)
        dgate = tl.zeros((BLOCK_I,), tl.float32)
        if WORDS:
            read = _from_live(words, live, WORDS, HAS_BASE)
            functions = tl.zeros((BLOCK_I,), tl.uint64)
        for r in tl.static_range(ORDER + 1):
            if WORDS:
                dphi = (read >> 16 * r).to(tl.uint16).to(dphi_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
            else:
                there = inside & (live >= -r) & (live < C - r)
                dphi = tl.load(dphi_ptr + offs_i * C + live + r, mask=there, other=0.0).to(tl.float32)
            phi = live_spline(u, r, ORDER)
            dx += dphi * live_slope(u, r, ORDER)
            dgate += dphi * phi
            if MAKE_PHI:
                functions |= _lane(phi * gate, r, dphi_ptr.dtype.element_ty)
        dx *= inverse_width
        if HAS_BASE:
            dbase = tl.load(dbase_ptr + offs_i, mask=inside, other=0.0).to(tl.float32)
            base = activation(x, ACTIVATION)
            dx += dbase * activation_derivative(x, ACTIVATION)
            dgate += dbase * base
        else:
            dx = tl.where((t < 0) | (t >= GRID_SIZE), 0.0, dx)
        if HAS_GATE:
            dx *= gate
            tl.store(dgate_ptr + offs_i, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        if HAS_NORM:
            product += dx * x
        tl.store(dx_ptr + offs_i, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if MAKE_PHI:
            tl.debug_barrier()  # other threads of the program have read what this one overwrites
            _store_words(_words(words_ptr, offs_i, WORDS), functions, live, inside, WORDS, HAS_BASE)
            if HAS_BASE:
                tl.store(dbase_ptr + offs_i, (base * gate).to(dbase_ptr.dtype.element_ty), mask=inside)
        if HAS_NORM:
            offs_i, x, gate, words, lo, inverse_width = offs, next_x, next_gate, next_words, next_lo, next_inverse_width
        else:
            words_ptr += I * WORDS
            dphi_ptr += I * C
            dbase_ptr += I
            dx_ptr += I
            dgate_ptr += I
            x_ptr += stride_xm
            gate_ptr += stride_gm
    if HAS_NORM:
        mean = tl.sum(product, axis=0) / I
        tl.debug_barrier()  # other threads of the program have written what this one reads
        for start in range(0, I, 4 * BLOCK_I):
            offs = start + tl.arange(0, 4 * BLOCK_I)
            xs = load_row(x_ptr, offs, stride_xi, offs < I) * scale
            dxs = tl.load(dx_ptr + offs, mask=offs < I, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offs, (scale * (dxs - xs * mean)).to(dx_ptr.dtype.element_ty), mask=offs < I)


@triton.jit
def _inputs(x_ptr, gate_ptr, offs, stride_xi, stride_gi, inside, HAS_GATE: tl.constexpr):
    return load_row(x_ptr, offs, stride_xi, inside), load_row(gate_ptr, offs, stride_gi, inside) if HAS_GATE else 1.0


@triton.jit
def _lane(value, r: tl.constexpr, dtype: tl.constexpr):
    """The 16 bits of `value` as the r-th of a word."""
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint64) << 16 * r


@triton.jit
def _words(words_ptr, offs, WORDS: tl.constexpr):
    """Pointers to the words of each input."""
    return words_ptr + offs if WORDS == 1 else words_ptr + offs[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def _load_words(words_ptr, offs, inside, WORDS: tl.constexpr):
    pointers = _words(words_ptr, offs, WORDS)
    return tl.load(pointers, mask=inside if WORDS == 1 else inside[:, None], other=0)


@triton.jit
def _from_live(words, live, WORDS: tl.constexpr, BEYOND: tl.constexpr):
    """The 16 bits of functions live, live + 1, ... of an input, from the lowest of a word on.

    BEYOND the first and the last, which begin and end a word, are zeros. Without it live to live + k are there, and
    what stands above them is not theirs.
    """
    if WORDS == 1:
        if not BEYOND:
            return words >> (16 * live).to(tl.uint64)
        low = words
        high = words
    else:
        if WORDS == 2:
            first, second = tl.split(words)
            low, high = tl.where(live < 4, first, second), second
        else:
            even, odd = tl.split(words.reshape(live.shape[0], 2, 2))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            low = tl.where(live < 4, first, tl.where(live < 8, second, tl.where(live < 12, third, fourth)))
            high = tl.where(live < 4, second, tl.where(live < 8, third, fourth))
        if BEYOND:
            high = tl.where(live < 0, first, high)
    if BEYOND:
        low = tl.where((live >= 0) & (live < 4 * WORDS), low, 0)
        high = tl.where(live < 4 * WORDS - 4, high, 0)
    shift = (16 * (live & 3)).to(tl.uint64)
    return (low >> shift) | (high << 1 << 63 - shift)


@triton.jit
def _store_words(pointers, functions, live, inside, WORDS: tl.constexpr, BEYOND: tl.constexpr):
    """`functions`, of 16 bits, as functions live, live + 1, ... of an input; zeros elsewhere."""
    if WORDS == 1:
        word = _word(functions, live, 0) if BEYOND else functions << (16 * live).to(tl.uint64)
        tl.store(pointers, word, mask=inside)
    else:
        if WORDS == 2:
            words = tl.join(_word(functions, live, 0), _word(functions, live, 1))
        else:
            even = tl.join(_word(functions, live, 0), _word(functions, live, 2))
            odd = tl.join(_word(functions, live, 1), _word(functions, live, 3))
            words = tl.join(even, odd).reshape(live.shape[0], 4)
        tl.store(pointers, words, mask=inside[:, None])


@triton.jit
def _word(functions, live, j: tl.constexpr):
    """The j-th word of `functions` shifted by `live` lanes."""
    shift = 16 * live - 64 * j
    up, down = functions << (shift & 63).to(tl.uint64), functions >> (-shift & 63).to(tl.uint64)
    return tl.where((shift >= 0) & (shift < 64), up, tl.where((shift < 0) & (shift > -64), down, 0))


@triton.jit
def _inverse_rms(x_ptr, I, stride_i, eps, BLOCK_I: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row."""
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, I, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        x = load_row(x_ptr, offs_i, stride_i, offs_i < I)
        total += x * x
    return tl.rsqrt(tl.sum(total, axis=0) / I + eps)


def unsupported(x: Tensor, spline_weight: Tensor, *, spline_order: int, base_activation: str) -> str | None:
    """Why these kernels cannot run this case, or None if they can."""
    if spline_order not in (1, 2, 3):
        return f"the kernels have spline_order 1, 2 and 3, not {spline_order}"
    if base_activation not in BASE_ACTIVATIONS:
        return f"the kernels have no base_activation {base_activation!r}"
    return unsupported_tensors(x.device, x=x.dtype, spline_weight=spline_weight.dtype)


def forward(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    norm_eps: float | None = None,
) -> Tensor:
    """x (M, I), gate (M, I) or None, spline_weight (I*C, O), grid (I, 2) or (2,), base_weight (O, I): y (M, O)."""
    M, I = x.shape
    O, C = spline_weight.shape[1], grid_size + spline_order
    if use_decode(M, I, O, C, spline_order):
        x = x if norm_eps is None else torch_kan.normalise(x, norm_eps)
        _, sms = device_properties(x.device.index)
        return decode(x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, sms=sms)
    y = spline_weight.new_empty(M, O)
    activation = None if base_weight is None else base_activation
    for rows in _chunks(M, I * C * spline_weight.element_size()):
        parts = _part(x, rows), _part(gate, rows), grid, grid_size, spline_order
        a, base = phi(*parts, y.dtype, activation, norm_eps)
        out = _part(y, rows)
        if base is not None:
            torch.mm(base, base_weight.mT, out=out)
        out.addmm_(a, spline_weight, beta=0 if base is None else 1)
        del a, base  # before the next are made
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
    _, sms = device_properties(x.device.index)
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
    norm_eps: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gate, spline_weight and base_weight, each where `needs` asks for it, else None."""
    needs_x, needs_gate, needs_weight, needs_base = needs
    (M, I), C, dtype = x.shape, grid_size + spline_order, spline_weight.dtype
    inward, outward = needs_x or needs_gate, needs_weight or needs_base
    dx = x.new_empty(M, I) if inward else None
    dgate = gate.new_empty(M, I) if inward and gate is not None else None
    activation = None if base_weight is None else base_activation
    chunks = _chunks(M, I * C * spline_weight.element_size())
    dweight = dbase = None
    if len(chunks) != 1:  # they add up in float32, in a fixed order
        dweight = spline_weight.new_zeros(spline_weight.shape, dtype=torch.float32) if needs_weight else None
        dbase = base_weight.new_zeros(base_weight.shape, dtype=torch.float32) if needs_base else None
    for rows in chunks:
        parts = _part(x, rows), _part(gate, rows), grid, grid_size, spline_order
        dy_part, a, base = _part(dy, rows), None, None
        if inward:
            a = dy_part @ spline_weight.mT
            base = None if base_weight is None else dy_part @ base_weight
            make_phi = outward and in_words(dtype, C)
            fold(_part(dx, rows), _part(dgate, rows), a, base, *parts, base_activation, make_phi, norm_eps)
            if not make_phi:
                a = base = None
        if outward and a is None:
            a, base = phi(*parts, dtype, activation, norm_eps)
        if needs_weight:
            dweight = _add(dweight, a.mT @ dy_part)
        if needs_base:
            dbase = _add(dbase, dy_part.mT @ base)
    return (
        dx if needs_x else None,
        dgate if needs_gate else None,
        dweight.to(dtype) if needs_weight else None,
        dbase.to(base_weight.dtype) if needs_base else None,
    )


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def phi(
    x: Tensor,
    gate: Tensor | None,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    dtype: torch.dtype,
    base_activation: str | None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Phi (M, I*C) and gate * act(x) (M, I) in `dtype`, with `norm_eps` of the normalised x.

    Without a base activation Phi is that of the grid's closest point, and there is no second.
    """
    (M, I), C = x.shape, grid_size + spline_order
    out, based = x.new_empty(M, I * C, dtype=dtype), base_activation is not None
    base = x.new_empty(M, I, dtype=dtype) if based else None
    if out.numel() == 0:
        return out, base
    (grid, stride_grid), gate_or_x = ranges(grid), x if gate is None else gate
    whole_rows = norm_eps is not None
    rows, warps = _whole_row(I * C) if whole_rows else PHI
    arguments = (
        out, base if based else out, x, gate_or_x, grid,
        M, I, *x.stride(), *gate_or_x.stride(), stride_grid, norm_eps or 0.0, rows,
        grid_size, spline_order, base_activation or "identity", gate is not None, based, whole_rows,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        if in_words(dtype, C):
            columns = _columns(I, C, warps)
            _phi_kernel[programs(M, I, rows, columns, whole_rows)](*arguments, columns, num_warps=warps)
        else:
            columns = 256 * warps
            _phi_flat_kernel[programs(M, I * C, rows, columns, whole_rows)](*arguments, columns, num_warps=warps)
    return out, base


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
    norm_eps: float | None = None,
) -> None:
    """Write dx and dgate (M, I) from dphi (M, I*C) and dbase (M, I).

    With `make_phi`, for what is `in_words`, these two become Phi and gate * act(x).
    """
    (M, I), C = x.shape, grid_size + spline_order
    if dx.numel() == 0:
        return
    (grid, stride_grid), gate_or_x = ranges(grid), x if gate is None else gate
    whole_rows = norm_eps is not None
    rows, warps = _whole_row(I * C) if whole_rows else FOLD
    columns = _columns(I, C, warps)
    with torch.cuda.device_of(x):
        _fold_kernel[programs(M, I, rows, columns, whole_rows)](
            dx, dx if dgate is None else dgate, dphi, dphi if dbase is None else dbase, x, gate_or_x, grid,
            M, I, *x.stride(), *gate_or_x.stride(), stride_grid, norm_eps or 0.0, rows, grid_size, spline_order,
            base_activation, gate is not None, dbase is not None, whole_rows,
            in_words(dphi.dtype, C), make_phi, columns, num_warps=warps,
        )  # fmt: skip


def in_words(dtype: torch.dtype, count: int) -> bool:
    """Whether the `count` functions of an input are 1, 2 or 4 words of 64 bits."""
    return dtype.itemsize == 2 and count in (4, 8, 16)


def _whole_row(columns: int) -> tuple[int, int]:
    return 1, 2 if columns < 4096 else 4 if columns < 8192 else 8


def _columns(I: int, count: int, warps: int) -> int:
    """Inputs of a tile: 16 bytes of Phi in 16 bits a thread where that is no less than an input."""
    return min(32 * warps * max(1, 8 // count), power_of_2(I))


def _chunks(size: int, bytes_each: int) -> list[slice]:
    """As few chunks of about the same length as CHUNK_BYTES allows."""
    count = max(1, ceil_div(size * bytes_each, CHUNK_BYTES))
    step = max(1, ceil_div(size, count))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return tensor if tensor is None or rows.stop - rows.start == tensor.shape[0] else tensor[rows]
