"""The claims' scripts run in their smallest setting, and their verdicts follow from what they measured."""

import json
import math
import sys
from pathlib import Path

import pytest
import scripts
import torch

CLAIMS = Path(__file__).parents[1] / "benchmarks" / "claims"
sys.path.insert(0, str(CLAIMS))  # as when a script is run: they import each other by name

import all as claims  # noqa: E402
import claim  # noqa: E402
import function_fitting  # noqa: E402
import local_control  # noqa: E402
import poisson  # noqa: E402
import special_functions  # noqa: E402

from kansformer.kan import KAN  # noqa: E402

pytest.importorskip("scipy")
pytest.importorskip("sympy")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_script_writes_table_data_and_picture(name, tmp_path):
    run = scripts.run(f"benchmarks/claims/{name}.py", "--quick", "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    text = (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 20_000
    assert not list(tmp_path.glob("*.part*"))
    for key in ("commit", "device", "torch", "dtype"):
        assert str(result["environment"][key]) in text
    # The verdict is the criteria's, in what was printed and in what was written.
    met = [c["met"] for c in result["criteria"]]
    expected = "holds" if all(met) else "holds in part" if any(met) else "does not hold"
    assert result["verdict"] == expected
    assert f"**Verdict: {expected}.**" in text
    assert f"**Verdict: {expected}.**" in run.stdout
    row = next(line for line in claims.table(tmp_path).splitlines() if f"{name}.md" in line)
    assert result["claim"] in row.replace("\\|", "|")


def test_quick_runs_do_not_replace_results():
    options = claim.arguments("x").parse_args(["--quick"])
    assert options.output is None
    assert claim.QUICK_FOLDER != claim.FOLDER
    assert "runs" in claim.QUICK_FOLDER.parts


@pytest.mark.parametrize(
    ("met", "expected"),
    [([True, True], "holds"), ([True, False], "holds in part"), ([False, False], "does not hold")],
)
def test_verdict(met, expected):
    assert claim.verdict([claim.criterion("", 1.0, m) for m in met]) == expected


def test_a_criterion_without_a_number_is_not_met():
    assert not claim.criterion("", math.nan, True).met


def test_the_table_says_what_is_not_recorded(tmp_path):
    assert claims.table(tmp_path).count("not recorded") == len(claims.CLAIMS)
    text = f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n"
    new = claims.with_table(text, "new")
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert "new" in new
    assert "old" not in new
    assert claims.with_table(new, "new") == new
    with pytest.raises(ValueError, match="needs one line"):
        claims.with_table("no markers", "new")


def test_readme_lists_every_script():
    text = (CLAIMS / "README.md").read_text()
    assert text.count(claims.BEGIN) == text.count(claims.END) == 1
    scripts = {p.stem for p in CLAIMS.glob("*.py")} - {"all", "claim"}
    assert scripts == set(claims.CLAIMS)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_minimise(optimizer):
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    unused = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
    trace = claim.minimise(lambda: (scale * (p - 1).square()).sum(), [p, unused], optimizer, 400, lr=0.1)
    assert torch.allclose(p, torch.ones_like(p), atol=1e-3)
    assert unused.item() == 1
    seconds, values = zip(*trace)
    assert list(seconds) == sorted(seconds)
    assert values[-1] <= values[0]


def test_minimise_keeps_the_best_of_a_run_that_diverges():
    p = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    calls = iter(range(10**6))

    def loss():
        return p.square() if next(calls) < 60 else p * math.nan

    claim.minimise(loss, [p], "adam", 100, lr=0.1)
    assert p.isfinite()
    assert abs(p.item()) < 2


def test_parameters_are_counted_as_the_article_does():
    kan = KAN([2, 10, 1], grid_size=5)
    assert claim.count(kan) == 30 * (5 + 3 + 1)  # G + k splines and the base term on every edge
    assert claim.count(claim.mlp([2, 100, 100, 100, 1])) == 20_601
    for layers in (1, 2, 3):
        width = claim.width_for(500, 2, 1, layers)
        assert claim.count(claim.mlp([2, *[width] * layers, 1])) == pytest.approx(500, rel=0.1)


def test_slope_and_mean():
    assert claim.slope([1, 2, 4], [8, 1, 1 / 8]) == pytest.approx(-3)
    assert claim.geometric_mean([1, 100]) == pytest.approx(10)


def test_the_physics_informed_loss_knows_the_solution():
    problem = poisson.Poisson(50, 16, mesh=21)

    class Exact(torch.nn.Module):
        def forward(self, x):
            return (math.pi * x).sin().prod(-1, keepdim=True)

    assert problem.loss(Exact()).item() < 1e-20
    assert max(problem.errors(Exact())) < 1e-20
    assert (problem.edge.abs() == 1).any(1).all()
    assert problem.loss(claim.mlp([2, 5, 1])).item() > 1  # and no other function passes


def test_the_formula_is_recognised_and_others_are_not():
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    right = sympy.exp(1.0000001 * sympy.sin(3.1415927 * x) + y**2)
    assert function_fitting.recovered(right)
    assert function_fitting.recovered(sympy.exp(sympy.cos(3.1415927 * x - 1.5707963) + y**2))
    for wrong in (sympy.exp(sympy.sin(3.2 * x) + y**2), sympy.sin(x) + y, right + 0.01, sympy.log(right) ** 2):
        assert not function_fitting.recovered(wrong)


def test_every_function_is_finite_where_it_is_sampled():
    for name, (f, ranges) in special_functions.FUNCTIONS.items():
        x, y = special_functions.sample(f, ranges, 2000, seed=1)
        assert y.isfinite().all(), name
        assert y.std() > 0, name
        assert x.abs().max() <= 1


def test_fronts_and_advantage():
    def row(kind, parameters, test):
        return {"function": "f", "kind": kind, "parameters": parameters, "test": test}

    rows = [row("KAN", 10, 0.1), row("KAN", 40, 0.01), row("KAN", 20, 0.2)]
    assert special_functions.front(rows, "f", "KAN") == [(10, 0.1), (40, 0.01)]
    worse = [row("MLP", r["parameters"], 10 * r["test"]) for r in rows]
    assert special_functions.advantage(rows + worse, "f") == pytest.approx(10)
    assert special_functions.front_slope(rows, "f", "KAN") == pytest.approx(math.log(10) / math.log(4))


def test_one_coefficient_moves_its_own_splines_alone():
    found = local_control.structure()
    assert found["moved"] == pytest.approx(found["expected"], abs=2e-3)
