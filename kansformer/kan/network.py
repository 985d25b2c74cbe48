"""A small Kolmogorov-Arnold network: the same KANLinear as in the transformer, stacked, with product nodes and masks.

    node_j = sum_i phi_ji(x_i)                                           Liu et al. 2024, arXiv:2404.19756, eq. 2.5
    node_j = (sum_i phi_ji(x_i)) * (sum_i phi_j'i(x_i))                  Liu et al. 2024, arXiv:2408.10205, section 2

N rows (samples), I in, O out (subnodes: what an edge ends in, before products), C = G + k splines an edge. Small
networks pay for operations, not for arithmetic, so a layer whose basis is small writes it down and keeps it, as the
operator never does; edges are a batched product, no loop over in x out exists.
"""

import copy
import os
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kansformer import splines
from kansformer.functional import kan_linear, under_transform
from kansformer.kan import fitting, formula, plot, pruning, storage, symbolic
from kansformer.kernels import torch_kan
from kansformer.layers import KANLinear

# Below this size of the basis (N * I * C elements, in bytes) the written-down form takes less time than the fused
# operator: forward + backward at N = 1000, [2, 5, 1], G = 3: 0.19 ms against 0.69 ms; at I = O = 20, G = 10 equal.
DENSE_BYTES = 2**20


class KANLayer(nn.Module):
    """One layer: KANLinear from I inputs to `sums + 2 * products` subnodes, with a mask on its edges.

    Args:
        in_features: I.
        sums, products: nodes of the layer; a product node multiplies two consecutive subnodes.
        options: of KANLinear.

    Attributes:
        linear: the KANLinear.
        symbolic: the SymbolicEdges; where it has a function, the spline is silent and gets no gradient.
        edge_mask: (O, I) buffer, 1 where the edge is alive; a pruned edge is exactly 0 and gets no gradient.
    """

    def __init__(self, in_features: int, sums: int, products: int = 0, **options: object) -> None:
        super().__init__()
        self.sums, self.products = sums, products
        self.linear = KANLinear(in_features, sums + 2 * products, **options)
        factory = {"dtype": self.linear.spline_weight.dtype, "device": self.linear.spline_weight.device}
        self.symbolic = symbolic.SymbolicEdges(in_features, self.linear.out_features, **factory)
        self.register_buffer("edge_mask", torch.ones(self.linear.out_features, in_features, **factory))

    @property
    def out_features(self) -> int:
        """Nodes, sums and products."""
        return self.sums + self.products

    def forward(self, x: Tensor, features: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """x (N, I) to nodes (N, sums + products); `features`, where x was seen before, is `self.features(x)`."""
        linear = self.linear
        fused = features is None and (
            torch.compiler.is_exporting()  # for any number of rows
            or x.numel() * linear.num_basis * x.element_size() > DENSE_BYTES
            or under_transform()
        )
        if fused:
            subnodes = self._fused(x)
        else:
            subnodes = _Dense.apply(x, linear.spline_weight, linear.base_weight, self, features, False)
        if self.symbolic.groups():
            subnodes = subnodes + (self.symbolic(x) * self.edge_mask).sum(-1)
        return self.nodes(subnodes)

    def edges(self, x: Tensor) -> Tensor:
        """The output of every edge: x (N, I) to (N, O, I). `nodes(edges(x).sum(-1))` is `forward(x)`."""
        out = _edges(*self.features(x), *self._weights()).permute(1, 2, 0)
        return out + self.symbolic(x) * self.edge_mask if self.symbolic.groups() else out

    def scaled(self, x: Tensor, features: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """`forward(x)`, and the mean magnitude of every edge over the rows, (O, I)."""
        if self.symbolic.groups():
            edges = self.edges(x)
            return self.nodes(edges.sum(-1)), edges.abs().mean(0)
        linear = self.linear
        subnodes, scale = _Dense.apply(x, linear.spline_weight, linear.base_weight, self, features, True)
        return self.nodes(subnodes), scale

    def nodes(self, subnodes: Tensor) -> Tensor:
        """Subnodes (N, sums + 2 * products) to nodes (N, sums + products)."""
        if self.products == 0:
            return subnodes
        factors = subnodes[:, self.sums :]
        return torch.cat([subnodes[:, : self.sums], factors[:, ::2] * factors[:, 1::2]], 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a layer knows of x without its parameters: splines (I, C, N), and act(x) (N, I) with a base term."""
        t, _ = self._position(x)
        return _Basis.apply(t, 0, self.linear.num_basis, self.linear.spline_order), self._act(x)

    def _position(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """t = (x - lo) / h (I, N), and 1 / h (I, 1). Without a base term, outside is the closest point of the grid."""
        lo, hi = self.linear.grid.to(x.dtype).unsqueeze(-1).unbind(1)
        inverse_width = self.linear.grid_size / (hi - lo)
        t = (x.mT.contiguous() - lo).mul(inverse_width)
        if self.linear.base_weight is None:
            t = splines.closest(t, self.linear.grid_size)
        return t, inverse_width

    def _act(self, x: Tensor) -> Tensor | None:
        name = self.linear.base_activation
        return None if name is None else torch_kan.activation(x, name)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Masked weights: splines (I, C, O) and base (O, I)."""
        linear, mask = self.linear, self._spline_mask()
        spline = linear.spline_weight.view(linear.in_features, linear.num_basis, -1) * mask.mT.unsqueeze(1)
        return spline, None if linear.base_weight is None else linear.base_weight * mask

    def _spline_mask(self) -> Tensor:
        """(O, I), 1 where the edge is alive and its spline speaks."""
        if not self.symbolic.groups():
            return self.edge_mask
        return self.edge_mask * (self.symbolic.function == symbolic.SPLINE)

    def _fused(self, x: Tensor) -> Tensor:
        linear, (spline, base) = self.linear, self._weights()
        return kan_linear(
            x,
            spline.flatten(0, 1),
            linear.grid,
            grid_size=linear.grid_size,
            spline_order=linear.spline_order,
            base_weight=base,
            base_activation=linear.base_activation or "identity",
            backend=linear.backend,
        )

    def extra_repr(self) -> str:
        alive = int(self.edge_mask.count_nonzero())
        return f"sums={self.sums}, products={self.products}, edges={alive} of {self.edge_mask.numel()}"


class KAN(nn.Module):
    """A Kolmogorov-Arnold network (arXiv:2404.19756, eq. 2.7), with product nodes (arXiv:2408.10205).

    Parameters start as KANLinear draws them. The paper's start (uniform base weights, splines of noise 0.1 or 0.3) was
    tried beside it on five functions and four seeds: better on some, worse on others, so there is one start, not two.

    Args:
        width: nodes of each layer, the inputs first: [2, 5, 1]; [5, 2] in place of a number means 5 sum nodes and 2
            product nodes.
        grid_size: G, intervals of every grid, or one number for each layer.
        spline_order: k, degree of the splines: 1, 2 or 3.
        grid_range: (lo, hi) of every grid at the start; `fit` moves them to the samples.
        base_activation: "silu", "gelu", "relu", "identity" or None.
        seed: of the initial parameters; torch's generator is left as it was.
        dtype: torch.float32, or torch.float64 for errors below about 1e-5.
        device: of the parameters.

    Attributes:
        width: [sums, products] of each layer.
        layers: ModuleList of KANLayer.
        inputs: the columns of the first network that this one takes; `prune(prune_input=True)` shortens it.
        samples: (N, n_in) inputs of the last `fit`, what pruning, plots and formulas look at; None before, never saved.

    Raises:
        ValueError, TypeError: for a width or an option that makes no network, naming it.
    """

    def __init__(
        self,
        width: Sequence[int | Sequence[int]],
        grid_size: int | Sequence[int] = 3,
        spline_order: int = 3,
        grid_range: Sequence[float] = (-1.0, 1.0),
        base_activation: str | None = "silu",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.width = _check_width(width)
        sizes = list(grid_size) if isinstance(grid_size, Sequence) else [grid_size] * (len(self.width) - 1)
        if len(sizes) != len(self.width) - 1:
            raise ValueError(f"grid_size {grid_size} needs one number, or one for each of {len(self.width) - 1} layers")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
        options = {"spline_order": spline_order, "grid_range": grid_range, "base_activation": base_activation}
        self.inputs = list(range(self.width[0][0]))
        self.samples: Tensor | None = None
        self.layers = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs = self.width[0][0]
            for size, (sums, products) in zip(sizes, self.width[1:]):
                layer = KANLayer(inputs, sums, products, grid_size=size, dtype=dtype, device="cpu", **options)
                self.layers.append(layer)
                inputs = layer.out_features
        self.to(device)

    @property
    def in_features(self) -> int:
        return self.layers[0].linear.in_features

    @property
    def out_features(self) -> int:
        return self.layers[-1].out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].linear.spline_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].linear.spline_weight.device

    def forward(self, x: Tensor) -> Tensor:
        """x (N, n_in), any float dtype (converted to the network's, under autocast too), to (N, n_out)."""
        x = self._input(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def activations(self, x: Tensor) -> list[Tensor]:
        """The output of every edge, (N, O, I) for each layer."""
        x = self._input(x)
        found = []
        for layer in self.layers:
            found.append(layer.edges(x))
            x = layer.nodes(found[-1].sum(-1))
        return found

    fit = fitting.fit
    evaluate = fitting.evaluate
    importance = pruning.importance
    prune = pruning.prune
    plot = plot.plot
    suggest_symbolic = symbolic.suggest_symbolic
    fix_symbolic = symbolic.fix_symbolic
    unfix_symbolic = symbolic.unfix_symbolic
    auto_symbolic = symbolic.auto_symbolic
    symbolic_formula = formula.symbolic_formula
    save = storage.save

    @classmethod
    def load(cls, folder: str | os.PathLike, device: torch.device | str | None = None) -> "KAN":
        return storage.load(cls, folder, device)

    load.__func__.__doc__ = storage.load.__doc__

    @torch.no_grad()
    def update_grid(self, x: Tensor) -> None:
        """Give each input of each layer the range of its samples, keeping every function there (least squares)."""
        x = self._input(x)
        for layer in self.layers:
            layer.linear.update_grid(x)
            x = layer(x)

    def refine(self, grid_size: int) -> "KAN":
        """A new network with `grid_size` intervals on every edge (grid extension, arXiv:2404.19756, section 2.4).

        On the grids the same function where `grid_size` is a multiple of the old size; otherwise each edge function is
        projected, uniformly weighted over its grid. This network stays as it is.
        """
        finer = self.copy()
        for layer in finer.layers:
            layer.linear.extend_grid(grid_size)
        return finer

    def copy(self) -> "KAN":
        """A network of its own with the same parameters, grids and masks."""
        return copy.deepcopy(self)

    def config(self) -> dict[str, object]:
        """The arguments that make a network of this shape."""
        first = self.layers[0].linear
        return {
            "width": self.width,
            "grid_size": [layer.linear.grid_size for layer in self.layers],
            "spline_order": first.spline_order,
            "grid_range": list(first.grid_range),
            "base_activation": first.base_activation,
            "dtype": self.dtype,
        }

    def samples_or(self, x: Tensor | None) -> Tensor:
        """x, or where it is None the inputs of the last `fit`, in the network's dtype."""
        if x is None and self.samples is None:
            raise ValueError("this network has not been fitted since it was made or loaded: pass samples x (N, n_in)")
        return self._input(self.samples if x is None else x)

    def _input(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.in_features:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"this network takes a tensor (N, {self.in_features}), got {what}")
        if not x.is_floating_point():
            raise TypeError(f"this network takes floating point inputs, got {x.dtype}; convert with .to({self.dtype})")
        return x.to(self.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}"


class _Dense(torch.autograd.Function):
    """A layer's subnodes, with the basis written down: one node in the graph, where operations cost more than numbers.

    dW = Phi^T dy,    dx_i = sum_c (dy W^T)_ic B'_c(x_i) + act'(x_i) (dy W_base)_i
    """

    @staticmethod
    def forward(ctx, x, spline_weight, base_weight, layer: KANLayer, features, scaled: bool):
        slopes = inverse_width = edges = None
        if features is None:
            t, inverse_width = layer._position(x)
            phi, slopes = _splines(t, 0, layer.linear.num_basis, layer.linear.spline_order, ctx.needs_input_grad[0])
            act = layer._act(x)
        else:
            phi, act = features
        spline, base = layer._weights()
        ctx.layer, ctx.scaled = layer, scaled
        if scaled:
            edges = _edges(phi, act, spline, base)
        ctx.save_for_backward(x, phi, slopes, act, spline, base, inverse_width, edges)
        if scaled:
            return edges.sum(0), edges.abs().mean(1).mT
        y = phi.flatten(0, 1).mT @ spline.flatten(0, 1)
        return y if base is None else y.addmm_(act, base.mT)

    @staticmethod
    def backward(ctx, dy: Tensor, dscale: Tensor | None = None):
        x, phi, slopes, act, spline, base, inverse_width, edges = ctx.saved_tensors
        layer, needs = ctx.layer, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the same through operations that can be differentiated again
            edges = _edges(*layer.features(x), *layer._weights())
            outputs = (edges.sum(0), edges.abs().mean(1).mT) if ctx.scaled else edges.sum(0)
            primals = (x, layer.linear.spline_weight, layer.linear.base_weight)
            primals = [p for p, need in zip(primals, needs) if need]
            gradients = torch.autograd.grad(outputs, primals, (dy, dscale) if ctx.scaled else dy, create_graph=True)
            gradients = iter(gradients)
            return *(next(gradients) if need else None for need in needs[:3]), None, None, None
        dx = dspline = dbase = None
        if ctx.scaled:  # every edge has its own gradient: (I, N, O)
            dedges = torch.addcmul(dy, edges.sign(), dscale.mT.unsqueeze(1), value=1 / len(x))
            phi_dy = phi @ dedges if needs[1] else None
            act_dy = (act.mT.unsqueeze(1) @ dedges).squeeze(1).mT if needs[2] else None
            dphi = spline @ dedges.mT if needs[0] else None
            dact = (dedges @ base.mT.unsqueeze(2)).squeeze(2).mT if needs[0] and base is not None else None
        else:
            phi_dy = (phi.flatten(0, 1) @ dy).view_as(spline) if needs[1] else None
            act_dy = dy.mT @ act if needs[2] else None
            dphi = (spline.flatten(0, 1) @ dy.mT).view_as(slopes) if needs[0] else None
            dact = dy @ base if needs[0] and base is not None else None
        mask = layer._spline_mask()
        if needs[1]:
            dspline = phi_dy.mul_(mask.mT.unsqueeze(1)).flatten(0, 1)
        if needs[2]:
            dbase = act_dy * mask
        if needs[0]:
            dx = dphi.mul_(slopes).sum(1).mul_(inverse_width).mT
            if base is None:
                t = splines.position(x, layer.linear.grid, layer.linear.grid_size)
                dx = dx * ((t >= 0) & (t < layer.linear.grid_size))
            else:
                dx = dx + torch_kan.activation_backward(dact, x, layer.linear.base_activation)
        return dx, dspline, dbase, None, None, None


def _edges(phi: Tensor, act: Tensor | None, spline: Tensor, base: Tensor | None) -> Tensor:
    """Spline edges (I, N, O) of splines (I, C, N), act(x) (N, I) and masked weights (I, C, O), (O, I)."""
    out = phi.mT @ spline
    return out if base is None else torch.addcmul(out, act.mT.unsqueeze(2), base.mT.unsqueeze(1))


class _Basis(torch.autograd.Function):
    """B_c(t), c = first .. first + count - 1, t in grid intervals: (I, N) to (I, count, N), differentiable for ever.

    B_c(t) = M_k(t - c - (1 - k) / 2) has the derivative b_{c-1}(t) - b_c(t), b the splines of order k - 1 with the same
    indices: a backward that is itself to be differentiated is this function at order k - 1. One that is not uses the
    closed form, computed beside the values.
    """

    @staticmethod
    def forward(ctx, t: Tensor, first: int, count: int, order: int) -> Tensor:
        values, slopes = _splines(t, first, count, order, ctx.needs_input_grad[0])
        ctx.settings = first, count, order
        ctx.save_for_backward(t, slopes)
        return values

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        t, slopes = ctx.saved_tensors
        first, count, order = ctx.settings
        if order == 0:
            return torch.zeros_like(t), None, None, None
        if torch.is_grad_enabled():  # create_graph=True
            lower = _Basis.apply(t, first - 1, count + 1, order - 1)
            return (F.pad(dy, (0, 0, 1, 1)).diff(dim=1) * lower).sum(1), None, None, None
        return (dy * slopes).sum(1), None, None, None


def _splines(t: Tensor, first: int, count: int, order: int, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """B_c(t) and, if asked, dB_c / dt: (I, count, N) each."""
    centre = torch.arange(first, first + count, dtype=t.dtype, device=t.device) + (1 - order) / 2
    s = t.unsqueeze(1) - centre.unsqueeze(1)
    if order == 0:
        return ((s >= -0.5) & (s < 0.5)).to(t.dtype), None
    return torch_kan._cardinal(s, order, slopes)


def _check_width(width: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """[2, [5, 2], 1] as [[2, 0], [5, 2], [1, 0]]."""
    if not isinstance(width, Sequence) or isinstance(width, str) or len(width) < 2:
        raise ValueError(f"width lists the nodes of at least two layers, such as [2, 5, 1], got {width!r}")
    pairs = []
    for nodes in width:
        pair = list(nodes) if isinstance(nodes, Sequence) and not isinstance(nodes, str) else [nodes, 0]
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in pair)
        if len(pair) != 2 or not whole or sum(pair) < 1:
            raise ValueError(f"a layer of width is a number of nodes or [sums, products], got {nodes!r} in {width!r}")
        pairs.append([int(n) for n in pair])
    if pairs[0][1]:
        raise ValueError(f"inputs are not products: width must begin with a number, got {width[0]!r}")
    return pairs
