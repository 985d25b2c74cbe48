"""Tasks with a known winner, so that the comparison is seen to discriminate.

    python benchmarks/synthetic.py

A sequence of points x_t in [-1, 1]^n, one of them marked; at the last place the model must say f(x) of the marked
one, so attention fetches it and the feed-forward blocks compute f:

    additive   f(x) = sum_j f_j(x_j), f_j a smooth random function of a coordinate: what the edges of a KAN layer are
    ridges     f(x) = sum_u a_u gelu(w_u x + b_u), a random GELU MLP with many units and as many outputs as the
               model has channels: a GELU block can be it, a KAN block of equal parameters has a third of the directions
    parities   f(x) = sum_u a_u s_i s_j s_k, s the signs of three coordinates, which is all that the model is shown of
               them: an edge sees two points of its function. Meant for MLPs, and no MLP's win

Blocks of equal parameters in the same decoder, fresh samples at every step and the same ones for all, each block at
the best of the learning rates by the first seed. The figure is the squared error over the variance of f on held-out
samples. The harness discriminates if a KAN block wins the first task and an MLP block the second, beyond two standard
errors of the difference, seed by seed; the third is kept because its outcome was not foreseen.
"""

import argparse
import itertools
import math
import statistics
from pathlib import Path

import torch
from harness import RESULTS, environment, header, markdown, write, write_json
from torch import Tensor, nn

from kansformer import KansformerConfig, KansformerModel

MLPS, KANS = ("mlp", "swiglu"), ("kan", "kan_mix", "kan_gated")
POINTS, HIDDEN = 8, 32
COORDINATES = {"additive": 8, "ridges": HIDDEN - 1, "parities": 8}
OUTPUTS = {"additive": 1, "ridges": HIDDEN, "parities": 1}
RIDGES, SHARPNESS = 96, 2.0
GRID = {"kan": {"grid_size": 8, "ffn_norm": False}, "kan_mix": {"grid_size": 5}, "kan_gated": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    env = environment("cpu", dtype="float32", steps=options.steps, batch_size=options.batch_size, seeds=options.seeds)
    print(header(env), flush=True)
    rows = []
    for task, block in itertools.product(TASKS, (*MLPS, *KANS)):
        errors = {rate: [fit(task, block, rate, 0, options)] for rate in options.rates}
        rate = min(errors, key=lambda rate: errors[rate][0])
        errors[rate] += [fit(task, block, rate, seed, options) for seed in range(1, options.seeds)]
        row = {"task": task, "block": block, "rate": rate, "errors": errors[rate], "parameters": parameters(block)}
        rows.append(row)
        print(row, flush=True)
    verdicts = {task: verdict([row for row in rows if row["task"] == task], task) for task in TASKS}
    columns = ["task", "block", "parameters", "rate", "error / variance", "standard error"]
    cells = []
    for row in rows:
        error = [f"{statistics.fmean(row['errors']):.2e}", f"{standard_error(row['errors']):.1e}"]
        cells.append([row["task"], row["block"], f"{row['parameters']:,}", f"{row['rate']:g}", *error])
    text = "\n\n".join([header(env), markdown(columns, cells), *verdicts.values()])
    write(
        options.output / "synthetic.md",
        f"# Tasks with a known winner\n\n`python benchmarks/synthetic.py`\n\n{text}\n",
    )
    write_json(options.output / "synthetic.json", {"environment": env, "rows": rows, "verdicts": verdicts})
    print("\n" + text)


def additive(generator: torch.Generator):
    """A sum of random Fourier series of four terms, of every coordinate."""
    shape = 4, COORDINATES["additive"]
    amplitude = torch.randn(shape, generator=generator) / torch.arange(1, 5).unsqueeze(1)
    phase = 2 * math.pi * torch.rand(shape, generator=generator)
    return lambda x: (amplitude * torch.sin(math.pi * torch.arange(1, 5)[:, None] * x.unsqueeze(-2) + phase)).sum(
        (-2, -1)
    )


def ridges(generator: torch.Generator):
    """A GELU MLP of RIDGES units and HIDDEN outputs; a unit bends within about a standard deviation of its input."""
    directions = nn.functional.normalize(torch.randn(COORDINATES["ridges"], RIDGES, generator=generator), dim=0)
    bends = torch.rand(RIDGES, generator=generator) - 0.5
    outputs = torch.randn(RIDGES, HIDDEN, generator=generator)
    return lambda x: nn.functional.gelu(SHARPNESS * (x @ directions - bends)) @ outputs


def parities(generator: torch.Generator):
    """Eight products of three signs of the coordinates, of random weights."""
    triples = torch.combinations(torch.arange(COORDINATES["parities"]), 3)
    chosen = triples[torch.randperm(len(triples), generator=generator)[:8]]
    weight = torch.randn(8, generator=generator)
    return lambda x: torch.sign(x)[..., chosen].prod(-1) @ weight


TASKS = {"additive": additive, "ridges": ridges, "parities": parities}
WINNERS = {"additive": KANS, "ridges": MLPS, "parities": MLPS}


class Regressor(nn.Module):
    """Points (B, POINTS, coordinates + 1) to (B, outputs): the decoder between two linear layers."""

    def __init__(self, block: str, coordinates: int, outputs: int):
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1}
        config = KansformerConfig(**sizes, ffn_type=block, intermediate_size=width(block), **GRID.get(block, {}))
        self.into, self.decoder, self.out = (
            nn.Linear(coordinates + 1, HIDDEN),
            KansformerModel(config),
            nn.Linear(HIDDEN, outputs),
        )

    def forward(self, points: Tensor) -> Tensor:
        return self.out(self.decoder(inputs_embeds=self.into(points), use_cache=False)[0][:, -1])


def width(block: str, reference: int = 96) -> int:
    """The width at which a block has the weights of a SwiGLU block of width `reference`, to the next unit."""
    C = GRID.get(block, {}).get("grid_size", 3) + 1
    per_unit = {"mlp": 2, "swiglu": 3, "kan": 2 * C, "kan_mix": 1 + C, "kan_gated": 2 + C}
    return round(3 * reference / per_unit[block])


def parameters(block: str) -> int:
    return sum(p.numel() for name, p in Regressor(block, 1, 1).named_parameters() if "mlp" in name)


def samples(f, count: int, task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(count, POINTS, COORDINATES[task], generator=generator) - 1
    x = x.sign() if task == "parities" else x
    marked = torch.randint(POINTS, (count,), generator=generator)
    mark = nn.functional.one_hot(marked, POINTS).unsqueeze(-1)
    return torch.cat([x, mark], -1), f(x[torch.arange(count), marked]).view(count, -1)


def fit(task: str, block: str, rate: float, seed: int, options: argparse.Namespace) -> float:
    """Squared error over variance on 4,096 held-out samples."""
    generator = torch.Generator().manual_seed(seed)
    f = TASKS[task](generator)
    points, targets = samples(f, 4096, task, generator)
    mean, deviation = targets.mean(0), targets.std(0)
    torch.manual_seed(seed)
    model = Regressor(block, COORDINATES[task], OUTPUTS[task])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / options.steps)) + 0.01)
    )
    for _ in range(options.steps):
        inputs, wanted = samples(f, options.batch_size, task, generator)
        nn.functional.mse_loss(model(inputs), (wanted - mean) / deviation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model.eval()(points), (targets - mean) / deviation).item()


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def verdict(rows: list[dict], task: str) -> str:
    """The best KAN block against the best MLP block, in words that the figures choose."""
    best = [
        min((r for r in rows if r["block"] in kind), key=lambda r: statistics.fmean(r["errors"]))
        for kind in (KANS, MLPS)
    ]
    (kan, mlp) = (statistics.fmean(row["errors"]) for row in best)
    error = standard_error([k - m for k, m in zip(*(row["errors"] for row in best))])
    expected = (kan < mlp) == (WINNERS[task] is KANS)
    names = f"{best[0]['block']} {kan:.2e}, {best[1]['block']} {mlp:.2e}"
    if not abs(kan - mlp) > 2 * error:
        return f"{task}: {names}: no difference beyond two standard errors ({error:.1e})."
    return f"{task}: {names}: {'as' if expected else 'not as'} expected, beyond two standard errors ({error:.1e})."


if __name__ == "__main__":
    main()
