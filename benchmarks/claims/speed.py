"""Time of a step at equal parameters: is a KAN ten times slower than an MLP?

    python benchmarks/claims/speed.py                    # peers take part where they can be imported
    python benchmarks/claims/speed.py --device cuda      # the triton backend in the transformer-sized part

Small: [2, 5, 1], G = 5, k = 3, 1,000 samples, float32: a gradient (forward, mean squared error, backward), and 20
iterations of L-BFGS from the same start by each library's own fit (scipy's, as ours, for those without one).
Transformer-sized: the training rows of benchmarks/bench_ffn.py, whose code runs here, at the parameters of an MLP.

pykan runs as it comes and with `speed()` (no symbolic branch, no stored activations, no checkpoints).
"""

import contextlib
import copy
import importlib.util
import io
import itertools
import math
from collections.abc import Callable

import torch
from claim import COLOURS, arguments, count, criterion, environment, markdown, minimise, mlp, publish, pyplot, width_for
from harness import ratio, side_by_side, summary
from torch import nn

from kansformer import KANLinear
from kansformer.kan import KAN

SAMPLES, WIDTH, GRID, ORDER, ITERATIONS = 1000, (2, 5, 1), 5, 3, 20
SLOW = 5.0  # "about ten times slower" begins here
OURS, LAYERS, DENSE, PYKAN = "kansformer KAN", "kansformer KANLinear", "MLP", "pykan"
LARGE = ("mlp", "swiglu", "kan k=3 C=8", "kan_gated k=1 C=4")
LARGE_OURS = LARGE[2]  # cubic, silu base term, G = 5: the article's layer


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    from bench_ffn import BLOCKS, training  # found once `claim` has put its folder on the path

    device, rounds = options.device, 3 if options.quick else 30
    small = small_rows(device, rounds)
    d, tokens = (64, 64) if options.quick else (512, 16384 if device == "cuda" else 2048)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    large = training(d, tokens, {name: BLOCKS[name] for name in LARGE}, device, dtype, 2 if options.quick else 7)
    env = environment(device, dtype="float32", rounds=rounds)

    times = {r["network"]: r["gradient_ratio"] for r in small}
    blocks = {r["block"]: r["step_ratio"] for r in large}
    measured = {f"{OURS}, [2, 5, 1]": times[OURS], f"kansformer block {LARGE_OURS}": blocks[LARGE_OURS]}
    if f"{PYKAN}, speed()" in times:
        measured |= {f"{PYKAN} at its fastest, [2, 5, 1]": min(times[n] for n in times if n.startswith(PYKAN))}
        measured |= {f"{PYKAN} layers, transformer-sized": blocks["peer kan"]}
    criteria = [
        criterion(f"{name}: at least {SLOW:g}x the time of an MLP of equal parameters", value, value >= SLOW)
        for name, value in measured.items()
    ]
    publish(
        options,
        "speed" if device == "cpu" else f"speed_{device}",
        title="A KAN is 10x slower than an MLP of equal parameters",
        paper="typically 10x slower",
        ours="Time against an MLP's: " + ", ".join(f"{value:.1f}x ({name})" for name, value in measured.items()) + ".",
        criteria=criteria,
        environment=env,
        tables=f"{small_table(small)}\n\n{large_table(large, d, tokens)}",
        data={"small": small, "transformer": large},
        figure=draw(small, large, d),
    )


def small_networks() -> dict[str, nn.Module]:
    """[2, 5, 1] of every library at hand, and an MLP of our KAN's parameters."""
    kan = KAN(list(WIDTH), grid_size=GRID, spline_order=ORDER)
    pairs = list(itertools.pairwise(WIDTH))
    options = {"grid_size": GRID, "spline_order": ORDER}
    w = width_for(count(kan), WIDTH[0], WIDTH[-1], hidden_layers=2)
    found = {
        DENSE: mlp([WIDTH[0], w, w, WIDTH[-1]], "silu", dtype=torch.float32),
        OURS: kan,
        LAYERS: nn.Sequential(*[KANLinear(i, o, grid_range=(-1, 1), **options) for i, o in pairs]),
    }
    if importlib.util.find_spec("kan"):
        from kan import KAN as Peer

        with contextlib.redirect_stdout(io.StringIO()):
            found[f"{PYKAN}, as it comes"] = Peer(width=list(WIDTH), grid=GRID, k=ORDER, auto_save=False)
            found[f"{PYKAN}, speed()"] = Peer(width=list(WIDTH), grid=GRID, k=ORDER, auto_save=False).speed()
    if importlib.util.find_spec("inkan"):
        from inkan import KANLayer

        found["inkan"] = nn.Sequential(*[KANLayer(i, o, **options) for i, o in pairs])
    if importlib.util.find_spec("efficient_kan"):
        from efficient_kan import KANLinear as Layer

        found["efficient-kan"] = nn.Sequential(*[Layer(i, o, **options) for i, o in pairs])
    return found


def small_rows(device: str, rounds: int) -> list[dict]:
    networks = {name: network.to(device) for name, network in small_networks().items()}
    x = 2 * torch.rand(SAMPLES, WIDTH[0], device=device) - 1
    y = ((math.pi * x[:, :1]).sin() + x[:, 1:].square()).exp()

    def gradient(network: nn.Module) -> Callable[[], object]:
        parameters = [p for p in network.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad((network(x) - y).square().mean(), parameters, allow_unused=True)

    gradients = side_by_side({name: gradient(network) for name, network in networks.items()}, rounds, device)
    steps = side_by_side({name: lbfgs_step(name, n, x, y) for name, n in networks.items()}, rounds // 3, device)
    return [
        {"network": name, "parameters": count(network)}
        | {"gradient_ms": summary(gradients[name]), "gradient_ratio": ratio(gradients[name], gradients[DENSE])}
        | {"step_ms": summary(steps[name]), "step_ratio": ratio(steps[name], steps[DENSE])}
        for name, network in networks.items()
    ]


def lbfgs_step(name: str, network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """Twenty iterations from the same start: the library's own fit where it has one."""
    start = copy.deepcopy(network.state_dict())
    data = {"train_input": x, "train_label": y, "test_input": x[:1], "test_label": y[:1]}

    def run() -> None:
        network.load_state_dict(start)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if name.startswith(PYKAN):
                network.fit(data, opt="LBFGS", steps=1, update_grid=False)
            elif name == OURS:
                network.fit(data, optimizer="lbfgs", steps=1, update_grid=False, progress=False)
            else:
                loss = lambda: (network(x) - y).square().mean()  # noqa: E731
                minimise(loss, network.parameters(), "lbfgs", ITERATIONS, looks=1)

    return run


def small_table(rows: list[dict]) -> str:
    columns = ["[2, 5, 1], 1,000 samples", "parameters", "gradient ms", "20-80%", "vs MLP"]
    columns += ["20 L-BFGS iterations ms", "vs MLP"]
    cells = []
    for r in rows:
        g = r["gradient_ms"]
        gradient = [f"{g['median']:.3g}", f"{g['q20']:.3g}-{g['q80']:.3g}", f"{r['gradient_ratio']:.2f}x"]
        step = [f"{r['step_ms']['median']:.3g}", f"{r['step_ratio']:.2f}x"]
        cells.append([r["network"], r["parameters"], *gradient, *step])
    return markdown(columns, cells)


def large_table(rows: list[dict], d: int, tokens: int) -> str:
    columns = [f"block, d = {d}, {tokens:,} tokens", "parameters", "fwd+bwd ms", "20-80%", "vs MLP"]
    cells = []
    for r in rows:
        s = r["step_ms"]
        spread = f"{s['q20']:.3g}-{s['q80']:.3g}"
        cells.append([r["block"], f"{r['parameters']:,}", f"{s['median']:.3g}", spread, f"{r['step_ratio']:.2f}x"])
    return markdown(columns, cells)


def draw(small: list[dict], large: list[dict], d: int):
    plt = pyplot()
    panels = {
        "Gradient of [2, 5, 1]": {r["network"]: r["gradient_ratio"] for r in small},
        "20 L-BFGS iterations of [2, 5, 1]": {r["network"]: r["step_ratio"] for r in small},
        f"Step of a block, d = {d}": {r["block"]: r["step_ratio"] for r in large},
    }
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 1.2 + 0.3 * max(map(len, panels.values()))))
    for axis, (title, values) in zip(axes, panels.items()):
        names = list(values)[::-1]
        colours = [_colour(name) for name in names]
        bars = axis.barh(names, [values[n] for n in names], color=colours, height=0.7)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.axvline(1, color=COLOURS["ink"], linewidth=0.8)
        axis.axvline(10, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
        axis.set(
            xscale="log",
            xlim=(0.5 * min(values.values()), 4 * max(10, *values.values())),
            title=title,
            xlabel="time, MLP = 1",
        )
    return figure


def _colour(name: str) -> str:
    if name.startswith(("kansformer", "kan ", "kan_")):
        return COLOURS["kan"]
    return COLOURS["mlp"] if name in (DENSE, "mlp", "swiglu") else COLOURS["peer"]


if __name__ == "__main__":
    main()
