"""KAN layers and the feed-forward blocks of a transformer built from them.

A block is d -> h -> d on a normalised input; `FFN_TYPES` names all, and every other line of a model is shared, so
a comparison differs in nothing else. G intervals and order k give C = G + k splines an edge.

    mlp         down(act(up x))                                         2 d h parameters
    swiglu      down(silu(gate x) * up x)                               3 d h
    kan         KAN(d->h), norm, KAN(h->d)                              2 d h (C + 1)      arXiv:2404.19756
    kan_mix     up (d->h), norm, KAN(h->d)                              d h (1 + C + 1)
    kan_gated   z = norm(gate x), v = up x, y_o = sum_h v_h phi_oh(z_h) d h (2 + C + 1)    arXiv:2408.10205
    kan_fourier z = up x, y_o = sum_h a_oh sin(w z_h) + b_oh cos(w z_h) 3 d h              arXiv:2406.01034

(one less in each C + 1 without the base term.) In `kan_gated` every edge has its own gate function phi; with the silu
base term, zero splines and no norm it is SwiGLU, bit for bit. With `project_value=False` the two gated blocks have no
up projection: v_h = x_(h mod d), the block's own input, so that

    y_o = sum_i x_i sum_m phi_oim(z_im)

is a linear map whose every entry is a KAN of the token, and a unit costs d weights less.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kansformer.functional import BASE_ACTIVATIONS, fourier_linear, kan_linear, may_fuse
from kansformer.kernels.torch_kan import activation, normalise
from kansformer.splines import basis, least_squares, num_basis, refit

# The standard deviation of the random part of an edge function, over that of its smooth part, at initialisation (the
# paper starts its splines at noise of this size, arXiv:2404.19756, section 2.2).
INIT_NOISE = 0.1

# Floating point operations of one live spline, of a base activation and of a norm, per element: counted in the closed
# forms, a transcendental as one. They are a percent of a block; matrix products are the rest.
SPLINE_FLOPS = {1: 4, 2: 8, 3: 11}
ACTIVATION_FLOPS = {"silu": 4, "gelu": 5, "relu": 1, "identity": 0}
NORM_FLOPS = 4


class KANLinear(nn.Module):
    """A Kolmogorov-Arnold layer: a learned function on every edge (Liu et al. 2024, arXiv:2404.19756, eq. 2.10).

        y_o = b_o + sum_i gate_i * ( base_weight[o, i] * act(x_i) + sum_c spline_weight[i*C + c, o] * B_c(x_i) )

    Outside the grid the splines fall to zero and the base term acts alone. A layer without base term has nothing left
    there, so it takes the closest point of the grid instead: its functions go on as constants.

    Args:
        in_features, out_features: I and O.
        grid_size: G, intervals of the grid.
        spline_order: k, the degree of the splines: 1, 2 or 3.
        grid_range: (lo, hi) at the start, the same for every input; `update_grid` gives each input its own.
        base_activation: "silu", "gelu", "relu" or "identity"; None for a layer without base term.
        bias: adds one number per output.
        init_gain: output standard deviation at initialisation for inputs of unit variance.
        backend: "auto", "torch" or "triton" (`functional.kan_linear`).

    Attributes:
        spline_weight: (I*C, O), row i*C + c.  base_weight: (O, I) or None.  bias: (O,) or None.
        grid: (I, 2) float32 buffer, saved in the state dict. It stays float32 under `.to(dtype)`, because a range
            rounded to bfloat16 moves every knot.

    Raises:
        ValueError: for sizes below one, an unknown activation, an order other than 1, 2, 3, or an empty range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: Sequence[float] = (-2.0, 2.0),
        base_activation: str | None = "silu",
        bias: bool = False,
        init_gain: float = 1.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, grid_size=grid_size)
        if spline_order not in (1, 2, 3):
            raise ValueError(f"spline_order must be 1, 2 or 3, got {spline_order}")
        lo, hi = (float(bound) for bound in grid_range)
        if not is_range(lo, hi):
            raise ValueError(f"grid_range must be two finite numbers lo < hi, got {(lo, hi)}, which differ in float32")
        if base_activation is not None and base_activation not in BASE_ACTIVATIONS:
            raise ValueError(
                f"base_activation is {base_activation!r}; choose None or one of {', '.join(BASE_ACTIVATIONS)}"
            )
        self.in_features, self.out_features = in_features, out_features = int(in_features), int(out_features)
        self.grid_size, self.spline_order, self.grid_range = int(grid_size), int(spline_order), (lo, hi)
        self.base_activation, self.init_gain, self.backend = base_activation, init_gain, backend
        factory = {"device": device, "dtype": dtype}
        self.spline_weight = nn.Parameter(torch.empty(in_features * self.num_basis, out_features, **factory))
        if base_activation is None:
            self.register_parameter("base_weight", None)
        else:
            self.base_weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("grid", torch.empty(in_features, 2, device=device, dtype=torch.float32))
        self.reset_parameters()

    @property
    def num_basis(self) -> int:
        """C = grid_size + spline_order, splines on every edge."""
        return num_basis(self.grid_size, self.spline_order)

    def forward(self, x: Tensor, gate: Tensor | None = None, norm_eps: float | None = None) -> Tensor:
        """x (..., I), gate (..., I) or None: (..., O). With `norm_eps` x is RMS-normalised first (`kan_linear`)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"this layer takes (..., {self.in_features}), got {tuple(x.shape)}")
        return kan_linear(
            x,
            self.spline_weight,
            self.grid,
            grid_size=self.grid_size,
            spline_order=self.spline_order,
            base_weight=self.base_weight,
            bias=self.bias,
            base_activation=self.base_activation or "identity",
            gate=gate,
            norm_eps=norm_eps,
            backend=self.backend,
        )

    @torch.no_grad()
    def reset_parameters(self, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw the parameters anew, and set the grid to `grid_range`.

        Every edge starts as w * psi + noise, w normal, psi the base activation (without a base term: the spline closest
        to silu). The noise, on the coefficients, carries INIT_NOISE^2 of psi's energy E[f^2] + E[f'^2], so that neither
        outputs nor gradients depend on the grid. For inputs X ~ N(0, 1) and I inputs

            Var(y_o) = init_gain^2,    Var(dx_i) / Var(dy_o) = (O / I) * init_gain^2 * E[psi'^2] / E[psi^2]

        up to the noise's share. `copy_(tensor, value)` does the writing (transformers passes its own, which leaves
        loaded tensors alone).
        """
        if self.spline_weight.is_meta:
            return
        start = _initial_edge(self.grid_size, self.spline_order, self.grid_range, self.base_activation)
        scale = self.init_gain / math.sqrt(self.in_features * start.energy)
        device = self.spline_weight.device
        weight = scale * torch.randn(self.out_features, self.in_features, device=device)
        shape = (self.in_features, self.num_basis, self.out_features)
        coefficients = scale * start.noise * torch.randn(shape, device=device)
        if self.base_weight is None:
            coefficients += weight.mT.unsqueeze(1) * torch.tensor(start.coefficients, device=device).unsqueeze(1)
        else:
            copy_(self.base_weight, weight.to(self.base_weight.dtype))
        copy_(self.spline_weight, coefficients.flatten(0, 1).to(self.spline_weight.dtype))
        if self.bias is not None:
            copy_(self.bias, torch.zeros_like(self.bias))
        copy_(self.grid, torch.tensor(self.grid_range, device=device, dtype=torch.float32).expand(self.in_features, 2))

    @torch.no_grad()
    def update_grid(self, x: Tensor, spread: float = 4.0) -> None:
        """Give each input the range of its samples, keeping every edge function (in the least-squares sense) there.

        The new range is [mean - spread * std, mean + spread * std], cut to the smallest and largest sample. Where
        torch.distributed is initialised the statistics are reduced over all ranks, so all ranks must call this and all
        get the same grid, to the bit. A constant input keeps its range, as does one that varies by less than float32
        tells apart at its size. An optimizer's state for `spline_weight` belongs to the old coefficients: reset it.

        Args:
            x: (..., I) samples.
            spread: standard deviations on either side of the mean.
        Raises:
            ValueError: if there is no sample, one is not finite, the last dimension is not I, spread is not above 0, or
                an adapter holds the coefficients.
        """
        refuse_adapters(self, "spline_weight")
        if not spread > 0:
            raise ValueError(f"spread is {spread}: it must be positive, standard deviations on either side of the mean")
        if x.shape[-1] != self.in_features or x.numel() == 0:
            raise ValueError(f"update_grid needs samples (..., {self.in_features}), at least one, got {tuple(x.shape)}")
        x = x.detach().reshape(-1, self.in_features).double()
        if not x.isfinite().all():
            raise ValueError(
                "update_grid needs finite samples, but some are NaN or infinite; look upstream of this layer"
            )
        sums = torch.stack([torch.full_like(x[0], x.shape[0]), x.sum(0), x.square().sum(0)])
        bounds = torch.stack([x.amin(0), -x.amax(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
        count, mean = sums[0], sums[1] / sums[0]
        deviation = (sums[2] / count - mean.square()).clamp_min(0).sqrt()
        lo = torch.maximum(bounds[0], mean - spread * deviation)
        hi = torch.minimum(-bounds[1], mean + spread * deviation)
        new_grid = torch.stack([lo, hi], -1).to(self.grid)
        width, size = new_grid[:, 1] - new_grid[:, 0], new_grid.abs().amax(-1)
        unresolved = width <= (1e-6 * size).clamp_min(1e-30)
        new_grid = torch.where(unresolved.unsqueeze(-1), self.grid, new_grid)
        self.spline_weight.copy_(self._refit(new_grid, self.grid_size))
        self.grid.copy_(new_grid)

    @torch.no_grad()
    def extend_grid(self, grid_size: int) -> None:
        """Refine to `grid_size` intervals on the same range (grid extension, arXiv:2404.19756, section 2.4).

        The function does not change where the new size is a multiple of the old one, and is the least-squares
        projection otherwise. `spline_weight` becomes a new, larger Parameter: build the optimizer anew.

        Raises:
            ValueError: if grid_size is below one, or an adapter holds the coefficients.
        """
        refuse_adapters(self, "spline_weight")
        check_sizes(grid_size=grid_size)
        grid_size = int(grid_size)
        weight = self._refit(self.grid, grid_size)
        self.spline_weight = nn.Parameter(weight, requires_grad=self.spline_weight.requires_grad)
        self.grid_size = grid_size

    def _refit(self, grid: Tensor, grid_size: int) -> Tensor:
        return refit(
            self.spline_weight,
            self.grid,
            self.grid_size,
            self.spline_order,
            grid,
            grid_size,
            constant_outside=self.base_weight is None,
        )

    @torch.no_grad()
    def out_of_grid_fraction(self, x: Tensor) -> Tensor:
        """The share of the values in x (..., I) outside their input's [lo, hi], NaN counted in: a scalar tensor."""
        inside = (x >= self.grid[:, 0]) & (x <= self.grid[:, 1])
        return 1 - inside.float().mean()

    def flops_per_token(self) -> int:
        """Forward floating point operations for one row: the products, and the splines and activation of each input."""
        weights = self.spline_weight.numel() + (0 if self.base_weight is None else self.base_weight.numel())
        spline = (self.spline_order + 1) * SPLINE_FLOPS[self.spline_order]
        base = 0 if self.base_activation is None else ACTIVATION_FLOPS[self.base_activation]
        return 2 * weights + self.in_features * (spline + base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KANLinear":
        grid = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype != torch.float32:
            self.grid = grid.to(self.grid.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid_range={self.grid_range}, "
            f"base_activation={self.base_activation!r}, bias={self.bias is not None}"
        )


class FourierLinear(nn.Module):
    """A KAN layer of waves: a Fourier basis of one frequency on every edge (Xu et al. 2024, arXiv:2406.01034).

        y_o = sum_i gate_i * (a_oi sin(w x_i) + b_oi cos(w x_i))
            = sum_i gate_i * r_oi sin(w x_i + p_oi),    r = hypot(a, b),  p = atan2(b, a)

    Args:
        in_features, out_features: I and O.
        frequency: w, the same for every edge.
        init_gain: output standard deviation at initialisation, whatever the inputs are (sin^2 + cos^2 = 1).
        backend: "auto", "torch" or "triton" (`functional.fourier_linear`). Triton is for plain weights and no gate;
            else, and on the torch backend, the two layers are called, with their adapters, hooks, quantised weights.

    Attributes:
        sin_proj, cos_proj: linear layers without bias whose weights (O, I) are a and b.

    Raises:
        ValueError: for sizes below one, or a frequency that is not positive and finite.
    """

    backend = "auto"  # of layers pickled before they had one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        frequency: float = 1.5,
        init_gain: float = 1.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        if not 0 < frequency < math.inf:
            raise ValueError(f"frequency must be positive and finite, got {frequency}")
        self.in_features, self.out_features, self.frequency = int(in_features), int(out_features), frequency
        self.backend = backend
        self.sin_proj = _linear(in_features, out_features, init_gain, device=device, dtype=dtype)
        self.cos_proj = _linear(in_features, out_features, init_gain, device=device, dtype=dtype)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x (..., I), gate (..., I) or None: (..., O)."""
        projections = self.sin_proj, self.cos_proj
        if gate is None and may_fuse(x, self.backend) and all(map(_is_plain, projections)):
            a, b = (projection.weight for projection in projections)
            if a.dtype == b.dtype:
                return fourier_linear(x, a, b, self.frequency, backend=self.backend)
        x = self.frequency * x
        sine, cosine = x.sin(), x.cos()
        if gate is not None:
            sine, cosine = gate * sine, gate * cosine
        return self.sin_proj(sine) + self.cos_proj(cosine)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, frequency={self.frequency}"


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call of `linear` is the product with its weight: no adapter, hook, bias, quantised or split weight."""
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) in (Tensor, nn.Parameter)
        and "forward" not in linear.__dict__  # where accelerate puts its own
        and linear._compiled_call_impl is None
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
    )


EdgeLayer = KANLinear | FourierLinear  # a learned function on each of I * O edges


class FeedForward(nn.Module):
    """What the blocks share: x (..., hidden_size) to the same shape, through `intermediate_size` units.

    A block of your own is a subclass of this, entered in `FFN_TYPES`; it takes (hidden_size, intermediate_size), its
    `fields`, init_gain, device and dtype. `benchmarks/peers.py` has some.
    """

    fields: tuple[str, ...] = ()  # options of the constructor, by their names in a model's configuration
    elementwise_flops = 0  # forward, per token, beside those of the linear and KAN layers

    def flops_per_token(self) -> int:
        """Forward floating point operations per token."""
        linear = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        kan = sum(m.flops_per_token() for m in self.modules() if isinstance(m, KANLinear))
        return linear + kan + self.elementwise_flops


class MLP(FeedForward):
    """down(act(up x)), the block of GPT-2."""

    fields = ("hidden_act",)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        init_gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_act not in BASE_ACTIVATIONS:
            raise ValueError(f"hidden_act is {hidden_act!r}; choose one of {', '.join(BASE_ACTIVATIONS)}")
        self.hidden_act = hidden_act
        factory = {"device": device, "dtype": dtype}
        self.up_proj = _linear(hidden_size, intermediate_size, 1.0, **factory)
        self.down_proj = _linear(intermediate_size, hidden_size, init_gain / _activation_rms(hidden_act), **factory)
        self.elementwise_flops = intermediate_size * ACTIVATION_FLOPS[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activation(self.up_proj(x), self.hidden_act))


class SwiGLU(FeedForward):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv:2002.05202), the block of Llama.

    With `gate_norm` the gate's input to silu is RMS-normalised with a learned gain: the MLP baseline that has the norm
    of `kan_gated` but not its functions. `project_value=False`: down(silu(gate x) * x), x repeated to the width.
    """

    fields = ("gate_norm", "project_value", "norm_eps")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        gate_norm: bool = False,
        project_value: bool = True,
        norm_eps: float = 1e-6,
        init_gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.gate_proj = _linear(hidden_size, intermediate_size, 1.0, **factory)
        self.up_proj = _linear(hidden_size, intermediate_size, 1.0, **factory) if project_value else None
        self.down_proj = _linear(intermediate_size, hidden_size, init_gain / _activation_rms("silu"), **factory)
        self.gate_norm = nn.RMSNorm(intermediate_size, eps=norm_eps, **factory) if gate_norm else None
        self.elementwise_flops = intermediate_size * (ACTIVATION_FLOPS["silu"] + 1 + (NORM_FLOPS if gate_norm else 0))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.gate_norm is not None:
            gate = self.gate_norm(gate)
        return self.down_proj(F.silu(gate) * _value(self.up_proj, x, gate))


class _KANFeedForward(FeedForward):
    """The options of the three blocks of splines.

    Args:
        grid_size, spline_order, grid_range, base_activation: of the KAN layers.
        ffn_norm: RMS-normalise, without a gain, what enters the block's last KAN layer, so that it fills the grid.
    """

    fields = ("grid_size", "spline_order", "grid_range", "base_activation", "ffn_norm", "norm_eps")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        grid_size: int = 3,
        spline_order: int = 1,
        grid_range: Sequence[float] = (-2.0, 2.0),
        base_activation: str | None = None,
        ffn_norm: bool = True,
        norm_eps: float = 1e-6,
        init_gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        self.ffn_norm, self.norm_eps = ffn_norm, norm_eps
        factory = {"device": device, "dtype": dtype}
        kan = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": grid_range}
        kan |= {"base_activation": base_activation} | factory
        self._build(hidden_size, intermediate_size, kan, factory, **options)
        self.down_proj = KANLinear(intermediate_size, hidden_size, init_gain=init_gain, **kan)
        self.elementwise_flops = intermediate_size * NORM_FLOPS * ffn_norm

    def _down(self, z: Tensor, **gate: Tensor) -> Tensor:
        """The last KAN layer of the normalised z. In training `down_proj` gets z and `norm_eps`, and keeps z alone for
        backward; in evaluation it gets the normalised z, so that hooks on it see what its functions do."""
        if not self.ffn_norm:
            return self.down_proj(z, **gate)
        if self.training:
            return self.down_proj(z, norm_eps=self.norm_eps, **gate)
        return self.down_proj(normalise(z, self.norm_eps), **gate)


class KAN(_KANFeedForward):
    """KAN(d->h), norm, KAN(h->d): the MLP of a transformer replaced as arXiv:2404.19756 proposes."""

    def _build(self, hidden_size: int, intermediate_size: int, kan: dict, factory: dict) -> None:
        self.up_proj = KANLinear(hidden_size, intermediate_size, **kan)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self.up_proj(x))


class KANMix(_KANFeedForward):
    """up (d->h), norm, KAN(h->d): every unit has a function per output in place of one activation."""

    def _build(self, hidden_size: int, intermediate_size: int, kan: dict, factory: dict) -> None:
        self.up_proj = _linear(hidden_size, intermediate_size, 1.0, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self.up_proj(x))


class KANGated(_KANFeedForward):
    """z = norm(gate x), v = up x, y_o = sum_h v_h * phi_oh(z_h): SwiGLU with a learned gate function on every edge.

    A KAN layer with product nodes (KAN 2.0, arXiv:2408.10205). With base_activation="silu", ffn_norm=False and zero
    splines it equals `SwiGLU` with the same weights bit for bit on the torch backend. `project_value=False`: v is x,
    repeated to the width.
    """

    fields = (*_KANFeedForward.fields, "project_value")

    def _build(
        self, hidden_size: int, intermediate_size: int, kan: dict, factory: dict, project_value: bool = True
    ) -> None:
        self.gate_proj = _linear(hidden_size, intermediate_size, 1.0, **factory)
        self.up_proj = _linear(hidden_size, intermediate_size, 1.0, **factory) if project_value else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate_proj(x)
        return self._down(z, gate=_value(self.up_proj, x, z))


class KANFourier(FeedForward):
    """z = up x, y_o = sum_h a_oh sin w z_h + b_oh cos w z_h: every edge is a wave with a height and a phase of its own.

    A `FourierLinear` behind a linear layer, with the parameters of SwiGLU of its width. At the start z has unit
    variance; w is `fourier_frequency`. On a GPU the layer's kernels keep z alone for backward.
    """

    fields = ("fourier_frequency",)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        fourier_frequency: float = 1.5,
        init_gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.up_proj = _linear(hidden_size, intermediate_size, 1.0, **factory)
        self.down_proj = FourierLinear(intermediate_size, hidden_size, fourier_frequency, init_gain, **factory)
        self.elementwise_flops = 3 * intermediate_size

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))


def _value(up_proj: nn.Linear | None, x: Tensor, gate: Tensor) -> Tensor:
    """up x, or without an up projection x itself, in as many copies as the width of `gate` takes."""
    if up_proj is not None:
        return up_proj(x)
    size, copies = gate.shape[-1], -(-gate.shape[-1] // x.shape[-1])
    return x.repeat(*[1] * (x.dim() - 1), copies)[..., :size]


FFN_TYPES: dict[str, type[FeedForward]] = {
    "mlp": MLP,
    "swiglu": SwiGLU,
    "kan": KAN,
    "kan_mix": KANMix,
    "kan_gated": KANGated,
    "kan_fourier": KANFourier,
}


def feed_forward(ffn_type: str, hidden_size: int, intermediate_size: int, **options: object) -> FeedForward:
    """Build the block `ffn_type` of FFN_TYPES; `options` are its class's.

    Raises:
        ValueError: for an unknown type or sizes below one.
    """
    if ffn_type not in FFN_TYPES:
        raise ValueError(f"ffn_type is {ffn_type!r}; choose one of {', '.join(FFN_TYPES)}")
    check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
    return FFN_TYPES[ffn_type](hidden_size, intermediate_size, **options)


def match_intermediate_size(
    ffn_type: str,
    hidden_size: int,
    *,
    reference: str = "swiglu",
    reference_size: int | None = None,
    match: str = "params",
    multiple_of: int = 8,
    **options: object,
) -> int:
    """The intermediate size at which `ffn_type` costs what a reference block of the same hidden size costs.

    Args:
        reference: the block to match, with its default options.
        reference_size: its intermediate size; None takes the usual one, 8/3 d for swiglu and 4 d for others, rounded up
            to `multiple_of`.
        match: "params", or "flops" for forward operations per token.
        multiple_of: the result is the closest multiple of this.
        options: of `ffn_type`'s block.
    Raises:
        ValueError: for unknown names or sizes below one.
    Warns:
        UserWarning: where the closest multiple misses the reference by more than 2%.
    """
    if match not in ("params", "flops"):
        raise ValueError(f"match is {match!r}; choose 'params' or 'flops'")
    check_sizes(hidden_size=hidden_size, multiple_of=multiple_of)
    if reference_size is None:
        usual = 8 * hidden_size / 3 if reference == "swiglu" else 4 * hidden_size
        reference_size = math.ceil(usual / multiple_of) * multiple_of

    def cost(kind: str, size: int, **block_options: object) -> int:
        block = feed_forward(kind, hidden_size, size, device="meta", **block_options)
        return block.flops_per_token() if match == "flops" else sum(p.numel() for p in block.parameters())

    target = cost(reference, reference_size)
    one, two = cost(ffn_type, 1, **options), cost(ffn_type, 2, **options)  # cost is linear in the size
    size = max(1, round((target - (2 * one - two)) / (two - one) / multiple_of)) * multiple_of
    miss = cost(ffn_type, size, **options) / target - 1
    if abs(miss) > 0.02:
        warnings.warn(
            f"{ffn_type} with intermediate_size={size} has {100 * (1 + miss):.1f}% of the {match} of {reference} with "
            f"{reference_size}: no multiple of {multiple_of} is closer; give a smaller one, or the intermediate_size",
            stacklevel=2,
        )
    return size


class _Edge(NamedTuple):
    energy: float  # E[f(X)^2] of an edge function of unit weight, noise included
    noise: float  # standard deviation of a coefficient's random part, for unit weight
    coefficients: tuple[float, ...]  # the spline closest to the start function


@functools.cache
def _initial_edge(grid_size: int, spline_order: int, grid_range: tuple[float, float], base: str | None) -> _Edge:
    """Moments under X ~ N(0, 1) of the functions that `KANLinear.reset_parameters` draws."""
    x, probability = _normal_quadrature()
    grid = torch.tensor(grid_range, dtype=torch.float64, device="cpu")
    inside = (x > grid[0]) & (x < grid[1]) if base is None else x.isfinite()
    points = (x.clamp(*grid_range) if base is None else x).unsqueeze(-1)
    b = basis(points, grid, grid_size, spline_order).squeeze(-2)
    slope = basis(points, grid, grid_size, spline_order, derivative=True).squeeze(-2) * inside.unsqueeze(-1)
    f = activation(points.squeeze(-1), base or "silu")
    if base is None and probability @ f.square() < 1e-12:  # a range where silu is zero
        f = points.squeeze(-1)
    root = probability.sqrt().unsqueeze(-1)
    coefficients = least_squares(root * b, root * f.unsqueeze(-1))
    if base is None:
        f, df = (b @ coefficients).squeeze(-1), (slope @ coefficients).squeeze(-1)
    else:
        df = torch.gradient(f, spacing=(x,))[0]
    smooth, smooth_slope = probability @ f.square(), probability @ df.square()
    rough, rough_slope = probability @ b.square().sum(-1), probability @ slope.square().sum(-1)
    noise = INIT_NOISE * ((smooth + smooth_slope) / (rough + rough_slope)).sqrt()
    energy = smooth + noise.square() * rough
    return _Edge(energy.item(), noise.item(), tuple(coefficients.squeeze(-1).tolist()))


@functools.cache
def _normal_quadrature(points: int = 4001, reach: float = 8.0) -> tuple[Tensor, Tensor]:
    """Nodes x (P,) and weights p (P,) with sum p f(x) = E[f(X)] for X ~ N(0, 1): the trapezoid rule on [-8, 8]."""
    x = torch.linspace(-reach, reach, points, dtype=torch.float64, device="cpu")
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return x, density * (2 * reach / (points - 1))


@functools.cache
def _activation_rms(name: str) -> float:
    x, probability = _normal_quadrature()
    return (probability @ activation(x, name).square()).sqrt().item()


def _linear(in_features: int, out_features: int, init_gain: float, **factory: object) -> nn.Linear:
    """A linear layer without bias whose outputs have the standard deviation `init_gain` for inputs of unit variance."""
    linear = nn.Linear(in_features, out_features, bias=False, **factory)
    linear.init_gain = init_gain
    nn.init.normal_(linear.weight, std=init_gain / math.sqrt(in_features))
    return linear


@contextlib.contextmanager
def observing(model: nn.Module, hooks: Sequence) -> Iterator[None]:
    """Runs of `model` that its `hooks` see: in evaluation mode, and eager, since compiled code would not call them.

    At the end the hooks are removed, and every module has the mode that it had.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()


def refuse_adapters(model: nn.Module, parameter: str | None = None) -> None:
    """ValueError if an adapter sits on a layer inside `model`, which a change of that layer would leave behind.

    PEFT's adapters are modules around a `base_layer`. Those of a bare parameter parametrize it while the model runs, so
    that writing to it in place writes to a temporary.

    Args:
        parameter: None for adapters of any kind; else those of bare parameters of this name.
    """
    for name, module in model.named_modules():
        if parameter is None:
            found = hasattr(module, "base_layer")
        else:
            found = parametrize.is_parametrized(module, parameter) or getattr(module, "parameter_name", "") == parameter
        if found:
            raise ValueError(
                f"{name or type(module).__name__} has an adapter{f' on {parameter}' if parameter else ''}, which would "
                "not follow this change: merge it first (peft: model = model.merge_and_unload()), or change the model "
                "before it gets adapters"
            )


def is_range(lo: float, hi: float) -> bool:
    """Whether lo < hi are two finite numbers that float32, a grid's dtype, tells apart."""
    lo, hi = torch.tensor([lo, hi], dtype=torch.float32, device="cpu").tolist()
    return math.isfinite(lo) and math.isfinite(hi) and lo < hi


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for the first size, by its name, that is no whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
