"""What the edges of a trained model's KAN layers do on a text: second moments of their inputs say it all.

The edge from input i to output o is linear in its parameters,

    f_oi(x) = w_oi . psi(x_i),    psi = (B_0, .., B_{C-1}, act),    its output: gate_i * f_oi(x_i)

(psi = (sin wx, cos wx) in a layer of waves.)

so everything quadratic in it follows from small matrices of each input, gathered in one pass over the text:

    S = E[psi psi^T],  m = E[psi],  c = E[x psi],  G = E[gate^2 psi psi^T]

    energy     E[(gate f)^2]   = w^T G w
    variance   Var f           = w^T (S - m m^T) w
    linearity  corr(x, f)^2    = (w^T (c - E[x] m))^2 / (Var x * Var f),    R^2 of the best straight line

No tensor of size tokens * I * O ever exists: the text costs tokens * I * P^2 operations, the edges I * O * P^2 once.
Shapes: M rows (tokens), I in, O out, C splines and P = C + 1 functions an edge (P = C without base term, 2 of a wave).
Edges are (I, O), as the rows of `spline_weight` are.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kansformer import splines
from kansformer.kernels.torch_kan import activation
from kansformer.layers import EdgeLayer, FourierLinear, KANLinear, observing

# Input densities are counted in BINS bins on the range and MARGIN of its width on either side; the outermost bins hold
# what lies further out.
BINS, MARGIN = 64, 0.25
# An edge whose standard deviation on the text is below this share of its layer's root mean square is called constant.
CONSTANT = 0.01
# Elements of the largest temporary tensor: 32 MiB of float64.
CHUNK = 2**22


def edge_ranges(layer: EdgeLayer) -> Tensor:
    """Where each input's functions are drawn: float64 (I, 2), the grid, or two periods of a wave around 0."""
    if isinstance(layer, KANLinear):
        return layer.grid.double()
    reach = 2 * math.pi / layer.frequency
    bounds = torch.tensor([-reach, reach], dtype=torch.float64, device=layer.sin_proj.weight.device)
    return bounds.expand(layer.in_features, 2)


def edge_basis(layer: EdgeLayer, x: Tensor, inputs: slice | Tensor = slice(None)) -> Tensor:
    """psi(x), the functions that every edge of an input is a combination of.

    Args:
        x: (..., I), of the inputs `inputs` where that says which.
    Returns:
        float64 (..., I, P).
    """
    x = x.double()
    if isinstance(layer, FourierLinear):
        return torch.stack([(layer.frequency * x).sin(), (layer.frequency * x).cos()], -1)
    grid, constant = layer.grid[inputs].double(), layer.base_weight is None
    psi = splines.basis(x, grid, layer.grid_size, layer.spline_order, constant_outside=constant)
    return psi if constant else torch.cat([psi, activation(x, layer.base_activation).unsqueeze(-1)], -1)


def edge_weights(layer: EdgeLayer, inputs: slice | Tensor = slice(None)) -> Tensor:
    """w, the coefficients of psi: float64 (I, P, O), or those of some inputs."""
    if isinstance(layer, FourierLinear):
        waves = (layer.sin_proj.weight, layer.cos_proj.weight)
        return torch.stack([weight.detach().mT[inputs].double() for weight in waves], 1)
    weights = layer.spline_weight.detach().unflatten(0, (layer.in_features, layer.num_basis))[inputs].double()
    if layer.base_weight is None:
        return weights
    return torch.cat([weights, layer.base_weight.detach().mT[inputs].double().unsqueeze(1)], 1)


@torch.no_grad()
def edge_curves(layer: EdgeLayer, edges: Tensor, points: Tensor) -> Tensor:
    """The functions of some edges, without their gates.

    Args:
        edges: (E, 2) int64, the input i and the output o of each.
        points: (E, N), where to evaluate them.
    Returns:
        float64 (E, N).
    """
    i, o = edges.unbind(-1)
    weights = edge_weights(layer, i)[torch.arange(len(o)), :, o]  # (E, P)
    return (edge_basis(layer, points.mT, i) * weights).sum(-1).mT


class Moments:
    """Sums over the rows that a KAN layer has seen; `statistics()` makes them into what is known of its edges."""

    def __init__(self, name: str, layer: EdgeLayer) -> None:
        self.name, self.layer, self.rows, self.gated = name, layer, 0, False
        self.ranges = edge_ranges(layer)
        inputs, functions = layer.in_features, edge_weights(layer, slice(1)).shape[1]
        zeros = {"dtype": torch.float64, "device": self.ranges.device}
        self.second = torch.zeros(inputs, functions, functions, **zeros)  # S
        self.weighted = torch.zeros(inputs, functions, functions, **zeros)  # G
        self.first = torch.zeros(inputs, functions, **zeros)  # m
        self.cross = torch.zeros(inputs, functions, **zeros)  # c
        self.powers = torch.zeros(2, inputs, **zeros)  # of x: first, second
        self.outside = torch.zeros(inputs, **zeros)
        self.counts = torch.zeros(inputs, BINS, **zeros)

    @torch.no_grad()
    def add(self, x: Tensor, gate: Tensor | None = None) -> None:
        """Count rows x (..., I) in, and the gate (..., I) that multiplies their edges.

        Raises:
            ValueError: if a value is not finite, naming the layer.
        """
        x = x.detach().flatten(0, -2)
        gate = None if gate is None else gate.detach().flatten(0, -2)
        if not (x.isfinite().all() and (gate is None or gate.isfinite().all())):
            raise ValueError(f"{self.name} gets NaN or infinite inputs on this text; look upstream of it")
        self.gated |= gate is not None
        self.rows += x.shape[0]
        rows = max(1, CHUNK // self.first.numel())
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            self._add(x[part].double(), None if gate is None else gate[part].double())

    def _add(self, x: Tensor, gate: Tensor | None) -> None:
        psi = edge_basis(self.layer, x)  # (M, I, P)
        by_input = psi.transpose(0, 1)  # (I, M, P)
        second = by_input.mT @ by_input
        self.second += second
        if gate is None:
            self.weighted += second
        else:
            scaled = by_input * gate.mT.unsqueeze(-1)
            self.weighted += scaled.mT @ scaled
        self.first += psi.sum(0)
        self.cross += (psi * x.unsqueeze(-1)).sum(0)
        self.powers += torch.stack([x.sum(0), x.square().sum(0)])
        lo, hi = self.ranges.unbind(-1)
        self.outside += ((x < lo) | (x > hi)).sum(0)
        place = ((x - lo) / (hi - lo) + MARGIN) / (1 + 2 * MARGIN)
        place = (place * BINS).clamp(0, BINS - 1).long() + BINS * torch.arange(x.shape[1], device=x.device)
        self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @torch.no_grad()
    def statistics(self) -> "EdgeStatistics":
        """The edges' statistics over the rows so far.

        Raises:
            ValueError: if there was no row.
        """
        layer, n = self.layer, self.rows
        if n == 0:
            raise ValueError(f"{self.name} has seen no tokens: measure it on a text that runs through it")
        mean, (x_mean, x_second) = self.first / n, self.powers / n
        x_variance = (x_second - x_mean.square()).clamp_min(0)
        second = self.second / n
        # float64 sums cancel to about 1e-14 of the second moment: less than that is no variance but rounding
        covariance = second - mean.unsqueeze(-1) * mean.unsqueeze(1)
        with_x = self.cross / n - x_mean.unsqueeze(-1) * mean
        c = layer.num_basis if isinstance(layer, KANLinear) else mean.shape[1]
        shape = (layer.in_features, layer.out_features)
        energy, variance, linearity = (torch.empty(shape, device=mean.device) for _ in range(3))
        spline_energy = base_energy = 0.0
        step = max(1, CHUNK // (layer.out_features * mean.shape[1]))
        for start in range(0, layer.in_features, step):
            part = slice(start, start + step)
            w = edge_weights(layer, part)  # (I, P, O)
            weighted = self.weighted[part] / n
            total = _quadratic(weighted, w)
            spread = _quadratic(covariance[part], w)
            rounding = 1e-13 * _quadratic(second[part], w)
            spread = torch.where(spread > rounding, spread, 0)
            slope = (with_x[part].unsqueeze(1) @ w).squeeze(1)
            spread_x = x_variance[part].unsqueeze(-1) * spread
            energy[part] = total.float()
            variance[part] = spread.float()
            linearity[part] = torch.where(spread_x > 0, slope.square() / spread_x, 1).clamp(0, 1).float()
            spline_energy += _quadratic(weighted[:, :c, :c], w[:, :c]).sum().item()
            base_energy += _quadratic(weighted[:, c:, c:], w[:, c:]).sum().item()
        return EdgeStatistics(
            name=self.name,
            layer=layer,
            ranges=self.ranges,
            rows=n,
            gated=self.gated,
            energy=energy,
            variance=variance,
            linearity=linearity,
            spline_energy=spline_energy,
            base_energy=base_energy,
            outside=(self.outside / n).float(),
            density=(self.counts / n).float(),
        )


@dataclass
class EdgeStatistics:
    """What a KAN layer's edges did on a text.

    Attributes:
        name, layer: the layer, and its name in the model.
        ranges: (I, 2), `edge_ranges`.
        rows: tokens seen.  gated: whether a gate multiplied the edges.
        energy: (I, O), E[(gate f)^2]: the mean square of what the edge adds to its output. The importance of an edge.
        variance: (I, O), Var f, without the gate.
        linearity: (I, O), R^2 of the best straight line through f on the text; 1 for constants.
        spline_energy, base_energy: the edges' energies summed, the two terms of each taken alone (waves are no base).
        outside: (I,), the share of an input's values outside its range.
        density: (I, BINS), the share of an input's values in each bin (see BINS, MARGIN).
    """

    name: str
    layer: EdgeLayer
    ranges: Tensor
    rows: int
    gated: bool
    energy: Tensor
    variance: Tensor
    linearity: Tensor
    spline_energy: float
    base_energy: float
    outside: Tensor
    density: Tensor

    @property
    def base_share(self) -> float:
        """The base terms' part of base_energy + spline_energy."""
        total = self.base_energy + self.spline_energy
        return self.base_energy / total if total else 0.0

    def constant(self, tolerance: float = CONSTANT) -> Tensor:
        """(I, O) bool: edges whose standard deviation is below `tolerance` of the layer's root mean square of it."""
        return self.variance <= tolerance**2 * self.variance.mean()

    def carriers(self, share: float) -> float:
        """The smallest part of the edges that carries `share` of the layer's energy."""
        sums = self.energy.flatten().double().sort(descending=True).values.cumsum(0)
        return ((sums < share * sums[-1]).sum().item() + 1) / sums.numel() if sums[-1] > 0 else 0.0

    def strongest(self, count: int) -> Tensor:
        """(E, 2): edges by energy, no input and no output twice; E <= count."""
        return _distinct(self.energy, count)

    def most_bent(self, count: int, share: float) -> Tensor:
        """(E, 2): of the `share` of the edges with the most energy, the least linear, no input and no output twice."""
        energy = self.energy.flatten()
        strong = max(1, round(share * energy.numel()))
        threshold = energy.kthvalue(energy.numel() - strong + 1).values
        return _distinct(torch.where(self.energy >= threshold, 1 - self.linearity, -1), count)


def _distinct(score: Tensor, count: int) -> Tensor:
    score, edges = score.clone(), []
    for _ in range(min(count, *score.shape)):
        i, o = divmod(int(score.argmax()), score.shape[1])
        if score[i, o] < 0:
            break
        edges.append((i, o))
        score[i, :] = score[:, o] = -1
    return torch.tensor(edges, device=score.device)


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Tensor]) -> list[EdgeStatistics]:
    """Run a model over a text once, without gradient, and measure every KAN layer in it.

    Args:
        model: any module that holds KAN layers and takes `input_ids`. It is put into eval mode, and back.
        batches: int64 (batch, sequence) each, moved to the model's device.
    Returns:
        One entry a layer, in the model's order.
    Raises:
        ValueError: for a model without KAN layers, a text without tokens, or values that are not finite.
    """
    moments = {m: Moments(name, m) for name, m in model.named_modules() if isinstance(m, EdgeLayer)}
    if not moments:
        kind = getattr(getattr(model, "config", None), "ffn_summary", type(model).__name__)
        raise ValueError(
            f"this model ({kind}) has no KAN layers, so no edge functions to inspect; "
            "kansformer.prune takes a Kansformer's feed-forward blocks of every kind"
        )

    def count(layer: EdgeLayer, args: tuple, kwargs: dict) -> None:
        moments[layer].add(args[0], kwargs.get("gate", args[1] if len(args) > 1 else None))

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in moments]
    run(model, batches, hooks)
    return [m.statistics() for m in moments.values()]


def run(model: nn.Module, batches: Iterable[Tensor], hooks: list) -> None:
    """Run the model on every batch in eval mode; the hooks are removed at the end, whatever happens."""
    device = next(model.parameters()).device
    with observing(model, hooks):
        for input_ids in batches:
            model(input_ids=input_ids.to(device), use_cache=False)


def _quadratic(matrix: Tensor, w: Tensor) -> Tensor:
    """w^T A w of every edge: A (I, P, P) and w (I, P, O) to (I, O)."""
    return ((matrix @ w) * w).sum(1)
