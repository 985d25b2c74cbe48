"""Edges that are formulas: c * f(a x + b) + d in place of a spline, found in samples, then trained like any parameter.

Which function (`suggest_symbolic`, `auto_symbolic`): the one with the lowest

    score = log10(1 - R^2 + 1e-8) + simplicity * complexity

so with simplicity = 0.5 a function may be one more complex if it leaves less than 10^-0.5 of the variance that the
simpler one leaves unexplained. Among equals (to 0.01) the smaller |b| wins: sin(x) before cos(x - pi / 2).

(Liu et al. 2024, arXiv:2404.19756, section 2.5.1. There the argument may cross a pole and NaN becomes 0; here the fit
stays in the function's domain, see `symbolic_fit`.)
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kansformer.kan import symbolic_fit
from kansformer.kan.library import LIBRARY, Function, lookup

if TYPE_CHECKING:
    from kansformer.kan.network import KAN, KANLayer

SPLINE = -1  # in `SymbolicEdges.function`
Place = Tensor | int | slice  # of edges, in one dimension of it


class SymbolicEdges(nn.Module):
    """The symbolic edges of a layer: every distinct function is evaluated once, on all its edges.

    Args:
        in_features, out_features: I and O.

    Attributes:
        function: (O, I) int64 buffer, the place of the edge's function in LIBRARY, -1 for a spline edge.
        affine: (O, I, 4) Parameter, a, b, c, d of c * f(a x + b) + d.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.register_buffer("function", torch.full(shape, SPLINE, dtype=torch.int64, device=device))
        identity = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype, device=device)
        self.affine = nn.Parameter(identity.expand(*shape, 4).clone())
        self._grouped: tuple[Tensor, int, list] | None = None
        self.groups()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, I) to (N, O, I), 0 on spline edges. Outside its domain a function is constant (`library`)."""
        out = x.new_zeros(x.shape[0], self.function.numel())
        groups = self.groups()
        if groups:
            affine = self.affine.flatten(0, 1)
            values = []
            for function, at, column in groups:
                a, b, c, d = affine[at].unbind(1)
                values.append(c * function(a * x[:, column] + b) + d)
            out = out.index_copy(1, torch.cat([at for _, at, _ in groups]), torch.cat(values, 1))
        return out.unflatten(1, self.function.shape)

    def groups(self) -> list[tuple[Function, Tensor, Tensor]]:
        """Each function in use, with the flat places o * I + i of its edges and their inputs i.

        Kept until `function` changes. A tracer, to which they are constants, cannot see that, so whatever changes it
        other than by hand asks for them anew.
        """
        if torch.compiler.is_compiling() and self._grouped is not None:
            return self._grouped[2]
        seen, version, groups = self._grouped or (None, 0, [])
        # A tensor made under inference_mode counts no versions: nothing is kept
        now = None if self.function.is_inference() else self.function._version
        if seen is not self.function or now is None or version != now:
            flat, members = self.function.flatten(), list(LIBRARY.values())
            groups = []
            for index in flat.unique().tolist():
                if index != SPLINE:
                    at = (flat == index).nonzero().flatten()
                    groups.append((members[index], at, at % self.function.shape[1]))
            self._grouped = self.function, now, groups
        return groups

    def _apply(self, *arguments, **options) -> "SymbolicEdges":
        super()._apply(*arguments, **options)
        if not self.function.is_meta:
            self.groups()
        return self

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self.groups()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_grouped": None}  # versions of a copy count from 0

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.groups()

    @torch.no_grad()
    def set(self, o: Place, i: Place, function: Tensor | int, affine: Tensor | None = None) -> None:
        """Make edges i -> o the functions of these places in LIBRARY, or SPLINE."""
        self.function[o, i] = function
        if affine is not None:
            self.affine[o, i] = affine.to(self.affine)
        self.groups()

    def extra_repr(self) -> str:
        return f"edges={int((self.function != SPLINE).sum())} of {self.function.numel()}"


class Suggestion(NamedTuple):
    """One function for one edge: c * f(a x + b) + d, `affine` = (a, b, c, d)."""

    name: str
    r2: float
    complexity: int
    score: float
    affine: tuple[float, float, float, float]

    def __str__(self) -> str:
        a, b, c, d = self.affine
        return f"{self.name:<9} 1 - R^2 = {1 - self.r2:<8.1e} {c:.5g} * f({a:.5g} x {b:+.5g}) {d:+.5g}"


class Choice(NamedTuple):
    """What `auto_symbolic` did with edge i -> o of a layer: `name` is None where it stays a spline."""

    layer: int
    i: int
    o: int
    name: str | None
    best: Suggestion

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.i} -> {self.o}: {'' if self.name else 'left a spline; best: '}{self.best}"


def suggest_symbolic(
    model: "KAN",
    layer: int,
    i: int,
    o: int,
    library: Sequence[str] | None = None,
    simplicity: float = 0.5,
    x: Tensor | None = None,
) -> list[Suggestion]:
    """Every function of the library fitted to edge i -> o of a layer, the best score first.

    Args:
        layer: 0 for the first.
        i, o: input node and output subnode (sum nodes first, then two for each product node).
        library: names from LIBRARY; None for all.
        simplicity: decades of unexplained variance that one unit of complexity must save (see the head of this file).
        x: (N, n_in) samples; None takes those of the last `fit`.
    Raises:
        ValueError: for an edge that does not exist or is pruned, an unknown function, or samples that are not finite.
    """
    names = lookup(library)
    _check_edge(model, layer, i, o)
    inputs, outputs = _edge_samples(model, layer, x)
    r2, affine = symbolic_fit.fit(inputs[:, [i]], outputs[:, o, [i]], names)
    return _ranked(names, r2[0], affine[0], simplicity)


def fix_symbolic(
    model: "KAN",
    layer: int,
    i: int,
    o: int,
    name: str,
    affine: Sequence[float] | None = None,
    x: Tensor | None = None,
) -> float:
    """Make edge i -> o of a layer c * f(a x + b) + d, in place.

    Args:
        name: of f in LIBRARY.
        affine: (a, b, c, d); None fits them to the edge's samples.
        x: (N, n_in) samples; None takes those of the last `fit`.
    Returns:
        R^2 of the function against what the edge was.
    Raises:
        ValueError: as `suggest_symbolic`, and where an `affine` that was given leaves f's domain, with the ranges.
    """
    (name,) = lookup([name])
    _check_edge(model, layer, i, o)
    inputs, outputs = _edge_samples(model, layer, x)
    inputs, outputs = inputs[:, [i]], outputs[:, o, [i]]
    if affine is None:
        r2, parameters = symbolic_fit.fit(inputs, outputs, [name])
        r2, parameters = r2[0, 0], parameters[0, 0]
    else:
        parameters = torch.as_tensor(affine, dtype=torch.float64)
        if parameters.shape != (4,) or not parameters.isfinite().all():
            raise ValueError(f"affine must be four finite numbers (a, b, c, d), got {affine!r}")
        r2 = symbolic_fit.r2_of(LIBRARY[name], parameters, inputs, outputs)
        outside = domain_violation(name, parameters[:2].tolist(), inputs)
        if outside:
            raise ValueError(f"edge ({layer}, {i}, {o}): {outside}; choose other a and b, or leave affine out")
    model.layers[layer].symbolic.set(o, i, list(LIBRARY).index(name), parameters)
    return r2.item()


def unfix_symbolic(model: "KAN", layer: int | None = None, i: int | None = None, o: int | None = None) -> None:
    """Make edge i -> o of a layer, or all edges, the splines again that they were before."""
    if layer is None:
        for each in model.layers:
            each.symbolic.set(slice(None), slice(None), SPLINE)
        return
    _check_edge(model, layer, i, o)
    model.layers[layer].symbolic.set(o, i, SPLINE)


def auto_symbolic(
    model: "KAN",
    library: Sequence[str] | None = None,
    r2_threshold: float = 0.99,
    simplicity: float = 0.5,
    x: Tensor | None = None,
    verbose: bool = True,
) -> list[Choice]:
    """Replace every live spline edge by the best-scored function that reaches the threshold, in place.

    Layer by layer: an edge is fitted on what the formulas before it deliver. Fit the network again afterwards.

    Args:
        library, simplicity, x: as `suggest_symbolic`.
        r2_threshold: an edge where no function reaches this R^2 stays a spline.
        verbose: print what was chosen.
    Returns:
        What became of every live spline edge.
    Raises:
        ValueError: for an unknown function, or samples that are not finite.
    """
    names = lookup(library)
    place = {name: k for k, name in enumerate(LIBRARY)}
    x, choices = model.samples_or(x), []
    for depth, layer in enumerate(model.layers):
        o, i = spline_edges(layer).nonzero().unbind(1)
        if len(o):
            r2, affine = symbolic_fit.fit(x[:, i], layer.edges(x).detach()[:, o, i], names)
            for edge in range(len(o)):
                ranked = _ranked(names, r2[edge], affine[edge], simplicity)
                best = next((s for s in ranked if s.r2 >= r2_threshold), None)
                shown = best or max(ranked, key=lambda s: s.r2)
                choice = Choice(depth, int(i[edge]), int(o[edge]), best and best.name, shown)
                choices.append(choice)
                if best:
                    layer.symbolic.set(choice.o, choice.i, place[best.name], torch.tensor(best.affine))
                if verbose:
                    print(choice)
        with torch.no_grad():
            x = layer(x)
    return choices


def spline_edges(layer: "KANLayer") -> Tensor:
    """(O, I) bool: alive and not symbolic."""
    return (layer.edge_mask > 0) & (layer.symbolic.function == SPLINE)


def domain_violation(name: str, slope_shift: Sequence[float], x: Tensor) -> str | None:
    """How a x + b leaves the domain of `name` on the samples, in words; None where it does not."""
    (a, b), (low, high) = slope_shift, LIBRARY[name].domain
    u = a * x.double() + b
    outside = int(((u < low) | (u > high)).sum())
    if not outside:
        return None
    return (
        f"{name} is undefined (or steeper than it is computed) at {outside} of {u.numel()} samples: its argument "
        f"{a:.5g} x {b:+.5g} runs from {u.min():.5g} to {u.max():.5g}, its domain from {low:.3g} to {high:.3g}"
    )


def _ranked(names: list[str], r2: Tensor, affine: Tensor, simplicity: float) -> list[Suggestion]:
    found = []
    for name, value, parameters in zip(names, r2.tolist(), affine.tolist()):
        complexity = LIBRARY[name].complexity
        score = math.log10(max(1 - value, 0) + 1e-8) + simplicity * complexity
        found.append(Suggestion(name, value, complexity, score, tuple(parameters)))
    return sorted(found, key=lambda s: (round(s.score, 2), abs(s.affine[1])))


@torch.no_grad()
def _edge_samples(model: "KAN", layer: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs (N, I) and edges (N, O, I) of a layer."""
    x = model.samples_or(x)
    for before in model.layers[:layer]:
        x = before(x)
    return x, model.layers[layer].edges(x)


def _check_edge(model: "KAN", layer: int, i: int, o: int) -> None:
    if not isinstance(layer, Integral) or not 0 <= layer < len(model.layers):
        raise ValueError(f"no layer {layer!r}: this network has layers 0 to {len(model.layers) - 1}")
    outputs, inputs = model.layers[layer].edge_mask.shape
    for what, index, count in (("input", i, inputs), ("output subnode", o, outputs)):
        if not isinstance(index, Integral) or not 0 <= index < count:
            raise ValueError(f"no {what} {index!r} in layer {layer}: it has 0 to {count - 1}")
    if model.layers[layer].edge_mask[o, i] == 0:
        raise ValueError(f"edge {i} -> {o} of layer {layer} is pruned: it is 0 and has no function")
