"""What is drawn, read back from the figure: boxes, lines, colours, opacities, names; files whole or absent."""

import itertools
import math
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot
import numpy as np
import pytest
import torch

from kansformer.kan import KAN
from kansformer.kan.plot import BLACK, RED, LayerDrawing, draw, plot_edge


@pytest.fixture(scope="module")
def samples():
    return torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def drawing(inputs, sums, products=0, alive=None, importance=None, names=None):
    shape = (sums + 2 * products, inputs)
    curves = np.sin(np.linspace(0, 3, 20)) * np.ones((*shape, 1))
    alive = np.ones(shape, bool) if alive is None else np.array(alive, bool)
    importance = np.ones(shape) if importance is None else np.array(importance)
    return LayerDrawing(sums, products, curves, importance, alive, names or [[None] * inputs] * shape[0])


def collections(figure, gid):
    return [c for c in figure.axes[0].collections if c.get_gid() == gid]


def boxes(figure):
    """(E, 4): left, bottom, right, top."""
    corners = [path.vertices for c in collections(figure, "boxes") for path in c.get_paths()]
    return np.array([[*v.min(0), *v.max(0)] for v in corners])


def overlaps(found):
    a, b = found[:, None], found[None]
    meet = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) > 0).all(-1)
    return int((meet.sum() - len(found)) / 2)


def test_overlaps_are_seen():
    assert overlaps(np.array([[0, 0, 1, 1], [0.5, 0.5, 2, 2], [3, 3, 4, 4]])) == 1


@pytest.mark.parametrize("width", [[2, 5, 1], [4, 20, 4], [1, 1], [3, [2, 2], [0, 1]], [30, 2], [4, 12, 12, 3]])
def test_every_edge_has_a_box_and_no_two_overlap(width, samples):
    model = KAN(width)
    x = torch.rand(32, model.in_features) * 2 - 1
    figure = model.plot(x=x)
    found = boxes(figure)
    assert len(found) == sum(layer.edge_mask.numel() for layer in model.layers)
    assert overlaps(found) == 0
    size = figure.get_size_inches()
    assert (found[:, 0] > figure.axes[0].get_xlim()[0]).all()
    assert (found[:, 2] < figure.axes[0].get_xlim()[1]).all()
    assert (found[:, 1] > 0).all()
    assert (found[:, 3] < size[1]).all()
    assert (found[:, 2] - found[:, 0]).min() > 0.2, "too small to read"


def test_lines_join_nodes_to_boxes_and_cross_no_box(samples):
    """In the gutters of several rows: a line may touch its own box's side, and enters none."""
    figure = KAN([4, 20, 4]).plot(x=samples)
    inner = boxes(figure) + np.array([1, 1, -1, -1]) * 0.01
    for collection in collections(figure, "edges"):
        for way in collection.get_segments():
            along = np.linspace(0, 1, 50)[:, None]
            points = np.concatenate([p + along * (q - p) for p, q in itertools.pairwise(way)])
            inside = (points[:, None] > inner[:, :2]).all(-1) & (points[:, None] < inner[:, 2:]).all(-1)
            assert not inside.any()


def test_opacity_is_tanh_of_importance_and_pruned_edges_are_absent():
    layer = drawing(2, 2, alive=[[1, 1], [0, 1]], importance=[[0.0, 0.2], [5.0, 1.0]])
    figure = draw([layer], ["a", "b"], beta=2.0)
    (collection,) = collections(figure, "boxes")
    opacity = collection.get_edgecolors()[:, 3]
    assert len(opacity) == 3
    expected = [0.07 + 0.93 * math.tanh(2 * score) for score in (0.0, 0.2, 1.0)]  # input by input
    assert np.allclose(opacity, expected)


def test_formulas_are_red_and_named(samples):
    model = KAN([2, 1])
    model.fix_symbolic(0, 1, 0, "sin", affine=(1, 0, 1, 0), x=samples[:, :2])
    figure = model.plot(x=samples[:, :2])
    (collection,) = collections(figure, "boxes")
    assert np.allclose(collection.get_edgecolors()[:, :3], [BLACK, RED])
    assert [t.get_text() for t in figure.axes[0].texts if t.get_gid() == "function"] == ["sin"]


def test_curves_are_the_edges_over_the_range_of_their_samples(samples):
    model = KAN([2, 1])
    x = samples[:, :2] * torch.tensor([1.0, 0.25])
    figure = model.plot(x=x)
    curve = figure.axes[0].collections[-1].get_segments()[1]
    at = torch.zeros(96, 2)
    at[:, 1] = torch.linspace(x[:, 1].min(), x[:, 1].max(), 96)
    expected = model.layers[0].edges(at)[:, 0, 1].detach().double().numpy()
    assert np.corrcoef(curve[:, 1], expected)[0, 1] > 1 - 1e-9
    assert abs(np.corrcoef(curve[:, 1], expected**2)[0, 1]) < 0.9999


def test_product_nodes_are_marked():
    figure = draw([drawing(2, 1, products=2)], ["a", "b"])
    assert len([p for p in figure.axes[0].patches if p.get_gid() == "product"]) == 2
    assert not [p for p in draw([drawing(2, 3)], ["a", "b"]).axes[0].patches if p.get_gid() == "product"]


def test_names_and_title(samples):
    figure = KAN([2, 1]).plot(x=samples[:, :2], inputs=["mass", "speed"], outputs=["energy"], title="a law")
    assert {t.get_text() for t in figure.axes[0].texts} == {"mass", "speed", "energy", "a law"}
    pruned = KAN([2, 1])
    pruned.inputs = [0, 4]
    assert {t.get_text() for t in pruned.plot(x=samples[:, :2]).axes[0].texts} == {"$x_{1}$", "$x_{5}$"}


def test_long_names_stay_inside(samples):
    names = [f"a feature with a long name {k}" for k in range(4)]
    figure = KAN([4, 1]).plot(x=samples, inputs=names)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in figure.axes[0].texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.y0 >= 0


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_files(kind, samples, tmp_path):
    path = tmp_path / "new" / f"network.{kind}"
    KAN([2, 2, 1]).plot(path, x=samples[:, :2])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    content = path.read_bytes()
    if kind == "svg":
        assert ElementTree.fromstring(content).tag.endswith("svg")
    else:
        assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[kind])


def test_a_failed_write_leaves_the_old_file(samples, tmp_path, monkeypatch):
    path = tmp_path / "network.png"
    path.write_bytes(b"old")

    def fail(self, name, **options):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        KAN([2, 1]).plot(path, x=samples[:, :2])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_left_alone(samples):
    before = dict(matplotlib.rcParams)
    KAN([2, 2, 1]).plot(x=samples[:, :2])
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


def test_one_edge_with_its_suggestions(samples):
    model = KAN([1, 1], dtype=torch.float64)
    x = samples[:, :1].double()
    model.fix_symbolic(0, 0, 0, "exp", affine=(2, 0, 1, 0), x=x)
    axes = plot_edge(model, 0, 0, 0, x=x).axes[0]
    edge, best = axes.lines[:2]
    assert best.get_label().startswith("exp")
    assert np.allclose(edge.get_ydata(), best.get_ydata(), atol=1e-9)


def test_bad_input(samples, tmp_path):
    model = KAN([2, 1])
    with pytest.raises(ValueError, match=r"'.*network.gif' should end in .png, .svg, .pdf"):
        model.plot(tmp_path / "network.gif", x=samples[:, :2])
    with pytest.raises(ValueError, match="inputs needs 2 names, got 1"):
        model.plot(x=samples[:, :2], inputs=["a"])
    with pytest.raises(ValueError, match="outputs needs 1 names, got 2"):
        model.plot(x=samples[:, :2], outputs=["a", "b"])
    with pytest.raises(ValueError, match="pass samples"):
        model.plot()


def test_a_network_without_live_edges_and_constant_edges(samples):
    model = KAN([2, 2, 1])
    with torch.no_grad():
        model.layers[0].edge_mask.zero_()
        model.layers[1].edge_mask[0, 1] = 0
    figure = model.plot(x=samples[:, :2])
    assert len(boxes(figure)) == 1
    (curve,) = figure.axes[0].collections[-1].get_segments()
    assert np.ptp(curve[:, 1]) == 0
