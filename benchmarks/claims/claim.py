"""What the claims share: networks and optimisers on equal terms, and verdicts that follow from the figures.

A script states its criteria beside the measured values; the verdict is computed from them (`verdict`), never written
down. `publish` prints the table and writes <name>.{md,json,png} with the header of benchmarks/harness.py.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import RESULTS, ROOT, environment, header, markdown, write, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kansformer.kan import KAN

__all__ = ["RESULTS", "ROOT", "environment", "markdown"]

FOLDER = RESULTS / "claims"
QUICK_FOLDER = ROOT / "runs" / "claims"  # figures of --quick measure nothing: they never replace results
COLOURS = {"kan": "#c2410c", "mlp": "#1d4ed8", "peer": "#9ca3af", "ink": "#1f2937", "faint": "#d1d5db"}
ACTIVATIONS = {"tanh": nn.Tanh, "silu": nn.SiLU, "relu": nn.ReLU}


class Criterion(NamedTuple):
    text: str  # the statement with its threshold
    value: str  # what was measured
    met: bool


def criterion(text: str, value: float, met: bool, pattern: str = "{:.2g}") -> Criterion:
    return Criterion(text, pattern.format(value), bool(met) and math.isfinite(value))


def verdict(criteria: Sequence[Criterion]) -> str:
    """All criteria met: holds. None: does not hold. Some: holds in part."""
    if all(c.met for c in criteria):
        return "holds"
    return "holds in part" if any(c.met for c in criteria) else "does not hold"


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest setting, seconds: measures nothing")
    parser.add_argument(
        "--output", type=Path, help="folder for the table, data and picture (benchmarks/results/claims)"
    )
    return parser


def publish(
    options: argparse.Namespace,
    name: str,
    *,
    title: str,
    paper: str,
    ours: str,
    criteria: Sequence[Criterion],
    environment: dict,
    tables: str,
    data: dict,
    figure: "Figure",
) -> None:
    """Print the tables and the verdict; write the markdown, the json and the picture.

    `title` is the claim, `paper` the figure that the paper (or the issue) gives for it and `ours` the one measured.
    """
    import matplotlib.pyplot as plt

    folder = options.output or (QUICK_FOLDER if options.quick else FOLDER)
    command = f"python benchmarks/claims/{name}.py" + (" --quick" if options.quick else "")
    outcome = verdict(criteria)
    checks = markdown(["criterion", "measured", "met"], [[c.text, c.value, "yes" if c.met else "no"] for c in criteria])
    body = f"{header(environment)}\n\n{tables}\n\n{checks}\n\n**Verdict: {outcome}.** {ours}"
    print(f"{title}\n\n{body}", flush=True)
    write(folder / f"{name}.md", f"# {title}\n\n`{command}`\n\n{body}\n\n![{title}]({name}.png)\n")
    summary = {"claim": title, "paper": paper, "ours": ours, "verdict": outcome, "command": command}
    checked = [c._asdict() for c in criteria]
    write_json(folder / f"{name}.json", {"environment": environment, **summary, "criteria": checked, **data})
    write_figure(folder / f"{name}.png", figure, environment)
    plt.close(figure)


def pyplot():
    """matplotlib.pyplot without a display, in this folder's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
        | {"legend.frameon": False, "axes.edgecolor": COLOURS["ink"], "figure.constrained_layout.use": True}
    )
    return plt


def mlp(sizes: Sequence[int], activation: str = "tanh", seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Linear layers of the given sizes with activations between them, in torch's default initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o, dtype=dtype), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def count(module: nn.Module) -> int:
    """Trained parameters; those of a KAN's symbolic edges, of which a spline edge has none, left out."""
    return sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and not n.endswith("symbolic.affine"))


def width_for(parameters: int, inputs: int, outputs: int, hidden_layers: int) -> int:
    """The width at which an MLP of `hidden_layers` comes closest to a number of parameters."""

    def size(w: int) -> int:
        return inputs * w + w + (hidden_layers - 1) * (w * w + w) + w * outputs + outputs

    return min(range(1, parameters + 1), key=lambda w: abs(size(w) - parameters))


def minimise(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    optimizer: str,
    steps: int,
    lr: float = 1e-2,
    watch: Callable[[], object] | None = None,
    looks: int = 10,
    until: Callable[[], bool] | None = None,
) -> list[tuple[float, object]]:
    """Lower a full-batch loss: the same two optimisers, and the same number of steps, for every network.

    "lbfgs": iterations of scipy's L-BFGS with ten remembered pairs, the optimiser of `KAN.fit`. "adam": steps, with a
    cosine from lr to zero. The parameters end at the lowest loss of the looks.

    Args:
        watch: called at `looks` evenly spaced steps, off the clock.
        until: at a look, whether to stop here.
    Returns:
        (seconds, watch()) of each look; the loss without a `watch`.
    """
    parameters = [p for p in parameters if p.requires_grad]
    piece = max(1, steps // looks)
    best, kept, trace = math.inf, [p.detach().clone() for p in parameters], []
    seconds, started = 0.0, time.perf_counter()

    def look(step: int) -> bool:
        """After a step: whether to stop. Between looks nothing happens."""
        nonlocal best, kept, seconds, started
        if step % piece and step != steps:
            return False
        seconds += time.perf_counter() - started
        value = loss().item()
        if value < best:
            best, kept = value, [p.detach().clone() for p in parameters]
        trace.append((seconds, watch() if watch else value))
        stop = not math.isfinite(value) or (until is not None and until())
        started = time.perf_counter()
        return stop

    if optimizer == "lbfgs":
        _lbfgs(loss, parameters, steps, look)
    else:
        _adam(loss, parameters, steps, lr, look)
    with torch.no_grad():
        for p, value in zip(parameters, kept):
            p.copy_(value)
    return trace


def climb(
    network: "KAN",
    grids: Sequence[int],
    samples: Tensor,
    loss: Callable[[nn.Module], Tensor],
    optimizer: str,
    steps: int,
    watch: Callable[[nn.Module], object] | None = None,
) -> Iterator[tuple["KAN", list[tuple[float, object]]]]:
    """Train a KAN through extensions of its grid, `steps` shared equally: yields it, and its trace, at each grid's end.

    Grids follow their samples four times in the first tenths of the first share, and whenever a share begins.
    """
    share = steps // len(grids)
    trace: list[tuple[float, object]] = []
    for grid in grids:
        first = grid == grids[0]
        if not first:
            network = network.refine(grid)
        for piece in [share // 10] * 4 + [share - 4 * (share // 10)] if first else [share]:
            network.update_grid(samples)
            now = functools.partial(loss, network)
            spent = trace[-1][0] if trace else 0.0
            seen = minimise(
                now, network.parameters(), optimizer, piece, watch=watch and functools.partial(watch, network)
            )
            trace += [(spent + seconds, found) for seconds, found in seen]
        yield network, list(trace)


def _lbfgs(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int, look: Callable[[int], bool]) -> None:
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    sizes = [p.numel() for p in parameters]

    def put(z) -> None:
        with torch.no_grad():
            for p, part in zip(parameters, torch.from_numpy(z).split(sizes)):
                p.copy_(part.view_as(p))

    def value(z):
        put(z)
        objective = loss()
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
        return objective.item(), torch.cat([g.flatten() for g in gradients]).double().numpy()

    done, stopped = 0, False

    def after_step(z) -> None:
        nonlocal done, stopped
        done += 1
        put(z)
        if look(done):
            stopped = True
            raise StopIteration

    while done < steps and not stopped:  # again, without its memory, where a line search fails
        before = done
        start = torch.cat([p.detach().flatten() for p in parameters]).double().numpy()
        options = {"maxiter": steps - done, "maxfun": 10 * steps, "maxcor": 10, "ftol": 0.0, "gtol": 0.0}
        with threadpool_limits(1, user_api="blas"):  # as in KAN.fit
            put(minimize(value, start, jac=True, method="L-BFGS-B", callback=after_step, options=options).x)
        if done == before:  # nor does the gradient lead anywhere
            look(steps)
            return


def _adam(
    loss: Callable[[], Tensor], parameters: list[Tensor], steps: int, lr: float, look: Callable[[int], bool]
) -> None:
    method = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(method, steps)
    for step in range(1, steps + 1):
        method.zero_grad()
        loss().backward()
        method.step()
        schedule.step()
        if look(step):
            return


def rmse(prediction: Tensor, target: Tensor) -> float:
    return (prediction - target).square().mean().sqrt().item()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent a of y ~ x^a, by least squares on logarithms."""
    u, v = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    u = u - u.mean()
    return (u @ v / (u @ u)).item()


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
