"""A network whose live edges are all symbolic as sympy expressions: node = sum_i c f(a x_i + b) + d, layer by layer."""

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from kansformer.kan.library import LIBRARY
from kansformer.kan.symbolic import domain_violation, spline_edges

if TYPE_CHECKING:
    import sympy

    from kansformer.kan.network import KAN, KANLayer

DENOMINATORS = (1, 2, 3, 4, 5, 6, 8, 10, 12)


def symbolic_formula(
    model: "KAN",
    variables: Sequence[Any] | None = None,
    digits: int | None = None,
    simplify: bool = True,
    timeout: float = 10.0,
) -> "list[sympy.Expr]":
    """The network as formulas, one for each output.

    Args:
        variables: names or sympy expressions for the inputs; None is x_1, x_2, ..., after pruning of inputs with the
            first network's numbers.
        digits: decimals that constants are rounded to, last; whole numbers become integers, what rounds to 0 goes. None
            keeps every digit, so that the formula is the network.
        simplify: expand products and powers, merge constants, and keep that where it is shorter.
        timeout: seconds for `simplify`, all outputs together; what is not done then stays as it is, with a warning.
    Raises:
        ValueError: if live edges are still splines, naming them, or the number of variables is wrong.
        ImportError: without sympy.
    Warns:
        UserWarning: if a function leaves its domain on the samples of the last fit (the network holds its last value
            there, the formula has none), or `timeout` passed.
    """
    sp = _sympy()
    left = [
        f"({depth}, {i}, {o})"
        for depth, layer in enumerate(model.layers)
        for o, i in spline_edges(layer).nonzero().tolist()
    ]
    if left:
        some = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        raise ValueError(
            f"edges (layer, i, o) {some} are splines, which have no formula: call auto_symbolic with a lower "
            "r2_threshold, fix_symbolic, or prune them"
        )
    if variables is None:
        variables = [f"x_{column + 1}" for column in model.inputs]
    if isinstance(variables, str) or len(variables) != model.in_features:
        raise ValueError(f"variables must be {model.in_features} names or expressions, got {variables!r}")
    nodes = [sp.Symbol(v) if isinstance(v, str) else sp.sympify(v) for v in variables]
    if model.samples is not None:
        _warn_domains(model)
    for layer in model.layers:
        nodes = _layer_expressions(layer, nodes, sp)
    return finished(nodes, digits, simplify, timeout)


def finished(nodes: "Sequence[sympy.Expr]", digits: int | None, simplify: bool, timeout: float) -> "list[sympy.Expr]":
    """Expressions as `symbolic_formula` gives them: simplified if asked, then rounded."""
    if not simplify:
        return [_rounded(node, digits) for node in nodes]
    sp, done = _sympy(), []
    try:
        with _deadline(timeout):
            for node in nodes:
                # exp(u + 0.3) is expanded to 1.35 exp(u) and, where u is a sum, joined again.
                tidy = sp.powsimp(sp.expand(node), deep=True, combine="exp")
                done.append(min(_rounded(tidy, digits), _rounded(node, digits), key=lambda e: e.count_ops()))
    except TimeoutError:
        warnings.warn(
            f"simplifying output {len(done)} took more than timeout={timeout:g} s; it and those after it stay as built",
            stacklevel=3,
        )
    return done + [_rounded(node, digits) for node in nodes[len(done) :]]


def round_constants(expression: "sympy.Expr", digits: int) -> "sympy.Expr":
    """Every float rounded to `digits` decimals; whole numbers become integers, so that 1.00 * x is x."""
    sp = _sympy()
    return _replace_floats(
        expression, lambda v: sp.Integer(round(v)) if round(v, digits) == round(v) else sp.Float(round(v, digits))
    )


def snap_constants(expression: "sympy.Expr", tolerance: float = 1e-3) -> "sympy.Expr":
    """Floats within `tolerance` of p / q or p pi / q become that, q one of DENOMINATORS, the smallest first.

    The tolerance is absolute below 1 and relative above.
    """
    sp = _sympy()

    def snap(value: float) -> "sympy.Expr":
        allowed = tolerance * max(1, abs(value))
        for q in DENOMINATORS:
            for unit, exact in ((1.0, sp.Integer(1)), (math.pi, sp.pi)):
                p = round(value / unit * q)
                if abs(p * unit / q - value) <= allowed and (p or unit == 1):
                    return sp.Rational(*Fraction(p, q).as_integer_ratio()) * exact
        return sp.Float(value)

    return _replace_floats(expression, snap)


def _layer_expressions(layer: "KANLayer", nodes: "list[sympy.Expr]", sp: Any) -> "list[sympy.Expr]":
    functions = list(LIBRARY.values())
    alive, which, affine = layer.edge_mask.tolist(), layer.symbolic.function.tolist(), layer.symbolic.affine.tolist()
    subnodes = []
    for o, row in enumerate(alive):
        terms = []
        for i in (i for i, mask in enumerate(row) if mask):
            a, b, c, d = (sp.Float(v) if v else sp.Integer(0) for v in affine[o][i])
            terms += [c * functions[which[o][i]].sympy(sp, a * nodes[i] + b), d]
        subnodes.append(sp.Add(*terms))
    factors = subnodes[layer.sums :]
    return subnodes[: layer.sums] + [p * q for p, q in zip(factors[::2], factors[1::2])]


def _rounded(node: "sympy.Expr", digits: int | None) -> "sympy.Expr":
    return node if digits is None else round_constants(node, digits)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block once it has run that long: checked at every call, in any thread, on any system."""
    end = time.monotonic() + seconds

    def check(frame: object, event: str, argument: object) -> None:
        if time.monotonic() > end:
            raise TimeoutError

    previous = sys.getprofile()
    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(previous)


def _warn_domains(model: "KAN") -> None:
    names, x, found = list(LIBRARY), model.samples_or(None), []
    for depth, layer in enumerate(model.layers):
        for o, i in ((layer.edge_mask > 0) & (layer.symbolic.function >= 0)).nonzero().tolist():
            name = names[layer.symbolic.function[o, i]]
            outside = domain_violation(name, layer.symbolic.affine[o, i, :2].tolist(), x[:, i])
            if outside:
                found.append(f"edge ({depth}, {i}, {o}): {outside}")
        x = layer(x).detach()
    if found:
        warnings.warn("the formula is not the network everywhere: " + "; ".join(found[:4]), stacklevel=3)


def _replace_floats(expression: "sympy.Expr", change: Any) -> "sympy.Expr":
    sp = _sympy()
    for _ in range(8):  # a constant that goes may let two others meet: (1.0002 y + 0)^2
        before = expression
        expression = before.xreplace({value: change(float(value)) for value in before.atoms(sp.Float)})
        if expression == before:
            break
    return expression


def _sympy() -> Any:
    try:
        import sympy
    except ImportError as error:
        raise ImportError('formulas need sympy: pip install "kansformer[science]"') from error
    return sympy
