"""Edges that are formulas: found exactly in samples, evaluated, differentiated, saved, written down, trained."""

import copy
import math

import pytest
import sympy
import torch
from numerics import assert_close
from torch.autograd import gradcheck, gradgradcheck

from kansformer.kan import KAN, create_dataset, symbolic_fit
from kansformer.kan.formula import round_constants, snap_constants
from kansformer.kan.library import LIBRARY, lookup
from kansformer.kan.symbolic import SPLINE, SymbolicEdges

NAMES = list(LIBRARY)
BOUNDED = ("tan", "arcsin", "arccos", "arctanh")


def uniform(count, lo=-0.5, hi=1.1, seed=0):
    return lo + (hi - lo) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(name):
    """a and b that keep the argument in every domain for x in [-0.5, 1.1]."""
    if name in BOUNDED:
        return 0.8, -0.2
    return (1.0, 1.0) if LIBRARY[name].domain[0] > -1 else (2.1, -0.4)


def edge(name, x, c=2.3, d=-1.1):
    a, b = truth(name)
    return c * LIBRARY[name](a * x + b) + d


@pytest.fixture(scope="module")
def fitted():
    """R^2 and affine of every function (columns) for samples of every function (rows)."""
    x = uniform(400).unsqueeze(1).expand(-1, len(NAMES))
    y = torch.stack([edge(name, x[:, 0]) for name in NAMES], 1)
    return x, y, *symbolic_fit.fit(x, y, NAMES)


# The library


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_sympy_agree(name):
    function, u = LIBRARY[name], torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    symbol = sympy.Symbol("u")
    formula = sympy.lambdify(symbol, function.sympy(sympy, symbol), "math")
    assert_close(function(u), torch.tensor([float(formula(v)) for v in u.tolist()], dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_finite_everywhere(name, dtype):
    u = torch.tensor([-1e6, -3.0, -1.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, math.pi / 2, 3.0, 80.0], dtype=dtype)
    u = u.clamp(-1e3, 1e3) if name.startswith("x") else u
    u.requires_grad_()
    value = LIBRARY[name](u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_symmetries_and_periods_are_true():
    u = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64)
    for name, function in LIBRARY.items():
        if function.symmetric:
            f, g = function(u), function(-u)
            assert min((f - g - (f - g).mean()).abs().max(), (f + g - (f + g).mean()).abs().max()) < 1e-12, name
        if function.half_period:
            assert_close(function(u + function.half_period), -function(u), 1e-12, name)


def test_names_are_checked():
    assert lookup(["sin", "x", "sin"]) == ["sin", "x"]
    assert lookup() == NAMES
    with pytest.raises(ValueError, match="'sine' in the library: did you mean 'sin'"):
        lookup(["x", "sine"])
    with pytest.raises(ValueError, match="library is empty"):
        lookup([])


# The search


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_recovered(name, fitted):
    x, y, r2, affine = fitted
    k = NAMES.index(name)
    assert 1 - r2[k, k] <= 1e-10
    a, b, c, d = affine[k, k]
    assert_close(c * LIBRARY[name](a * x[:, k] + b) + d, y[:, k], 1e-6, name)


def test_r2_is_that_of_the_parameters_and_never_nan(fitted):
    x, y, r2, affine = fitted
    assert r2.isfinite().all()
    assert affine.isfinite().all()
    for k, name in enumerate(NAMES):
        a, b, c, d = affine[:, k].unbind(1)
        residual = (c * LIBRARY[name](a * x + b) + d - y).square().sum(0)
        expected = 1 - residual / (y - y.mean(0)).square().sum(0).clamp_min(1e-300)
        varies = torch.arange(len(NAMES)) != NAMES.index("0")
        assert_close(r2[varies, k], expected[varies], 1e-9, name)
        assert (c.abs() <= 2e4 * y.std(0))[varies].all(), f"{name}: differences of large numbers"


def test_the_wrong_function_does_not_fit(fitted):
    _, _, r2, _ = fitted
    for right, wrong in (("sin", "tanh"), ("x^2", "exp"), ("abs", "x^4"), ("gaussian", "log"), ("1/x^2", "sin")):
        assert r2[NAMES.index(right), NAMES.index(wrong)] < 0.9999, (right, wrong)


def test_canonical_parameters(fitted):
    _, _, _, affine = fitted
    best = {name: affine[k, k].tolist() for k, name in enumerate(NAMES)}
    assert best["x^2"][0] == 1
    assert best["x^2"][1] == pytest.approx(-0.4 / 2.1, abs=1e-6)
    assert best["exp"][1] == 0
    assert best["x"][:2] == [1, 0]
    assert best["tanh"] == pytest.approx([2.1, -0.4, 2.3, -1.1], abs=1e-5)
    for name in ("sin", "cos"):
        assert best[name][0] > 0
        assert abs(best[name][1]) <= math.pi / 2 + 1e-9


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [("sin", 25.0, 0.3), ("exp", -6.0, 0.0), ("sqrt", 1.0, 0.0), ("1/x", 1.0, 1e-3), ("log", 2.0, 0.01)],
)
def test_hard_cases_are_recovered(name, a, b):
    """Ten periods; a steep fall; domains that begin where the samples do."""
    x = uniform(500, 0, 1).unsqueeze(1)
    r2, _ = symbolic_fit.fit(x, -0.7 * LIBRARY[name](a * x + b) + 5, [name])
    assert 1 - r2.item() <= 1e-8


@pytest.mark.parametrize(("shift", "scale"), [(0, 1e-3), (100, 1), (-1e3, 50)])
def test_the_scale_of_the_inputs_does_not_matter(shift, scale):
    t = uniform(300, -1, 1).unsqueeze(1)
    r2, _ = symbolic_fit.fit(shift + scale * t, torch.tanh(3 * t - 1), ["tanh"])
    assert 1 - r2.item() <= 1e-9


def test_domains_hold_for_every_sample():
    """log of a line that is negative somewhere: the fit moves the line, it does not make NaN."""
    x = uniform(200, -1, 1).unsqueeze(1)
    names = [name for name in NAMES if LIBRARY[name].domain[0] > -math.inf]
    r2, affine = symbolic_fit.fit(x, x.square(), names)
    assert r2.isfinite().all()
    for name, (a, b, _, _) in zip(names, affine[0].tolist()):
        u, (low, high) = a * x + b, LIBRARY[name].domain
        assert u.min() >= low - 1e-9, name
        assert u.max() <= high + 1e-9, name


def test_constant_edges():
    x = torch.stack([uniform(50), torch.full((50,), 2.0, dtype=torch.float64)], 1)
    y = torch.full((50, 2), 1 / 3, dtype=torch.float64)
    r2, affine = symbolic_fit.fit(x, y, NAMES)
    assert (r2 == 1).all()
    assert (affine[..., 2] == 0).all()
    assert_close(affine[..., 3], torch.full_like(affine[..., 3], 1 / 3), 1e-15)
    r2, affine = symbolic_fit.fit(x[:, :1].float(), (y[:, :1] + 1e-8 * uniform(50).unsqueeze(1)).float(), ["x"])
    assert r2.item() == 1, "float32 rounding is no variance"


def test_bad_samples():
    x = uniform(10).unsqueeze(1)
    with pytest.raises(ValueError, match="finite samples"):
        symbolic_fit.fit(x, x.where(x > 0, math.nan), ["x"])
    with pytest.raises(ValueError, match="N >= 2"):
        symbolic_fit.fit(x[:1], x[:1], ["x"])
    with pytest.raises(ValueError, match="one shape"):
        symbolic_fit.fit(x, x[:5], ["x"])


# The module


def some_edges(inputs=3, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = SymbolicEdges(inputs, outputs, dtype=torch.float64)
    chosen = torch.tensor([NAMES.index(n) for n in ("sin", "exp", "x^3", "tanh", "gaussian", "x")] + [SPLINE] * 2)
    module.function.copy_(chosen[torch.randint(len(chosen), (outputs, inputs), generator=generator)])
    with torch.no_grad():
        module.affine.copy_(torch.randn(outputs, inputs, 4, generator=generator))
    return module


def by_hand(module, x):
    out = torch.zeros(len(x), *module.function.shape, dtype=x.dtype)
    for o, row in enumerate(module.function.tolist()):
        for i, k in enumerate(row):
            if k != SPLINE:
                a, b, c, d = module.affine[o, i]
                out[:, o, i] = c * LIBRARY[NAMES[k]](a * x[:, i] + b) + d
    return out


def test_edges_are_what_a_loop_computes():
    module, x = some_edges(), uniform(60).view(20, 3)
    assert (module.function == SPLINE).any()
    assert_close(module(x), by_hand(module, x), 1e-15)


def test_each_function_is_evaluated_once(monkeypatch):
    calls = []
    for name in ("sin", "exp"):
        function = LIBRARY[name]
        counted = function._replace(torch=lambda u, name=name, f=function.torch: calls.append(name) or f(u))
        monkeypatch.setitem(LIBRARY, name, counted)
    module = SymbolicEdges(6, 5)
    module.function.copy_(torch.tensor([NAMES.index("sin"), NAMES.index("exp")]).repeat(15).view(5, 6))
    module(torch.rand(4, 6))
    assert sorted(calls) == ["exp", "sin"]


def test_derivatives():
    module, x = some_edges(), uniform(6).view(2, 3).requires_grad_()

    def run(x, affine):
        return torch.func.functional_call(module, {"affine": affine}, (x,))

    inputs = (x, module.affine.detach().clone().requires_grad_())
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_changes_in_place_are_seen():
    module, x = some_edges(), uniform(60).view(20, 3)
    module(x)
    other = some_edges(seed=1)
    module.load_state_dict(other.state_dict())
    assert_close(module(x), by_hand(other, x), 1e-15)
    clone = copy.deepcopy(module)
    clone.set(0, 0, NAMES.index("abs"))
    assert_close(clone(x), by_hand(clone, x), 1e-15)
    assert_close(module(x), by_hand(other, x), 1e-15)


# On a network


def samples(count=200, inputs=2, seed=0):
    return uniform(count * inputs, -1, 1, seed).view(count, inputs)


def symbolic_network(width=(2, [1, 1], 1)):
    """Every edge a formula."""
    model = KAN(list(width), dtype=torch.float64)
    names, k = ("sin", "x^2", "exp", "tanh", "x", "gaussian"), 0
    for depth, layer in enumerate(model.layers):
        for o, i in layer.edge_mask.nonzero().tolist():
            affine = (0.5 + 0.1 * (k % 5), 0.2, 0.3 + 0.05 * (k % 7), -0.1)
            model.fix_symbolic(depth, i, o, names[k % len(names)], affine=affine, x=samples())
            k += 1
    model.samples = samples()
    return model


def test_compiled_whole_and_exported():
    """For any number of rows; formulas that come and go are seen by what was compiled."""
    model, x = KAN([2, [2, 1], 1], dtype=torch.float64), samples()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check():
        assert_close(compiled(x), model(x), 1e-14)
        for strict in (False, True):
            rows = ({0: torch.export.Dim("rows")},)
            program = torch.export.export(model, (x[:5],), dynamic_shapes=rows, strict=strict).module()
            assert_close(program(x), model(x), 1e-14)

    check()
    fixed = copy.deepcopy(model)
    model.fix_symbolic(0, 0, 0, "sin", x=x)
    check()
    model.unfix_symbolic()
    check()
    fixed.fix_symbolic(1, 2, 0, "exp", affine=(1, 0, 1, 0), x=x)
    model.load_state_dict(fixed.state_dict())
    check()


def evaluate(formulas, variables, x):
    functions = [sympy.lambdify(variables, f, "math") for f in formulas]
    return torch.tensor([[float(f(*row)) for f in functions] for row in x.tolist()], dtype=torch.float64)


def test_an_edge_becomes_its_formula_and_its_spline_again():
    model, x = KAN([2, 3, 1], dtype=torch.float64), samples()
    before, spline = model(x), model.layers[0].edges(x)[:, 2, 1]
    r2 = model.fix_symbolic(0, 1, 2, "x^2", affine=(1, 0, 2, -1), x=x)
    edges = model.layers[0].edges(x)
    assert_close(edges[:, 2, 1], 2 * x[:, 1].square() - 1, 1e-14)
    residual = (edges[:, 2, 1] - spline).square().sum() / (spline - spline.mean()).square().sum()
    assert r2 == pytest.approx(1 - residual.item())
    assert_close(model.layers[0](x), model.layers[0].nodes(edges.sum(-1)), 1e-13)
    model.unfix_symbolic(0, 1, 2)
    assert torch.equal(model(x), before)
    model.fix_symbolic(1, 0, 0, "exp", x=x)
    assert not torch.equal(model(x), before)
    model.unfix_symbolic()
    assert torch.equal(model(x), before)


def test_a_silent_spline_and_an_unused_formula_get_no_gradient():
    model, x = KAN([1, 2], dtype=torch.float64), samples(inputs=1)
    model.fix_symbolic(0, 0, 1, "sin", x=x)
    model(x).square().sum().backward()
    layer = model.layers[0]
    assert (layer.linear.spline_weight.grad[:, 1] == 0).all()
    assert (layer.linear.spline_weight.grad[:, 0] != 0).any()
    assert (layer.symbolic.affine.grad[0] == 0).all()
    assert (layer.symbolic.affine.grad[1] != 0).all()


def test_pruned_formulas_are_zero():
    model, x = symbolic_network((2, 1)), samples()
    model.layers[0].edge_mask[0, 1] = 0
    assert (model.layers[0].edges(x)[:, 0, 1] == 0).all()
    assert_close(evaluate(model.symbolic_formula(["u", "v"]), sympy.symbols("u v"), x), model(x), 1e-12)


def test_suggestions_are_ranked():
    model, x = KAN([1, 1], dtype=torch.float64), samples(inputs=1)
    model.fix_symbolic(0, 0, 0, "sin", affine=(3, 0.1, 2, 0), x=x)
    found = model.suggest_symbolic(0, 0, 0, x=x)
    assert [s.name for s in found[:2]] == ["sin", "cos"], "equals: the smaller shift"
    assert found[0].affine == pytest.approx((3, 0.1, 2, 0), abs=1e-6)
    assert {s.name for s in found} == set(NAMES)
    scores = [s.score for s in found]
    assert [round(s, 2) for s in scores] == sorted(round(s, 2) for s in scores)
    assert "sin" in str(found[0])
    assert [s.name for s in model.suggest_symbolic(0, 0, 0, library=["x", "tanh"], x=x)] in (
        ["x", "tanh"],
        ["tanh", "x"],
    )


@pytest.mark.parametrize("name", ["x", "x^2", "exp", "log", "sin", "tanh", "abs", "0"])
def test_simplicity_finds_the_simple_function(name):
    """A line is a sine, a parabola and an exponential with extreme constants: the simplest wins."""
    model, x = KAN([1, 1], dtype=torch.float64), 1.5 + samples(inputs=1)
    affine = (math.pi, 0.0, 0.7, 0.2) if name == "sin" else (1.0, -1.5 if name in ("tanh", "abs") else 0.0, 0.7, 0.2)
    model.fix_symbolic(0, 0, 0, name, affine=affine, x=x)
    assert model.suggest_symbolic(0, 0, 0, x=x)[0].name == name


def test_simplicity_is_a_knob():
    model, x = KAN([1, 1], dtype=torch.float64), samples(inputs=1)
    model.fix_symbolic(0, 0, 0, "sin", affine=(1, 0, 1, 0), x=x)
    assert model.suggest_symbolic(0, 0, 0, x=x)[0].name == "sin"
    assert model.suggest_symbolic(0, 0, 0, library=["x", "sin"], simplicity=5, x=x)[0].name == "x"


def test_auto_symbolic_reports_what_it_did_and_what_it_left(capsys):
    torch.manual_seed(0)
    model, x = KAN([2, 2, 1], grid_size=8, dtype=torch.float64), samples()
    with torch.no_grad():
        model.layers[0].linear.spline_weight[: model.layers[0].linear.num_basis, 0].normal_()  # a rough edge, 0 -> 0
        model.layers[0].edge_mask[1, 1] = 0
    model.fix_symbolic(1, 0, 0, "exp", affine=(1, 0, 1, 0), x=x)
    choices = model.auto_symbolic(x=x, r2_threshold=0.999)
    assert [(c.layer, c.i, c.o) for c in choices] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    left = [c for c in choices if c.name is None]
    assert (0, 0, 0) in [(c.layer, c.i, c.o) for c in left]
    for choice in choices:
        function = model.layers[choice.layer].symbolic.function[choice.o, choice.i]
        assert function == (SPLINE if choice.name is None else NAMES.index(choice.name))
        assert (choice.best.r2 >= 0.999) == (choice.name is not None)
    printed = capsys.readouterr().out
    assert "layer 0, 0 -> 0: left a spline; best:" in printed
    assert len(printed.splitlines()) == 4
    model.auto_symbolic(x=x, r2_threshold=0.999, verbose=False)
    assert capsys.readouterr().out == ""


def test_save_load_prune_and_refine_keep_formulas(tmp_path):
    model, x = symbolic_network((2, 3, 1)), samples()
    expected = model(x)
    model.save(tmp_path)
    assert torch.equal(KAN.load(tmp_path)(x), expected)
    assert torch.equal(model.refine(6)(x), expected)
    pruned = model.prune(node_threshold=0, edge_threshold=0)
    assert_close(pruned(x), expected, 1e-14)


def test_bad_edges_and_names():
    model, x = KAN([2, 3, 1]), samples().float()
    for call in (model.suggest_symbolic, model.unfix_symbolic, lambda *e, **k: model.fix_symbolic(*e, "sin", **k)):
        options = {} if call == model.unfix_symbolic else {"x": x}
        with pytest.raises(ValueError, match="no layer 2: this network has layers 0 to 1"):
            call(2, 0, 0, **options)
        with pytest.raises(ValueError, match="no input 2 in layer 0: it has 0 to 1"):
            call(0, 2, 0, **options)
        with pytest.raises(ValueError, match="no output subnode -1 in layer 0: it has 0 to 2"):
            call(0, 0, -1, **options)
    with pytest.raises(ValueError, match="did you mean 'sqrt'"):
        model.fix_symbolic(0, 0, 0, "sqr", x=x)
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        model.auto_symbolic(["gauss"], x=x)
    model.layers[0].edge_mask[1, 0] = 0
    with pytest.raises(ValueError, match="edge 0 -> 1 of layer 0 is pruned"):
        model.fix_symbolic(0, 0, 1, "sin", x=x)
    with pytest.raises(ValueError, match="pass samples"):
        model.suggest_symbolic(0, 0, 0)


def test_undefined_functions_and_nan_samples():
    model, x = KAN([1, 1], dtype=torch.float64), samples(inputs=1)
    with pytest.raises(ValueError, match=r"log is undefined .* at 200 of 200 samples: its argument 1 x -5"):
        model.fix_symbolic(0, 0, 0, "log", affine=(1, -5, 1, 0), x=x)
    with pytest.raises(ValueError, match=r"arcsin is undefined .* samples: its argument 2 x \+0 runs from"):
        model.fix_symbolic(0, 0, 0, "arcsin", affine=(2, 0, 1, 0), x=x)
    assert (model.layers[0].symbolic.function == SPLINE).all(), "nothing changes where it fails"
    with pytest.raises(ValueError, match="four finite numbers"):
        model.fix_symbolic(0, 0, 0, "sin", affine=(1, 0, math.nan, 0), x=x)
    x[3, 0] = math.nan
    for call in (lambda: model.suggest_symbolic(0, 0, 0, x=x), lambda: model.auto_symbolic(x=x)):
        with pytest.raises(ValueError, match="NaN"):
            call()


# Formulas


@pytest.mark.parametrize("width", [(2, 1), (2, [1, 1], 1), (2, [1, 1])])
@pytest.mark.parametrize("simplify", [False, True])
def test_the_formula_is_the_network(width, simplify):
    model, x = symbolic_network(width), samples(30)
    formulas = model.symbolic_formula(["u", "v"], simplify=simplify, timeout=60)
    assert len(formulas) == model.out_features
    assert_close(evaluate(formulas, sympy.symbols("u v"), x), model(x).detach(), 1e-12)


def test_variables():
    model = symbolic_network((2, 1))
    (formula,) = model.symbolic_formula()
    assert {str(s) for s in formula.free_symbols} == {"x_1", "x_2"}
    t = sympy.Symbol("t")
    (formula,) = model.symbolic_formula([t, 2 * t])
    assert formula.free_symbols == {t}
    with pytest.raises(ValueError, match="variables must be 2 names"):
        model.symbolic_formula(["a"])


def test_splines_have_no_formula():
    model = symbolic_network((2, 2, 1))
    model.unfix_symbolic(0, 1, 0)
    model.unfix_symbolic(1, 0, 0)
    with pytest.raises(ValueError, match=r"\(0, 1, 0\), \(1, 0, 0\) are splines.*auto_symbolic"):
        model.symbolic_formula()


def test_leaving_the_domain_is_said():
    model, x = KAN([1, 1], dtype=torch.float64), samples(inputs=1)
    model.fix_symbolic(0, 0, 0, "log", affine=(1, 2, 1, 0), x=x)
    model.samples = x
    model.symbolic_formula()
    with torch.no_grad():
        model.layers[0].symbolic.affine[0, 0, 1] = 0.5
    with pytest.warns(UserWarning, match=r"not the network everywhere: edge \(0, 0, 0\): log is undefined"):
        model.symbolic_formula()


def test_constants():
    x, y = sympy.symbols("x y")
    noisy = 1.00004 * sympy.exp(0.99997 * (y + 2e-6) ** 2 + 1.00001 * sympy.sin(3.14159 * x - 1e-7)) - 3e-6
    assert round_constants(noisy, 3) == sympy.exp(y**2 + sympy.sin(3.142 * x))
    assert snap_constants(noisy) == sympy.exp(y**2 + sympy.sin(sympy.pi * x))
    assert snap_constants(sympy.Float(0.66671) * x + 1.5708) == 2 * x / 3 + sympy.pi / 2
    assert snap_constants(sympy.Float(0.7312) * x) == sympy.Float(0.7312) * x


def test_simplification_has_an_end():
    model = symbolic_network((2, 4, 4, 4, 1))
    with pytest.warns(UserWarning, match="more than timeout=0.05 s"):
        model.symbolic_formula(timeout=0.05)


# The article's example


def test_the_formula_of_the_article():
    """exp(sin(pi x) + y^2): fit, prune, formulas, fit."""
    data = create_dataset(lambda x: torch.exp(torch.sin(torch.pi * x[:, 0]) + x[:, 1] ** 2), dtype=torch.float64)
    model = KAN([2, 5, 1], grid_size=5, dtype=torch.float64)
    model.fit(data, steps=10, lamb=1e-2, progress=False)
    model = model.prune()
    model.fit(data, steps=5, progress=False)
    assert model.width == [[2, 0], [1, 0], [1, 0]]
    splines = model.evaluate(data)["test_loss"]
    choices = model.auto_symbolic(verbose=False)
    assert [c.name for c in choices] == ["sin", "x^2", "exp"]
    model.fit(data, steps=10, progress=False)
    error = model.evaluate(data)["test_loss"]
    assert error <= 1e-4 < splines
    assert error <= 1e-9, "the formula is exact"
    x, y = sympy.symbols("x y")
    (formula,) = model.symbolic_formula([x, y], digits=4)
    assert snap_constants(formula) == sympy.exp(sympy.sin(sympy.pi * x) + y**2)
