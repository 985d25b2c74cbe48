"""A network drawn as in the article: nodes in layers, on every live edge a box with its function.

(Liu et al. 2024, arXiv:2404.19756, figure 2.2.) A box spans the input's range over the samples and the function's own
range; its opacity is tanh(beta * importance). Where one row would make the boxes too small there are several, in
columns, and the lines of the inner rows run in the gutters between them, never behind a box. Every length is in inches:
one axes covers the figure, one unit is one inch. Nothing of pyplot is touched.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kansformer.kan.library import LIBRARY
from kansformer.kan.symbolic import suggest_symbolic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kansformer.kan.network import KAN

FORMATS = ("png", "svg", "pdf")
BLACK, RED = (0.1, 0.1, 0.1), (0.76, 0.07, 0.12)
POINTS = 96  # of a curve
FAINTEST = 0.07  # opacity of the least important live edge
BOX, SMALLEST = 0.5, 0.32  # side of a box: as it is wished, and where a second row begins
SPACE = 0.35  # between boxes, in their sides
WIDEST = 13.0


class LayerDrawing(NamedTuple):
    """What is drawn of a layer with O subnodes over I nodes.

    Attributes:
        sums, products: nodes above; O = sums + 2 * products.
        curves: (O, I, P) function values over the range of each input, evenly spaced.
        importance: (O, I) in [0, 1].
        alive: (O, I) bool.
        names: (O, I) of the library functions, None for splines.
    """

    sums: int
    products: int
    curves: np.ndarray
    importance: np.ndarray
    alive: np.ndarray
    names: list[list[str | None]]


def plot(
    model: "KAN",
    path: str | os.PathLike | None = None,
    x: Tensor | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    title: str | None = None,
    beta: float = 3.0,
) -> "Figure":
    """Draw a network: its functions over the ranges they meet, splines black, formulas red with their names.

    Args:
        path: file to write, .png, .svg or .pdf, whole or not at all.
        x: (N, n_in) samples; None takes those of the last `fit`.
        inputs, outputs: names; "$...$" is mathematics. None is x_1, x_2, ... and nothing.
        title: above.
        beta: opacity is tanh(beta * importance); larger shows more of the unimportant.
    Returns:
        The matplotlib Figure.
    Raises:
        ValueError: for another file type, or a wrong number of names.
        ImportError: without matplotlib.
    """
    kind = None if path is None else _format(path)
    inputs = [f"$x_{{{column + 1}}}$" for column in model.inputs] if inputs is None else list(inputs)
    for what, names, count in (("inputs", inputs, model.in_features), ("outputs", outputs or [], model.out_features)):
        if len(names) != count and (names or what == "inputs"):
            raise ValueError(f"{what} needs {count} names, got {len(names)}: {list(names)!r}")
    figure = draw(layer_drawings(model, x), inputs, outputs, title, beta)
    if path is not None:
        _write(figure, Path(path), kind)
    return figure


def plot_edge(model: "KAN", layer: int, i: int, o: int, suggestions: int = 3, x: Tensor | None = None) -> "Figure":
    """Edge i -> o of a layer over its samples, with the best suggested formulas (`suggest_symbolic`) dashed on it."""
    ranked = suggest_symbolic(model, layer, i, o, x=x)
    ranked = [found for found in ranked if found.r2 > 0.5][:suggestions]
    with torch.no_grad():
        inputs = model.samples_or(x)
        for before in model.layers[:layer]:
            inputs = before(inputs)
        points = _ranges(inputs)
        at, curve = points[:, i].cpu(), model.layers[layer].edges(points)[:, o, i].cpu()
    figure = _figure(5.0, 3.6)
    axes = figure.add_subplot()
    axes.plot(at, curve, color=BLACK, linewidth=2.5, label="edge")
    for colour, found in zip(("C3", "C0", "C2", "C1", "C4", "C5"), ranked):
        a, b, c, d = found.affine
        fitted = c * LIBRARY[found.name](a * at.double() + b) + d
        label = f"{found.name}, $1 - R^2$ = {1 - found.r2:.1e}"
        axes.plot(at, fitted, "--", color=colour, linewidth=1.4, label=label)
    axes.set(xlabel=f"input {i}", title=f"layer {layer}, {i} → {o}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("tight")
    return figure


@torch.no_grad()
def layer_drawings(model: "KAN", x: Tensor | None = None) -> list[LayerDrawing]:
    """The arrays behind `plot`, over samples x (N, n_in), or those of the last fit."""
    inputs, names, found = model.samples_or(x), list(LIBRARY), []
    for layer, importance in zip(model.layers, model.importance(inputs).edges):
        curves = layer.edges(_ranges(inputs)).permute(1, 2, 0)
        called = [[names[k] if k >= 0 else None for k in row] for row in layer.symbolic.function.tolist()]
        arrays = (t.cpu().numpy() for t in (curves, importance, layer.edge_mask > 0))
        found.append(LayerDrawing(layer.sums, layer.products, *arrays, called))
        inputs = layer(inputs)
    return found


def draw(
    layers: Sequence[LayerDrawing],
    inputs: Sequence[str],
    outputs: Sequence[str] | None = None,
    title: str | None = None,
    beta: float = 3.0,
) -> "Figure":
    """Draw layers, the first at the bottom; arguments as in `plot`."""
    most = max(int(layer.alive.sum()) for layer in layers)
    nodes = max(len(inputs), *(layer.sums + 2 * layer.products for layer in layers))
    pitch = BOX * (1 + SPACE)
    width = min(max(most * pitch, nodes * 0.45, 3.0), max(WIDEST, nodes * 0.3))
    slanted = _longest(inputs) > width / len(inputs)
    bottom = 0.55 + (min(_longest(inputs), 2.5) * 0.6 if slanted else 0)
    bands = [_Band(layer, width) for layer in layers]
    top = 0.2 + (0.3 if outputs else 0) + (0.35 if title else 0)
    margin = 0.25
    left = max(margin, _longest(inputs) * 0.82 - width / len(inputs) / 2) if slanted else margin
    figure = _figure(left + width + margin, bottom + sum(band.height for band in bands) + top)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-left, width + margin), ylim=(0, figure.get_figheight()))
    axes.axis("off")

    places = _spread(len(inputs), width)
    y = bottom
    radius = min(0.07, 0.12 * width / nodes)
    _dots(axes, places, y, radius)
    size = min(13, 72 * 0.6 * width / len(inputs)) if not slanted else 10
    for place, name in zip(places, inputs):
        style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {"ha": "center"}
        axes.text(place, y - 0.14, name, va="top", fontsize=max(size, 6), **style)
    for layer, band in zip(layers, bands):
        places = _draw_band(axes, layer, band, places, y, width, radius, beta)
        y += band.height
    for place, name in zip(places, outputs or []):
        axes.text(place, y + 0.16, name, va="bottom", ha="center", fontsize=13)
    if title:
        axes.text(width / 2, figure.get_figheight() - 0.14, title, va="top", ha="center", fontsize=14)
    return figure


class _Band:
    """Where the boxes of a layer and their lines lie: `rows` to a column, no smaller than they must be."""

    def __init__(self, layer: LayerDrawing, width: float) -> None:
        count = max(int(layer.alive.sum()), 1)
        self.rows = max(1, math.ceil(SMALLEST * (1 + SPACE) * count / width))
        self.pitch = width / math.ceil(count / self.rows)
        self.side = min(BOX, self.pitch / (1 + SPACE))
        self.step = self.side * 1.3
        self.lead = 0.55 + min(0.75, 0.03 * width)  # from a node to the boxes: the wider, the flatter the lines
        self.products = 0.42 if layer.products else 0.0
        self.height = 2 * self.lead + self.rows * self.step + self.products

    def centre(self, edge: int) -> tuple[float, float]:
        """x, and y above the nodes below."""
        column, row = divmod(edge, self.rows)
        return (column + 0.5) * self.pitch, self.lead + (row + 0.5) * self.step

    def lines(self, edge: int, start: tuple[float, float], end: tuple[float, float]) -> list[list]:
        """The way from a node into the box, and from it to a subnode; `start` and `end` count from the nodes below."""
        row, half = edge % self.rows, self.side / 2
        x, y = self.centre(edge)
        lane = (self.pitch - self.side) / 2 / self.rows  # half a gutter for those that come, half for those that leave
        enter, leave = [start, (x, y - half)], [(x, y + half), end]
        if row > 0:
            left = x - half - lane * row
            enter = [start, (left, self.lead), (left, y), (x - half, y)]
        if row < self.rows - 1:
            right = x + half + lane * (self.rows - 1 - row)
            leave = [(x + half, y), (right, y), (right, self.lead + self.rows * self.step), end]
        return [enter, leave]


def _draw_band(
    axes: "Axes",
    layer: LayerDrawing,
    band: _Band,
    below: np.ndarray,
    y: float,
    width: float,
    radius: float,
    beta: float,
) -> np.ndarray:
    """One layer above the nodes at `below`; the places of its own nodes."""
    from matplotlib.collections import LineCollection, PolyCollection

    above = _spread(layer.sums + layer.products, width)
    top = y + band.height
    ends = [(place, top) for place in above[: layer.sums]]
    aside = min(0.3, width / len(above) / 4)
    for place in above[layer.sums :]:
        ends += [(place - aside, top - band.products), (place + aside, top - band.products)]

    lines, boxes, curves, colours = [], [], [], []
    half, inner = band.side / 2, 0.8 * band.side
    across = np.linspace(-inner / 2, inner / 2, layer.curves.shape[-1])
    for edge, (i, o) in enumerate(np.argwhere(layer.alive.T)):  # boxes stand over their inputs, as in the article
        x, height = band.centre(edge)
        height += y
        opacity = FAINTEST + (1 - FAINTEST) * math.tanh(beta * max(float(layer.importance[o, i]), 0.0))
        name = layer.names[o][i]
        colour = (*(BLACK if name is None else RED), opacity)
        colours.append(colour)
        ways = band.lines(edge, (below[i], 0.0), (ends[o][0], ends[o][1] - y))
        lines += [[(at, y + up) for at, up in way] for way in ways]
        boxes.append([(x + h * half, height + v * half) for h, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
        curves.append(np.stack([x + across, height + inner * _scaled(layer.curves[o, i])], 1))
        if name is not None and band.rows == 1:
            axes.text(
                x + half + 0.03,
                height + half,
                name,
                color=colour,
                fontsize=max(5, 14 * band.side),
                va="bottom",
                ha="center",
                gid="function",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                zorder=2.5,
            )
    thick = 1.3 if band.rows == 1 else 0.7
    doubled = [colour for colour in colours for _ in range(2)]
    axes.add_collection(LineCollection(lines, colors=doubled, linewidths=thick, zorder=1, gid="edges"))
    axes.add_collection(
        PolyCollection(boxes, facecolors="white", edgecolors="white", linewidths=thick, zorder=2, gid="backs")
    )
    axes.add_collection(
        PolyCollection(boxes, facecolors="none", edgecolors=colours, linewidths=thick, zorder=3, gid="boxes")
    )
    axes.add_collection(LineCollection(curves, colors=colours, linewidths=max(0.8, 3.2 * band.side), zorder=4))

    if layer.products:
        factors = np.array(ends[layer.sums :])
        joins = [[factor, (above[layer.sums + k // 2], top)] for k, factor in enumerate(factors)]
        axes.add_collection(LineCollection(joins, colors=[BLACK], linewidths=1.3, zorder=1))
        _dots(axes, factors[:, 0], top - band.products, 0.7 * radius)
    _dots(axes, above[: layer.sums], top, radius)
    _products(axes, above[layer.sums :], top, 1.9 * radius)
    return above


def _scaled(curve: np.ndarray) -> np.ndarray:
    """To [-1/2, 1/2]; a constant, to rounding, is a line through the middle."""
    low, high = float(curve.min()), float(curve.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros_like(curve)
    return (curve - low) / (high - low) - 0.5


def _spread(count: int, width: float) -> np.ndarray:
    return (np.arange(count) + 0.5) * width / count


def _dots(axes: "Axes", places: Sequence[float], y: float, radius: float) -> None:
    from matplotlib.patches import Circle

    for x in places:
        axes.add_patch(Circle((x, y), radius, facecolor=BLACK, edgecolor="none", zorder=5))


def _products(axes: "Axes", places: Sequence[float], y: float, radius: float) -> None:
    from matplotlib.patches import Circle

    reach = radius * 0.5
    for x in places:
        axes.add_patch(
            Circle((x, y), radius, facecolor="white", edgecolor=BLACK, linewidth=1.3, zorder=5, gid="product")
        )
        for slope in (1, -1):
            axes.plot(
                [x - reach, x + reach], [y - slope * reach, y + slope * reach], color=BLACK, linewidth=1.5, zorder=6
            )


def _longest(names: Sequence[str]) -> float:
    """Inches that the longest name takes, about."""
    return max(len(re.sub(r"[$_{}\\^]", "", name)) for name in names) * 0.095


def _ranges(x: Tensor) -> Tensor:
    """(POINTS, I) from the smallest to the largest sample of each input."""
    lo, hi = x.amin(0), x.amax(0)
    return lo + (hi - lo) * torch.linspace(0, 1, POINTS, dtype=x.dtype, device=x.device).unsqueeze(1)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "kansformer[science]"') from error
    return Figure(figsize=(width, height), facecolor="white")


def _format(path: str | os.PathLike) -> str:
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"{str(path)!r} should end in {', '.join('.' + k for k in FORMATS)}")
    return kind


def _write(figure: "Figure", path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format=kind, dpi=200)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
