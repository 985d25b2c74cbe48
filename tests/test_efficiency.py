"""The sweep: cells are matched, ratios are the ones that were put in, runs are made once, bad sweeps are refused."""

import bz2
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import param_efficiency as efficiency  # noqa: E402
import peers  # noqa: E402
import sweeps  # noqa: E402

MODELS = {"swiglu": {"ffn_type": "swiglu"}, "kan_gated": {"ffn_type": "kan_gated"}}
UPPER = {"ffn_type": "swiglu", "widths": [1, 2]}
SIZE = {"vocab_size": 320, "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True}


def sweep(**changes) -> dict:
    text = {"data": "tinyshakespeare", "tokenizer": "byte", "sequence_length": 32, "batch_size": 2}
    schedule = {"steps": 3, "warmup_steps": 1, "eval_every": 3, "eval_batches": 2, "save_every": 3}
    values = {
        "name": "tiny",
        "train": text | schedule,
        "sizes": {"d16": SIZE | {"hidden_size": 16}, "d32": SIZE | {"hidden_size": 32}},
        "models": MODELS,
        **{"reference": "swiglu", "baselines": ["swiglu"], "learning_rates": ["1e-3"], "seeds": [0]},
    }
    return values | changes


def test_cells_cost_what_the_reference_costs():
    size = SIZE | {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    models = {
        "swiglu": {"ffn_type": "swiglu"},
        "mlp": {"ffn_type": "mlp"},
        "kan_mix": {"ffn_type": "kan_mix"},
        "kan_gated": {"ffn_type": "kan_gated"},
        "read": {"ffn_type": "kan_gated", "grid_size": 7, "match": "weights_read"},
        "wide": {"ffn_type": "swiglu", "match": "read"},
        "upper": {"ffn_type": "swiglu", "widths": [1, 3]},
        **{kind: {"ffn_type": kind} for kind in peers.BLOCKS},
    }
    settings = {"steps": 10, "batch_size": 4, "sequence_length": 32}
    costs = {
        name: efficiency.costs([(10, efficiency.configuration(size, model, "swiglu", models))], settings)
        for name, model in models.items()
    }
    for name in ("mlp", "kan_mix", "kan_gated", "upper", *peers.BLOCKS):
        assert costs[name]["feed_forward"] == pytest.approx(costs["swiglu"]["feed_forward"], rel=0.01)
    assert costs["read"]["weights_read"] == pytest.approx(costs["swiglu"]["weights_read"], rel=0.01)
    assert costs["read"]["feed_forward"] == pytest.approx(2.5 * costs["swiglu"]["feed_forward"], rel=0.02)  # 10/4 of it
    assert costs["wide"]["parameters"] == pytest.approx(costs["read"]["parameters"], rel=0.01)
    assert costs["upper"]["intermediate_size"] == [172, 516]  # 344 each, in one to three
    # k = 1, C = 4: 2 of 4 coefficients and the two projections are read, 4 of 6 weights
    unread = costs["kan_gated"]["parameters"] - costs["kan_gated"]["weights_read"]
    assert unread == pytest.approx(costs["kan_gated"]["feed_forward"] * 2 / 6)
    wide = [efficiency.configuration(size | {"intermediate_size": 1000}, models[m], "swiglu", models) for m in models]
    assert wide[0].intermediate_size == 1000
    assert wide[3].intermediate_size == 500  # (2 + C) d h


def test_a_run_whose_grids_are_refined_costs_what_its_parts_cost():
    models = {"swiglu": {"ffn_type": "swiglu"}, "coarse": {"ffn_type": "kan_gated", "intermediate_size": 12}}
    models |= {"fine": models["coarse"] | {"grid_size": 7}, "both": models["coarse"] | {"grid_size": 7}}
    models["both"] = models["both"] | {"coarse_grids": [[2, 3]]}
    values = sweep(models=models)
    parts = efficiency.phases(values, "d16", "both")
    assert [(steps, config.grid_size) for steps, config in parts] == [(2, 3), (1, 7)]
    cost = {m: efficiency.costs(efficiency.phases(values, "d16", m), values["train"]) for m in models}
    assert cost["both"]["flops"] == pytest.approx((2 * cost["coarse"]["flops"] + cost["fine"]["flops"]) / 3)
    assert cost["both"] | {"flops": 0} == cost["fine"] | {"flops": 0}
    times = efficiency.step_times({("d16", "both"): parts}, values["train"], 1, "cpu")
    assert set(times) == {("d16", "both")}


@pytest.mark.parametrize(("kind", "error"), [("gr_kan", 2e-4), ("chebyshev", 0.6)])
def test_peers_functions_are_those_of_their_papers(kind, error):
    x = torch.linspace(-3, 3, 40, dtype=torch.float64).expand(2, 5, 40)
    with torch.compiler.set_stance("force_eager"):
        block = peers.BLOCKS[kind](40, 16).double()
        assert (block.input_function(x) - x).abs().max() < error
        assert (block.function(x) - torch.nn.functional.silu(x)).abs().max() < error
        coefficients = list(block.function.parameters())
        for parameter in coefficients:
            torch.nn.init.normal_(parameter)
        found = block.function(x)
    a, *b = (parameter.detach().view(peers.GROUPS, -1).numpy() for parameter in coefficients)
    for group in range(peers.GROUPS):
        part = x[..., 5 * group : 5 * group + 5].numpy()
        if b:
            down = 1 + abs(np.polynomial.polynomial.polyval(part, [0, *b[0][group]]))
            expected = np.polynomial.polynomial.polyval(part, a[group]) / down
        else:
            expected = np.polynomial.chebyshev.chebval(np.tanh(part), a[group])
        np.testing.assert_allclose(found[..., 5 * group : 5 * group + 5].detach().numpy(), expected, rtol=1e-9)


@pytest.mark.usefixtures("forked")
def test_a_peers_block_is_trained_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    values = sweep(models=MODELS | {"gr_kan": {"ffn_type": "gr_kan"}})
    values["train"]["cache_dir"] = str(tmp_path / "cache")
    parts = efficiency.phases(values, "d16", "gr_kan")
    efficiency.write(tmp_path / "configs" / "d16_gr_kan.json", parts[0][1].to_json_string())
    made = efficiency.train(values, tmp_path, "d16", "gr_kan", 1e-3, 0, "cpu", 1, "now")
    assert made["feed_forward_parameters"] == efficiency.costs(parts, values["train"])["feed_forward"]
    assert 4 < made["val_loss"] < 7


def test_layers_of_two_kinds_have_the_parameters_of_the_reference_each():
    models = dict(MODELS)
    models["first"] = {"ffn_type": ["kan_gated", "swiglu"], "match": "params"}
    values = sweep(models=models)
    values["sizes"] = {"d16": values["sizes"]["d16"] | {"num_hidden_layers": 2}}
    widths = {name: efficiency.configured(values, "d16", name).intermediate_size for name in models}
    assert widths["first"] == [widths["kan_gated"], widths["swiglu"]]
    models["cubic"] = {"ffn_type": "kan", "grid_size": 5, "spline_order": 3}
    models["peer"] = {"ffn_type": "gr_kan"}
    names = sweeps.kan_blocks({"sweep": values})
    assert names.pop("peer") == sweeps.PEERS["gr_kan"]
    assert names.pop("cubic") == "kan C=8, k=3"
    assert names == {"kan_gated": "kan_gated C=4", "first": "kan_gated C=4, 1 of 2 layers"}
    assert sweeps.PEERS.keys() == peers.BLOCKS.keys()


def test_ratio_is_what_was_put_in():
    """Models on loss = 3 - 0.2 ln(efficiency * x): the ratio is the efficiency, whatever the sizes."""

    def points(sizes, better, noise=0.0):
        losses = [3 - 0.2 * math.log(better * x) for x in sizes]
        return [(x, [loss - noise, loss, loss + noise]) for x, loss in zip(sizes, losses)]

    def match(model, baseline):
        return efficiency.match(model, baseline, [losses for _, losses in [*model, *baseline]])

    differences, ratio, (low, high) = match(points([10, 30, 90], 1.3), points([12, 40, 100], 1.0))
    assert [ratio, low, high] == pytest.approx([1.3] * 3)
    assert differences == pytest.approx([-0.2 * math.log(1.3)] * 3)
    _, ratio, (low, high) = match(points([10, 30, 90], 0.8, 0.01), points([10, 30, 90], 1.0, 0.01))
    assert ratio == pytest.approx(0.8)
    assert low < ratio < high < 1
    # of two sizes none leaves a hull: in a size's mean the noise is 0.01 / sqrt(3), in a mean of two 0.01 / sqrt(6), in
    # a difference of two models 0.01 / sqrt(3); the slope is 0.2, and 8 degrees of freedom put 95% within 2.306
    low, high = match(points([10, 90], 0.8, 0.01), points([10, 90], 1.0, 0.01))[2]
    assert math.log(high / low) / 2 == pytest.approx(2.306 * 0.01 / math.sqrt(3) / 0.2, rel=0.1)
    once = [[(x, losses[:1]) for x, losses in points([10, 30, 90], better)] for better in (0.8, 1.0)]
    assert match(*once)[2] is None
    assert math.isnan(efficiency.match(points([1, 2], 1.0), [(1, [2.0]), (2, [3.0])])[1])  # more gives a higher loss
    differences = efficiency.match([*points([90], 1.3), *points([10], 1.0)], points([10, 30, 90], 1.0))[0]
    assert differences == pytest.approx([-0.2 * math.log(1.3), 0], abs=1e-12)  # in the model's order
    spent_badly = [*points([10, 30, 90], 1.0), *points([31, 91], 0.1)]
    assert efficiency.match(points([20, 60], 1.3), spent_badly)[1] == pytest.approx(1.3)
    assert efficiency.match(spent_badly, spent_badly)[1:] == (1, None)
    alike = [(x * (1 + 1e-3 * i), losses) for i, x in enumerate((1.0, 0.9)) for x, losses in points([10, 30], x)]
    assert efficiency.match(points([9, 30], 1.0), alike)[1] == pytest.approx(1.0, rel=0.01)  # no line through two alike
    assert efficiency.frontier([(0, 9), (1, 8.9), (2, 5), (2, 6), (3, 4), (4, 4.5)]) == [(0, 9), (2, 5), (3, 4)]


@pytest.mark.usefixtures("forked")
def test_a_sweep_runs_once(tmp_path, monkeypatch):
    path = tmp_path / "tiny.yaml"
    text = sweep()
    text["train"]["cache_dir"] = str(tmp_path / "cache")
    path.write_text(yaml.safe_dump(text))

    def main(*options: str) -> None:
        command = [
            "param_efficiency.py",
            str(path),
            "--runs",
            str(tmp_path / "runs"),
            "--output",
            str(tmp_path / "out"),
        ]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        efficiency.main()

    main("--rounds", "1")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")}
    assert len(made) == 4
    result = json.loads((tmp_path / "out" / "table.json").read_text())
    for cell in result["cells"]:
        assert cell["losses"][0] == cell["searched"]["0.001"]
    assert (tmp_path / "out" / "efficiency.png").stat().st_size > 10_000
    assert str(result["environment"]["commit"]) in (tmp_path / "out" / "table.md").read_text()
    again = efficiency.run_all(efficiency.read(path), tmp_path / "runs" / "tiny", 2, "cpu", "another commit")
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")}
    for was, cell in zip(result["cells"], again.values()):
        assert [cell["losses"], cell["trained"]] == [was["losses"], was["trained"]]
    more = text | {"models": text["models"] | {"wider": {"ffn_type": "swiglu", "intermediate_size": 64}}}
    path.write_text(yaml.safe_dump(more))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    main("--rounds", "1", "--keep")
    assert len(list((tmp_path / "runs").rglob("results.json"))) == 2  # the new model at both sizes
    kept = json.loads((tmp_path / "out" / "table.json").read_text())
    losses = {(cell["size"], cell["model"]): cell["losses"] for cell in kept["cells"]}
    assert len(losses) == 6
    assert all(losses[cell["size"], cell["model"]] == cell["losses"] for cell in result["cells"])
    assert all(cell["trained"].startswith(f"commit {result['environment']['commit']}") for cell in kept["cells"])
    assert kept["step_ms"][:2] != result["step_ms"][:2]
    (tmp_path / "elsewhere").rename(tmp_path / "runs" / "before")
    changed = efficiency.read(path)
    changed["models"]["kan_gated"] = {"ffn_type": "kan_gated", "grid_size": 5}
    assert set(efficiency.trained_cells(changed, kept)) == {key for key in losses if key[1] != "kan_gated"}
    main("--rounds", "0", "--keep")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["comparisons"] == kept["comparisons"]
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "later")
    (tmp_path / "runs" / "before" / "tiny").rename(tmp_path / "runs" / "tiny")
    path.write_text(yaml.safe_dump(text | {"seeds": [0, 1]}))
    main("--rounds", "0")
    extended = json.loads((tmp_path / "out" / "table.json").read_text())
    times = {(line["size"], line["model"]): line["median"] for line in kept["step_ms"]}
    assert {len(cell["losses"]) for cell in extended["cells"]} == {2}
    assert all(cell["seconds"] == 3e-3 * times[cell["size"], cell["model"]] for cell in extended["cells"])
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "before" / "tiny")
    path.write_text(yaml.safe_dump(text | {"seeds": [0, 1], "more_seeds": {"kan_gated": [3]}}))
    main("--rounds", "0", "--keep")
    assert len(list((tmp_path / "runs" / "tiny").rglob("results.json"))) == 2  # seed 3 of one model, at both sizes
    grown = json.loads((tmp_path / "out" / "table.json").read_text())
    for was, cell in zip(extended["cells"], grown["cells"]):
        assert cell["losses"][:2] == was["losses"]
        assert len(cell["losses"]) == len(cell["bits_per_byte"]) == (3 if cell["model"] == "kan_gated" else 2)
    assert "2 seeds (3 of kan_gated)" in (tmp_path / "out" / "table.md").read_text()
    first = efficiency.trained_cells(efficiency.read(path) | {"seeds": [0]}, grown)
    assert [cell["losses"] for cell in first.values()] == [cell["losses"][:1] for cell in grown["cells"]]
    assert efficiency.trained_cells(efficiency.read(path) | {"seeds": [1]}, grown) == {}
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "one")
    path.write_text(yaml.safe_dump(text))
    other = efficiency.read(path) | {"train": text["train"] | {"steps": 4}}
    with pytest.raises(ValueError, match="of another sweep"):
        efficiency.table_of(other, tmp_path / "out")
    with pytest.raises(ValueError, match="other settings: remove it"):
        efficiency.run_all(other, tmp_path / "runs" / "before" / "tiny", 1, "cpu", "another commit")


def test_a_thorough_search_goes_on_until_the_best_rate_has_neighbours(monkeypatch, tmp_path):
    best = {"swiglu": 0.05, "kan_gated": 0.004}
    tried = []

    def train(sweep, folder, size, model, rate, seed, device, threads, made):
        tried.append((model, rate, seed))
        if rate > 0.09:
            raise FloatingPointError("diverged")
        loss = abs(math.log(rate / best[model])) + seed
        return {"val_loss": loss, "val_bits_per_byte": loss, "trained": made}

    monkeypatch.setattr(efficiency, "train", train)
    values = sweep(sizes={"d16": SIZE}, learning_rates=[3e-3, 6e-3, 1.2e-2], seeds=[0, 1])
    closed = efficiency.run_all(values, tmp_path, 1, "cpu", "a")
    assert {model: cell["learning_rate"] for (_, model), cell in closed.items()} == {
        "swiglu": 0.012,
        "kan_gated": 0.003,
    }
    tried.clear()
    cells = efficiency.run_all(values | {"thorough": True}, tmp_path, 1, "cpu", "b", closed)
    assert {(rate, seed) for model, rate, seed in tried if model == "swiglu"} == {
        (0.024, 0), (0.048, 0), (0.096, 0), (0.048, 1)
    }  # fmt: skip
    assert [(rate, seed) for model, rate, seed in tried if model == "kan_gated"] == [(0.0015, 0)]
    swiglu, kan = cells["d16", "swiglu"], cells["d16", "kan_gated"]
    assert (swiglu["learning_rate"], len(swiglu["losses"]), swiglu["trained"]) == (0.048, 2, "b")
    assert swiglu["searched"]["0.096"] == math.inf
    assert list(swiglu["searched"]) == ["0.003", "0.006", "0.012", "0.024", "0.048", "0.096"]
    assert (kan["losses"], kan["trained"]) == (closed["d16", "kan_gated"]["losses"], "a")


def test_rates_that_are_close_are_told_apart_by_all_seeds(monkeypatch, tmp_path):
    losses = {1e-3: [1.1, 1.1, 1.1], 2e-3: [1.0, 1.2, 1.3], 4e-3: [1.007, 1.1, 1.1], 8e-3: [1.009, 1, 1]}
    tried = []

    def train(sweep, folder, size, model, rate, seed, device, threads, made):
        tried.append((rate, seed))
        return {"val_loss": losses[rate][seed], "val_bits_per_byte": losses[rate][seed], "trained": made}

    monkeypatch.setattr(efficiency, "train", train)
    models = {"swiglu": {"ffn_type": "swiglu"}}
    values = sweep(sizes={"d16": SIZE}, models=models, learning_rates=list(losses), seeds=[0, 1, 2])
    [plain] = efficiency.run_all(values, tmp_path, 1, "cpu", "a").values()
    assert (plain["learning_rate"], plain["close"]) == (2e-3, {})
    tried.clear()
    cells = efficiency.run_all(values | {"thorough": True}, tmp_path, 1, "cpu", "b", {("d16", "swiglu"): plain})
    cell = cells["d16", "swiglu"]
    assert (cell["learning_rate"], cell["losses"], cell["trained"]) == (4e-3, losses[4e-3], "b")
    assert cell["close"] == {"0.002": losses[2e-3], "0.004": losses[4e-3]}
    assert tried == [(4e-3, seed) for seed in range(3)]
    tried.clear()
    more = values | {"thorough": True, "more_seeds": {"swiglu": []}}
    assert efficiency.run_all(more, tmp_path, 1, "cpu", "c", cells) == cells
    assert tried == []


def test_some_models_of_a_sweep():
    models = MODELS | {"mlp": {"ffn_type": "mlp"}}
    whole = sweep(models=models, baselines=[["swiglu", "mlp"], "swiglu"])
    some = efficiency.restricted(whole, ["kan_gated", "swiglu"])
    assert list(some["models"]) == [name for name in models if name != "mlp"]
    assert some["baselines"] == ["swiglu"]
    with pytest.raises(ValueError, match="gelu is none of the models swiglu"):
        efficiency.restricted(whole, ["swiglu", "gelu"])
    with pytest.raises(ValueError, match="matched to swiglu: name it too"):
        efficiency.restricted(whole, ["kan_gated"])
    with pytest.raises(ValueError, match="no baseline is left"):
        efficiency.restricted(whole | {"baselines": ["mlp"]}, ["kan_gated", "swiglu"])
    long = efficiency.read(ROOT / "configs/sweeps/long.yaml")
    with pytest.raises(ValueError, match="matched to kan_gated_read: name it too"):
        efficiency.restricted(long, ["swiglu", "swiglu_wide"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"seeds must be a list with something in it, not \[\]"),
        ({"more_seeds": {"swiglu": [1, 0]}}, r"swiglu has the seeds \[0, 1, 0\], one of them twice"),
        ({"more_seeds": {"gelu": [1]}}, "gelu is none of the models"),
        ({"thorough": True}, "thorough is true or false, not True, and true needs two"),
        ({"thorough": "yes"}, "thorough is true or false, not 'yes'"),
        ({"learning_rates": "1e-3"}, "learning_rates must be a list"),
        ({"train": None}, "train must be a dict"),
        ({"models": {"swiglu": {"ffn_type": "swiglu"}, "kan": {"ffn_typ": "kan"}}}, "kan has ffn_typ: no field"),
        ({"sizes": {"d16": 16}}, "d16 has 16"),
        ({"reference": "gelu"}, "gelu is none of the models"),
        ({"train": {"steps": 3, "seed": 1}}, "the sweep's own"),
        ({"speed": 1}, "must have the keys"),
        ({"models": MODELS | {"swiglu": UPPER | {"widths": [1]}}}, r"swiglu has widths \[1\]; .* not the reference's"),
        ({"models": MODELS | {"upper": UPPER}}, r"upper has widths \[1, 2\]; .* each layer of every size"),
        ({"models": MODELS | {"upper": UPPER | {"widths": [0]}}}, r"upper has widths \[0\]; .* positive"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path, changes, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep(**changes)))
    with pytest.raises(ValueError, match=message):
        efficiency.read(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_whole(path):
    values = efficiency.read(path)
    for size in values["sizes"]:
        for model in values["models"]:
            config = efficiency.configured(values, size, model)
            assert values["train"].get("precision") != "bf16" or config.intermediate_size % 16 == 0


def test_words_are_counted_as_wikitext_counts_them(tmp_path):
    (tmp_path / "valid.txt").write_text(" = Title = \n\n a b c \n", newline="\n")
    assert efficiency.bytes_a_word(tmp_path) == 21 / (6 + 3)
    assert efficiency.bytes_a_word(tmp_path / "none") is None
    published = ROOT.parent / "shared" / "data" / "wikitext-2"
    if (published / "valid.txt.bz2").is_file():  # 217,646 words with ends of lines, as published
        with bz2.open(published / "valid.txt.bz2") as file:
            assert len(file.read()) / efficiency.bytes_a_word(published) == pytest.approx(217_646)
