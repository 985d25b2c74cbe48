"""The functions that an edge can become: c * f(a x + b) + d, f one of LIBRARY.

Every function is finite for every argument: outside `domain` it goes on as the constant that it has at the domain's
end, so neither a fit nor a step of an optimizer can make NaN. Domains keep off poles and off infinite slopes by a hair.
Where f(-u) = -f(u) or f(u) up to c and d, half the line is domain enough: the sign of a does the rest (1/x is u > 0).
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

HAIR = 2.0**-20  # the distance to a pole
EDGE = 1 - 2.0**-23  # the float32 below 1: the slope of arcsin is finite there
HIGHEST = 40.0  # exp of more, squared in a loss, is infinite in float32


class Function(NamedTuple):
    """One member of LIBRARY.

    Attributes:
        torch: f on tensors, finite on `domain`.
        sympy: f on sympy expressions, as a function of (sympy, u).
        complexity: what it costs in the choice of a formula: 1 for x, one more for each step away and for each of a, b
            that c and d cannot absorb.
        search: where to look for (alpha, beta) in f(alpha t + beta), t in [-1, 1]: () to (K, 2).
        free: which of alpha and beta mean anything: f(x)^2's scale is c's, exp's shift too.
        domain: smallest and largest argument.
        symmetric: f(-u) is f(u) or -f(u) up to a constant, on the whole domain: then a > 0.
        half_period: f(u + half_period) = -f(u): then |b| is at most half of it.
    """

    torch: Callable[[Tensor], Tensor]
    sympy: Callable[[Any, Any], Any]
    complexity: int
    search: Callable[[], Tensor]
    free: tuple[bool, bool]
    domain: tuple[float, float] = (-math.inf, math.inf)
    symmetric: bool = False
    half_period: float | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """f(u), u outside the domain taken to its end."""
        return self.torch(u if self.domain == (-math.inf, math.inf) else u.clamp(*self.domain))


def lookup(names: Iterable[str] | None = None) -> list[str]:
    """`names` as a checked list, each name once; None for the whole library.

    Raises:
        ValueError: for an unknown name, with the nearest ones, or for no name at all.
    """
    if names is None:
        return list(LIBRARY)
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in names:
        if name not in LIBRARY:
            near = difflib.get_close_matches(str(name), LIBRARY, 3, 0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"no function {name!r} in the library: {hint}It holds {', '.join(LIBRARY)}")
    if not names:
        raise ValueError(f"library is empty; leave it out for all of {', '.join(LIBRARY)}")
    return names


def _pairs(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.cartesian_prod(alpha, beta)


def _geometric(low: float, high: float, count: int) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _linear(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _only() -> Tensor:
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def _places() -> Tensor:
    """Powers and abs: u = t + beta."""
    return _pairs(torch.ones(1, dtype=torch.float64), _linear(-4, 4, 161))


def _one_sided() -> Tensor:
    """log, sqrt, 1/x on u > 0: u = beta + t or beta - t, beta from just inside to where they are all but linear."""
    beta = torch.cat([1 + _geometric(2 * HAIR**2, HAIR**2 * 4, 2), 1 + _geometric(1.1 * HAIR, 20, 56)])
    return _pairs(torch.tensor([1.0, -1.0], dtype=torch.float64), beta)


def _rates() -> Tensor:
    """exp: u = alpha t."""
    rate = _geometric(0.05, HIGHEST - 1, 40)
    return torch.stack([torch.cat([rate, -rate]), torch.zeros(80, dtype=torch.float64)], 1)


def _waves() -> Tensor:
    """sin: up to ten periods, twelve phases of half a turn."""
    return _pairs(_linear(0.25, 32, 128), _linear(-math.pi / 2, math.pi / 2, 13)[1:])


def _steps() -> Tensor:
    """tanh and a bell: u = alpha (t - place), from nearly straight to nearly a jump."""
    rate, place = _pairs(_geometric(0.2, 60, 20), _linear(-2.5, 2.5, 51)).unbind(1)
    return torch.stack([rate, -rate * place], 1)


def _inside(low: float, high: float) -> Callable[[], Tensor]:
    """tan, arcsin: the range of t onto every part [p, q] of the domain."""

    def search() -> Tensor:
        inner = _linear(0.05, 0.95, 13)
        near = _geometric(1e-4, 2e-2, 6)
        ends = low + (high - low) * torch.cat([torch.zeros(1, dtype=torch.float64), near, inner, 1 - near.flip(0)])
        ends = torch.cat([ends, torch.full((1,), high, dtype=torch.float64)])
        p, q = torch.combinations(ends).unbind(1)
        return torch.stack([(q - p) / 2, (q + p) / 2], 1)

    return search


_LINE = {"search": _places, "free": (False, True), "symmetric": True}
_POLE = {"search": _one_sided, "free": (False, True), "domain": (HAIR, math.inf)}
_ROOT = _POLE | {"domain": (HAIR**2, math.inf)}
_WAVE = {"search": _waves, "free": (True, True), "symmetric": True, "half_period": math.pi}
_STEP = {"search": _steps, "free": (True, True), "symmetric": True}


def _bounded(end: float) -> dict:
    return {"search": _inside(-end, end), "free": (True, True), "domain": (-end, end), "symmetric": True}


# Saved networks name functions by their place here: add at the end, remove nothing.
LIBRARY: dict[str, Function] = {
    "0": Function(lambda u: 0 * u, lambda sp, u: sp.Integer(0), 0, _only, (False, False), symmetric=True),
    "x": Function(lambda u: u, lambda sp, u: u, 1, _only, (False, False), symmetric=True),
    "x^2": Function(torch.square, lambda sp, u: u**2, 2, **_LINE),
    "x^3": Function(lambda u: u * u * u, lambda sp, u: u**3, 3, **_LINE),
    "x^4": Function(lambda u: u.square().square(), lambda sp, u: u**4, 4, **_LINE),
    "x^5": Function(lambda u: u.square().square() * u, lambda sp, u: u**5, 5, **_LINE),
    "1/x": Function(torch.reciprocal, lambda sp, u: 1 / u, 2, **_POLE),
    "1/x^2": Function(lambda u: u.square().reciprocal(), lambda sp, u: 1 / u**2, 3, **_POLE),
    "sqrt": Function(torch.sqrt, lambda sp, u: sp.sqrt(u), 2, **_ROOT),
    "1/sqrt": Function(torch.rsqrt, lambda sp, u: 1 / sp.sqrt(u), 3, **_POLE),
    "x^1.5": Function(lambda u: u * u.sqrt(), lambda sp, u: sp.sqrt(u) ** 3, 3, **_ROOT),
    "exp": Function(torch.exp, lambda sp, u: sp.exp(u), 2, _rates, (True, False), domain=(-math.inf, HIGHEST)),
    "log": Function(torch.log, lambda sp, u: sp.log(u), 2, **_POLE),
    "abs": Function(torch.abs, lambda sp, u: sp.Abs(u), 3, **_LINE),
    "sin": Function(torch.sin, lambda sp, u: sp.sin(u), 3, **_WAVE),
    "cos": Function(torch.cos, lambda sp, u: sp.cos(u), 3, **_WAVE),
    "tan": Function(torch.tan, lambda sp, u: sp.tan(u), 4, **_bounded(math.pi / 2 - 1e-3)),
    "tanh": Function(torch.tanh, lambda sp, u: sp.tanh(u), 3, **_STEP),
    "sigmoid": Function(torch.sigmoid, lambda sp, u: 1 / (1 + sp.exp(-u)), 4, **_STEP),
    "arctan": Function(torch.arctan, lambda sp, u: sp.atan(u), 4, **_STEP),
    "arcsin": Function(torch.arcsin, lambda sp, u: sp.asin(u), 4, **_bounded(EDGE)),
    "arccos": Function(torch.arccos, lambda sp, u: sp.acos(u), 4, **_bounded(EDGE)),
    "arctanh": Function(torch.arctanh, lambda sp, u: sp.atanh(u), 4, **_bounded(EDGE)),
    "gaussian": Function(lambda u: torch.exp(-u.square()), lambda sp, u: sp.exp(-(u**2)), 3, **_STEP),
}
