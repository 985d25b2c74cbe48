import copy
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from numerics import assert_close, assert_twice
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.flop_counter import FlopCounterMode

from kansformer import splines
from kansformer.functional import BASE_ACTIVATIONS, choose_backend, decompositions, fourier_linear, kan_linear
from kansformer.kernels import torch_kan
from kansformer.layers import FourierLinear, KANLinear

I, O, G = 13, 7, 5


def tensors(rows, spline_order, gated=False, based=True, dtype=torch.float64, x_dtype=None, grid_size=G, I=I, O=O):
    """Random operands of one layer, scaled for outputs of about unit size; one grid a feature."""
    x_dtype = x_dtype or dtype
    count = splines.num_basis(grid_size, spline_order)
    x = torch.randn(rows, I, dtype=torch.float64)
    lo = -1 - torch.rand(I)
    return {
        "x": x.to(x_dtype).requires_grad_(),
        "gate": torch.randn(rows, I, dtype=torch.float64).to(x_dtype).requires_grad_() if gated else None,
        "spline_weight": (torch.randn(I * count, O, dtype=torch.float64) / 2).to(dtype).requires_grad_(),
        "grid": torch.stack([lo, lo + 2 + torch.rand(I)], 1),
        "base_weight": (torch.randn(O, I, dtype=torch.float64) / 3).to(dtype).requires_grad_() if based else None,
    }


def reference(x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation="silu"):
    """The formula with Phi written out, in float64."""
    x, spline_weight = x.double(), spline_weight.double()
    phi = splines.basis(x, grid, grid_size, spline_order, constant_outside=base_weight is None)
    base = torch_kan.activation(x, base_activation)
    if gate is not None:
        phi, base = phi * gate.double().unsqueeze(-1), base * gate.double()
    y = phi.flatten(-2) @ spline_weight
    return y if base_weight is None else y + F.linear(base, base_weight.double())


def layer(t, spline_order, grid_size=G, **kwargs):
    return kan_linear(**t, grid_size=grid_size, spline_order=spline_order, **kwargs)


def gradients(y, t, cotangent):
    names = [name for name in ("x", "gate", "spline_weight", "base_weight") if t[name] is not None]
    return dict(zip(names, torch.autograd.grad(y, [t[name] for name in names], cotangent.to(y.dtype))))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """A Phi of 100 rows or less in float64, so that small tests have several chunks."""
    monkeypatch.setattr(torch_kan, "CPU_CHUNK_BYTES", 8 * 100 * I * (G + 3))


# Rows: none, one (the decode path), a few, and several chunks with a remainder.
@pytest.mark.parametrize("rows", [0, 1, 3, 405])
@pytest.mark.parametrize("spline_order", [1, 2, 3])
@pytest.mark.parametrize(("gated", "based"), list(itertools.product([False, True], repeat=2)))
def test_forward_and_gradients(rows, spline_order, gated, based, poison_empty):
    t = tensors(rows, spline_order, gated, based)
    y, truth = layer(t, spline_order), reference(*t.values(), G, spline_order)
    assert_close(y, truth, 1e-12)
    cotangent = torch.randn_like(y)
    expected = gradients(truth, t, cotangent)
    for name, gradient in gradients(y, t, cotangent).items():
        assert_close(gradient, expected[name], 1e-11, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("x_dtype", [None, torch.float32])
def test_low_precision(dtype, rows, x_dtype, poison_empty):
    """Each result at most twice as far off as the written-out formula at the same dtype."""
    t = tensors(rows, 3, gated=True, dtype=dtype, x_dtype=x_dtype)
    y, truth = layer(t, 3), reference(*t.values(), G, 3)
    phi = splines.basis(t["x"], t["grid"], G, 3) * t["gate"].unsqueeze(-1)
    twin = phi.flatten(-2).to(dtype) @ t["spline_weight"]
    twin = twin + F.linear((F.silu(t["x"]) * t["gate"]).to(dtype), t["base_weight"])
    epsilon = 2 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert_twice(y, twin, truth, epsilon)
    cotangent = torch.randn_like(y)
    expected, twins = gradients(truth, t, cotangent), gradients(twin, t, cotangent)
    for name, gradient in gradients(y, t, cotangent).items():
        assert gradient.dtype == t[name].dtype
        assert_twice(gradient, twins[name], expected[name], epsilon, name)


@pytest.mark.parametrize("base_activation", BASE_ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_base_activations(base_activation, gated):
    t = tensors(40, 2, gated)
    y, truth = (
        layer(t, 2, base_activation=base_activation),
        reference(*t.values(), G, 2, base_activation),
    )
    assert_close(y, truth, 1e-12)
    cotangent = torch.randn_like(y)
    expected = gradients(truth, t, cotangent)
    for name, gradient in gradients(y, t, cotangent).items():
        assert_close(gradient, expected[name], 1e-11, name)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=4) if any(w)])
def test_only_the_gradients_asked_for(wanted):
    t = tensors(30, 1, gated=True)
    names = ("x", "gate", "spline_weight", "base_weight")
    for name, need in zip(names, wanted):
        t[name].requires_grad_(need)
    y, truth = layer(t, 1), reference(*t.values(), G, 1)
    cotangent = torch.randn_like(y)
    asked = [t[name] for name, need in zip(names, wanted) if need]
    for gradient, expected in zip(
        torch.autograd.grad(y, asked, cotangent), torch.autograd.grad(truth, asked, cotangent)
    ):
        assert_close(gradient, expected, 1e-11)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_on_knots_at_the_ends_and_far_outside(rows, spline_order):
    t = tensors(rows, spline_order, based=False)
    t["grid"] = torch.tensor([-1.0, 1.0])
    special = torch.tensor([-1e30, -3.0, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4, 3.0, 1e30, float("inf"), -float("inf")])
    t["x"] = special.double().expand(rows, I).clone().requires_grad_()
    y, truth = layer(t, spline_order), reference(*t.values(), G, spline_order)
    assert_close(y, truth, 1e-12)
    cotangent = torch.randn_like(y)
    for name, gradient in gradients(y, t, cotangent).items():
        assert_close(gradient, gradients(truth, t, cotangent)[name], 1e-11, name)
        break  # x: its derivative at the knots is the reference's, from the right


@pytest.mark.parametrize("rows", [2, 300])
def test_nan_stays_in_its_row(rows):
    t = tensors(rows, 3)
    t["x"].data[1, 4] = float("nan")
    y = layer(t, 3)
    assert y[1].isnan().all()
    assert y[torch.arange(rows) != 1].isfinite().all()


def test_shapes_and_strides():
    t = tensors(24, 3, gated=True)
    y = layer(t, 3)
    reshaped = t | {name: t[name].view(2, 3, 4, I) for name in ("x", "gate")}
    assert torch.equal(layer(reshaped, 3), y.view(2, 3, 4, O))
    strided = t | {name: t[name].t().contiguous().t() for name in ("x", "gate", "spline_weight", "base_weight")}
    assert_close(layer(strided, 3), y, 1e-14)
    one = layer(t | {"x": t["x"][0], "gate": t["gate"][0]}, 3)
    assert one.shape == (O,)
    bias = torch.randn(O)
    assert_close(layer(t, 3, bias=bias), y + bias, 1e-14)


def test_gradcheck_twice():
    t = tensors(3, 3, gated=True, I=3, O=2)
    x, gate, spline_weight, grid, base_weight = t.values()

    def f(x, gate, spline_weight, base_weight):
        return kan_linear(x, spline_weight, grid, grid_size=G, spline_order=3, base_weight=base_weight, gate=gate)

    assert torch.autograd.gradcheck(f, (x, gate, spline_weight, base_weight))
    assert torch.autograd.gradgradcheck(f, (x, gate, spline_weight, base_weight))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize("based", [False, True])
def test_transforms_and_forward_mode(based):
    """torch.func and tangents agree with backward: through the operator they would be zero, or fail."""
    t = tensors(3, 2, gated=True)
    base = {"base_weight": t["base_weight"]} if based else {}

    def f(x):
        return kan_linear(x, t["spline_weight"], t["grid"], grid_size=G, spline_order=2, gate=t["gate"], **base)

    expected = torch.autograd.functional.jacobian(f, t["x"])
    assert expected.norm() > 0.1
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert_close(jacobian(f)(t["x"]), expected, 1e-12)
    tangent = torch.randn_like(t["x"])
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(t["x"], tangent))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_close(found, torch.einsum("moni,ni->mo", expected, tangent), 1e-12)
    layer = KANLinear(4, 3, base_activation="silu" if based else None).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    per_row = torch.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    assert_close(per_row, torch.autograd.grad(layer(x).sum(), x)[0], 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms(backend):
    """As above, where torch.compile traces the transform, and where no weight wants a gradient."""
    layer, x, v = KANLinear(3, 2).requires_grad_(False), torch.randn(4, 3), torch.randn(4, 3)

    def tangent(x):
        return torch.func.jvp(layer, (x,), (v,))[1]

    def gradient(x):
        return torch.func.grad(lambda z: layer(z).square().sum())(x)

    for f in (tangent, gradient):
        torch._dynamo.reset()
        assert f(x).norm() > 0.1
        assert_close(torch.compile(f, backend=backend)(x), f(x), 1e-6)


@pytest.mark.parametrize("based", [False, True])
def test_norm_eps_is_a_norm_before_the_layer(based):
    """Values, gradients of two orders, torch.func, compiled training, the operator as plain operations."""
    t = tensors(7, 3, gated=True, based=based)
    call = lambda x, gate=t["gate"], **options: layer(t | {"x": x, "gate": gate}, 3, **options)  # noqa: E731
    inside = lambda x, *gate: call(x, *gate, norm_eps=0.1)  # noqa: E731
    x, before = t["x"], call(torch_kan.normalise(t["x"], 0.1))
    (slope,) = torch.autograd.grad(before.sum(), x, retain_graph=True)
    for function in (inside, torch.compile(inside, backend="aot_eager", fullgraph=True)):
        assert_close(function(x), before, 1e-13)
        assert_close(torch.autograd.grad(function(x).sum(), x)[0], slope, 1e-13)
    assert torch.autograd.gradgradcheck(inside, (x,))
    each = torch.func.vmap(torch.func.grad(lambda x, gate: inside(x, gate).sum()))
    assert_close(each(x, t["gate"]), slope, 1e-13)
    operands = t["x"], t["gate"], t["spline_weight"], t["grid"], t["base_weight"]
    plain = decompositions()[torch.ops.kansformer.kan_linear.default]
    assert_close(plain(*operands, G, 3, "silu", 0.1), before, 1e-13)


@pytest.mark.parametrize("norm_eps", [-1.0, float("nan"), "1e-6"])
def test_a_bad_norm_eps_is_said(norm_eps):
    with pytest.raises(ValueError, match="norm_eps is"):
        layer(tensors(2, 1), 1, norm_eps=norm_eps)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_eager_training_calls_no_operator_where_nothing_looks_on(monkeypatch):
    """And the operator where something does: a dispatch mode, a tracer. Both give the same bits."""
    t = tensors(9, 1, gated=True)
    calls = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **kwargs or {})

    def step():
        y = layer(t, 1)
        return [y, *torch.autograd.grad(y.sum(), [v for v in t.values() if v is not None and v.requires_grad])]

    with Look():
        seen = step()
    assert [call for call in calls if "kansformer" in call] == [
        "kansformer.kan_linear.default",
        "kansformer.kan_linear_backward.default",
    ]
    for name in ("kan_linear", "kan_linear_backward"):
        monkeypatch.setattr(torch.ops.kansformer, name, None)
    for value, expected in zip(step(), seen):
        assert torch.equal(value, expected)
    monkeypatch.undo()
    for name in ("kan_linear", "kan_linear_backward", "kan_linear_int8"):
        assert torch.Tag.flexible_layout in getattr(torch.ops.kansformer, name).default.tags
    module = KANLinear(I, O)
    traced = torch.jit.trace(module, torch.randn(5, I), check_trace=False)
    x = torch.randn(31, I)
    assert_close(traced(x), module(x), 1e-6)


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("norm_eps", [None, 0.1])
def test_batches_of_gradients(operator, norm_eps, monkeypatch):
    """is_grads_batched, and what is built on it: all rows of a Jacobian or Hessian in one backward pass."""
    if operator:
        monkeypatch.setattr("kansformer.functional._observed", lambda *tensors: True)
    t = tensors(3, 3, gated=True)
    operands = [v for v in t.values() if v.requires_grad]
    y = layer(t, 3, norm_eps=norm_eps)
    directions = torch.randn(2, *y.shape, dtype=y.dtype)
    batches = torch.autograd.grad(y, operands, directions, retain_graph=True, is_grads_batched=True)
    for at, direction in enumerate(directions):
        for batch, alone in zip(batches, torch.autograd.grad(y, operands, direction, retain_graph=True)):
            assert_close(batch[at], alone, 1e-13)
    energy = lambda x: layer(t | {"x": x}, 3, norm_eps=norm_eps).square().sum()  # noqa: E731
    x, hessian = t["x"].detach(), torch.autograd.functional.hessian
    assert_close(hessian(energy, x, vectorize=True), hessian(energy, x), 1e-13)


def test_third_derivative():
    x = torch.linspace(-0.9, 0.95, 50, dtype=torch.float64).unsqueeze(1).requires_grad_()
    grid = torch.tensor([-1.0, 1.0])
    weight = splines.fit(x.detach(), (x.detach() ** 3).unsqueeze(-1), grid, 4, 3)
    y = kan_linear(x, weight, grid, grid_size=4, spline_order=3)
    for expected in (3 * x**2, 6 * x, torch.full_like(x, 6)):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert_close(y, expected, 1e-9)


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed, norm_eps):
    """Also of tensors that are not contiguous, whose gradients are."""
    t = tensors(6, 3, gated=True)
    if transposed:
        t = {name: v.detach().mT.clone().mT.requires_grad_(v.requires_grad) for name, v in t.items()}
    forward = (*t.values(), G, 3, "silu", norm_eps, "torch")
    torch.library.opcheck(torch.ops.kansformer.kan_linear, forward)
    detached = [v.detach() for v in t.values()]
    backward = (
        torch.randn(6, O, dtype=torch.float64),
        *detached,
        G,
        3,
        "silu",
        norm_eps,
        "torch",
        [True, False, True, True],
    )
    torch.library.opcheck(torch.ops.kansformer.kan_linear_backward, backward)


def test_saved_for_backward_is_x_and_gate():
    t = tensors(500, 3, gated=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        layer(t, 3)
    assert {s.data_ptr() for s in saved} == {v.data_ptr() for v in t.values()}


def test_compile_does_not_recompile_for_a_new_length():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    t = tensors(1, 1)
    compiled = torch.compile(lambda x: layer(t | {"x": x}, 1), backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 4, 8, 11, 21, 34, 55, 89, 144, 300):  # none equal to another dimension: those share a symbol
        x = torch.randn(rows, I, dtype=torch.float64, requires_grad=True)
        y = compiled(x)
        assert_close(y, layer(t | {"x": x}, 1), 1e-14)
        y.sum().backward()
        assert x.grad is not None
    assert counter.frame_count == 1


def test_compile_with_every_dimension_symbolic():
    torch._dynamo.reset()
    module = KANLinear(I, O, G, 1)
    compiled = torch.compile(lambda x, gate: module(x, gate), backend="eager", fullgraph=True, dynamic=True)
    for rows in (3, 11):
        x, gate = torch.randn(2, rows, I)
        assert_close(compiled(x, gate), module(x, gate), 1e-6)


def test_compiled_backward_is_one_operator():
    """Tracing must not take the differentiable backward, which writes Phi down."""
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    t = tensors(9, 3)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    call = lambda x: layer(t | {"x": x}, 3, backend="torch")  # noqa: E731
    torch.compile(call, backend=backend, fullgraph=True)(t["x"]).sum().backward()
    forward, backward = ([name for name in graph if "kansformer" in name or "mm" in name] for graph in graphs)
    assert forward == ["kansformer.kan_linear.default"]
    assert backward == ["kansformer.kan_linear_backward.default"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's way")
@pytest.mark.parametrize(("k", "based"), [(1, False), (3, True)])
def test_training_compiled_on_a_cpu_is_plain_operations_that_keep_no_phi(k, based, monkeypatch):
    """Equal outputs and gradients, with one grid and one an input, cut as by inductor; inference, a named backend
    and the environment variable keep the operator."""
    names, kept = [], []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def compiled(**options):
        torch._dynamo.reset()
        names.clear()
        call = lambda x: layer(t | {"x": x}, k, **options)  # noqa: E731
        compilers = {"fw_compiler": record, "bw_compiler": record, "partition_fn": min_cut_rematerialization_partition}
        return torch.compile(call, backend=aot_autograd(**compilers), fullgraph=True)

    t = tensors(200, k, gated=True, based=based)
    t["grid"] = t["grid"] if k == 3 else t["grid"][0]
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s.numel()) or s, lambda s: s):
        y = compiled()(t["x"])
    assert max(kept) < t["x"].numel() * (G + k)
    leaves = [v for v in t.values() if v is not None and v.requires_grad]
    cotangent = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, cotangent)
    assert not [name for name in names if "kansformer" in name]
    expected = layer(t, k)
    assert_close(y, expected, 1e-13)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, cotangent)):
        assert_close(ours, theirs, 1e-12)
    with torch.no_grad():
        compiled()(t["x"])
    assert "kansformer.kan_linear.default" in names
    compiled(backend="torch")(t["x"])
    assert "kansformer.kan_linear.default" in names
    monkeypatch.setenv("KANSFORMER_BACKEND", "torch")
    compiled()(t["x"])
    assert "kansformer.kan_linear.default" in names


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's way")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on CPU needs g++")
def test_training_compiled_on_a_cpu_goes_along_the_inputs():
    """No loop that inductor makes transposes tiles, which took a small model's fused loops twice the time."""
    torch._dynamo.reset()
    kan = KANLinear(88, 64, grid_size=3, spline_order=1, base_activation=None)
    z, v = (torch.randn(256, 88).requires_grad_() for _ in range(2))
    y, (forward, backward) = run_fw_bw_and_get_code(lambda: torch.compile(kan)(z, gate=v, norm_eps=1e-6))
    assert_close(y, kan(z, gate=v, norm_eps=1e-6), 1e-6)
    assert "cpp_fused" in backward
    assert "transpose_mxn" not in forward + backward


def test_autocast():
    t = tensors(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(t, 3)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(t, 3), 1e-2)
    y.sum().backward()
    assert t["spline_weight"].grad.dtype == torch.float32


def test_activation_checkpointing_and_functional_call():
    t = tensors(20, 3)
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(t | {"x": x}, 3), t["x"], use_reentrant=False)
    cotangent = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, t["x"], cotangent)
    assert torch.equal(gradient, torch.autograd.grad(layer(t, 3), t["x"], cotangent)[0])


def test_flops():
    t = tensors(30, 3)
    with FlopCounterMode(display=False) as counter:
        layer(t, 3).sum().backward()
    weights = t["spline_weight"].numel() + t["base_weight"].numel()
    assert counter.get_total_flops() == 3 * 2 * 30 * weights


def test_two_runs_are_bit_equal():
    t = tensors(300, 3, gated=True, dtype=torch.float32)
    results = []
    for _ in range(2):
        y = layer(t, 3)
        results.append([y, *gradients(y, t, torch.ones_like(y)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spline_weight": torch.zeros(I * 7, O)}, ValueError, r"spline_weight must be \(104, O\)"),
        ({"grid": torch.zeros(I)}, ValueError, r"grid must be \(2,\) or \(13, 2\) here, got \(13,\)"),
        ({"base_weight": torch.zeros(I, O)}, ValueError, r"base_weight must be \(7, 13\)"),
        ({"gate": torch.zeros(3, I)}, ValueError, "gate must be"),
        ({"bias": torch.zeros(I)}, ValueError, "bias must be"),
        ({"x": torch.zeros(2, I, dtype=torch.long)}, TypeError, "int64"),
        ({"x": torch.zeros(())}, ValueError, "0 features"),
        ({"grid_size": 0}, ValueError, "grid_size >= 1"),
        ({"spline_order": 4}, ValueError, "1, 2 or 3, got 5 and 4"),
        ({"base_activation": "tanh"}, ValueError, "'tanh'; choose one of silu"),
        ({"backend": "cuda"}, ValueError, "'cuda'; choose one of 'auto', 'torch', 'triton'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    settings = tensors(2, 3, dtype=torch.float32) | {"grid_size": G, "spline_order": 3}
    with pytest.raises(error, match=message):
        kan_linear(**(settings | change))


def test_choice_of_backend(monkeypatch):
    x, weight = torch.zeros(2, I), torch.zeros(I * 8, O)
    assert choose_backend(x, weight, spline_order=3) == "torch"
    monkeypatch.setenv("KANSFORMER_BACKEND", "torch")
    assert choose_backend(x, weight, spline_order=3) == "torch"
    monkeypatch.setenv("KANSFORMER_BACKEND", "tensorflow")
    with pytest.raises(ValueError, match="KANSFORMER_BACKEND is 'tensorflow'"):
        choose_backend(x, weight, spline_order=3)
    assert choose_backend(x, weight, spline_order=3, backend="torch") == "torch"  # the argument wins


@pytest.mark.parametrize("rows", [1, 40])
def test_triton_backend_through_the_operator(rows):
    """The same operator on the kernels (interpreted without a GPU): forward, all gradients, and the second ones."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        import interpreter  # noqa: F401
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t = tensors(rows, 3, gated=True, dtype=torch.float32)
    t = {name: tensor.detach().to(device).requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    y, twin = layer(t, 3, backend="triton"), layer(t, 3, backend="torch")
    assert_close(y, twin, 1e-5)
    cotangent = torch.randn_like(y)
    expected = gradients(twin, t, cotangent)
    for name, gradient in gradients(layer(t, 3, backend="triton"), t, cotangent).items():
        assert_close(gradient, expected[name], 1e-5, name)
    (slope,) = torch.autograd.grad(y, t["x"], cotangent, create_graph=True)
    assert_close(torch.autograd.grad(slope.sum(), t["x"])[0].isfinite().float(), torch.ones(rows, I, device=device), 0)


def test_triton_says_why_it_cannot_run():
    program = (
        "import torch; from kansformer.functional import choose_backend;"
        "choose_backend(torch.zeros(2, 3), torch.zeros(24, 4), spline_order=3, backend='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError: backend 'triton' cannot run here: " in run.stderr


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("spline_order", [1, 3])
def test_live_rows_of_a_transposed_x(spline_order, gated):
    t = tensors(2, spline_order, gated)
    across = {name: t[name].detach().mT.contiguous().mT for name in ("x", "gate") if t[name] is not None}
    assert_close(layer(t | across, spline_order), layer(t, spline_order), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 300])  # live rows, and the product
@pytest.mark.parametrize("spline_order", [1, 2, 3])
@pytest.mark.parametrize("shared_grid", [False, True])
def test_without_base_the_ends_go_on_as_constants(spline_order, rows, dtype, shared_grid):
    t = tensors(rows, spline_order, gated=True, based=False, dtype=dtype)
    t["grid"] = torch.tensor([-1.9953, 1.9953]) if shared_grid else t["grid"]  # between two numbers of bfloat16
    lo, hi = t["grid"].unbind(-1)
    far = torch.where(torch.rand(rows, I) < 0.5, lo - 0.3 * torch.rand(rows, I), hi + 0.3 * torch.rand(rows, I))
    far[0] = torch.tensor([torch.inf, -torch.inf] * I)[:I]
    some = torch.rand(rows, I) < 0.3
    some[0] = True
    if shared_grid and rows > 2:
        far[1], some[1] = 1.9921875, True  # inside
    x = torch.where(some, far, t["x"].detach().float()).to(dtype).requires_grad_()
    y = layer(t | {"x": x}, spline_order)
    # The bounds are exact, also where x has fewer bits than they.
    at_the_ends = layer(t | {"x": x.double().clamp(lo, hi)}, spline_order)
    assert_close(y, at_the_ends, 1e-12 if dtype == torch.float64 else 2e-2)
    y.sum().backward()
    exact = x.detach().double()
    outside = (exact < lo) | (exact > hi)
    assert outside.any()
    assert (x.grad[outside] == 0).all()
    assert (x.grad[(exact > lo) & (exact < hi)] != 0).float().mean() > 0.9
    if shared_grid and rows > 2:
        assert (x.grad[1] != 0).all()


@pytest.fixture
def waves():
    """A layer of waves on the kernels (interpreted without a GPU), its twin on torch, and an input."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        import interpreter  # noqa: F401
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = FourierLinear(I, O, backend="triton", device=device)
    twin = copy.deepcopy(fused)
    twin.backend = "torch"
    return fused, twin, torch.randn(2, 3, I, device=device, requires_grad=True)


def operators(function):
    """Those of ours that a call of `function` and its backward dispatch."""
    calls = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **kwargs or {})

    with Look():
        function().sum().backward()
    return [call.removeprefix("kansformer.") for call in calls if "kansformer" in call]


BOTH_WAVES = ["fourier_linear.default", "fourier_linear_backward.default"]


def test_waves_by_the_operator_and_without(waves, monkeypatch):
    """As plain operations, whether something looks on or not; both ways the same bits, and x alone is kept."""
    fused, twin, x = waves
    leaves = [x, *fused.parameters()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        y = fused(x)
    assert {s.data_ptr() for s in saved} == {leaf.data_ptr() for leaf in leaves}
    dy = torch.randn_like(y)
    gradients, expected = torch.autograd.grad(y, leaves, dy), twin(x)
    assert_close(y, expected, 1e-6)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, [x, *twin.parameters()], dy)):
        assert_close(gradient, exact, 1e-6)
    assert torch.equal(fourier_linear(x, *list(fused.parameters()), 1.5, backend="triton"), y)
    assert operators(lambda: fused(x)) == BOTH_WAVES
    assert operators(lambda: twin(x)) == []
    monkeypatch.setattr("kansformer.functional._observed", lambda *tensors: True)
    seen = fused(x)
    assert torch.equal(seen, y)
    assert all(map(torch.equal, torch.autograd.grad(seen, leaves, dy), gradients))
    plain = decompositions()[torch.ops.kansformer.fourier_linear.default]
    assert_close(plain(x.flatten(0, 1), *fused.parameters(), 1.5), y.flatten(0, 1), 1e-6)


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_waves_under_a_checkpoint(waves, use_reentrant, operator, monkeypatch):
    if operator:
        monkeypatch.setattr("kansformer.functional._observed", lambda *tensors: True)
    fused, _, x = waves
    expected = torch.autograd.grad(fused(x).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, *expected)


def test_a_layer_of_waves_pickled_before_it_had_a_backend(waves):
    _, twin, x = waves
    old = copy.deepcopy(twin)
    del old.backend
    assert_close(old(x), twin(x), 1e-6)


def test_projections_of_two_dtypes_under_autocast(waves):
    fused, _, x = waves
    with torch.autocast(x.device.type, torch.bfloat16):
        y = fused(x)
        fused.cos_proj.bfloat16()
        assert_close(fused(x), y, 1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_waves_is_traced_symbolically():
    layer, x = FourierLinear(I, O), torch.randn(3, I)
    assert torch.equal(torch.fx.symbolic_trace(layer, {"gate": None})(x), layer(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_waves(waves, transposed):
    fused, _, x = waves
    operands = [x.detach().flatten(0, 1), *(p.detach() for p in fused.parameters())]
    if transposed:
        operands = [t.T.contiguous().T for t in operands]
    dy = torch.randn(6, O, device=x.device)
    forward, backward = torch.ops.kansformer.fourier_linear, torch.ops.kansformer.fourier_linear_backward
    torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in operands), 1.5))
    torch.library.opcheck(backward, (dy, *operands, 1.5, [True, False, True]))
    assert all(torch.Tag.flexible_layout in operator.default.tags for operator in (forward, backward))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize("operator", [False, True])
def test_waves_beyond_a_first_gradient(waves, operator, monkeypatch):
    """Second derivatives, batches of gradients, torch.func and tangents are those of plain operations."""
    if operator:
        monkeypatch.setattr("kansformer.functional._observed", lambda *tensors: True)
    *layers, x = waves
    seconds, jacobians, tangents, hessians = [], [], [], []
    for layer in layers:
        y = layer(x)
        first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()]))
        directions = torch.eye(O, device=x.device).view(O, 1, 1, O).expand(O, *y.shape)
        jacobians += torch.autograd.grad(layer(x), x, directions, is_grads_batched=True)
        tangents.append(torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1])
        hessians.append(torch.func.vmap(torch.func.hessian(lambda row, f=layer: f(row).sum()))(x.flatten(0, 1)))
    for ours, theirs in (*zip(*seconds), jacobians, tangents, hessians):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("change", ["adapter", "pre-hook", "hook", "backward hook", "forward", "bias", "gate", "type"])
def test_what_sits_on_a_projection_is_called(waves, change):
    """Each doubles what a projection, or the gate what a wave, gives: the kernels would pass it by."""
    fused, twin, x = waves
    module, gate, cosine = fused.sin_proj, None, 0 * fused.cos_proj.weight.data
    fused.cos_proj.weight.data, twin.cos_proj.weight.data = cosine, cosine
    factor = 2
    if change == "adapter":
        fused.sin_proj = torch.nn.Sequential(module, torch.nn.Linear(O, O, bias=False, device=x.device))
        fused.sin_proj[1].weight.data.copy_(2 * torch.eye(O))
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif change == "hook":
        module.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "backward hook":
        seen = []
        module.register_full_backward_hook(lambda module, dx, dy: seen.append(dy))
        fused(x).sum().backward()
        assert seen
        factor = 1
    elif change == "forward":
        module.forward = lambda x: 2 * F.linear(x, module.weight)
    elif change == "bias":
        module.bias = torch.nn.Parameter(torch.zeros(O, device=x.device))
        factor = 1
    elif change == "gate":
        gate = torch.full_like(x, 2)
    else:
        module.weight = torch.nn.Parameter(module.weight.data.as_subclass(Doubled))
    assert operators(lambda: fused(x, gate)) == []
    assert_close(fused(x, gate), factor * twin(x), 1e-6)


class Doubled(torch.Tensor):
    """A weight that stands for twice its values, as a quantised one stands for others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        return 2 * y.as_subclass(torch.Tensor) if function is F.linear else y


def test_autocast_of_waves(waves):
    fused, twin, x = waves
    for layer in (fused, twin):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(x)
            half = layer(x.bfloat16())
        assert y.dtype == half.dtype == torch.bfloat16
        assert_close(y, twin(x), 1e-2)
        assert_close(half, twin(x), 2e-2)
        y.sum().backward()
    for ours, theirs in zip(fused.parameters(), twin.parameters()):
        assert ours.grad.dtype == torch.float32
        assert_close(ours.grad, theirs.grad, 1e-2)


def test_flops_of_waves(waves):
    fused, twin, x = waves
    counts = []
    for layer in (fused, twin):
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 6 * 2 * I * O] * 2


def test_compiled_waves_are_one_operator_for_every_length_or_plain_operations(waves):
    for layer, ours in zip(waves[:2], (BOTH_WAVES, [])):
        graphs = []

        def record(graph, _, graphs=graphs):
            graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=record, bw_compiler=record)
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        for rows in (4, 9, 40):
            x = torch.randn(rows, I, device=waves[2].device, requires_grad=True)
            y = compiled(x)
            assert_close(y, waves[1](x), 1e-6)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert_close(dx, torch.autograd.grad(waves[1](x).sum(), x)[0], 1e-5)
        names = [name.removeprefix("kansformer.") for graph in graphs for name in graph if "kansformer" in name]
        assert names == ours
        assert len(graphs) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sin_weight": torch.zeros(I, O)}, ValueError, r"must be \(O, 13\); they are \(13, 7\) and \(7, 13\)"),
        ({"cos_weight": torch.zeros(O + 1, I)}, ValueError, r"they are \(7, 13\) and \(8, 13\)"),
        ({"cos_weight": torch.zeros(O, I, dtype=torch.half)}, TypeError, "float32 and cos_weight torch.float16"),
        ({"x": torch.zeros(2, I, dtype=torch.long)}, TypeError, "int64"),
        ({"x": torch.zeros(())}, ValueError, "0 features"),
        ({"backend": "cuda"}, ValueError, "'cuda'; choose one of 'auto', 'torch', 'triton'"),
        ({"backend": "triton", "x": torch.zeros(2, I).double()}, RuntimeError, "cannot run here: x is torch.float64"),
    ],
)
def test_bad_waves_are_named(change, error, message):
    if "triton" in change.values():
        pytest.importorskip("triton")
    settings = {"x": torch.zeros(2, I), "sin_weight": torch.zeros(O, I), "cos_weight": torch.zeros(O, I)}
    with pytest.raises(error, match=message):
        fourier_linear(**(settings | {"frequency": 1.5} | change))
