"""The Triton kernels: numbers against float64, in the interpreter or on a GPU, and what the compiler makes of them.

The interpreter holds bfloat16 as truncated float32, so that a rounding costs twice what it costs on a GPU: bfloat16 is
allowed twice the error there.
"""

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from numerics import assert_close, assert_twice, error
from torch import Tensor

from kansformer.functional import fourier_linear
from kansformer.kernels import torch_kan

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kansformer.kernels import triton_basis, triton_decode, triton_kan, triton_waves  # noqa: E402

if not torch.cuda.is_available():
    import interpreter  # noqa: F401

HERE = Path(__file__).parent
# numpy warns where a GPU quietly makes infinity, as in exp of a large number.
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)  # all of it then runs on the GPU, so `-m gpu` is to find it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "gate", "spline_weight", "base_weight")


@dataclasses.dataclass
class Layer:
    """One layer with inputs and a cotangent; weights are scaled so that outputs are O(1)."""

    x: Tensor
    gate: Tensor | None
    spline_weight: Tensor
    grid: Tensor
    base_weight: Tensor | None
    grid_size: int
    spline_order: int
    base_activation: str
    dy: Tensor
    norm_eps: float | None = None

    @property
    def arguments(self):
        return (
            self.x, self.gate, self.spline_weight, self.grid, self.base_weight,
            self.grid_size, self.spline_order, self.base_activation,
        )  # fmt: skip

    def forward(self, kernels) -> Tensor:
        return kernels.forward(*self.arguments, self.norm_eps)

    def backward(self, kernels, needs: tuple[bool, ...] | None = None) -> tuple[Tensor | None, ...]:
        return kernels.backward(self.dy, *self.arguments, needs or self.needs, self.norm_eps)

    @property
    def needs(self) -> tuple[bool, ...]:
        return tuple(getattr(self, name) is not None for name in NAMES)

    def double(self) -> "Layer":
        return dataclasses.replace(
            self, **{n: getattr(self, n).double() for n in (*NAMES, "grid", "dy") if getattr(self, n) is not None}
        )


def make(
    M,
    I,
    O,
    G,
    k,
    *,
    gate=False,
    base=True,
    activation="silu",
    dtype=torch.float32,
    x_dtype=None,
    shared_grid=False,
    norm_eps=None,
):
    x_dtype = x_dtype or dtype
    draw = lambda *shape, dtype=dtype, scale=1.0: (torch.randn(*shape) * scale).to(dtype).to(DEVICE)  # noqa: E731
    width = 1.5 + torch.rand(() if shared_grid else I)
    grid = torch.stack([0.1 - width, 0.2 + width], -1).to(DEVICE)
    x = draw(M, I, dtype=x_dtype, scale=1.5)
    if k == 1 and x_dtype == torch.float32:  # the slope jumps at knots, and one rounding of t or another decides where
        h = (grid[..., 1] - grid[..., 0]) / G
        t = (x - grid[..., 0]) / h
        x = torch.where((t - t.round()).abs() < 1e-5, x + 0.01 * h, x)
    return Layer(
        x=x,
        gate=draw(M, I, dtype=x_dtype) if gate else None,
        spline_weight=draw(I * (G + k), O, scale=max(I, 1) ** -0.5),
        grid=grid,
        base_weight=draw(O, I, scale=max(I, 1) ** -0.5) if base else None,
        grid_size=G,
        spline_order=k,
        base_activation=activation,
        dy=draw(M, O),
        norm_eps=norm_eps,
    )


def check(layer: Layer, forward=None, backward: bool = True) -> None:
    """The 2x rule for the output and every gradient, against float64 and with the torch backend as the twin."""
    interpreted = DEVICE == "cpu" and layer.spline_weight.dtype == torch.bfloat16
    epsilon = 4e-3 if interpreted else 1e-6
    exact = layer.double()
    results = {"y": layer.forward(triton_kan) if forward is None else forward(*layer.arguments)}
    twins = {"y": layer.forward(torch_kan)}
    references = {"y": exact.forward(torch_kan)}
    assert results["y"].dtype == layer.spline_weight.dtype
    if backward:
        results |= zip(NAMES, layer.backward(triton_kan))
        twins |= zip(NAMES, layer.backward(torch_kan))
        references |= zip(NAMES, exact.backward(torch_kan))
    for name, reference in references.items():
        if reference is None:
            assert results[name] is None
            continue
        if name != "y":
            assert results[name].dtype == getattr(layer, name).dtype
        assert_twice(results[name], twins[name], reference, epsilon, name)


SHAPES = [(1, 1, 1), (70, 37, 45), (33, 72, 130)] if DEVICE == "cpu" else [(1, 1, 1), (333, 200, 330), (4096, 768, 520)]


ORDERS = [(1, 1), (1, 3), (1, 7), (2, 3), (2, 5), (3, 5), (3, 8)]
PRODUCT = list(itertools.product(SHAPES, ORDERS, [False, True]))
if DEVICE == "cpu":  # the interpreter is slow where there are many tiles: gated and not by turns
    PRODUCT = [case for case in PRODUCT if case[0] != SHAPES[2] or case[2] == ORDERS.index(case[1]) % 2]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("shape", "order", "gate"), PRODUCT, ids=str)
def test_matches_float64(shape, order, gate):
    k, G = order
    check(make(*shape, G, k, gate=gate))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("count", [4, 7, 8, 16])  # of functions: 7 has no whole number of words
def test_half_precision(dtype, count, k, gate):
    check(make(*SHAPES[1], count - k, k, gate=gate, base=not gate, dtype=dtype))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_x_of_another_dtype(x_dtype):
    check(make(*SHAPES[1], 5, 3, gate=True, dtype=torch.bfloat16, x_dtype=x_dtype))


@pytest.mark.parametrize("activation", triton_kan.BASE_ACTIVATIONS)
def test_base_activations(activation):
    check(make(20, 10, 12, 3, 1, gate=True, activation=activation))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_without_base_and_with_one_grid_for_all(k):
    check(make(20, 10, 12, 3, k, base=False, shared_grid=True))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("base", [False, True], ids=["no base", "base"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("k", "G"), [(1, 3), (1, 6), (3, 5), (1, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype, k, G, gate, base):
    """Rows longer than a tile, and so small that eps counts."""
    layer = make(9, 300, 20, G, k, gate=gate, base=base, dtype=dtype, norm_eps=1e-2)
    layer.x[4] *= 0.03
    check(layer)
    check(dataclasses.replace(layer, x=layer.x[:1], gate=layer.gate[:1] if gate else None, dy=layer.dy[:1]))  # decodes


def test_norm_of_strided_rows():
    layer = make(20, 30, 11, 7, 1, gate=True, base=False, norm_eps=1e-6)
    layer.x = torch.randn(30, 40, device=DEVICE).T[::2]
    layer.gate = torch.randn(20, 60, device=DEVICE)[:, ::2]
    check(layer)


def test_backward_of_the_norm():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch_kan.normalise(x, 0.1), x, dy)
    assert_close(torch_kan.normalise_backward(dy, x.detach(), 0.1), expected, 1e-14)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("count", [3, 4])  # of functions
def test_chunks_of_phi(monkeypatch, count):
    """By rows, never more than CHUNK_BYTES; in words, backward makes Phi in place of dPhi."""
    layer = make(50, 23, 9, count - 1, 1, gate=True, dtype=torch.float16)
    monkeypatch.setattr(triton_kan, "CHUNK_BYTES", 7 * 23 * count * 2)
    sizes, phi = [], triton_kan.phi
    monkeypatch.setattr(triton_kan, "phi", lambda *a: sizes.append(phi(*a)) or sizes[-1])
    check(layer)
    assert len(sizes) == (8 if count == 4 else 16)  # 50 rows in sevens
    assert max(size.nbytes for size, _ in sizes) <= triton_kan.CHUNK_BYTES


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("k", "G"), [(1, 7), (2, 6), (3, 5)])
@pytest.mark.parametrize(("M", "I"), [(1, 37), (1, 300), (3, 50)])
def test_decode(M, I, k, G, gate):
    layer = make(M, I, 70, G, k, gate=gate)
    check(layer, forward=triton_decode.decode, backward=False)
    x = layer.x.clone()
    x[0, :3] = torch.tensor([1e4, -1e4, 2.4], device=DEVICE)
    check(dataclasses.replace(layer, x=x), forward=triton_decode.decode, backward=False)


def test_forward_decodes_where_that_reads_less(monkeypatch):
    assert triton_kan.use_decode(1, 64, 64, 8, 3)
    assert triton_kan.use_decode(4, 64, 64, 8, 1)
    assert not triton_kan.use_decode(3, 64, 64, 8, 3)
    assert not triton_kan.use_decode(0, 64, 64, 8, 3)
    assert not triton_kan.use_decode(65, 64, 64, 1000, 1)
    layer = make(1, 40, 50, 5, 3)
    expected = triton_decode.decode(*layer.arguments)
    assert torch.equal(triton_kan.forward(*layer.arguments), expected)
    monkeypatch.setattr(triton_kan, "use_decode", lambda *a: False)
    assert error(triton_kan.forward(*layer.arguments), expected) < 1e-6


@triton.jit
def _inverse_widths(out_ptr, grid_ptr, N, GRID_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, inverse_width = triton_basis.grid_scale(grid_ptr, offs, 2, N, GRID_SIZE)
    tl.store(out_ptr + offs, inverse_width, mask=offs < N)


@pytest.mark.parametrize("G", [1, 2, 3, 5, 7, 8, 13, 63, 100])
def test_inverse_width_is_the_exact_quotient(G):
    """Bit for bit: widths of every size, those next to a power of two, and as layers have them."""
    powers = 2.0 ** torch.arange(-60, 61)
    widths = torch.cat([powers, powers * (1 - 2**-24), powers * (1 + 2**-23), torch.exp(40 * torch.randn(100_000))])
    widths = widths[(widths > 1e-30) & (widths < 1e30)]
    lo = torch.randn(100_000)
    grid = torch.cat([torch.stack([0 * widths, widths], -1), torch.stack([lo, lo + 1 + 5 * torch.rand(100_000)], -1)])
    grid = grid.to(DEVICE)
    found = torch.empty(len(grid), device=DEVICE)
    _inverse_widths[triton.cdiv(len(grid), 16384),](found, grid, len(grid), G, 16384)
    width = grid[:, 1] - grid[:, 0]
    assert torch.equal(found, torch.full_like(width, G) / width)  # a number / tensor would be its reciprocal * number


@pytest.mark.parametrize("k", [1, 2, 3])
def test_on_knots_at_the_ends_and_far_outside(k):
    layer = make(40, 6, 8, 4, k, gate=True)
    lo, hi = -2.0, 2.0  # knots and their positions are exact in binary
    layer.grid = torch.tensor([lo, hi], device=DEVICE)
    points = torch.tensor([*torch.arange(-4, 5), -2.5, 2.5, 5, -5, 1e4, -1e4, 3e38], device=DEVICE)
    layer.x = points[torch.randint(len(points), (40, 6))].to(layer.x).clone()
    layer.base_weight = None
    check(layer)
    check(layer, forward=triton_decode.decode, backward=False)


@pytest.mark.parametrize("base", [False, True])
def test_a_slope_next_to_a_knot_is_that_of_one_side(base):
    """t rounds to a knot from below here and there: dx is then the slope of the interval before or after it."""
    layer = make(2048, 8, 6, 7, 1, gate=False, base=base)
    lo, hi = layer.grid.unbind(-1)
    knot = lo + (hi - lo) / 7 * torch.randint(1, 7, (2048, 8), device=DEVICE)
    steps = torch.randint(-2, 3, knot.shape, device=DEVICE, dtype=torch.int32)
    layer.x = (knot.view(torch.int32) + steps).view(torch.float32)
    dx = triton_kan.backward(layer.dy, *layer.arguments, (True, False, False, False))[0]
    h = ((hi - lo) / 7).double()
    sides = []
    for side in (-0.25, 0.25):
        there = dataclasses.replace(layer, x=knot.double() + side * h).double()
        without = dataclasses.replace(there, base_weight=None)
        sides.append(torch_kan.backward(there.dy, *without.arguments, (True, False, False, False))[0])
    if base:
        at = dataclasses.replace(layer, spline_weight=0 * layer.spline_weight).double()
        slope = torch_kan.backward(at.dy, *at.arguments, (True, False, False, False))[0]
        sides = [side + slope for side in sides]
    off = torch.stack([(dx - side).abs() for side in sides]).amin(0)
    assert (off < 1e-4 * (1 + sides[0].abs())).all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("forward", [triton_kan.forward, triton_decode.decode])
def test_nan_in_nan_out(k, forward):
    layer = make(20, 10, 12, 4, k, base=False)
    clean = forward(*layer.arguments)
    layer.x[3, 7] = torch.nan
    y = forward(*layer.arguments)
    assert y[3].isnan().all()
    rest = torch.arange(20) != 3
    assert torch.equal(y[rest], clean[rest])
    dx, _, dw, _ = triton_kan.backward(layer.dy, *layer.arguments, (True, False, True, False))
    assert dx.isnan().sum() == 1
    assert dx[3, 7].isnan()
    assert dw.unflatten(0, (10, -1))[7].isnan().all()
    assert not dw.unflatten(0, (10, -1))[torch.arange(10) != 7].isnan().any()


def test_strided_tensors():
    layer = make(50, 24, 18, 3, 2, gate=True)
    layer.x = torch.randn(24, 100, device=DEVICE).T[::2]
    layer.gate = torch.randn(50, 48, device=DEVICE)[:, ::2]
    layer.spline_weight = torch.randn(18, 24 * 5, device=DEVICE).T
    layer.base_weight = torch.randn(24, 18, device=DEVICE).T
    layer.dy = torch.randn(18, 50, device=DEVICE).T
    check(layer)
    layer.dy = torch.randn(1, 1, device=DEVICE).expand(50, 18)
    check(layer)


@pytest.mark.parametrize("empty", ["M", "I", "O"])
def test_empty(empty):
    sizes = {"M": 5, "I": 6, "O": 7} | {empty: 0}
    layer = make(*sizes.values(), 3, 2, gate=True)
    y = triton_kan.forward(*layer.arguments)
    assert y.shape == (sizes["M"], sizes["O"])
    assert (y == 0).all()
    for name, gradient in zip(NAMES, triton_kan.backward(layer.dy, *layer.arguments, layer.needs)):
        assert gradient.shape == getattr(layer, name).shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_asked_for(needs):
    layer = make(9, 6, 7, 3, 1, gate=True)
    everything = triton_kan.backward(layer.dy, *layer.arguments, (True,) * 4)
    for gradient, expected, needed in zip(triton_kan.backward(layer.dy, *layer.arguments, needs), everything, needs):
        assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("count", [4, 8, 16])
def test_two_runs_are_bit_equal(count):
    sizes = (3000, 400, 70) if DEVICE == "cuda" else (20, 10, 12)  # the interpreter runs one program after another
    layer = make(*sizes, count - 3, 3, gate=True, dtype=torch.bfloat16, norm_eps=1e-6)
    runs = [(layer.forward(triton_kan), *layer.backward(triton_kan)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_comparison_rejects_zeros_and_one_wrong_coefficient():
    layer = make(40, 20, 24, 5, 3)
    with pytest.raises(AssertionError, match="off by"):
        check(layer, forward=lambda *a: torch.zeros(40, 24, device=DEVICE), backward=False)

    def perturbed(x, gate, spline_weight, *rest):
        spline_weight = spline_weight.clone()
        spline_weight[61, 5] *= 1.1
        return triton_kan.forward(x, gate, spline_weight, *rest)

    with pytest.raises(AssertionError, match="off by"):
        check(layer, forward=perturbed, backward=False)


def test_unsupported_says_why():
    x, w = torch.zeros(2, 3, device=DEVICE), torch.zeros(24, 4, device=DEVICE)
    reason = lambda x=x, w=w, k=3, act="silu": triton_kan.unsupported(x, w, spline_order=k, base_activation=act)  # noqa: E731
    assert reason() is None
    assert "4" in reason(k=4)
    assert "tanh" in reason(act="tanh")
    assert "float64" in reason(x=x.double())
    assert "float64" in reason(w=w.double())


def test_what_a_gpu_lacks_is_said(monkeypatch):
    """Not interpreted, on a GPU that need not be there."""
    found = types.SimpleNamespace(major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(triton_basis, "device_properties", triton_basis.device_properties.__wrapped__)
    monkeypatch.setattr(triton_basis, "spline", object.__new__(triton.JITFunction))
    reason = lambda device: triton_basis.unsupported_tensors(torch.device(device), x=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "7.5" in reason("cuda:0")
    assert "cpu" in reason("cpu")
    found.major, found.minor = 9, 0
    assert reason("cuda:0") is None
    assert triton_basis.device_properties(0) == (90, 40)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA" in reason("cuda:0")


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    layer = make(40_000, 8_192, 16, 5, 3, gate=False, base=False, dtype=torch.bfloat16)
    wide = torch.empty(40_000, 65_536, dtype=torch.bfloat16, device=DEVICE)
    wide[:, -8_192:] = layer.x
    y = triton_kan.forward(*layer.arguments)
    assert torch.equal(triton_kan.forward(wide[:, -8_192:], *layer.arguments[1:]), y)
    gradients = triton_kan.backward(layer.dy, *layer.arguments, layer.needs)
    strided = triton_kan.backward(layer.dy, wide[:, -8_192:], *layer.arguments[1:], layer.needs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, strided) if a is not None)


def make_waves(M, I, O, dtype=torch.float32, x_dtype=None) -> tuple:
    """dy, x, sin_weight, cos_weight and the frequency of a layer of waves, scaled so that outputs are O(1)."""
    draw = lambda *shape, dtype=dtype, scale=1.0: (torch.randn(*shape) * scale).to(dtype).to(DEVICE)  # noqa: E731
    x = draw(M, I, dtype=x_dtype or dtype, scale=3.0)
    return draw(M, O), x, *(draw(O, I, scale=max(I, 1) ** -0.5) for _ in range(2)), 1.7


def run_waves(dy, *layer, needs=(True, True, True)) -> tuple[Tensor | None, ...]:
    return triton_waves.forward(*layer), *triton_waves.backward(dy, *layer, needs)


def run_plain_waves(dy, *layer) -> tuple[Tensor, ...]:
    *leaves, frequency = (t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in layer)
    y = fourier_linear(*leaves, frequency, backend="torch")
    return y, *torch.autograd.grad(y, leaves, dy)


def check_waves(*layer) -> None:
    """`check` for a layer of waves; its twin has w x in float32, as the kernels do."""
    exact = run_plain_waves(*(t.double() if isinstance(t, Tensor) else t for t in layer))
    epsilon = 4e-3 if DEVICE == "cpu" and layer[2].dtype == torch.bfloat16 else 1e-6
    dtypes = [t.dtype for t in layer[:4]]
    twin = run_plain_waves(layer[0], layer[1].float(), *layer[2:])
    for *results, name, dtype in zip(run_waves(*layer), twin, exact, ("y", *"xab"), dtypes):
        assert results[0].dtype == dtype
        assert_twice(*results, epsilon, name)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 5, 6), torch.float32), (SHAPES[0], torch.float32), *itertools.product(SHAPES[1:], triton_basis.DTYPES)],
    ids=str,
)
def test_waves_match_float64(shape, dtype):
    check_waves(*make_waves(*shape, dtype))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_waves_of_x_of_another_dtype(x_dtype):
    check_waves(*make_waves(*SHAPES[1], torch.bfloat16, x_dtype))


def test_waves_of_strided_tensors():
    dy, x, a, b, frequency = make_waves(50, 24, 18)
    strided = torch.randn(24, 100, device=DEVICE).T[::2]
    transposed = [t.T.contiguous().T for t in (dy, a, b)]
    check_waves(transposed[0], strided, *transposed[1:], frequency)
    check_waves(torch.randn(1, 1, device=DEVICE).expand(50, 18), x, a, b, frequency)


@pytest.mark.parametrize("reach", [1, 10, 100, 1e3, 1e4, 1e5])
def test_waves_of_large_arguments(reach):
    """Each wave at most twice as far off as torch's own."""
    x = reach * (2 * torch.rand(100, 1000, device=DEVICE) - 1)
    sine, cosine = triton_waves.waves(x, 1.0, torch.float32)
    assert_twice(sine, x.sin(), x.double().sin(), 0, "sine")
    assert_twice(cosine, x.cos(), x.double().cos(), 0, "cosine")


def test_waves_at_quarter_turns_and_beyond_all_digits():
    turns = torch.pi / 2 * torch.arange(-2000, 2001, dtype=torch.float64)
    points = torch.cat([turns, turns + torch.pi / 4]).float().unsqueeze(0).to(DEVICE)
    exact = points.double().sin(), points.double().cos()
    for found, wave in zip(triton_waves.waves(points, 1.0, torch.float32), exact):
        assert (found - wave).abs().max() < 2e-7
    far = torch.logspace(5, 38, 10_000, device=DEVICE).unsqueeze(0)
    for found in triton_waves.waves(torch.cat([far, -far]), 1.0, torch.float32):
        assert (found.abs() <= 1).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_waves_of_nan_and_infinity_are_nan():
    dy, x, *weights, frequency = make_waves(20, 10, 12)
    clean = run_waves(dy, x, *weights, frequency)
    x[:3, 7] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    y, dx, *dweights = run_waves(dy, x, *weights, frequency)
    assert y[:3].isnan().all()
    assert torch.equal(y[3:], clean[0][3:])
    assert dx.isnan().nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]
    for dweight in dweights:
        assert dweight[:, 7].isnan().all()
        assert dweight.isnan().sum() == 12


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_of_waves_asked_for(needs):
    layer = make_waves(9, 6, 7)
    everything = run_waves(*layer)
    for gradient, expected, needed in zip(run_waves(*layer, needs=needs), everything, (True, *needs)):
        assert torch.equal(gradient, expected) if needed else gradient is None


def test_two_runs_of_waves_are_bit_equal():
    layer = make_waves(*((3000, 400, 70) if DEVICE == "cuda" else (20, 10, 12)), torch.bfloat16)
    assert all(map(torch.equal, run_waves(*layer), run_waves(*layer)))


@pytest.mark.gpu
def test_offsets_of_waves_beyond_32_bits():
    x = torch.randn(2**17 + 3, 2**14, dtype=torch.bfloat16, device=DEVICE)
    last = x[-5:].clone()
    sine, cosine = triton_waves.waves(x, 1.7, x.dtype)
    expected = triton_waves.waves(last, 1.7, x.dtype)
    assert torch.equal(sine[-5:], expected[0])
    assert torch.equal(cosine[-5:], expected[1])
    dx = triton_waves.fold(sine, cosine, x, 1.7, make_waves=True)
    assert torch.equal(sine[-5:], expected[0])
    assert torch.equal(dx[-5:], triton_waves.fold(*expected, last, 1.7, make_waves=False))


# What the compiler makes of the kernels, for GPUs that need not be there.

Case = collections.namedtuple("Case", "dtype spline_order grid_size gate base rows x norm", defaults=[None, False])
TRAINING, ALL = (4096,), (1, 16, 4096)
CASES = [
    Case("bfloat16", 1, 3, True, False, ALL, norm=True),  # kan_gated, C = 4
    Case("bfloat16", 1, 6, False, False, TRAINING, norm=True),  # kan_mix, C = 7
    Case("bfloat16", 1, 15, True, False, TRAINING, norm=True),  # four words an input
    Case("bfloat16", 3, 5, False, True, ALL),  # kan, C = 8
    Case("bfloat16", 3, 5, True, True, TRAINING),
    Case("bfloat16", 2, 3, True, True, TRAINING),  # a C that is no power of 2
    Case("float16", 1, 7, False, True, TRAINING),
    Case("float32", 3, 5, False, True, (1, 4096)),
    Case("bfloat16", 1, 3, True, False, TRAINING, x="float32"),  # kan_gated under autocast
]
MANY_CASES = (
    [
        Case(dtype, k, G, gate, base, ALL)
        for dtype, (k, G), gate, base in itertools.product(
            ("bfloat16", "float16", "float32"),
            [(1, 3), (1, 7), (2, 3), (2, 4), (3, 3), (3, 5)],
            (False, True),
            (False, True),
        )
    ]
    + CASES[:3]
    + CASES[-1:]
)
# Decoding float32 coefficients puts up to 69 bytes a thread aside with triton 3.9.
SPILLED_BYTES = 0 if triton.__version__.startswith("3.6.") else 80
CAPABILITIES = (80, 89, 90, 100, 120)


def compiled(capability: int, cases: list[Case], cache: Path) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), str(capability)],
        input=json.dumps([case._asdict() for case in cases]),
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_compiled(kernels: list[dict]) -> None:
    assert {kernel["kernel"] for kernel in kernels} >= {
        "_phi_kernel", "_phi_flat_kernel", "_fold_kernel", "_kan_decode_kernel", "_sum_kernel",
        "_waves_kernel", "_fold_waves_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= 48 * 1024, kernel  # what every GPU gives every program
        assert kernel["stack"] <= SPILLED_BYTES, f"spills registers: {kernel}"
        most = {"_phi_kernel": 128, "_fold_kernel": 128, "_waves_kernel": 64, "_fold_waves_kernel": 64}
        if kernel["kernel"] in most:
            assert kernel["registers"] <= most[kernel["kernel"]], f"too few programs share a multiprocessor: {kernel}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_ahead_of_time(capability, tmp_path):
    check_compiled(compiled(capability, CASES if capability == 90 else CASES[:5], tmp_path))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_configuration_compiles_ahead_of_time(capability, tmp_path):
    for dtype in ("bfloat16", "float16", "float32"):
        check_compiled(compiled(capability, [c for c in MANY_CASES if c.dtype == dtype], tmp_path))


def test_a_new_number_of_rows_compiles_nothing(tmp_path):
    """One variant of each training kernel over ten lengths, by triton's own specialization."""
    program = """
import json, sys
import aot
lengths = (1, 65, 100, 128, 129, 1000, 1024, 2048, 3000, 4095, 16384)
variants = {}
for case in json.load(sys.stdin):
    for launch in aot.launches(aot.Case(**case | {"rows": lengths}), 90):
        variants.setdefault(launch.kernel.__name__, set()).add(str(launch.variant(90)))
print(json.dumps({name: len(found) for name, found in variants.items()}))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([CASES[0]._asdict()]), env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = json.loads(done.stdout)
    sums = counts.pop("_sum_kernel")  # one for each pair of alignments, whatever the lengths
    assert counts.pop("_kan_decode_kernel") == 2  # coefficients in the weights' dtype, and in int8
    assert counts.pop("_waves_kernel") == 2  # whole tiles, and rows of 136
    assert counts.pop("_fold_waves_kernel") == 4  # either with waves for the weights' gradients, and without
    assert set(counts.values()) == {1}, counts
    assert sums <= 2


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("M", "I"), [(1, 300), (3, 37)])
def test_decode_of_int8_coefficients(M, I, gate, k):
    layer = make(M, I, 45, 8 - k, k, gate=gate, base=gate)
    scale = layer.spline_weight.abs().amax(1) / 127
    quantized = (layer.spline_weight / scale[:, None]).round().to(torch.int8)
    rest = layer.arguments[3:]
    y = triton_kan.decode_int8(layer.x, layer.gate, quantized, scale, *rest)
    layer.spline_weight = quantized * scale[:, None]
    assert_twice(y, torch_kan.forward(*layer.arguments), torch_kan.forward(*layer.double().arguments), 1e-6, "y")
