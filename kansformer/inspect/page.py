"""The measurements as one self-contained HTML page: inline CSS, SVG and PNG; no script, no request, light and dark."""

import base64
import html
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kansformer.inspect.edges import CONSTANT, MARGIN, EdgeStatistics, edge_curves
from kansformer.layers import FourierLinear

STRONGEST, BENT = 8, 4  # edges drawn for each layer, of either kind
STRONG = 0.1  # the part of the edges, by energy, that the bent ones are chosen from
STRAIGHT = 0.99  # R^2 of a line from which an edge counts as straight
DECADES = 3  # of energy that the heat map shows
HEAT_CELLS = (96, 144)  # at most: outputs down, inputs across
PANEL = 240, 138, 120  # width, height and base line of a chart
TALL = 104  # the highest bar
STYLESHEET = Path(__file__).with_name("page.css")

# A layer's statistics and some of its edges (E, 2) -> a formula for each
Describe = Callable[[EdgeStatistics, Tensor], Sequence[str]]


def report(statistics: Sequence[EdgeStatistics], facts: Mapping[str, str], describe: Describe | None = None) -> str:
    """The page.

    Args:
        statistics: of `measure`, one a layer.
        facts: what stands in the header, name and value; the first one is the title.
        describe: (statistics, edges (E, 2)) -> a formula for each edge, written below its picture. None: none.
    """
    title = next(iter(facts.values()))
    items = "".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in facts.items())
    layers = "\n".join(_layer(s, describe) for s in statistics)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Edge functions of {_escape(title)}</title>
<style>
{STYLESHEET.read_text()}</style>
</head>
<body>
<header>
<p class="kicker">Kansformer inspect</p>
<h1>What the edges learned</h1>
<dl class="facts">{items}</dl>
</header>
<main>
{_overview(statistics)}
{layers}
</main>
<footer>Made by <code>python -m kansformer.inspect</code>. Every figure is measured on the text named above; energies
are mean squares of what an edge adds to its output, gates included.</footer>
</body>
</html>
"""


def _overview(statistics: Sequence[EdgeStatistics]) -> str:
    columns = {
        "layer": "",
        "edges": "inputs × outputs",
        "off grid": "share of the inputs' values outside their grid",
        "constant": f"edges whose standard deviation is below {CONSTANT:g} of the layer's",
        "straight": f"edges that a straight line explains to R² ≥ {STRAIGHT:g}",
        "median R²": "of the best straight line through an edge",
        "base term": "share of the base term in the energy of base and spline terms",
        "half in": "the smallest share of the edges that carries half of the energy",
        "90% in": "the smallest share of the edges that carries 90% of the energy",
    }
    head = "".join(f'<th scope="col" title="{_escape(about)}">{_escape(name)}</th>' for name, about in columns.items())
    rows = []
    for s in statistics:
        cells = [
            f"{s.energy.shape[0]:,} × {s.energy.shape[1]:,}",
            "no grid" if isinstance(s.layer, FourierLinear) else _percent(s.outside.mean().item()),
            _percent(s.constant().float().mean().item()),
            _percent((s.linearity >= STRAIGHT).float().mean().item()),
            f"{s.linearity.median().item():.2f}",
            "none" if getattr(s.layer, "base_weight", None) is None else _percent(s.base_share),
            _percent(s.carriers(0.5)),
            _percent(s.carriers(0.9)),
        ]
        link = f'<th scope="row"><a href="#{_anchor(s)}">{_escape(_short(s.name))}</a></th>'
        rows.append(f"<tr>{link}{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    legend = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(about)}</dd>" for name, about in columns.items() if about)
    return f"""<section>
<h2>All layers</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<details><summary>What the columns mean</summary><dl class="legend">{legend}</dl></details>
</section>"""


def _layer(s: EdgeStatistics, describe: Describe | None) -> str:
    strongest, bent = s.strongest(STRONGEST), s.most_bent(BENT, STRONG)
    if isinstance(s.layer, FourierLinear):
        where, off_grid = "two periods (between the two upright lines) and a little more", ""
    else:
        where = "on its grid (between the two upright lines) and a little beyond; dots: its values at the knots"
        off_grid = _off_grid(s)
    edges = torch.cat([strongest, bent])
    formulas = [""] * len(edges) if describe is None else describe(s, edges)
    drawn = [_edge(s, e, f) for e, f in zip(edges, formulas)]
    unit = "gate input" if s.gated else "input"
    return f"""<section id="{_anchor(s)}">
<h2>{_escape(_short(s.name))}</h2>
<p class="about">{_escape(_about(s))}.</p>
<h3>The strongest edges</h3>
<p class="note">One for each of the {len(strongest)} strongest inputs. Line: the learned function, {where};
shaded: where the {unit} lies on this text, the outermost bars holding all that lies further out.</p>
<div class="gallery">{"".join(drawn[: len(strongest)])}</div>
<h3>The least straight</h3>
<p class="note">Of the strongest {_percent(STRONG)} of the edges, those that a straight line explains worst.</p>
<div class="gallery">{"".join(drawn[len(strongest) :])}</div>
<div class="panels">{_linearity(s)}{_inputs(s)}{_heat(s)}{off_grid}</div>
{_idle(s)}
</section>"""


def _about(s: EdgeStatistics) -> str:
    layer = s.layer
    if isinstance(layer, FourierLinear):
        functions = f"waves of angular frequency {layer.frequency:g}"
    else:
        low, high = layer.grid.amin(0)[0].item(), layer.grid.amax(0)[1].item()
        base = "no base term" if layer.base_weight is None else f"base term {layer.base_activation}"
        functions = f"splines of order {layer.spline_order} on {layer.grid_size} intervals of "
        functions += f"[{_number(low)}, {_number(high)}], {base}"
    gate = ", every edge multiplied by its input's gate" if s.gated else ""
    return f"{layer.in_features:,} inputs, {layer.out_features:,} outputs, {functions}{gate}"


def _edge(s: EdgeStatistics, edge: Tensor, formula: str) -> str:
    """One learned function over the density of its input."""
    width, height, top, bottom = 220, 150, 8, 16
    i, o = edge.tolist()
    lo, hi = s.ranges[i].tolist()
    span = hi - lo
    unit = torch.linspace(-MARGIN, 1 + MARGIN, 181, dtype=torch.float64)
    knots = torch.linspace(0, 1, getattr(s.layer, "grid_size", -1) + 1, dtype=torch.float64)  # none on a wave
    points = lo + span * torch.cat([unit, knots])
    values = edge_curves(s.layer, edge.unsqueeze(0), points.unsqueeze(0).to(edge.device))[0].cpu()
    reach = values.abs().max().item() or 1.0

    def across(u: float) -> float:
        return width * (u + MARGIN) / (1 + 2 * MARGIN)

    def down(value: float) -> float:
        return top + (height - top - bottom) * (0.5 - 0.46 * value / reach)

    floor = height - bottom
    line = _path((across(u), down(v)) for u, v in zip(unit.tolist(), values.tolist()))
    dots = "".join(
        f'<circle cx="{across(u):.1f}" cy="{down(v):.1f}" r="2.2"/>'
        for u, v in zip(knots.tolist(), values[len(unit) :].tolist())
    )
    density = s.density[i].tolist()
    tall = max(density)
    shade = _steps([d / tall for d in density], width, floor, 0.72 * (floor - top))
    ticks = "".join(
        f'<text x="{across(u):.1f}" y="{height - 4}" text-anchor="middle">{_number(lo + span * u)}</text>'
        for u in (0, 0.5, 1)
    )
    bounds = _path([(across(0), top), (across(0), floor)]) + _path([(across(1), top), (across(1), floor)])
    label = f"edge function from input {i} to output {o}"
    r2 = s.linearity[i, o].item()
    code = f"<code>{_escape(formula)}</code>" if formula else ""
    return f"""<figure class="edge"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
<path class="density" d="{shade}"/><path class="bound" d="{bounds}"/>{_axis(width, down(0))}
<path class="curve" d="{line}"/><g class="knots">{dots}</g>{ticks}
<text x="3" y="{top + 6}">±{_number(reach)}</text></svg>
<figcaption><span>{i} → {o}</span><span>line R² {r2:.2f}</span>{code}</figcaption></figure>"""


def _linearity(s: EdgeStatistics) -> str:
    """How many edges, and how much of the energy, at each R^2 of the best line."""
    bins = 20
    place = (s.linearity * bins).clamp(0, bins - 1).long().flatten().cpu()
    count = torch.bincount(place, minlength=bins).double()
    energy = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, place, s.energy.flatten().double().cpu())
    shares = [(v / v.sum().clamp_min(1e-300)).tolist() for v in (count, energy)]
    top = max(map(max, shares))
    width, height, floor = PANEL
    bars = "".join(
        f'<rect class="{kind}" x="{width * (b + 0.08 + 0.42 * n) / bins:.1f}" width="{0.42 * width / bins:.1f}" '
        f'y="{floor - TALL * v / top:.1f}" height="{TALL * v / top:.1f}"/>'
        for n, (kind, values) in enumerate(zip(("count", "energy"), shares))
        for b, v in enumerate(values)
    )
    ticks = "".join(
        f'<text x="{width * u:.0f}" y="{height - 8}" text-anchor="{anchor}">{u:g}</text>'
        for u, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    caption = (
        f"How straight the edges are: R² of the best line on this text. "
        f'<i class="key count"></i>edges <i class="key energy"></i>their energy; tallest bar {_percent(top)}.'
    )
    return _panel("Non-linearity", _svg(width, height, f"{_axis(width, floor)}{bars}{ticks}"), caption)


def _inputs(s: EdgeStatistics) -> str:
    """The energy of the inputs, strongest first."""
    by_input = s.energy.double().sum(1)
    shares, order = (by_input / by_input.sum().clamp_min(1e-300)).sort(descending=True)
    (width, height, floor), top = PANEL, shares[0].item() or 1.0
    area = _steps([v / top for v in _thin(shares, 160)], width, floor, TALL)
    ticks = (
        f'<text x="0" y="{height - 8}">1</text>'
        f'<text x="{width}" y="{height - 8}" text-anchor="end">{len(shares):,}</text>'
        f'<text x="0" y="10">{_percent(top)}</text>'
    )
    first = ", ".join(str(i) for i in order[:5].tolist())
    caption = f"Share of each input in the layer's energy, strongest first; the first five are {first}."
    body = f'<path class="fill" d="{area}"/>{_axis(width, floor)}{ticks}'
    return _panel("Importance of inputs", _svg(width, height, body), caption)


def _heat(s: EdgeStatistics) -> str:
    """Every edge's energy, rows and columns sorted, on a logarithmic scale."""
    energy = s.energy.double().cpu()
    energy = energy[energy.sum(1).argsort(descending=True)][:, energy.sum(0).argsort(descending=True)].mT
    rows, columns = min(HEAT_CELLS[0], energy.shape[0]), min(HEAT_CELLS[1], energy.shape[1])
    cells = torch.nn.functional.adaptive_avg_pool2d(energy[None, None], (rows, columns))[0, 0]
    level = 1 + (cells / cells.max().clamp_min(1e-300)).clamp_min(1e-300).log10() / DECADES
    image = base64.b64encode(_png((255 * level.clamp(0, 1)).round().byte())).decode()
    pooled = "" if cells.shape == energy.shape else ", averaged over neighbours"
    caption = (
        f"Energy of every edge{pooled}: inputs across, outputs down, both sorted by importance. "
        f'Logarithmic: <i class="ramp"></i> 10<sup>−{DECADES}</sup> to 1 of the largest.'
    )
    # The PNG is an alpha mask, so that the accent colour of the theme shines through.
    mask = f"--map:url(data:image/png;base64,{image})"
    picture = f'<div class="heat" role="img" aria-label="energy of every edge" style="{mask}"></div>'
    return _panel("Importance of edges", picture, caption)


def _off_grid(s: EdgeStatistics) -> str:
    """How the inputs' shares of values outside the grid are spread."""
    outside = s.outside.double().cpu()
    reach = max(0.1, math.ceil(10 * outside.max().item()) / 10)
    bins = 20
    count = torch.histc(outside, bins, 0, reach)
    (width, height, floor), top = PANEL, count.max().item()
    bars = "".join(
        f'<rect class="energy" x="{width * (b + 0.1) / bins:.1f}" width="{0.8 * width / bins:.1f}" '
        f'y="{floor - TALL * v / top:.1f}" height="{TALL * v / top:.1f}"/>'
        for b, v in enumerate(count.tolist())
    )
    ticks = (
        f'<text x="0" y="{height - 8}">0%</text>'
        f'<text x="{width}" y="{height - 8}" text-anchor="end">{_percent(reach)}</text>'
        f'<text x="{width}" y="10" text-anchor="end">{int(top)} inputs</text>'
    )
    worst = outside.argmax().item()
    caption = (
        f"Inputs by the share of their values outside the grid: {_percent(outside.mean().item())} on average, "
        f"{_percent(outside[worst].item())} at input {worst}."
    )
    return _panel("Out of the grid", _svg(width, height, f"{_axis(width, floor)}{bars}{ticks}"), caption)


def _idle(s: EdgeStatistics) -> str:
    """Which edges are constant, and what that means."""
    constant = s.constant()
    number, total = int(constant.sum()), constant.numel()
    energy = s.energy.double()
    lost = (energy * constant).sum().item() / max(energy.sum().item(), 1e-300)
    whole = constant.all(1).nonzero().flatten().tolist()
    listed = ", ".join(map(str, whole[:12])) + (", ..." if len(whole) > 12 else "")
    unit = "a constant gate function leaves a linear unit" if s.gated else "a constant function can go into a bias"
    inputs = f" Inputs whose edges are all constant: {listed}." if whole else " No input has only constant edges."
    return (
        f'<p class="note"><b>{number:,}</b> of {total:,} edges ({_percent(number / total)}) are constant on this text '
        f"(standard deviation below {CONSTANT:g} of the layer's root mean square; {unit}); they carry {_percent(lost)} "
        f"of the energy.{inputs}</p>"
    )


def _panel(title: str, picture: str, caption: str) -> str:
    return f'<figure class="panel"><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>'


def _svg(width: int, height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{body}</svg>'


def _axis(width: int, y: float) -> str:
    return f'<line class="zero" x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _path(points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _steps(heights: Sequence[float], width: int, floor: float, tall: float) -> str:
    """The outline of adjacent bars of heights in [0, 1]."""
    tops = [(width * (b + side) / len(heights), floor - tall * h) for b, h in enumerate(heights) for side in (0, 1)]
    return _path([(0, floor), *tops, (width, floor)]) + "Z"


def _thin(values: Tensor, count: int) -> list[float]:
    """At most `count` of the sorted values, evenly spaced."""
    places = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long().to(values.device)
    return values[places].tolist()


def _png(alpha: Tensor) -> bytes:
    """A picture whose opacity is `alpha`, uint8 (rows, columns)."""
    rows, columns = alpha.shape
    pixels = torch.stack([torch.zeros_like(alpha), alpha], -1).flatten(1)  # grey, alpha
    raw = b"".join(b"\0" + bytes(row.tolist()) for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def _short(name: str) -> str:
    return name.removeprefix("model.")


def _anchor(s: EdgeStatistics) -> str:
    return _escape(s.name.replace(".", "-"))


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _number(value: float) -> str:
    return f"{value:.2g}".replace("-", "−") if abs(value) >= 1e-9 else "0"


def _escape(text: object) -> str:
    return html.escape(str(text))
