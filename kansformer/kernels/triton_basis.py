"""What every Triton kernel of this folder evaluates in registers: splines, their derivatives, base activations.

And what their launchers share: a program's tile, and what the kernels cannot take. All arithmetic is float32. Where one
interval's functions are wanted (`live_interval`) they are polynomials of u, where in it x stands; a third of the
instructions. Else a spline is M_k(s), s = t - c - (1 - k)/2, t = (x - lo)/h (see `kansformer.splines`), written with
clamps instead of branches; a clamp lets NaN through (the GPU's min and max swallow it unless asked):

    M_1 = [1 - |s|]
    M_2 = ([3/2 - |s|]^2 - 3 [1/2 - |s|]^2) / 2
    M_3 = ([2 - |s|]^3 - 4 [1 - |s|]^3) / 6

with [a] = max(a, 0). Both terms of a difference are at most 8/6, so unlike truncated powers over the whole grid nothing
cancels. A derivative that jumps (k = 1, at knots) takes its value from the right, as in `kansformer.splines`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def program_tile(M, N, rows, WHOLE_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's first row (int64), its columns of N in the first step, and the number of steps.

    With WHOLE_ROWS it goes along one row, BLOCK columns a step; else down `rows` rows, BLOCK columns of each. Last rows
    first: the product before wrote them last, and the one after begins with the first; both are in cache.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if WHOLE_ROWS:
        return program.to(tl.int64), tl.arange(0, BLOCK), tl.cdiv(N, BLOCK)
    else:
        tiles = tl.cdiv(N, BLOCK)
        m = program // tiles * rows
        return m.to(tl.int64), program % tiles * BLOCK + tl.arange(0, BLOCK), tl.minimum(rows, M - m)


@triton.jit
def load_row(ptr, offs, stride, mask):
    return tl.load(ptr + offs.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def positive(a):
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def grid_scale(grid_ptr, offs_i, stride_grid, I, GRID_SIZE: tl.constexpr):
    """lo and 1/h of the features `offs_i`; (0, G) beyond I, where nothing is stored or weights are masked."""
    inside = offs_i < I
    lo = tl.load(grid_ptr + offs_i * stride_grid, mask=inside, other=0.0)
    hi = tl.load(grid_ptr + offs_i * stride_grid + 1, mask=inside, other=1.0)
    return lo, divide(GRID_SIZE * 1.0, hi - lo)  # a quotient 1 ulp off puts inputs on the other side of a knot


@triton.jit
def divide(a, b):
    """a / b rounded to nearest as by `tl.div_rn`, without its branches; a an integer below 128, 1e-30 < b < 1e30.

    The square of rsqrt is within 2^-21 of 1/b, a Newton step makes it 1/b rounded to nearest, with which the last line
    rounds the quotient to nearest (Markstein, IBM J. Res. Dev. 34(1), 1990). A step errs downwards by up to 2^-42; for
    b one ulp below a power of two that is the wrong side of a midpoint: hence 2^-41. Where 1/b lies so near to another
    midpoint, either neighbour gives the same quotient: compared for every a and all 2^23 mantissas of b.
    """
    r = tl.rsqrt(b)
    r *= r
    r = tl.fma(r, tl.fma(-b, r, 1.0) + 2**-41, r)
    q = a * r
    return tl.fma(tl.fma(-b, q, a), r, q)


@triton.jit
def clamped(t, low, high):
    """The closest point of [low, high]; NaN stays. On a grid that is [0, G] in t."""
    t = tl.minimum(t, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(t, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_live(t, GRID_SIZE: tl.constexpr):
    """The first of the k + 1 functions that are not zero at t = (x - lo)/h; beyond the grid the outermost ones."""
    return tl.floor(tl.minimum(tl.maximum(tl.where(t == t, t, 0.0), 0.0), GRID_SIZE - 1.0))


@triton.jit
def spline(s, ORDER: tl.constexpr):
    """M_k(s)."""
    r = tl.abs(s)
    if ORDER == 1:
        return positive(1 - r)
    elif ORDER == 2:
        a = positive(1.5 - r)
        b = positive(0.5 - r)
        return 0.5 * (a * a) - 1.5 * (b * b)
    else:
        a = positive(2 - r)
        b = positive(1 - r)
        return (a * a) * (a * (1 / 6)) - (b * b) * (b * (2 / 3))


@triton.jit
def live_interval(t, GRID_SIZE: tl.constexpr, ORDER: tl.constexpr, CLAMPED: tl.constexpr):
    """(j, u): the k + 1 functions that are not zero at t = (x - lo)/h are j to j + k, and t is u in [0, 1] past knot j.

    CLAMPED takes the grid's closest point for t. Else j goes on beyond the grid, where there is no function below 0 and
    from G + k on, until none is left.
    """
    if CLAMPED:
        t = clamped(t, 0.0, GRID_SIZE * 1.0)
        last = GRID_SIZE - 1.0
    else:
        last = GRID_SIZE + ORDER * 1.0
        t = clamped(t, -1.0 - ORDER, last)
    j = tl.floor(tl.minimum(tl.where(t == t, t, 0.0), last))
    return j.to(tl.int32), t - j


@triton.jit
def live_spline(u, r: tl.constexpr, ORDER: tl.constexpr):
    """The r-th of the k + 1 functions of an interval: M_k as a polynomial, here without a clamp."""
    if ORDER == 1:
        return 1 - u if r == 0 else u
    elif ORDER == 2:
        v = 1 - u if r == 0 else u
        return 0.5 + u * (1 - u) if r == 1 else 0.5 * (v * v)
    elif r == 0 or r == 3:
        v = 1 - u if r == 0 else u
        return (v * v) * (v * (1 / 6))
    else:
        v = u if r == 1 else 1 - u
        return 2 / 3 - (v * v) * (1 - 0.5 * v)


@triton.jit
def live_slope(u, r: tl.constexpr, ORDER: tl.constexpr):
    """Its derivative with respect to u. NaN in u stays NaN in one of them at least."""
    if ORDER == 1:
        return 0 * u - 1 if r == 0 else tl.full(u.shape, 1.0, tl.float32)
    elif ORDER == 2:
        return u - 1 if r == 0 else 1 - 2 * u if r == 1 else u
    elif r == 0:
        return -0.5 * ((1 - u) * (1 - u))
    elif r == 1:
        return u * (1.5 * u - 2)
    elif r == 2:
        return (1 - u) * (0.5 + 1.5 * u)
    else:
        return 0.5 * (u * u)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """The base function: "silu", "gelu" (with erf), "relu" or "identity"."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return x * normal_cdf(x)
    elif ACTIVATION == "relu":
        return positive(x)
    else:
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        p = tl.sigmoid(x)
        return p * (1 + x * (1 - p))
    elif ACTIVATION == "gelu":
        return normal_cdf(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))  # 1 / sqrt(2 pi)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, tl.where(x == x, 0.0, x))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)


def ranges(grid: Tensor) -> tuple[Tensor, int]:
    """The grid (2,) or (I, 2) as `grid_scale` reads it, and its `stride_grid`."""
    return grid.to(torch.float32).contiguous(), 0 if grid.dim() == 1 else 2


def ceil_div(a: int, b: int) -> int:
    """As triton's cdiv, which takes microseconds on the host."""
    return -(-a // b)


def programs(M: int, N: int, rows: int, block: int, whole_rows: bool = False) -> tuple[int]:
    """The launch grid that `program_tile` divides."""
    return (M if whole_rows else ceil_div(M, rows) * ceil_div(N, block),)


def power_of_2(size: int) -> int:
    """The first power of 2 from `size` on, as triton's next_power_of_2, likewise."""
    return 1 << (size - 1).bit_length()


@functools.cache
def device_properties(index: int | None) -> tuple[int, int]:
    """Compute capability as in 90, and the number of multiprocessors."""
    if index is None:  # interpreted on the CPU
        return 90, 132
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def unsupported_tensors(device: torch.device, **dtypes: torch.dtype) -> str | None:
    """Why the kernels of this folder cannot take tensors of these dtypes on `device`, or None if they can."""
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            return f"{name} is {dtype}; the kernels take bfloat16, float16 and float32"
    if isinstance(spline, triton.JITFunction):
        if device.type != "cuda" or torch.version.cuda is None:
            return f"x is on {device}; the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1 before triton is imported)"
        capability, _ = device_properties(device.index)
        if capability < 80:
            return f"compute capability {capability / 10} is below 8.0"
    return None
