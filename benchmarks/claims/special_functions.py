"""Special functions and formulas of physics: KANs against MLPs of many sizes, the Pareto front, and how error scales.

    python benchmarks/claims/special_functions.py

Six special functions (arXiv:2404.19756, section 3.2) and eight formulas of Feynman's lectures, dimensionless as in
section 3.3; inputs scaled to [-1, 1], outputs to unit variance, float64, 1,000 samples to learn from and 1,000 to test
on. Twelve KANs (three shapes, G = 3, 5, 10, 20) meet twelve MLPs (three shapes of width, depth, two
activations) with the same optimisers, steps, seeds and choice by validation error; a KAN's grid is extended in the
course of its steps, so no KAN has more of them than an MLP.

Scaling, RMSE ~ N^-alpha with alpha = k + 1 = 4 for cubic splines (section 2.3): where the shape of the function is
known, a [n, 5, 1] network is pruned to it and the exponent is fitted over G = 3 .. 50; N is proportional to G + k + 1.
"""

import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from claim import (
    COLOURS,
    arguments,
    climb,
    count,
    criterion,
    environment,
    geometric_mean,
    markdown,
    minimise,
    mlp,
    publish,
    pyplot,
    rmse,
    slope,
)
from function_fitting import prune
from torch import Tensor, nn

from kansformer.kan import KAN, Dataset

GRIDS = (3, 5, 10, 20)
SHAPES = ((2,), (5,), (5, 5))  # hidden layers of the KANs
MLPS = tuple((w, d, a) for w in (6, 16, 40) for d in (2, 3) for a in ("tanh", "silu"))
RUNS = (("lbfgs", 0), ("lbfgs", 1), ("adam", 0))  # optimisers and seeds, the same for all
SCALING_GRIDS = (3, 5, 10, 20, 50)
RESOLVED = 0.3
pi = math.pi


def _scipy(name: str) -> Callable:
    def f(*arguments: Tensor) -> Tensor:
        from scipy import special

        return torch.from_numpy(getattr(special, name)(*(a.numpy() for a in arguments)))

    return f


# name: (function of columns, ranges)
FUNCTIONS: dict[str, tuple[Callable, list[tuple[float, float]]]] = {
    "jv(v, x)": (_scipy("jv"), [(0, 4), (0, 12)]),
    "iv(v, x)": (_scipy("iv"), [(0, 3), (0, 3)]),
    "ellipkinc(phi, m)": (_scipy("ellipkinc"), [(-pi / 2, pi / 2), (0, 0.95)]),
    "ellipeinc(phi, m)": (_scipy("ellipeinc"), [(-pi, pi), (0, 1)]),
    "kv(v, x)": (_scipy("kv"), [(0, 2), (0.5, 4)]),
    "P_2^1(x) cos(phi)": (lambda x, p: 3 * x * (1 - x * x).clamp_min(0).sqrt() * p.cos(), [(-1, 1), (-pi, pi)]),
    "I.6.20 exp(-t^2/2s^2)/sqrt(2 pi s^2)": (
        lambda t, s: (-(t**2) / (2 * s**2)).exp() / (2 * pi * s**2).sqrt(),
        [(-1, 1), (0.5, 2)],
    ),
    "I.12.11 1 + a sin(t)": (lambda a, t: 1 + a * t.sin(), [(-1, 1), (0, 2 * pi)]),
    "I.16.6 (a + b)/(1 + a b)": (lambda a, b: (a + b) / (1 + a * b), [(-0.8, 0.8), (-0.8, 0.8)]),
    "I.26.2 arcsin(n sin(t))": (lambda n, t: (n * t.sin()).arcsin(), [(0, 0.95), (-pi / 2, pi / 2)]),
    "I.29.16 sqrt(1 + a^2 - 2a cos(t))": (
        lambda a, t: (1 + a**2 - 2 * a * t.cos()).sqrt(),
        [(0.2, 0.8), (0, 2 * pi)],
    ),
    "I.30.3 sin(n t/2)^2 / sin(t/2)^2": (
        lambda n, t: ((n * t / 2).sin() / (t / 2).sin()) ** 2,
        [(1, 4), (0.2, pi)],
    ),
    "I.40.1 n exp(-a)": (lambda n, a: n * (-a).exp(), [(0, 1), (-2, 2)]),
    "II.6.15a sqrt(a^2 + b^2) c": (lambda a, b, c: (a**2 + b**2).sqrt() * c, [(0.1, 1), (0.1, 1), (-1, 1)]),
}
# Functions whose shape is known: name: (function, width).
KNOWN: dict[str, tuple[Callable, list[int]]] = {
    "J0(20 x)": (lambda x: _scipy("j0")(20 * x), [1, 1]),
    "exp(sin(pi x) + y^2)": (lambda x, y: ((pi * x).sin() + y**2).exp(), [2, 1, 1]),
    "x y": (lambda x, y: x * y, [2, 2, 1]),
}


def main() -> None:
    options = arguments(__doc__).parse_args()
    quick = options.quick
    steps, names, mlps, shapes, runs = 600, list(FUNCTIONS), MLPS, SHAPES, RUNS
    if quick:
        steps, names, mlps, shapes, runs = 20, names[:2], MLPS[::5], SHAPES[:2], RUNS[::2]
    works = [(learn_function, name, steps, mlps, shapes, runs) for name in names]
    works += [(learn_known, name, 3 * steps, quick) for name in KNOWN]
    # Functions side by side, one thread each: small networks gain nothing from a second.
    workers = 1 if quick else os.cpu_count()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        results = list(pool.map(_call, works)) if not quick else [_call(w) for w in works]
    rows = [row for found in results[: len(names)] for row in found]
    known = results[len(names) :]
    env = environment("cpu", dtype="float64", steps=steps, runs=len(runs)) | {"threads": f"1 x {workers}"}

    pairs = {name: advantage(rows, name) for name in names}
    mean = geometric_mean(list(pairs.values()))
    wins = sum(v > 1 for v in pairs.values())
    exponents = sorted(k["alpha"] for k in known)
    alpha = exponents[len(exponents) // 2]
    fronts = {kind: [front_slope(rows, name, kind) for name in names] for kind in ("KAN", "MLP")}
    steepness = {kind: sum(s) / len(s) for kind, s in fronts.items()}
    criteria = [
        criterion(
            f"at equal parameters a KAN has less error for at least 90% of the {len(names)} functions",
            wins / len(names),
            wins >= 0.9 * len(names),
            "{:.0%}",
        ),
        criterion("on average over functions and sizes, at least 10x less", mean, mean >= 10),
        criterion("exponent at the known shapes between 3 and 5 (theory: 4), median", alpha, 3 <= alpha <= 5),
        criterion(
            "KANs' fronts fall faster with parameters than MLPs' (mean exponents' difference > 0)",
            steepness["KAN"] - steepness["MLP"],
            steepness["KAN"] > steepness["MLP"],
            "{:+.2f}",
        ),
    ]
    listed = ", ".join(f"{k['alpha']:.1f} ({k['function']})" for k in known)
    ours = (
        f"At equal parameters the KANs' error is lower for {wins} of {len(names)} functions, by {mean:.2g}x on average "
        f"(geometric mean). Exponents at known shapes: {listed};"
        f" along the fronts {steepness['KAN']:.1f} (KAN) and {steepness['MLP']:.1f} (MLP)."
    )
    publish(
        options,
        "special_functions",
        title="Special functions and formulas: KANs have the better Pareto front, and error falls as N^-4",
        paper="KANs' fronts consistently better; alpha = 4, MLPs slower",
        ours=ours,
        criteria=criteria,
        environment=env,
        tables=f"{table(rows, pairs)}\n\n{known_table(known)}",
        data={"rows": rows, "advantage": pairs, "known": known},
        figure=draw(rows, pairs, known),
    )


def _one_thread() -> None:
    torch.set_num_threads(1)


def _call(work: tuple) -> object:
    return work[0](*work[1:])


def sample(f: Callable, ranges: list[tuple[float, float]], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs in [-1, 1] and values at the ranges' points."""
    unit = torch.rand(count, len(ranges), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lo, hi = torch.tensor(ranges, dtype=torch.float64).unbind(1)
    return 2 * unit - 1, f(*(lo + (hi - lo) * unit).unbind(1))


def learn_function(name: str, steps: int, mlps: tuple, shapes: tuple, runs: tuple) -> list[dict]:
    """Test RMSE of every network, each by its best run on the validation samples."""
    f, ranges = FUNCTIONS[name]
    x, y = sample(f, ranges, 2500, seed=0)
    mean, scale = y[:1000].mean(), y[:1000].std()
    parts = list(zip(x.split([1000, 500, 1000]), ((y - mean) / scale).split([1000, 500, 1000])))
    rows = []
    for optimizer, seed in runs:
        for hidden in shapes:
            kan = KAN([len(ranges), *hidden, 1], grid_size=GRIDS[0], seed=seed, dtype=torch.float64)
            rows += learn_kan(kan, GRIDS, parts, optimizer, steps, seed)
        for width, depth, activation in mlps:
            network = mlp([len(ranges)] + [width] * depth + [1], activation, seed)
            minimise(functools.partial(_loss, network, *parts[0]), network.parameters(), optimizer, steps)
            label = f"{depth} x {width} {activation}"
            rows.append(_row("MLP", label, network, parts, optimizer, seed))
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["kind"], row["network"]
        if row["validation"] < best.get(key, {"validation": math.inf})["validation"]:
            best[key] = row | {"function": name}
    return list(best.values())


def learn_kan(network: KAN, grids: tuple, parts: list, optimizer: str, steps: int, seed: int) -> list[dict]:
    """One row for each grid."""
    width = [sums for sums, _ in network.width]
    stages = climb(network, grids, parts[0][0], lambda net: _loss(net, *parts[0]), optimizer, steps)
    return [
        _row("KAN", f"{width} G = {grid}", network, parts, optimizer, seed) for grid, (network, _) in zip(grids, stages)
    ]


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (network(x).squeeze(-1) - y).square().mean()


@torch.no_grad()
def _row(kind: str, label: str, network: nn.Module, parts: list, optimizer: str, seed: int) -> dict:
    errors = {n: rmse(network(x).squeeze(-1), y) for n, (x, y) in zip(("train", "validation", "test"), parts)}
    return {"kind": kind, "network": label, "parameters": count(network), "optimizer": optimizer, "seed": seed} | errors


def learn_known(name: str, steps: int, quick: bool) -> dict:
    """RMSE over G at the right shape, the best of three seeds at every G, and the exponent.

    Fitted from the coarsest grid that resolves the function (RMSE below RESOLVED standard deviations) to the lowest
    error, beyond which it is the optimiser's; over two grids at least.
    """
    f, width = KNOWN[name]
    x, y = sample(f, [(-1, 1)] * width[0], 1000 if quick else 4000, seed=0)
    y = (y - y.mean()) / y.std()
    half = len(x) // 2
    parts = [(x[:half], y[:half]), (x[half:], y[half:]), (x[half:], y[half:])]
    grids = SCALING_GRIDS[:2] if quick else SCALING_GRIDS
    runs = []
    for seed in range(1 if quick else 3):
        network = KAN(width, grid_size=grids[0], seed=seed, dtype=torch.float64)
        if len(width) > 2:  # a shape this small is reached from a wider one, as the article does, or hardly at all
            wider = KAN([width[0], 5, 1], grid_size=grids[0], seed=seed, dtype=torch.float64)
            data = Dataset(parts[0][0], parts[0][1].unsqueeze(1), parts[1][0], parts[1][1].unsqueeze(1))
            network, _ = prune(data, wider, 2 if quick else 10, least=width[1])
        runs.append(learn_kan(network, grids, parts, "lbfgs", steps, seed))
    best = [min((run[i] for run in runs), key=lambda r: r["validation"]) for i in range(len(grids))]
    errors = [r["test"] for r in best]
    stop = max(2, 1 + errors.index(min(errors)))
    start = next((i for i, e in enumerate(errors[: stop - 1]) if e < RESOLVED), stop - 2)
    alpha = -slope([g + 4 for g in grids[start:stop]], errors[start:stop])
    fitted = grids[start:stop]
    return {
        "function": name,
        "width": [sums for sums, _ in network.width],
        "grids": grids,
        "alpha": alpha,
        "fitted": fitted,
        "rows": best,
    }


def front(rows: list[dict], name: str, kind: str) -> list[tuple[int, float]]:
    """(parameters, test RMSE) of the networks that no smaller one of their kind beats."""
    own = sorted((r["parameters"], r["test"]) for r in rows if r["function"] == name and r["kind"] == kind)
    kept: list[tuple[int, float]] = []
    for parameters, error in own:
        if not kept or error < kept[-1][1]:
            kept.append((parameters, error))
    return kept


def advantage(rows: list[dict], name: str) -> float:
    """The MLPs' error over the KANs', geometric mean over budgets at which both have a network (steps of 2^1/2)."""
    fronts = [front(rows, name, kind) for kind in ("KAN", "MLP")]
    lo = max(f[0][0] for f in fronts)
    hi = min(max(r["parameters"] for r in rows if r["function"] == name and r["kind"] == k) for k in ("KAN", "MLP"))
    budgets = [lo * 2 ** (i / 2) for i in range(int(2 * math.log2(max(hi, lo) / lo)) + 1)]
    errors = [[min(e for p, e in f if p <= b) for b in budgets] for f in fronts]
    return geometric_mean([m / k for k, m in zip(*errors)])


def front_slope(rows: list[dict], name: str, kind: str) -> float:
    points = front(rows, name, kind)
    return -slope(*zip(*points)) if len(points) > 1 else 0.0


def table(rows: list[dict], pairs: dict[str, float]) -> str:
    best = ["parameters", "test RMSE"]
    columns = ["function", "best KAN", *best, "best MLP", *best, "MLP / KAN error at equal parameters"]
    cells = []
    for name, ratio in pairs.items():
        best = [
            min((r for r in rows if r["function"] == name and r["kind"] == k), key=lambda r: r["validation"])
            for k in ("KAN", "MLP")
        ]
        cells.append(
            [name]
            + [c for r in best for c in (r["network"], f"{r['parameters']:,}", f"{r['test']:.1e}")]
            + [f"{ratio:.2g}x"]
        )
    return markdown(columns, cells)


def known_table(known: list[dict]) -> str:
    columns = ["known shape", "width", *[f"G = {g}" for g in known[0]["grids"]], "fitted over G", "alpha"]
    cells = []
    for k in known:
        errors = [f"{r['test']:.1e}" for r in k["rows"]]
        span = f"{k['fitted'][0]} to {k['fitted'][-1]}"
        cells.append([k["function"], k["width"], *errors, span, f"{k['alpha']:.2f}"])
    return markdown(columns, cells)


def draw(rows: list[dict], pairs: dict[str, float], known: list[dict]):
    plt = pyplot()
    total = len(pairs) + 1
    columns = min(5, total)
    lines = math.ceil(total / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.9 * columns, 2.5 * lines), squeeze=False)
    cells = list(axes.flat)
    for axis, (name, ratio) in zip(cells, pairs.items()):
        for kind in ("KAN", "MLP"):
            colour = COLOURS[kind.lower()]
            own = [(r["parameters"], r["test"]) for r in rows if r["function"] == name and r["kind"] == kind]
            axis.loglog(*zip(*own), ".", color=colour, alpha=0.35, markersize=4)
            axis.loglog(*zip(*front(rows, name, kind)), color=colour, label=kind, drawstyle="steps-post")
        axis.set_title(f"{name}\nMLP / KAN {ratio:.2g}x", fontsize=8)
        axis.tick_params(labelsize=7)
    last = cells[len(pairs)]
    for k, shade in zip(known, ("#7c2d12", "#c2410c", "#f59e0b")):
        x = [g + 4 for g in k["grids"]]
        last.loglog(x, [r["test"] for r in k["rows"]], "o-", color=shade, markersize=3, label=f"{k['function']}")
    x = torch.tensor([7.0, 54.0])
    last.set_xticks([7, 14, 24, 54], ["7", "14", "24", "54"])
    last.loglog(x, 0.02 * (x / 7) ** -4, color=COLOURS["ink"], linestyle=":", label="slope -4")
    last.set_title("Known shapes: RMSE against G + 4", fontsize=8)
    last.tick_params(labelsize=7)
    last.legend(fontsize=6, loc="lower left")
    cells[0].legend(fontsize=8)
    for axis in cells[len(pairs) + 1 :]:
        axis.set_visible(False)
    for axis in cells:
        axis.yaxis.set_minor_formatter("")
    last.xaxis.set_minor_formatter("")
    figure.supxlabel("parameters", fontsize=9)
    figure.supylabel("test RMSE (outputs of unit variance)", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
