"""A layer of waves on a GPU: sine and cosine by Triton, matrix products by the library torch calls for them.

    y[m, o] = sum_i A[o, i] sin(w x[m, i]) + B[o, i] cos(w x[m, i])

Letters: M rows (tokens), I in, O out. With S = sin(w x) and C = cos(w x), (M, I), forward is two products and backward
four, those of a linear layer of as many parameters:

    y = S @ A^T + C @ B^T       dA = dy^T @ S        dS = dy @ A
    dx = w (dS * C - dC * S)    dB = dy^T @ C        dC = dy @ B

One kernel writes S and C, one folds dS and dC into dx and leaves S and C in their places for dA and dB, so that nothing
is saved but x. Both move every element once, and are to be bound by that: in 16 bits 6 bytes an element forward and 12
backward, in whose time an H100 issues about 50 and 100 instructions. A range reduction each for sin and cos, as they
have in libdevice, comes to some 100.

Sine and cosine share one. y = w x is n pi/2 + r, n the nearest integer, and

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

from kansformer.kernels.triton_basis import ceil_div
from kansformer.kernels.triton_kan import unsupported_tensors

# Elements and warps of a program's tile, 8 elements a thread. One warp's barrier waits for no other. On sm_90 an
# element is 29 instructions of WAVES and 37 of FOLD in bfloat16; with 16 a thread FOLD has 76 registers in float32, not
# 57.
WAVES, FOLD = (1024, 4), (256, 1)


@triton.jit(do_not_specialize=["M"])
def _waves_kernel(sine_ptr, cosine_ptr, x_ptr, M, I, frequency, BLOCK: tl.constexpr):
    """sin(w x) and cos(w x) of contiguous (M, I)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = offs < M.to(tl.int64) * I - first
    sine, cosine = _sine_and_cosine(tl.load(x_ptr + first + offs, mask=inside, other=0.0), frequency)
    tl.store(sine_ptr + first + offs, sine.to(sine_ptr.dtype.element_ty), mask=inside)
    tl.store(cosine_ptr + first + offs, cosine.to(cosine_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _fold_waves_kernel(
    dx_ptr, sine_ptr, cosine_ptr, x_ptr, M, I, frequency, MAKE_WAVES: tl.constexpr, BLOCK: tl.constexpr
):
    """dx of contiguous (M, I) from dS and dC, which MAKE_WAVES replaces by S and C."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = offs < M.to(tl.int64) * I - first
    dsine = tl.load(sine_ptr + first + offs, mask=inside, other=0.0).to(tl.float32)
    dcosine = tl.load(cosine_ptr + first + offs, mask=inside, other=0.0).to(tl.float32)
    sine, cosine = _sine_and_cosine(tl.load(x_ptr + first + offs, mask=inside, other=0.0), frequency)
    dx = frequency * (dsine * cosine - dcosine * sine)
    tl.store(dx_ptr + first + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if MAKE_WAVES:
        tl.debug_barrier()  # other threads of the program have read what this one overwrites
        tl.store(sine_ptr + first + offs, sine.to(sine_ptr.dtype.element_ty), mask=inside)
        tl.store(cosine_ptr + first + offs, cosine.to(cosine_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sine_and_cosine(x, frequency):
    y = x.to(tl.float32) * frequency
    shifted = tl.fma(y, 0.6366197723675814, 12582912.0)  # 2/pi, 1.5 * 2^23: the last bits are n's, in twos complement
    n = shifted - 12582912.0
    r = tl.fma(n, -1.5707963705062866, y)
    r = tl.fma(n, 4.371139000186243e-08, r)
    r = tl.minimum(r, 0.8, propagate_nan=tl.PropagateNan.ALL)  # pi/4 and what rounding y 2/pi adds, y to 10^5
    r = tl.maximum(r, -0.8, propagate_nan=tl.PropagateNan.ALL)
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
    x = x.contiguous()
    sine, cosine = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    if x.numel():
        block, warps = WAVES
        with torch.cuda.device_of(x):
            _waves_kernel[ceil_div(x.numel(), block),](sine, cosine, x, *x.shape, frequency, block, num_warps=warps)
    return sine, cosine


def fold(dsine: Tensor, dcosine: Tensor, x: Tensor, frequency: float, make_waves: bool) -> Tensor:
    """dx (M, I) from contiguous dsine and dcosine (M, I), which with `make_waves` become sin(w x) and cos(w x)."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        block, warps = FOLD
        with torch.cuda.device_of(x):
            _fold_waves_kernel[ceil_div(x.numel(), block),](
                dx, dsine, dcosine, x, *x.shape, frequency, make_waves, block, num_warps=warps
            )
    return dx
