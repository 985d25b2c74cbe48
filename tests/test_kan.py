"""The small-network KAN: the layer it shares with the transformer, fits, refinement, pruning, files, bad input."""

import copy
import json
import math
import warnings
from itertools import pairwise

import pytest
import torch

from kansformer.kan import KAN, Dataset, KANLayer, create_dataset
from kansformer.kan import network as network_module


def f(x):
    return torch.exp(torch.sin(torch.pi * x[:, 0]) + x[:, 1] ** 2)


@pytest.fixture(scope="module")
def data():
    return create_dataset(f, train_num=400, test_num=200, dtype=torch.float64)


@pytest.fixture(scope="module")
def fitted(data):
    model = KAN([2, 5, 1], dtype=torch.float64)
    model.fit(data, steps=10, lamb=1e-3, progress=False)
    return model


def inputs(rows, columns, reach=1.5):
    return ((torch.rand(rows, columns, dtype=torch.float64) * 2 - 1) * reach).requires_grad_()


def layer(order=3, base="silu"):
    options = {"grid_size": 4, "spline_order": order, "base_activation": base, "grid_range": (-1, 1)}
    return KANLayer(3, 2, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("base", ["silu", "gelu", "relu", "identity", None])
def test_a_layer_is_the_layer_of_the_transformer(order, base):
    kan, x = layer(order, base), inputs(50, 3)
    y, expected = kan(x), kan.nodes(kan.linear(x))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    parameters = [x, *kan.linear.parameters()]
    for got, want in zip(torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base", ["silu", None])
def test_large_layers_take_the_fused_operator(monkeypatch, base):
    kan, x = layer(base=base), inputs(50, 3)
    kan.edge_mask[1, 2] = 0
    small = kan(x)
    monkeypatch.setattr(network_module, "DENSE_BYTES", 0)
    monkeypatch.setattr(network_module, "_Dense", None)
    torch.testing.assert_close(kan(x), small, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", ["silu", None])
def test_edges_sum_to_the_nodes_and_scales_are_their_means(base):
    kan, x = layer(base=base), inputs(50, 3)
    kan.edge_mask[1, 2] = 0
    edges = kan.edges(x)
    assert edges.shape == (50, 6, 3)
    assert (edges[:, 1, 2] == 0).all()
    assert (edges[:, 1, :2].abs().amin() > 0).all()
    torch.testing.assert_close(kan.nodes(edges.sum(-1)), kan(x), rtol=1e-12, atol=1e-12)
    y, scale = kan.scaled(x)
    weight = torch.randn_like(scale)
    parameters = [x, *kan.linear.parameters()]
    got = torch.autograd.grad(y.square().sum() + (weight * scale).sum(), parameters)
    direct = kan.nodes(edges.sum(-1)).square().sum() + (weight * edges.abs().mean(0)).sum()
    for g, want in zip(got, torch.autograd.grad(direct, parameters)):
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-12)
    assert scale.shape == (6, 3)


def test_product_nodes_multiply_consecutive_subnodes():
    kan, x = layer(), inputs(20, 3)
    subnodes, nodes = kan.edges(x).sum(-1), kan(x)
    assert nodes.shape == (20, 4)
    expected = [subnodes[:, 0], subnodes[:, 1], subnodes[:, 2] * subnodes[:, 3], subnodes[:, 4] * subnodes[:, 5]]
    torch.testing.assert_close(nodes, torch.stack(expected, 1))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_pruned_edges_are_zero_and_get_no_gradient(order):
    kan, x = layer(order), inputs(20, 3)
    before = kan.edges(x)
    kan.edge_mask[0, 1] = 0
    after = kan.edges(x)
    assert (after[:, 0, 1] == 0).all()
    after[:, 0, 1] = before[:, 0, 1]
    assert torch.equal(after, before)
    spline, base = torch.autograd.grad(kan(x).sum(), [kan.linear.spline_weight, kan.linear.base_weight])
    spline = spline.view(3, -1, 6)
    assert (spline[1, :, 0] == 0).all()
    assert base[0, 1] == 0
    assert (spline[0, :, 0].abs().sum() > 0) & (spline[1, :, 1].abs().sum() > 0) & (base[0, 0] != 0)


def test_derivatives_of_any_order():
    kan, x = layer(), inputs(6, 3, reach=0.9)
    assert torch.autograd.gradgradcheck(lambda x, *parameters: kan(x), (x, *kan.linear.parameters()))
    # The third derivative of a cubic spline is constant between knots: differences of the second give it.
    model = KAN([1, 1], grid_size=4, base_activation="identity", dtype=torch.float64)
    derivatives = [lambda x: model(x)]
    for _ in range(3):
        derivatives.append(lambda x, g=derivatives[-1]: torch.autograd.grad(g(x).sum(), x, create_graph=True)[0])
    x = torch.tensor([[0.1], [0.3]], dtype=torch.float64, requires_grad=True)
    second = derivatives[2](x)
    torch.testing.assert_close(derivatives[3](x)[0, 0], (second[1, 0] - second[0, 0]) / 0.2, rtol=1e-8, atol=1e-8)
    assert derivatives[3](x)[0, 0].abs() > 1e-3
    knot = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)  # where |s| has no slope
    near = torch.tensor([[1e-7]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(derivatives[2](knot), derivatives[2](near), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_and_the_generator_stays():
    state = torch.get_rng_state()
    one, two, other = KAN([2, 3, 1], seed=5), KAN([2, 3, 1], seed=5), KAN([2, 3, 1], seed=6)
    data = create_dataset(f, train_num=50, test_num=10)
    runs = []
    for model in (one, two):
        history = model.fit(data, steps=2, progress=False)
        history2 = model.fit(data, optimizer="adam", steps=5, batch_size=20, progress=False)
        runs.append((history, history2, model(data.test_input)))
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0][:2] == runs[1][:2]
    assert torch.equal(runs[0][2], runs[1][2])
    assert not torch.equal(one.layers[0].linear.base_weight, other.layers[0].linear.base_weight)


def test_refinement_keeps_the_function(data):
    model = KAN([2, 3, 1], dtype=torch.float64)
    model.update_grid(data.train_input)  # inside the grids, that is
    y = model(data.train_input)
    finer, between = model.refine(6), model.refine(5)
    torch.testing.assert_close(finer(data.train_input), y, rtol=0, atol=1e-10)
    assert 1e-6 < (between(data.train_input) - y).abs().max() < 0.1
    assert [m.layers[1].linear.grid_size for m in (model, finer, between)] == [3, 6, 5]
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in finer.parameters()}


def test_the_staircase_descends(data):
    """arXiv:2404.19756, section 2.4, on its own function: every finer grid lowers the loss."""
    model, losses = KAN([2, 5, 1], dtype=torch.float64), []
    for grid_size in (3, 5, 10, 20):
        model = model.refine(grid_size)
        losses.append(model.fit(data, steps=15, update_grid=grid_size == 3, progress=False)["train_loss"][-1])
    assert all(fine < coarse / 1.5 for coarse, fine in pairwise(losses)), losses
    assert losses[-1] < 2e-4


def test_lbfgs_goes_where_float64_can_go():
    """y = x^2 is a spline: what is left is rounding."""
    data = create_dataset(lambda x: x.square(), n_var=1, train_num=100, test_num=50, dtype=torch.float64)
    history = KAN([1, 1], dtype=torch.float64).fit(data, steps=50, progress=False)
    assert history["test_loss"][-1] < 1e-9
    assert len(history["train_loss"]) == len(history["test_loss"]) == len(history["reg"])


def test_adam_and_batches_learn(data):
    model = KAN([2, 5, 1], dtype=torch.float64)
    start = model.evaluate(data)["test_loss"]
    history = model.fit(data, optimizer="adam", steps=150, lr=2e-2, batch_size=64, progress=False)
    assert history["test_loss"][-1] < start / 5
    assert len(history["train_loss"]) == 150
    assert all(p.grad is None for p in model.parameters())


def test_regularisation_is_the_papers(data):
    model = KAN([2, 3, 1], dtype=torch.float64)
    edges = [e.abs().mean(0) for e in model.activations(data.train_input)]
    l1 = sum(e.sum() for e in edges)
    entropy = sum(-(e / e.sum() * (e / e.sum()).log()).sum() for e in edges)
    weights = [layer.linear.spline_weight.view(layer.linear.in_features, 6, -1) for layer in model.layers]
    coef = sum(w.abs().mean(1).sum() for w in weights)
    diff = sum((w[:, 1:] - w[:, :-1]).abs().mean(1).sum() for w in weights)
    options = {"lamb": 1e-9, "lamb_l1": 1.5, "lamb_entropy": 0.5, "lamb_coef": 0.3, "lamb_coefdiff": 0.2}
    expected = 1.5 * l1 + 0.5 * entropy + 0.3 * coef + 0.2 * diff
    reg = model.fit(data, optimizer="adam", steps=1, update_grid=False, progress=False, **options)["reg"][0]
    assert math.isclose(reg, expected.item(), rel_tol=1e-9)


def test_regularisation_makes_sparse(data, fitted):
    plain = KAN([2, 5, 1], dtype=torch.float64)
    plain.fit(data, steps=10, progress=False)
    alive = [sum(int((e > 3e-2).sum()) for e in m.importance().edges) for m in (fitted, plain)]
    assert alive[0] < alive[1]


def test_cross_entropy_for_integer_labels():
    x = torch.rand(200, 2, dtype=torch.float64) * 2 - 1
    label = (x[:, 0] * x[:, 1] > 0).long()
    model = KAN([2, 2, 2], dtype=torch.float64)
    history = model.fit(Dataset(x, label), steps=10, progress=False)
    assert history["train_loss"][-1] < 0.1
    assert (model(x).argmax(1) == label).float().mean() > 0.97
    with pytest.raises(ValueError, match="classes go from 0 to 2"):
        model.fit(Dataset(x, label + (x[:, 0] > 0).long()))


def test_importance_knows_what_an_output_does_not_read(data):
    """y depends on x_0 alone: x_1 and what it feeds score low; scores of a single-layer network are spreads."""
    model = KAN([2, 1], dtype=torch.float64)
    scores = model.importance(data.train_input)
    edges = model.activations(data.train_input)[0]
    expected = edges.std(0, correction=0) / edges.sum(-1).std(0, correction=0).unsqueeze(1)
    torch.testing.assert_close(scores.edges[0], expected)
    torch.testing.assert_close(scores.nodes[0], expected.sum(0))
    one = Dataset(data.train_input, torch.sin(3 * data.train_input[:, :1]))
    model = KAN([2, 2, 1], dtype=torch.float64)
    model.fit(one, steps=15, lamb=1e-3, progress=False)
    nodes = model.importance().nodes[0]
    assert nodes[1] < 1e-2 * nodes[0]
    assert model.prune(prune_input=True).inputs == [0]


def test_pruning_returns_a_smaller_network_with_the_masked_ones_outputs(data, fitted):
    small = fitted.prune()
    kept = [i for i, a in enumerate(fitted.importance().nodes[1]) if a >= 1e-2]
    assert small.width == [[2, 0], [len(kept), 0], [1, 0]]
    assert 0 < len(kept) < 5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in fitted.parameters())
    masked, scores = fitted.copy(), fitted.importance()
    for layer, score in zip(masked.layers, scores.edges):
        layer.edge_mask *= score >= 3e-2
    dropped = [i for i in range(5) if i not in kept]
    masked.layers[0].edge_mask[dropped] = 0
    masked.layers[1].edge_mask[:, dropped] = 0
    torch.testing.assert_close(small(data.test_input), masked(data.test_input), rtol=1e-12, atol=1e-12)
    assert fitted.width == [[2, 0], [5, 0], [1, 0]]
    assert all(bool(layer.edge_mask.all()) for layer in fitted.layers)
    again = small.fit(data, steps=10, progress=False)
    assert again["test_loss"][-1] < 0.02


def test_pruning_keeps_what_is_frozen(fitted):
    model = copy.deepcopy(fitted)
    model.layers[0].linear.spline_weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in model.prune().parameters()] == wanted
    assert not all(wanted)


def test_made_under_inference_mode():
    with torch.inference_mode():
        model, x = KAN([2, 3, 1]), torch.randn(5, 2)
        assert torch.equal(model(x), model(x))


def test_pruning_removes_product_nodes_and_inputs_whole():
    model = KAN([3, [2, 2], 2], dtype=torch.float64)
    x = inputs(100, 3).detach()
    with torch.no_grad():
        model.layers[0].linear.spline_weight.view(3, 6, 6)[:, :, 3] = 0  # the second factor of the first product
        model.layers[0].linear.base_weight[3] = 0
        model.layers[0].linear.spline_weight.view(3, 6, 6)[1] = 0  # input 1 is read by nothing
        model.layers[0].linear.base_weight[:, 1] = 0
    small = model.prune(node_threshold=1e-9, edge_threshold=1e-9, prune_input=True, x=x)
    assert small.width == [[2, 0], [2, 1], [2, 0]]
    assert small.inputs == [0, 2]
    model.layers[1].edge_mask[:, 2] = 0  # the dead product sent on a constant, which goes with it
    torch.testing.assert_close(small(x[:, [0, 2]]), model(x), rtol=1e-12, atol=1e-12)


def test_pruning_everything_is_refused_with_thresholds_that_work(fitted):
    with pytest.raises(ValueError, match="nothing that reaches output") as error:
        fitted.prune(edge_threshold=100)
    numbers = [part.split("=")[1] for part in str(error.value).split(";")[1].split() if "=" in part]
    assert fitted.prune(*(float(n) for n in numbers)).width[-1] == [1, 0]
    constant = KAN([2, 2, 1])
    for p in constant.parameters():
        p.data.zero_()
    with pytest.raises(ValueError, match="constant on the samples"):
        constant.prune(x=torch.rand(10, 2))


def test_save_and_load(tmp_path, data, fitted):
    model = fitted.prune().refine(6)
    model.layers[0].linear.extend_grid(12)
    model.fix_symbolic(0, 0, 0, "sin")
    model.save(tmp_path / "net")
    loaded = KAN.load(tmp_path / "net")
    assert loaded.dtype == torch.float64
    assert [layer.linear.grid_size for layer in loaded.layers] == [12, 6]
    assert torch.equal(loaded(data.test_input), model(data.test_input))
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]


def test_load_refuses_what_does_not_fit(tmp_path, fitted):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        KAN.load(tmp_path)
    fitted.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"format": "other"}, "does not describe a kansformer"),
        ({"colour": 1}, "does not describe a network"),
        ({"width": [2, 4, 1]}, "does not fit"),
        ({"grid_size": 4}, "does not fit"),
        ({"dtype": "float32"}, "does not fit"),
        ({"dtype": "bool"}, "does not describe a network"),
        ({"inputs": [0]}, "names the inputs"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            KAN.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not json"):
        KAN.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        KAN.load(tmp_path)


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        ([], {}, "at least two layers"),
        ([2], {}, "at least two layers"),
        ("25", {}, "at least two layers"),
        (5, {}, "at least two layers"),
        ([2, 0, 1], {}, "number of nodes"),
        ([2, -1, 1], {}, "number of nodes"),
        ([2, 2.5, 1], {}, "number of nodes"),
        ([2, [1, 1, 1], 1], {}, "number of nodes"),
        ([2, None, 1], {}, "number of nodes"),
        ([[2, 1], 1], {}, "inputs are not products"),
        ([2, 5, 1], {"grid_size": [3]}, "grid_size"),
        ([2, 5, 1], {"grid_size": 0}, "grid_size"),
        ([2, 5, 1], {"grid_range": (1, -1)}, "grid_range"),
        ([2, 5, 1], {"spline_order": 5}, "spline_order"),
        ([2, 5, 1], {"base_activation": "tan"}, "base_activation"),
    ],
)
def test_bad_networks(width, options, message):
    with pytest.raises(ValueError, match=message):
        KAN(width, **options)


def test_bad_dtype():
    with pytest.raises(TypeError, match="float64"):
        KAN([2, 1], dtype=torch.float16)
    with pytest.raises(TypeError, match="int64"):
        KAN([2, 1])(torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
def test_autocast_and_transforms():
    """A network's own dtype under autocast; torch.func as backward."""
    model, x = KAN([2, [2, 1], 1], dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), model.double()(x))
    assert model(x).dtype == torch.float64
    expected = torch.autograd.functional.jacobian(model, x)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(model)(x), expected, rtol=1e-10, atol=1e-12)


def test_bad_arguments_of_fit(tmp_path):
    model, data = KAN([2, 1]), Dataset(torch.rand(10, 2), torch.rand(10, 1))
    for batch_size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {batch_size}"):
            model.fit(data, optimizer="adam", batch_size=batch_size)
    with pytest.raises(ValueError, match="lamb is -1"):
        model.fit(data, lamb=-1)
    model.requires_grad_(False)
    model.layers[0].symbolic.affine.requires_grad_(True)  # of formulas, of which there are none
    for optimizer in ("lbfgs", "adam"):
        with pytest.raises(ValueError, match="no parameter requires a gradient: unfreeze"):
            model.fit(data, optimizer)
    assert model.samples is None
    assert (model.layers[0].linear.grid == torch.tensor([-1.0, 1.0])).all(), "nothing was done"
    with pytest.raises(ValueError, match=r"in torch.float16; save it in one of float32, float64"):
        model.half().save(tmp_path)


def test_small_inputs_are_learned_and_large_offsets_warned_of():
    x = torch.rand(60, 2, dtype=torch.float64) * 2 - 1
    y = (3 * x[:, :1]).sin() + x[:, 1:] ** 2
    fitted = KAN([2, 3, 1], dtype=torch.float64).fit(Dataset(1e-9 * x, y), steps=3, progress=False)
    assert fitted["train_loss"][-1] < 0.1 * y.std()
    with pytest.warns(UserWarning, match=r"input columns \[0, 1\] vary by less than a millionth of their size"):
        KAN([2, 3, 1], dtype=torch.float64).fit(Dataset(x + 1e8, y), steps=1, progress=False)


def test_bad_data():
    x, y = torch.rand(10, 2), torch.rand(10, 1)
    for value, name in ((math.nan, "nan"), (math.inf, "inf")):
        bad = x.clone()
        bad[3, 1] = value
        with pytest.raises(ValueError, match=f"train_input holds {name} in row 3, column 1"):
            Dataset(bad, y)
        with pytest.raises(ValueError, match=f"test_label holds {name} in row 7, column 0"):
            Dataset(x, y, x, torch.where(torch.arange(10).unsqueeze(1) == 7, value, y))
    for train, label, message in [
        (x[:0], y[:0], "at least one row"),
        (x[:, 0], y, "must be"),
        (x, y[:9], "10 input rows"),
        (x, y.unsqueeze(2), "10 input rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            Dataset(train, label)
    with pytest.raises(ValueError, match="both"):
        Dataset(x, y, x)
    with pytest.raises(ValueError, match="train and test rows differ"):
        Dataset(x, y, x[:, :1], y)
    for bad, message in [
        (Dataset(x[:, :1], y), "1 input columns, the network takes 2"),
        (Dataset(x, x), "2 label columns, the network gives 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            KAN([2, 1]).fit(bad)
    model = KAN([2, 1])
    with pytest.raises(ValueError, match=r"takes a tensor \(N, 2\)"):
        model(torch.rand(3, 1))
    with pytest.raises(TypeError, match="Dataset or a dictionary"):
        model.fit([x, y])
    with pytest.raises(ValueError, match="optimizer"):
        model.fit(Dataset(x, y), optimizer="sgd")
    with pytest.raises(ValueError, match="batch_size"):
        model.fit(Dataset(x, y), batch_size=3)
    with pytest.raises(ValueError, match="steps"):
        model.fit(Dataset(x, y), steps=0)
    with pytest.raises(ValueError, match="pass samples"):
        model.importance()
    with pytest.raises(ValueError, match="ranges"):
        create_dataset(f, ranges=(1, -1))


def test_degenerate_data_are_learned():
    """One sample, a constant target, more coefficients than samples: the minimum exists and is found."""
    one = Dataset([[0.3, 0.4]], [[2.0]])
    history = KAN([2, 2, 1]).fit(one, steps=10, progress=False)
    assert history["train_loss"][-1] < 1e-3
    x = torch.rand(30, 2, dtype=torch.float64)
    model = KAN([2, 2, 1], dtype=torch.float64)
    model.fit(Dataset(x, torch.full((30, 1), 5.0, dtype=torch.float64)), steps=10, progress=False)
    torch.testing.assert_close(model(x), torch.full((30, 1), 5.0, dtype=torch.float64), atol=1e-2, rtol=0)
    few = Dataset(x[:4], x[:4, :1])
    assert KAN([2, 3, 1], grid_size=20, dtype=torch.float64).fit(few, steps=5, progress=False)["train_loss"][-1] < 1e-4


def test_constant_features_and_inputs_out_of_range_are_warned_of():
    x = torch.rand(50, 2, dtype=torch.float64)
    x[:, 1] = 100
    model = KAN([2, 2, 1], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"input columns \[1\] are constant"):
        history = model.fit(Dataset(x, torch.sin(3 * x[:, 0])), steps=10, progress=False)
    assert history["train_loss"][-1] < 1e-2
    x = torch.rand(50, 2, dtype=torch.float64)
    model = KAN([2, 1], dtype=torch.float64)
    far = Dataset(x, x.sum(1), torch.cat([x[:30], x[:20] + 5]), torch.cat([x[:30], x[:20] + 5]).sum(1))
    with pytest.warns(UserWarning, match=r"40\.0% of the test rows lie outside"):
        model.fit(far, steps=2, progress=False)
    with pytest.warns(UserWarning, match=r"40\.0% of the test rows lie outside"):
        model.evaluate(far)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_loss_that_is_not_finite_ends_the_fit_with_the_last_good_parameters(data, optimizer):
    calls = 0

    def loss(prediction, label):
        nonlocal calls
        calls += 1
        return (prediction - label).square().mean() * (math.nan if calls > 60 else 1)

    model = KAN([2, 2, 1], dtype=torch.float64)
    start = model.evaluate(data)["train_loss"]
    train = Dataset(data.train_input, data.train_label)
    with pytest.warns(RuntimeWarning, match="not finite"):
        history = model.fit(train, optimizer, steps=100, loss=loss, update_grid=False, progress=False)
    assert len(history["train_loss"]) < 100
    assert model.evaluate(data)["train_loss"] < start


def test_any_float_goes_into_any_network(data):
    model = KAN([2, 2, 1], dtype=torch.float32)
    mixed = {"train_input": data.train_input.numpy(), "train_label": data.train_label.numpy()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(mixed, steps=2, progress=False)
    assert model(data.test_input).dtype == torch.float32
    assert model.double()(data.test_input.float()).dtype == torch.float64


def test_create_dataset_is_reproducible_and_normalises():
    state = torch.get_rng_state()
    one, two = create_dataset(f, seed=3), create_dataset(f, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["train_input"], two["train_input"])
    assert one.train_label.shape == (1000, 1)
    assert not torch.equal(one.train_input, one.test_input)
    normal = create_dataset(f, ranges=[(0, 1), (5, 9)], normalize_input=True, normalize_label=True)
    torch.testing.assert_close(normal.train_input.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.train_label.std(0), torch.ones(1))
    assert create_dataset(f, test_num=0).test_input is None
    raw = create_dataset(f, ranges=[(0, 1), (5, 9)])
    assert raw.train_input[:, 1].min() >= 5
    assert raw.train_input[:, 0].max() <= 1
