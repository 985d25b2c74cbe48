"""Edge functions of a language model as formulas: of splines c * f(a x + b) + d where one fits, of waves themselves."""

import sympy  # torch depends on it
import torch
from torch import Tensor

from kansformer.inspect.edges import BINS, MARGIN, EdgeStatistics, edge_curves, edge_weights
from kansformer.kan import symbolic_fit
from kansformer.kan.library import LIBRARY
from kansformer.layers import FourierLinear

# What a reader knows at sight, plainest first: a later one must leave less than SIMPLER of the variance that the best
# before it leaves.
NAMES = ("x", "x^2", "abs", "x^3", "exp", "sin", "tanh", "gaussian")
SIMPLER = 0.5
SAMPLES = 256


def formulas(statistics: EdgeStatistics, edges: Tensor) -> list[str]:
    """The library function that fits each edge best on the text, as "0.3 tanh(x - 1) (R² 0.98)".

    Samples are quantiles of the input's density, so that a fit counts where the text is. Nothing is fitted to waves:
    "0.2 sin(1.5 x + 0.7)" is what the edge computes.

    Args:
        statistics: of a layer.
        edges: (E, 2), input and output of each.
    """
    if isinstance(statistics.layer, FourierLinear):
        inputs, outputs = edges.unbind(-1)
        a, b = edge_weights(statistics.layer, inputs)[torch.arange(len(edges)), :, outputs].unbind(-1)
        angle, waves = _number(statistics.layer.frequency) * sympy.Symbol("x"), zip(a.hypot(b), torch.atan2(b, a))
        return [_written(_number(r) * sympy.sin(angle + _number(phase))) for r, phase in waves]
    x = quantiles(statistics, edges[:, 0], SAMPLES)
    y = edge_curves(statistics.layer, edges, x)
    r2, affine = symbolic_fit.fit(x.mT, y.mT, list(NAMES))
    found = []
    for scores, parameters in zip(r2.tolist(), affine.tolist()):
        best = 0
        for index, score in enumerate(scores):
            if 1 - score < SIMPLER * (1 - scores[best]):
                best = index
        a, b, c, d = map(_number, parameters[best])
        expression = c * LIBRARY[NAMES[best]].sympy(sympy, a * sympy.Symbol("x") + b) + d
        found.append(f"{_written(expression)} (R²\u00a0{scores[best]:.2f})")
    return found


def _written(expression: sympy.Expr) -> str:
    return str(expression).replace("**", "^").replace("*", " ").lower()  # Abs


def _number(value: float) -> sympy.Number:
    """Three digits, whole numbers without a point."""
    value = float(f"{value:.3g}")
    return sympy.Integer(value) if value == round(value) else sympy.Float(value, 3)


def quantiles(statistics: EdgeStatistics, inputs: Tensor, count: int) -> Tensor:
    """(E, count) float64: evenly spaced quantiles of the inputs' densities, linear within a bin."""
    density = statistics.density[inputs].double()
    steps = torch.nn.functional.pad(density.cumsum(-1), (1, 0))
    steps = steps / steps[:, -1:]
    level = (torch.arange(count, dtype=torch.float64, device=density.device) + 0.5) / count
    level = level.expand(len(inputs), -1).contiguous()
    place = torch.searchsorted(steps, level).clamp(1, BINS)
    below, above = steps.gather(1, place - 1), steps.gather(1, place)
    within = (level - below) / (above - below).clamp_min(torch.finfo(torch.float64).tiny)
    unit = (place - 1 + within) / BINS * (1 + 2 * MARGIN) - MARGIN
    lo, hi = statistics.ranges[inputs].unsqueeze(-1).unbind(1)
    return lo + (hi - lo) * unit
