"""The search for c * f(a x + b) + d behind samples of an edge function: all edges and candidates at once, in float64.

With t the input scaled to [-1, 1], alpha t + beta stays in f's domain for every sample where it does at t = -1 and 1:
candidates outside are never evaluated. c and d are a least-squares line, so only (alpha, beta) are searched (variable
projection, Golub and Pereyra 1973):

    R^2(alpha, beta) = <f - mean f, y - mean y>^2 / (|f - mean f|^2 |y - mean y|^2)

1. Grid. Every edge is interpolated on the same POINTS values of t, so f is evaluated once for all edges and R^2 of all
   candidates and all edges is one matrix product.
2. Levenberg-Marquardt from the best candidate of each of STARTS parts of the grid, with Kaufman's Jacobian (BIT 15,
   1975): the projection of c f'(u) (t, 1) off (f, 1). A step that leaves the domain or does not improve is not taken.
3. One form for each function (x^2 has a = 1, sin has a > 0 and |b| <= pi / 2, ...), c and d from all samples.
"""

import torch
from torch import Tensor

from kansformer.kan.library import LIBRARY, Function

POINTS = 201  # of t in step 1: ten to a period of the quickest wave in the library
STARTS = 4
STEPS = 40  # at most, of step 2; functions that are in the library take about ten
PATIENCE = 5  # steps without a gain of a thousandth, on any edge, end step 2
SAMPLES = 512  # at most, in step 2; step 3 takes all
FLAT, FAR = 0.03, 40.0  # |alpha| below, |beta / alpha| above: a straight line, and c f + d nothing but cancellation
VARIES = 1e-4  # of max(1, |f|), at least, in the search: a far tail of sigmoid fits exp, with c = 1e15
CHUNK = 64  # edges at a time: 64 * 512 * STARTS float64 are 1 MiB


def fit(x: Tensor, y: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Best affine parameters of every function for every edge.

    Args:
        x, y: (N, E) inputs and outputs of E edges, any float dtype.
        names: F keys of LIBRARY.
    Returns:
        r2: (E, F) float64, 1 - residual / variance; 1 where y is constant to rounding (c = 0, d the constant).
        affine: (E, F, 4) float64, a, b, c, d.
    Raises:
        ValueError: for other shapes, fewer than two samples, or samples that are not finite.
    """
    if x.dim() != 2 or x.shape != y.shape or x.shape[0] < 2:
        raise ValueError(
            f"a fit needs x and y of one shape (N, E) with N >= 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a fit needs finite samples: x or y holds NaN or infinity; look at the data")
    rounding = 8 * torch.finfo(y.dtype).eps
    chunks = [
        _fit_chunk(x_.double().mT, y_.double().mT, names, rounding)
        for x_, y_ in zip(x.split(CHUNK, 1), y.split(CHUNK, 1))
    ]
    return torch.cat([r2 for r2, _ in chunks]), torch.cat([affine for _, affine in chunks])


def r2_of(function: Function, parameters: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """R^2 of given a, b, c, d (4,) on samples (N, 1); 1 or -inf where y is constant."""
    a, b, c, d = parameters.to(x.device)
    x, y = x.double(), y.double()
    residual = (c * function(a * x + b) + d - y).square().sum()
    variance = (y - y.mean()).square().sum()
    return torch.where(residual == 0, 1.0, 1 - residual / variance)


def line(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, d and sum of squares of the residual of y = c f + d along the last dimension; c = 0 where f is constant."""
    centred, mean = f - f.mean(-1, keepdim=True), y.mean(-1)
    c = _slope(f, centred, y - mean.unsqueeze(-1))
    d = mean - c * f.mean(-1)
    return c, d, (y - c.unsqueeze(-1) * f - d.unsqueeze(-1)).square().sum(-1)


def _slope(f: Tensor, centred: Tensor, y: Tensor, least: Tensor | None = None) -> Tensor:
    """c; 0 where the standard deviation of f is below `least`, by default rounding."""
    energy = centred.square().sum(-1)
    least = f.abs().amax(-1) * 1e-13 if least is None else least
    constant = energy <= least.square() * f.shape[-1]
    return torch.where(constant, 0, (centred * y).sum(-1) / torch.where(constant, 1, energy))


@torch.no_grad()
def _fit_chunk(x: Tensor, y: Tensor, names: list[str], rounding: float) -> tuple[Tensor, Tensor]:
    """x, y (E, N) float64."""
    lo, hi = x.amin(1), x.amax(1)
    middle, radius = (hi + lo) / 2, (hi - lo) / 2
    radius = torch.where(radius > 0, radius, 1)  # a constant input: t = 0
    t = (x - middle.unsqueeze(1)) / radius.unsqueeze(1)
    mean = y.mean(1, keepdim=True)
    variance = (y - mean).square().sum(1)
    constant = variance <= (rounding * y.abs().amax(1)).square() * y.shape[1]
    unit = (y - mean) / torch.where(constant, 1, variance).sqrt().unsqueeze(1)  # (E, N), sum 0, sum of squares 1

    order = t.argsort(1)
    t_sorted, unit_sorted = t.gather(1, order), unit.gather(1, order)
    curve = _interpolate(t_sorted, unit_sorted)
    some = (
        torch.linspace(0, t.shape[1] - 1, min(SAMPLES, t.shape[1]), device=t.device).round().long()
    )  # keeps both ends
    t_some, unit_some = t_sorted[:, some], unit_sorted[:, some]

    r2, affine = [], []
    for name in names:
        function = LIBRARY[name]
        alpha, beta = _refine(function, t_some, unit_some, _starts(function, curve))
        a = alpha / radius
        b = beta - a * middle
        raw = _evaluate(function, a, b, x, y)
        plain = _evaluate(function, *_one_form(function, a, b), x, y)
        # The one form is the same function: only where it leaves the domain by a hair, or overflows, is it worse.
        same = plain[0] <= raw[0] + 1e-12 * variance
        residual, parameters = torch.where(same, plain[0], raw[0]), torch.where(same.unsqueeze(1), plain[1], raw[1])
        r2.append(torch.where(constant, 1.0, 1 - residual / torch.where(constant, 1, variance)))
        flat = torch.zeros_like(parameters)
        flat[:, 0], flat[:, 3] = 1, mean.squeeze(1)
        affine.append(torch.where(constant.unsqueeze(1), flat, parameters))
    return torch.stack(r2, 1), torch.stack(affine, 1)


def _evaluate(function: Function, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residual (E,) and a, b, c, d (E, 4) on all samples."""
    c, d, residual = line(function(a.unsqueeze(1) * x + b.unsqueeze(1)), y)
    return residual, torch.stack([a, b, c, d], 1)


def _one_form(function: Function, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of all (a, b) that are one function up to c and d, the plainest."""
    if not function.free[0]:
        a, b = a.sign(), b / a.abs()
    if not function.free[1]:
        b = torch.zeros_like(b)
    if function.symmetric:
        sign = torch.where(a < 0, -1.0, 1.0)
        a, b = sign * a, sign * b
    if function.half_period is not None:
        b = b - function.half_period * (b / function.half_period).round()
    return a, b


def _interpolate(t: Tensor, y: Tensor) -> Tensor:
    """Sorted samples (E, N) as curves (E, POINTS) over [-1, 1], linear in between."""
    at = torch.linspace(-1, 1, POINTS, dtype=t.dtype, device=t.device).expand(t.shape[0], -1).contiguous()
    right = torch.searchsorted(t.contiguous(), at).clamp(1, t.shape[1] - 1)
    t0, t1, y0, y1 = t.gather(1, right - 1), t.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
    width = t1 - t0
    share = torch.where(width > 0, (at - t0) / torch.where(width > 0, width, 1), 0).clamp(0, 1)
    return y0 + share * (y1 - y0)


def _starts(function: Function, curve: Tensor) -> Tensor:
    """The best candidate of each part of the grid: (2, S, E)."""
    candidates = function.search().to(curve)
    candidates = candidates[_in_domain(function, *candidates.unbind(1))]
    t = torch.linspace(-1, 1, POINTS, dtype=curve.dtype, device=curve.device)
    f = function(candidates[:, :1] * t + candidates[:, 1:])  # (K, P)
    least = _least(f).unsqueeze(1) * POINTS**0.5
    f = f - f.mean(1, keepdim=True)
    f = f / torch.maximum(f.norm(dim=1, keepdim=True), least)
    r2 = (f @ (curve - curve.mean(1, keepdim=True)).mT).square()  # (K, E), up to a factor of each edge
    parts = zip(r2.tensor_split(STARTS), candidates.tensor_split(STARTS))
    return torch.stack([part[scores.argmax(0)] for scores, part in parts if len(part)]).permute(2, 0, 1)


def _least(f: Tensor) -> Tensor:
    """The standard deviation over the last dimension below which f counts as constant in the search."""
    return f.abs().amax(-1).clamp_min(1) * VARIES


def _in_domain(function: Function, alpha: Tensor, beta: Tensor) -> Tensor:
    (low, high), reach = function.domain, alpha.abs()
    return (beta - reach >= low) & (beta + reach <= high) & (reach >= FLAT) & (beta.abs() <= FAR * reach)


def _refine(function: Function, t: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2. t, y (E, N), theta (2, S, E): the best start's alpha and beta, (E,) each."""
    free = torch.tensor(function.free, device=t.device)
    damping, idle = torch.full_like(theta[0], 1e-3), 0
    state = _linearise(function, theta, t, y)
    for _ in range(STEPS if free.any() else 0):
        loss, residual, jacobian = state
        jacobian = jacobian * free.view(2, 1, 1, 1)
        normal = torch.einsum("isen,jsen->seij", jacobian, jacobian)
        slope = torch.einsum("isen,sen->sei", jacobian, residual)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        diagonal = torch.where(diagonal > 0, damping.unsqueeze(-1) * diagonal, 1)
        step = torch.linalg.solve_ex(normal + torch.diag_embed(diagonal), slope)[0].permute(2, 0, 1)
        trial = torch.where(step.isfinite().all(0), theta + step, theta)
        inside = _in_domain(function, *trial)
        trial = torch.where(inside, trial, theta)
        new = _linearise(function, trial, t, y)
        better = new[0] < loss
        idle = 0 if (new[0] < 0.999 * loss - 1e-28).any() else idle + 1
        if idle == PATIENCE:
            break
        theta = torch.where(better, trial, theta)
        kept = better, better.unsqueeze(-1), better.unsqueeze(-1)
        state = tuple(torch.where(k, n, s) for k, n, s in zip(kept, new, state))
        damping = torch.where(better, damping / 8, damping * 6).clamp(1e-14, 1e10)
    best = state[0].argmin(0, keepdim=True)
    return theta[0].gather(0, best)[0], theta[1].gather(0, best)[0]


def _linearise(function: Function, theta: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (S, E), residual (S, E, N), and its Jacobian with c and d projected out, (2, S, E, N)."""
    alpha, beta = theta.unsqueeze(-1)
    with torch.enable_grad():
        u = (alpha * t + beta).requires_grad_()
        f = function(u)
        (slope,) = torch.autograd.grad(f.sum(), u)
    f = f.detach()
    centred = f - f.mean(-1, keepdim=True)
    c = _slope(f, centred, y, _least(f)).unsqueeze(-1)
    residual = y - c * centred
    jacobian = c * torch.stack([slope * t, slope])
    jacobian = jacobian - jacobian.mean(-1, keepdim=True)
    energy = centred.square().sum(-1, keepdim=True).clamp_min(torch.finfo(f.dtype).tiny)
    jacobian = jacobian - centred * ((jacobian * centred).sum(-1, keepdim=True) / energy)
    return residual.square().sum(-1), residual, jacobian
