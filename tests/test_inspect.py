"""Looking into trained models: the statistics against every edge written out, and the page against a parser."""

import base64
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from numerics import assert_close, error
from tokenizer import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from kansformer import KANLinear, KansformerConfig, KansformerForCausalLM, splines
from kansformer.inspect import edge_curves, measure, report
from kansformer.inspect.__main__ import main
from kansformer.inspect.edges import BINS, MARGIN, Moments
from kansformer.inspect.formulas import formulas, quantiles
from kansformer.layers import EdgeLayer, FourierLinear

ROOT = Path(__file__).parents[1]
LAYERS = {
    "linear splines": {"spline_order": 1, "grid_size": 3, "base_activation": None},
    "quadratic": {"spline_order": 2, "grid_size": 4, "base_activation": "gelu"},
    "cubic": {"spline_order": 3, "grid_size": 5, "base_activation": "silu"},
}


def layer_and_inputs(name: str, rows: int = 400) -> tuple[EdgeLayer, torch.Tensor, torch.Tensor]:
    """A layer with a grid of its own for each input, and inputs and gates, some of them off the grid."""
    scale = torch.rand(5, dtype=torch.float64) + 0.5
    if name == "waves":
        layer = FourierLinear(5, 7, frequency=4.0, dtype=torch.float64)
    else:
        layer = KANLinear(5, 7, **LAYERS[name], dtype=torch.float64)
        layer.update_grid(torch.randn(500, 5, dtype=torch.float64) * scale, spread=2.0)
    return layer, torch.randn(rows, 5, dtype=torch.float64) * scale + 0.3, torch.randn(rows, 5, dtype=torch.float64)


@torch.no_grad()
def every_edge(layer: EdgeLayer, x: torch.Tensor) -> torch.Tensor:
    """(M, I, O), from the layer itself: a gate that lets one input through."""
    inputs = torch.eye(layer.in_features, dtype=x.dtype)
    return torch.stack([layer(x, gate=row.expand_as(x)) for row in inputs], 1)


def tiny_model(ffn_type: str | list[str], **fields) -> KansformerForCausalLM:
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 64}
    return KansformerForCausalLM(KansformerConfig(ffn_type=ffn_type, **sizes | fields)).eval()


def token_batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randint(256, (4, 32)) for _ in range(count)]


# Statistics


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "waves"])
def test_statistics_equal_those_of_every_edge(name, gated, monkeypatch):
    monkeypatch.setattr("kansformer.inspect.edges.CHUNK", 1000)  # several pieces, of rows and of inputs
    layer, x, gate = layer_and_inputs(name)
    moments = Moments("layer", layer)
    for rows in (slice(0, 150), slice(150, None)):
        moments.add(x[rows].unsqueeze(0), gate[rows].unsqueeze(0) if gated else None)
    s = moments.statistics()

    f = every_edge(layer, x)
    added = f * gate.unsqueeze(-1) if gated else f
    assert_close(s.energy, added.square().mean(0), 1e-6, "energy")
    assert_close(s.variance, f.var(0, correction=0), 1e-6, "variance")
    centred, x_centred = f - f.mean(0), (x - x.mean(0)).unsqueeze(-1)
    correlation = (centred * x_centred).mean(0) / (centred.square().mean(0) * x_centred.square().mean(0)).sqrt()
    assert_close(s.linearity, correlation.square(), 1e-6, "linearity")
    lo, hi = s.ranges.unbind(-1)
    assert_close(s.outside, ((x < lo) | (x > hi)).double().mean(0), 1e-6, "outside")
    assert s.outside.min() > 0
    assert (s.rows, s.gated) == (400, gated)

    if name == "waves":
        assert s.ranges.tolist() == [[-math.pi / 2, math.pi / 2]] * 5
        assert s.spline_energy == pytest.approx(added.square().mean(0).sum().item(), rel=1e-9)
        return
    splines_only = KANLinear(5, 7, **LAYERS[name], dtype=torch.float64)
    splines_only.load_state_dict(layer.state_dict())
    if layer.base_weight is not None:
        torch.nn.init.zeros_(splines_only.base_weight)
    parts = every_edge(splines_only, x)
    weight = gate.unsqueeze(-1) if gated else 1
    assert s.spline_energy == pytest.approx((parts * weight).square().mean(0).sum().item(), rel=1e-9)
    assert s.base_energy == pytest.approx(((f - parts) * weight).square().mean(0).sum().item(), rel=1e-6)
    assert 0 < s.base_share < 1 if layer.base_weight is not None else s.base_share == 0

    with torch.no_grad():
        layer.spline_weight[3, 2] += 0.5  # one coefficient of one edge: the comparison sees it
    assert error(moments.statistics().energy, added.square().mean(0)) > 1e-3


def test_density_counts_every_value():
    layer, x, _ = layer_and_inputs("cubic")
    x[0, 0], x[1, 0] = 1e9, -1e9
    moments = Moments("layer", layer)
    moments.add(x)
    density = moments.statistics().density
    assert_close(density.sum(1), torch.ones(5), 1e-6)
    lo, hi = layer.grid.double().unbind(-1)
    unit = (x - lo) / (hi - lo)
    for i in range(5):
        edges = torch.linspace(-MARGIN, 1 + MARGIN, BINS + 1, dtype=torch.float64)
        expected = torch.histogram(unit[:, i].clamp(edges[0], edges[-1]), edges).hist / len(x)
        assert_close(density[i], expected, 1e-6)


def test_constant_straight_and_strongest_edges():
    layer = KANLinear(4, 3, grid_size=4, spline_order=3, base_activation=None)
    x = torch.linspace(-2, 2, 200).unsqueeze(-1).expand(-1, 4)
    wanted = torch.stack([torch.stack([x[:, 0], 0 * x[:, 0] + 5, torch.sin(3 * x[:, 0])], -1)] * 4, 1)
    wanted[:, 2] *= 3  # input 2 is the strongest
    wanted[:, 3] = 7.0  # input 3 has only constants
    with torch.no_grad():
        layer.spline_weight.copy_(splines.fit(x, wanted, layer.grid, 4, 3))
    moments = Moments("layer", layer)
    moments.add(x)
    s = moments.statistics()
    assert s.constant().tolist() == [[False, True, False]] * 3 + [[True] * 3]
    assert s.linearity[:3, 0] == pytest.approx([1.0] * 3, abs=1e-6)
    assert (s.linearity[:3, 2] < 0.2).all()
    assert s.linearity[:, 1] == pytest.approx([1.0] * 4)  # a constant is a straight line
    first, *others = s.strongest(10).tolist()
    assert first == [2, 1]
    assert len(others) == 2
    assert len({i for i, _ in [first, *others]}) == len({o for _, o in [first, *others]}) == 3
    assert s.most_bent(1, 1.0).tolist()[0][1] == 2
    assert s.most_bent(4, 0.1).tolist() == [[2, 1]]  # the strongest tenth of twelve edges is one
    assert 0 < s.carriers(0.5) < s.carriers(0.9) <= 1


@pytest.mark.parametrize("name", [*LAYERS, "waves"])
def test_curves_are_the_layers(name):
    layer, _, _ = layer_and_inputs(name)
    edges = torch.tensor([[0, 6], [4, 0], [4, 3]])
    points = torch.linspace(-4, 4, 50, dtype=torch.float64).expand(3, -1)
    found = edge_curves(layer, edges, points)
    full = every_edge(layer, points[0].unsqueeze(-1).expand(-1, 5))
    assert_close(found, torch.stack([full[:, i, o] for i, o in edges.tolist()]), 1e-12)


def test_no_tensor_holds_every_edge_of_every_token():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if torch.is_tensor(tensor):
                    self.numel = max(self.numel, tensor.numel())
            return output

    tokens, inputs, outputs = 4096, 48, 80
    layer = KANLinear(inputs, outputs, base_activation="silu")
    moments = Moments("layer", layer)
    with Largest() as largest:
        moments.add(torch.randn(tokens, inputs))
        moments.statistics()
    assert 0 < largest.numel < tokens * inputs * outputs / 5  # the basis of a chunk of tokens


@pytest.mark.parametrize("ffn_type", ["kan", "kan_mix", "kan_gated", "kan_fourier"])
def test_measure_a_model(ffn_type):
    model, batches = tiny_model(ffn_type).train(), token_batches()
    statistics = measure(model, iter(batches))
    assert [s.name for s in statistics] == [name for name, m in model.named_modules() if isinstance(m, EdgeLayer)]
    assert model.training
    seen = []
    s = statistics[-1]
    with torch.no_grad():
        hook = s.layer.register_forward_pre_hook(lambda m, a, k: seen.append((a[0], k.get("gate"))), with_kwargs=True)
        for batch in batches:
            model.eval()(input_ids=batch)
        hook.remove()
    x, gate = (torch.cat(t).flatten(0, -2) if t[0] is not None else None for t in zip(*seen))
    f = every_edge(s.layer, x)
    added = f if gate is None else f * gate.unsqueeze(-1)
    assert_close(s.energy, added.square().mean(0), 1e-5)
    assert s.gated == (ffn_type == "kan_gated")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_measure_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(swiglu\) has no KAN layers.*kansformer.prune"):
        measure(tiny_model("swiglu"), token_batches())
    with pytest.raises(ValueError, match=r"\(1 x swiglu, 1 x mlp\) has no KAN layers"):
        measure(tiny_model(["swiglu", "mlp"]), token_batches())
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj has seen no tokens"):
        measure(tiny_model("kan"), [])
    model = tiny_model("kan_gated")
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj gets NaN"):
        measure(model, token_batches())
    assert not any(m._forward_pre_hooks for m in model.modules())


# Formulas


def test_formulas_name_what_an_edge_is():
    layer = KANLinear(3, 1, grid_size=4, spline_order=2, base_activation=None)
    x = torch.linspace(-2, 2, 300).unsqueeze(-1).expand(-1, 3)
    wanted = torch.stack([(x[:, 0] - 0.5).square() * 2 - 1, 0.3 * x[:, 1] + 0.1, torch.sin(2.5 * x[:, 2])], 1)
    with torch.no_grad():
        layer.spline_weight.copy_(splines.fit(x, wanted.unsqueeze(-1), layer.grid, 4, 2))
    moments = Moments("layer", layer)
    moments.add(x)
    square, line, wave = formulas(moments.statistics(), torch.tensor([[0, 0], [1, 0], [2, 0]]))
    a, b, c = map(float, re.fullmatch(r"(\S+) \(x - (\S+)\)\^2 - (\S+) \(R²\s1\.00\)", square).groups())
    assert (a, b, c) == pytest.approx((2, 0.5, 1), abs=0.02)  # the outermost samples may lie off the grid
    assert re.fullmatch(r"0\.(3|299) x \+ 0\.(1|0999) \(R²\s1\.00\)", line), line
    assert "sin(2.4" in wave or "sin(2.5" in wave


def test_the_formula_of_a_wave_is_what_it_computes():
    layer = FourierLinear(3, 4, frequency=1.5)
    with torch.no_grad():
        layer.sin_proj.weight[3, 2], layer.cos_proj.weight[3, 2] = -0.3, 0.4
    moments = Moments("layer", layer)
    moments.add(torch.randn(20, 3))
    found = formulas(moments.statistics(), torch.tensor([[0, 0], [2, 3]]))[1]
    assert found == "0.5 sin(1.5 x + 2.21)"
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)
    expected = edge_curves(layer, torch.tensor([[2, 3]]), x.unsqueeze(0))[0]
    assert_close(0.5 * torch.sin(1.5 * x + 2.21), expected, 5e-3)


def test_quantiles_follow_the_density():
    layer, x, _ = layer_and_inputs("cubic", rows=20000)
    moments = Moments("layer", layer)
    moments.add(x)
    found = quantiles(moments.statistics(), torch.tensor([1, 3]), 9)
    for row, i in zip(found, (1, 3)):
        expected = x[:, i].quantile((torch.arange(9, dtype=torch.float64) + 0.5) / 9)
        width = (layer.grid[i, 1] - layer.grid[i, 0]).item() * (1 + 2 * MARGIN) / BINS
        assert (row[1:-1] - expected[1:-1]).abs().max() < width  # the ends may lie in the open bins


# The page


class Page(HTMLParser):
    """What the page is made of; raises where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.text = [], [], [], set(), ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids |= {value for key, value in attrs if key == "id"}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_self_contained():
    model = tiny_model("kan", base_activation="silu", spline_order=3)
    statistics = measure(model, token_batches())
    text = report(statistics, {"Model": "a <b>&model", "Tokens": "384"}, formulas)
    page = Page(text)
    names = [name for name, _ in model.kan_layers()]
    assert len(names) == 4
    assert {name.replace(".", "-") for name in names} <= page.ids
    assert all(text.count(f'href="#{name.replace(".", "-")}"') == 1 for name in names)
    assert page.text.count("Importance of edges") == len(names)
    assert "a <b>&model" in page.text  # escaped on the way in
    assert page.tags.count("figure") == sum(8 + 4 + 4 for _ in names)

    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for key, value in page.attributes:
        assert key not in ("src", "srcset", "onclick", "onload"), (key, value)
        assert key != "href" or value[1:] in page.ids
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in re.findall(r"url\((.*?)\)", text))
    assert "http" not in text
    assert "@import" not in text
    assert "nan" not in re.sub(r"[^a-z]+", " ", page.text.lower()).split()
    for drawn in re.findall(r' d="(.*?)"', text):
        assert not re.search("nan|inf", drawn)

    picture = base64.b64decode(re.search(r"base64,(.*?)\)", text)[1])
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG")
    assert (width, height) == (32, 24)  # inputs across, outputs down


def test_page_of_waves():
    statistics = measure(tiny_model(["kan_fourier", "kan_gated"]), token_batches())
    text = report(statistics, {"Model": "waves below splines"}, formulas)
    page = Page(text)
    for said in ("waves of angular frequency 1.5", "no grid", "two periods", " sin(1.5 x ", "splines of order 1"):
        assert said in page.text, said
    assert page.text.count("Out of the grid") == 1
    waves, splined = text.split('<section id="model-layers-1')
    assert "<circle" not in waves
    assert "<circle" in splined


def test_page_of_dead_and_tiny_layers():
    """Nothing divides by an energy that is zero, or draws more edges than there are."""
    layer = KANLinear(2, 1, base_activation=None)
    torch.nn.init.zeros_(layer.spline_weight)
    moments = Moments("dead", layer)
    moments.add(torch.randn(10, 2))
    page = Page(report([moments.statistics()], {"Model": "none"}))
    assert "2 of 2 edges (100%) are constant" in page.text


# The command


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model("kan_gated").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("What light through yonder window breaks?\n" * 40)
    return tmp_path


def test_command(folder, capsys):
    output = folder / "new" / "page.html"
    main([str(folder / "model"), "--text", str(folder / "text.txt"), "--output", str(output)])
    page = Page(output.read_text())
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    for fact in ("kan_gated", "1,640", "of these, feed-forward", "kansformer 0."):
        assert fact in page.text, fact
    assert "R²" in page.text
    assert str(output) in capsys.readouterr().out


def test_command_says_what_is_wrong(folder):
    model, text = str(folder / "model"), folder / "text.txt"

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--output", str(folder / "page.html")])
        assert not (folder / "page.html").exists()
        return str(stop.value)

    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "has 0 tokens: give a text" in refused(model, "--text", folder / "empty.txt")
    assert "binary.txt is not UTF-8 text" in refused(model, "--text", folder / "binary.txt")
    assert "is not a file" in refused(model, "--text", folder / "nowhere.txt")
    assert "needs at least two" in refused(model, "--text", text, "--tokens", "1")
    assert f"did you mean {model}?" in refused(folder, "--text", text)
    assert "no config.json" in refused(folder / "nowhere", "--text", text)
    tiny_model("kan", vocab_size=64).save_pretrained(folder / "small")
    assert "has no tokenizer" in refused(folder / "small", "--text", text)
    byte_tokenizer().save_pretrained(folder / "small")
    assert "the model knows 64" in refused(folder / "small", "--text", text)
    tiny_model("swiglu").save_pretrained(folder / "swiglu")
    byte_tokenizer().save_pretrained(folder / "swiglu")
    assert "(swiglu) has no KAN layers" in refused(folder / "swiglu", "--text", text)
    (folder / "small" / "model.safetensors").write_bytes(b"torn")
    assert "cannot be loaded" in refused(folder / "small", "--text", text)
