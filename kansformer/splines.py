"""Uniform B-splines in plain torch: the reference that every backend is tested against.

A grid divides [lo, hi] into G = grid_size intervals of width h and carries C = G + k splines of order (degree) k. On a
uniform grid they are one cardinal spline M_k, shifted (Schoenberg 1946; de Boor, A Practical Guide to Splines, ch. X):

    B_c(x) = M_k(t - c - (1 - k) / 2),    t = (x - lo) / h,    c = 0 .. C-1

    M_1(s) = 1 - |s|                    for |s| < 1
    M_2(s) = 3/4 - s^2                  for |s| < 1/2,      (3/2 - |s|)^2 / 2    for |s| < 3/2
    M_3(s) = 2/3 - s^2 + |s|^3 / 2      for |s| < 1,        (2 - |s|)^3 / 6      for |s| < 2

Inside the grid they sum to one and exactly k + 1 of them are non-zero; outside they fall to zero over k more knots. At
a knot a derivative that jumps takes its value from the right. Arithmetic is in float64 for float64 inputs and in
float32 for every other dtype. NaN in gives NaN out. Everything here is differentiable in x as often as one likes.

Shapes: x is (..., I); a grid is (2,) for all features or (I, 2), one (lo, hi) each; coefficients are (I*C, O) with row
i*C + c, the matrix of the product Phi @ W.
"""

import torch
from torch import Tensor


def num_basis(grid_size: int, spline_order: int) -> int:
    """C = G + k, the number of splines on a grid of G intervals."""
    return grid_size + spline_order


def knots(grid: Tensor, grid_size: int, spline_order: int) -> Tensor:
    """The extended knot vector lo + (j - k) h, j = 0 .. G + 2k: shape (..., G + 2k + 1) for a grid (..., 2)."""
    steps = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=grid.dtype, device=grid.device)
    lo, hi = grid[..., :1], grid[..., 1:]
    return lo + (hi - lo) * (steps / grid_size)


def cox_de_boor(x: Tensor, grid: Tensor, grid_size: int, spline_order: int) -> Tensor:
    """B_c(x) for any order by the Cox-de Boor recursion (de Boor 1972): (..., I) to (..., I, C). Slow; a reference."""
    x = _upcast(x)
    t = knots(grid.to(x.dtype), grid_size, spline_order)
    x = x.unsqueeze(-1).clamp(t[..., :1] - 1, t[..., -1:])
    b = ((x >= t[..., :-1]) & (x < t[..., 1:])).to(x.dtype)
    for k in range(1, spline_order + 1):
        left = (x - t[..., : -k - 1]) / (t[..., k:-1] - t[..., : -k - 1])
        right = (t[..., k + 1 :] - x) / (t[..., k + 1 :] - t[..., 1:-k])
        b = left * b[..., :-1] + right * b[..., 1:]
    return torch.where(x.isnan(), x, b)


def cardinal(s: Tensor, spline_order: int) -> Tensor:
    """M_k(s), the centred cardinal B-spline of order 1, 2 or 3."""
    a = s.abs()
    if spline_order == 1:
        return torch.where((s < -1) | (s >= 1), 0, torch.where(s < 0, 1 + s, 1 - s))
    if spline_order == 2:
        far, near = (1.5 - a).square() / 2, 0.75 - s.square()
        return torch.where((s < -1.5) | (s >= 1.5), 0, torch.where((s < -0.5) | (s >= 0.5), far, near))
    if spline_order == 3:
        near = 2 / 3 - s.square() * (1 - a / 2)
        return torch.where(a >= 2, 0, torch.where(a >= 1, (2 - a).pow(3) / 6, near))
    raise ValueError(f"closed forms exist for spline_order 1, 2 and 3, not {spline_order}; use cox_de_boor")


def cardinal_derivative(s: Tensor, spline_order: int) -> Tensor:
    """M_k'(s) = M_{k-1}(s + 1/2) - M_{k-1}(s - 1/2), in closed form; the value from the right where it jumps."""
    a = s.abs()
    if spline_order == 1:
        inside = torch.where(s < 0, 1.0, -1.0).to(s.dtype)
        return torch.where(s.isnan(), s, torch.where((s < -1) | (s >= 1), 0, inside))
    if spline_order == 2:
        return torch.where(a >= 1.5, 0, torch.where((s < -0.5) | (s >= 0.5), (a - 1.5) * s.sign(), -2 * s))
    if spline_order == 3:
        near = s * (1.5 * a - 2)
        return torch.where(a >= 2, 0, torch.where(a >= 1, -(2 - a).square() / 2 * s.sign(), near))
    raise ValueError(f"closed forms exist for spline_order 1, 2 and 3, not {spline_order}")


def inverse_width(grid: Tensor, grid_size: int, dtype: torch.dtype) -> Tensor:
    """1 / h = G / (hi - lo) in `dtype`, correctly rounded as in the kernels: (...,) for a grid (..., 2)."""
    lo, hi = grid.to(dtype).unbind(-1)
    return torch.full_like(hi, grid_size) / (hi - lo)  # a number over a tensor is its reciprocal times the number


def basis(
    x: Tensor,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    derivative: bool = False,
    dim: int = -1,
    constant_outside: bool = False,
) -> Tensor:
    """All splines at x, or their derivatives in x: (..., I) to (..., I, C).

    Closed form for orders 1 to 3, Cox-de Boor above (values only, half-open at the last outer knot).

    Args:
        x: (..., I), any float dtype.
        grid: (2,) or (I, 2), the ends of the grid.
        dim: -1, or -2 for (..., C, I).
        constant_outside: beyond the grid, take its closest point (values only).
    """
    if constant_outside and (derivative or spline_order > 3):
        raise ValueError("constant_outside is for values, and spline_order 1, 2 and 3")
    if spline_order > 3 and not derivative:
        return cox_de_boor(x, grid, grid_size, spline_order).movedim(-1, dim)
    t = position(x, grid, grid_size)
    # Clamped just past the last knot, where every spline is zero: infinite x must not meet its own square.
    past = spline_order + 1
    t = closest(t, grid_size) if constant_outside else t.clamp(-past, grid_size + past)
    c = torch.arange(num_basis(grid_size, spline_order), dtype=t.dtype, device=t.device)
    centres = c + (1 - spline_order) / 2
    s = t.unsqueeze(dim) - (centres if dim == -1 else centres.unsqueeze(-1))
    if not derivative:
        return cardinal(s, spline_order)
    return cardinal_derivative(s, spline_order) * inverse_width(grid, grid_size, t.dtype).unsqueeze(dim)


def live_basis(
    x: Tensor, grid: Tensor, grid_size: int, spline_order: int, constant_outside: bool = False
) -> tuple[Tensor, Tensor]:
    """Where the k + 1 splines that can be non-zero at x, or at the grid's closest point to it, begin.

    Returns:
        first: (..., I) int64 in [0, G-1]; the live splines are first .. first + k.
        s: (..., I), the position relative to the first one's centre: spline first + r has the value M_k(s - r).
    """
    t = position(x, grid, grid_size)
    t = closest(t, grid_size) if constant_outside else t
    first = t.floor().long().clamp_(0, grid_size - 1)  # NaN becomes some integer here and stays NaN in s
    return first, t - (first + (1 - spline_order) / 2)


def fit(x: Tensor, y: Tensor, grid: Tensor, grid_size: int, spline_order: int) -> Tensor:
    """Least-squares coefficients of one curve per feature and output: y[n, i, o] = sum_c W[i*C + c, o] B_c(x[n, i]).

    The minimum-norm solution through QR and a truncated SVD of R, in float64: stable where samples do not reach every
    spline (their coefficients become zero), the same on CPU and CUDA.

    Args:
        x: (N, I) samples.  y: (N, I, O) values.
    Returns:
        (I*C, O) in y's dtype.
    Raises:
        ValueError: on wrong shapes, no samples, or samples that are not finite.
    """
    if x.dim() != 2 or y.dim() != 3 or y.shape[:2] != x.shape or x.shape[0] == 0:
        raise ValueError(
            f"fit needs x (N, I) and y (N, I, O) with N >= 1, got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("fit needs finite samples: x or y holds NaN or infinity; drop those rows first")
    phi = basis(x.double(), grid, grid_size, spline_order).transpose(0, 1)
    return least_squares(phi, y.double().transpose(0, 1)).flatten(0, 1).to(y.dtype)


def refit(
    spline_weight: Tensor,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    new_grid: Tensor | None = None,
    new_grid_size: int | None = None,
    constant_outside: bool = False,
) -> Tensor:
    """Coefficients on another grid for the same functions: (I*C, O) to (I*C', O).

    Exact on [lo, hi] when the new knots contain the old ones (same range, G' a multiple of G: the grid extension of
    arXiv:2404.19756, section 2.4), else the least-squares projection, uniformly weighted over the new range. Both are
    one linear map of the C coefficients of a feature, so no sample of any function is ever made and the cost does not
    depend on data. Computed in float64. With `constant_outside` the functions go on as constants beyond the old grid
    instead of falling to zero.
    """
    new_grid = grid if new_grid is None else new_grid
    new_grid_size = grid_size if new_grid_size is None else new_grid_size
    count = num_basis(grid_size, spline_order)
    # Between two knots of either grid both functions are polynomials of degree k: k + 2 points an interval of the finer
    # grid determine them.
    points = (spline_order + 2) * 2 * max(grid_size, new_grid_size)
    unit = (torch.arange(points, dtype=torch.float64, device=grid.device) + 0.5) / points
    lo, hi = new_grid.double().unbind(-1)
    x = lo + (hi - lo) * unit.unsqueeze(-1).expand(points, *lo.shape if lo.dim() else (1,))  # (P, I) or (P, 1)
    old = basis(x, grid.double(), grid_size, spline_order, constant_outside=constant_outside)
    old = old.transpose(0, 1)  # (I or 1, P, C)
    new = basis(x, new_grid, new_grid_size, spline_order).transpose(0, 1)
    transfer = least_squares(new, old.expand(max(old.shape[0], new.shape[0]), -1, -1))  # (I or 1, C', C)
    weight = spline_weight.double().unflatten(0, (-1, count))  # (I, C, O)
    return (transfer @ weight).flatten(0, 1).to(spline_weight.dtype)


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """Minimum-norm argmin |a w - b| for batches a (I, N, C), b (I, N, O)."""
    q, r = torch.linalg.qr(a)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    cutoff = s.amax(-1, keepdim=True) * max(a.shape[-2:]) * torch.finfo(a.dtype).eps
    inverse = torch.where(s > cutoff, 1 / s, 0)
    return vh.mT @ (inverse.unsqueeze(-1) * (u.mT @ (q.mT @ b)))


def position(x: Tensor, grid: Tensor, grid_size: int) -> Tensor:
    """t = (x - lo) / h in at least float32: 0 to G on the grid."""
    x = _upcast(x)
    return (x - grid[..., 0].to(x.dtype)) * inverse_width(grid, grid_size, x.dtype)


def closest(t: Tensor, grid_size: int) -> Tensor:
    """The grid's point closest to a position; a slope as from the right: 0 from the last knot on."""
    return torch.where(t >= grid_size, grid_size, t.clamp_min(0))


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
