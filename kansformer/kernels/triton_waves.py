"""A layer of waves on a GPU: sine and cosine by Triton, matrix products by the library torch calls for them.

    y[m, o] = sum_i A[o, i] sin(w x[m, i]) + B[o, i] cos(w x[m, i])

Letters: M rows (tokens), I in, O out. With S = sin(w x) and C = cos(w x), (M, I), forward is two products and backward
four, those of a linear layer of as many parameters:

    y = S @ A^T + C @ B^T       dA = dy^T @ S        dS = dy @ A
    dx = w (dS * C - dC * S)    dB = dy^T @ C        dC = dy @ B

One kernel writes S and C, one folds dS and dC into dx and leaves S and C in their places for dA and dB, so that nothing
is saved but x. Both move every element once and are bound by that (on an H200 at 0.93 to 0.96 of a copy's rate), since
sine and cosine share one range reduction: 28 and 36 instructions of sm_90 an element. y = w x is n pi/2 + r, n the
nearest integer, and

    r = (y - n P1) - n P2,    P1 + P2 = pi/2 to 2^-49

(Cody and Waite, Software Manual for the Elementary Functions, 1980). Each difference is one fma; the first is exact, a
multiple of 2^-23 (of y's last bit, where that is less) below 1. The polynomials are those of Cephes' sinf and cosf
(S. L. Moshier, https://netlib.org/cephes), minimax on [-pi/4, pi/4]. Where y has no digits left for r, from 10^7 on, r
is clamped, so that waves stay within [-1, 1]; infinity gives NaN. Arithmetic is float32; S, C and the products are in
the weights' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kansformer.kernels.triton_basis import clamped, load_row, power_of_2, program_tile, programs, unsupported_tensors

# Rows and warps of a program, 8 elements of a row a thread, measured on an H200 (benchmarks/results/LOG.md).
WAVES, FOLD = (2, 4), (1, 4)


@triton.jit(do_not_specialize=["M", "rows"])
def _waves_kernel(sine_ptr, cosine_ptr, x_ptr, M, I, stride_xm, stride_xi, frequency, rows, BLOCK: tl.constexpr):
    """sin(w x) and cos(w x), (M, I), of a strided x."""
    m, offs, steps = program_tile(M, I, rows, False, BLOCK)
    sine_ptr += m * I
    cosine_ptr += m * I
    x_ptr += m * stride_xm
    inside = offs < I
    for _ in range(steps):
        sine, cosine = _sine_and_cosine(load_row(x_ptr, offs, stride_xi, inside), frequency)
        tl.store(sine_ptr + offs, sine.to(sine_ptr.dtype.element_ty), mask=inside)
        tl.store(cosine_ptr + offs, cosine.to(cosine_ptr.dtype.element_ty), mask=inside)
        sine_ptr += I
        cosine_ptr += I
        x_ptr += stride_xm


@triton.jit(do_not_specialize=["M", "rows"])
def _fold_waves_kernel(
    dx_ptr, sine_ptr, cosine_ptr, x_ptr, M, I, stride_xm, stride_xi, frequency, rows,
    MAKE_WAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (M, I) from dS and dC, which MAKE_WAVES replaces by S and C."""
    m, offs, steps = program_tile(M, I, rows, False, BLOCK)
    dx_ptr += m * I
    sine_ptr += m * I
    cosine_ptr += m * I
    x_ptr += m * stride_xm
    inside = offs < I
    for _ in range(steps):
        dsine = tl.load(sine_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        dcosine = tl.load(cosine_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        sine, cosine = _sine_and_cosine(load_row(x_ptr, offs, stride_xi, inside), frequency)
        dx = frequency * (dsine * cosine - dcosine * sine)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if MAKE_WAVES:
            tl.debug_barrier()  # other threads of the program have read what this one overwrites
            tl.store(sine_ptr + offs, sine.to(sine_ptr.dtype.element_ty), mask=inside)
            tl.store(cosine_ptr + offs, cosine.to(cosine_ptr.dtype.element_ty), mask=inside)
        dx_ptr += I
        sine_ptr += I
        cosine_ptr += I
        x_ptr += stride_xm


@triton.jit
def _sine_and_cosine(x, frequency):
    y = x * frequency
    shifted = tl.fma(y, 0.6366197723675814, 12582912.0)  # 2/pi, 1.5 * 2^23: the last bits are n's, in twos complement
    n = shifted - 12582912.0
    r = tl.fma(n, -1.5707963705062866, y)
    r = tl.fma(n, 4.371139000186243e-08, r)
    r = clamped(r, -0.8, 0.8)  # pi/4 and what rounding y 2/pi adds, y to 10^5
    s = r * r
    sine = tl.fma(tl.fma(s, -1.9515295891e-4, 8.3321608736e-3), s, -1.6666654611e-1)
    sine = tl.fma(sine * s, r, r)
    cosine = tl.fma(tl.fma(s, 2.443315711809948e-5, -1.388731625493765e-3), s, 4.166664568298827e-2)
    cosine = tl.fma(tl.fma(cosine, s, -0.5), s, 1.0)
    bits = shifted.to(tl.int32, bitcast=True)
    odd = (bits & 1) != 0  # a quarter turn more: sin is cos, and cos is -sin
    first, second = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return _negated(first, bits << 30), _negated(second, (bits << 30) + (1 << 30))


@triton.jit
def _negated(value, sign):
    """-value where the first bit of `sign` is set."""
    return (value.to(tl.int32, bitcast=True) ^ (sign & -(2**31))).to(tl.float32, bitcast=True)


def unsupported(device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run this case, or None if they can."""
    return unsupported_tensors(device, x=x_dtype, sin_weight=dtype)


def forward(x: Tensor, sin_weight: Tensor, cos_weight: Tensor, frequency: float) -> Tensor:
    """x (M, I), sin_weight and cos_weight (O, I) of one dtype: y (M, O) in it."""
    sine, cosine = waves(x, frequency, sin_weight.dtype)
    return torch.mm(sine, sin_weight.mT).addmm_(cosine, cos_weight.mT)


def backward(
    dy: Tensor,
    x: Tensor,
    sin_weight: Tensor,
    cos_weight: Tensor,
    frequency: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, sin_weight and cos_weight, each where `needs` asks for it, else None."""
    needs_x, needs_sin, needs_cos = needs
    dx = None
    if needs_x:
        sine, cosine = dy @ sin_weight, dy @ cos_weight
        dx = fold(sine, cosine, x, frequency, make_waves=needs_sin or needs_cos)
    else:
        sine, cosine = waves(x, frequency, sin_weight.dtype)
    return dx, dy.mT @ sine if needs_sin else None, dy.mT @ cosine if needs_cos else None


def waves(x: Tensor, frequency: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sin(w x) and cos(w x) of x (M, I), in `dtype`."""
    sine, cosine = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        grid, x, rows, block, warps = _launch(x, *WAVES)
        with torch.cuda.device_of(x):
            _waves_kernel[grid](sine, cosine, x, *x.shape, *x.stride(), frequency, rows, block, num_warps=warps)
    return sine, cosine


def fold(dsine: Tensor, dcosine: Tensor, x: Tensor, frequency: float, make_waves: bool) -> Tensor:
    """dx (M, I) from contiguous dsine and dcosine (M, I), which with `make_waves` become sin(w x) and cos(w x)."""
    dx = x.new_empty(x.shape)
    if x.numel():
        grid, x, rows, block, warps = _launch(x, *FOLD)
        with torch.cuda.device_of(x):
            _fold_waves_kernel[grid](
                dx, dsine, dcosine, x, *x.shape, *x.stride(), frequency, rows, make_waves, block, num_warps=warps
            )
    return dx


def _launch(x: Tensor, rows: int, warps: int) -> tuple[tuple[int], Tensor, int, int, int]:
    """Programs, x in rows of whole tiles where that is a view, and the rest: two kinds of arguments for all lengths."""
    if x.is_contiguous() and x.numel() % (256 * warps) == 0:
        x = x.view(-1, 256 * warps)
    (M, I), block = x.shape, min(256 * warps, power_of_2(x.shape[1]))
    return programs(M, I, rows, block), x, rows, block, warps
