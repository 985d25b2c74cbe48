"""Layer-wise distillation: a pretrained SwiGLU block into smaller blocks; size against held-out loss.

    python benchmarks/bench_distill.py SmolLM2-135M-Instruct.Q4_1.gguf --train_text train.txt --valid_text valid.txt

Each chosen layer's block is matched on its own real inputs and outputs, first in closed form, then by gradient steps
(the same number and the same tokens for all, each student at the best ridge and rate on tokens that neither step saw):

    svd        gate, up and down each of low rank, the truncation weighted by the covariance of the matrix's inputs
               (data-aware SVD, as in arXiv:2403.07378)
    swiglu     the units of most output energy; down by least squares
    kan_gated  fewer units, each with an edge function (silu and a spline) to every output, by least squares; the ridge
               is the splines' own, and leaves SwiGLU of as many units as it grows

Then all chosen layers are replaced at once, and the model's held-out loss is the figure. Shares are of the block's
parameters. The source is anything that kansformer.convert takes.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_finetune import held_out_loss, load, sequences
from harness import RESULTS, environment, header, markdown, write, write_figure, write_json
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from kansformer import splines
from kansformer.layers import KANGated, SwiGLU

METHODS = ("svd", "swiglu", "kan_gated")
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # of the mean square of a feature
RIDGE = 1e-4  # that of the silu terms of kan_gated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder or a .gguf file of a Llama-like model")
    parser.add_argument("--train_text", type=Path, required=True)
    parser.add_argument("--valid_text", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--tokens", type=int, default=6144, help="to match a block on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_tokens", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--valid_sequences", type=int, default=16)
    parser.add_argument("--grid_size", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "distill")
    options = parser.parse_args()
    if not all(0 < share < 1 for share in options.shares):
        parser.error(f"--shares must lie between 0 and 1, not {options.shares}")

    model, tokenizer = load(options.source)
    layers = model.eval().model.layers
    if wrong := [index for index in options.layers if not 0 <= index < len(layers)]:
        parser.error(f"--layers {wrong}: the model has layers 0 to {len(layers) - 1}")
    keys = ("layers", "tokens", "steps", "batch_tokens", "rates", "sequence_length", "valid_sequences", "grid_size")
    env = environment("cpu", dtype="float32", source=options.source.name, **{k: getattr(options, k) for k in keys})
    print(header(env), flush=True)

    set_seed(options.seed)
    length = options.sequence_length
    train = sequences(options.train_text, -(-options.tokens // length), length, tokenizer)
    valid = sequences(options.valid_text, options.valid_sequences, length, tokenizer)
    before = held_out_loss(model, valid)
    pairs, held_out = (inputs_and_outputs(model, options.layers, rows) for rows in (train, valid))
    rows = [{"method": "none", "share": 1.0, "loss": before, "error": 0.0, "closed_form": 0.0, "parameters": 1.0}]
    blocks = {index: layers[index].mlp for index in options.layers}
    for method in METHODS:
        for share in options.shares:
            found = []
            for index, block in blocks.items():
                student, errors = distil(method, block, share, pairs[index], held_out[index], options)
                layers[index].mlp = student
                found.append(errors | {"layer": index, "parameters": size(student) / size(block)})
            row = {"method": method, "share": share, "loss": held_out_loss(model, valid), "layers": found}
            for key in ("error", "closed_form", "parameters"):
                row[key] = sum(errors[key] for errors in found) / len(found)
            rows.append(row)
            print(row, flush=True)
            for index, block in blocks.items():
                layers[index].mlp = block
    columns = ["block", "share of its parameters", "error, closed form", "after the steps", "held-out loss", "change"]
    cells = []
    for row in rows:
        errors = [f"{row['parameters']:.3f}", f"{row['closed_form']:.4f}", f"{row['error']:.4f}"]
        cells.append([row["method"], *errors, f"{row['loss']:.4f}", f"{row['loss'] - before:+.4f}"])
    table = markdown(columns, cells)
    note = (
        "Error: squared, over the output's, on held-out text, mean over layers. Loss: nats a token of the whole model "
        "with the layers replaced."
    )
    print(f"\n{table}")
    write(options.output / "table.md", f"{header(env)}\n\n{note}\n\n{table}\n")
    write_json(options.output / "table.json", {"environment": env, "rows": rows})
    draw(rows, before, options.output / "curve.png", env)


Pair = tuple[Tensor, Tensor]  # inputs (N, d) and outputs (N, d) of a block


@torch.no_grad()
def inputs_and_outputs(model: nn.Module, chosen: list[int], rows: Tensor) -> dict[int, Pair]:
    """What the block of each chosen layer gets and gives on the tokens of `rows`."""
    seen: dict[int, list[Pair]] = {index: [] for index in chosen}
    hooks = [
        model.model.layers[index].mlp.register_forward_hook(
            lambda _, args, output, kept=seen[index]: kept.append((args[0].flatten(0, -2), output.flatten(0, -2)))
        )
        for index in chosen
    ]
    for batch in rows.split(4):
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {index: tuple(map(torch.cat, zip(*kept))) for index, kept in seen.items()}


def distil(
    method: str, block: nn.Module, share: float, pair: Pair, held_out: Pair, options: argparse.Namespace
) -> tuple[nn.Module, dict]:
    """A student of `share` of the block's parameters, and its errors on held-out text before and after the steps."""
    x, y = pair
    chosen = len(x) // 8  # tokens that choose the ridge and the rate
    start = {"svd": low_rank, "swiglu": narrow_swiglu, "kan_gated": narrow_kan}[method]
    with torch.no_grad():
        starts = [(strength, start(block, share, x[chosen:], y[chosen:], strength, options)) for strength in RIDGES]

    def best(students: list[tuple[float, nn.Module]]) -> tuple[float, nn.Module]:
        return min(students, key=lambda item: error(item[1], x[:chosen], y[:chosen]))

    strength, first = best(starts)
    students = [(rate, copy.deepcopy(first)) for rate in options.rates]
    for rate, student in students:
        descend(student, x[chosen:], y[chosen:], rate, options)
    rate, student = best(students)
    errors = {"closed_form": error(first, *held_out), "error": error(student, *held_out)}
    return student, errors | {"ridge": strength, "rate": rate}


@torch.no_grad()
def error(block: nn.Module, x: Tensor, y: Tensor) -> float:
    """Squared error over the squared output."""
    found = torch.cat([block(part) for part in x.split(1024)])
    return ((found - y).square().sum() / y.square().sum()).item()


def descend(student: nn.Module, x: Tensor, y: Tensor, rate: float, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    scale = y.square().mean()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, 1 - step / options.steps)
        rows = torch.randint(len(x), (options.batch_tokens,), generator=generator)
        (F.mse_loss(student(x[rows]), y[rows]) / scale).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


class LowRankSwiGLU(nn.Module):
    """down(silu(gate x) * up x), each matrix a product of two."""

    def __init__(self, gate: Pair, up: Pair, down: Pair):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.ParameterList(nn.Parameter(part) for part in pair) for pair in (gate, up, down)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = ((x @ b.mT) @ a.mT for a, b in (self.gate, self.up))
        a, b = self.down
        return ((F.silu(gate) * up) @ b.mT) @ a.mT


def low_rank(
    block: nn.Module, share: float, x: Tensor, y: Tensor, strength: float, options: argparse.Namespace
) -> nn.Module:
    gate, up, down = block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight
    rank = max(1, round(share * gate.numel() / sum(gate.shape)))
    hidden = F.silu(x @ gate.mT) * (x @ up.mT)
    return LowRankSwiGLU(*(truncated(*matrix, rank, strength) for matrix in ((gate, x), (up, x), (down, hidden))))


def truncated(weight: Tensor, inputs: Tensor, rank: int, strength: float) -> Pair:
    """(O, r) and (r, I) whose product P minimises the error of inputs @ P.mT: SVD of weight @ S, covariance S S.mT."""
    covariance = (inputs.mT @ inputs).double() / len(inputs)
    covariance += strength * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    u, s, v = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    back = torch.linalg.solve_triangular(factor, v[:rank], upper=False, left=False)  # v @ S^-1
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root.unsqueeze(1) * back).float()


def strongest(block: nn.Module, x: Tensor, count: int) -> Tensor:
    """The units of most output energy."""
    hidden = F.silu(block.gate_proj(x)) * block.up_proj(x)
    energy = hidden.square().mean(0) * block.down_proj.weight.square().sum(0)
    return energy.topk(count).indices.sort().values


def ridge(features: Tensor, y: Tensor, strengths: Tensor) -> Tensor:
    """(F, O) that maps features (N, F) to y (N, O); strengths (F,) or ()."""
    features, y = features.double(), y.double()
    gram = features.mT @ features
    gram.diagonal().add_(strengths * gram.diagonal().mean())
    return torch.linalg.solve(gram, features.mT @ y).float()


def narrow_swiglu(
    block: nn.Module, share: float, x: Tensor, y: Tensor, strength: float, options: argparse.Namespace
) -> nn.Module:
    hidden_size, units = x.shape[1], block.gate_proj.weight.shape[0]
    keep = strongest(block, x, max(1, round(share * units)))
    student = SwiGLU(hidden_size, len(keep))
    student.gate_proj.weight.copy_(block.gate_proj.weight[keep])
    student.up_proj.weight.copy_(block.up_proj.weight[keep])
    hidden = F.silu(student.gate_proj(x)) * student.up_proj(x)
    student.down_proj.weight.copy_(ridge(hidden, y, torch.tensor(strength)).mT)
    return student


def narrow_kan(
    block: nn.Module, share: float, x: Tensor, y: Tensor, strength: float, options: argparse.Namespace
) -> nn.Module:
    hidden_size, units = x.shape[1], block.gate_proj.weight.shape[0]
    C = options.grid_size + 1
    keep = strongest(block, x, max(1, round(share * 3 * units / (3 + C))))
    student = KANGated(hidden_size, len(keep), options.grid_size, 1, base_activation="silu", ffn_norm=False)
    student.gate_proj.weight.copy_(block.gate_proj.weight[keep])
    student.up_proj.weight.copy_(block.up_proj.weight[keep])
    z, v, layer = student.gate_proj(x), student.up_proj(x), student.down_proj
    layer.update_grid(z)
    phi = splines.basis(z, layer.grid, options.grid_size, 1) * v.unsqueeze(-1)
    strengths = torch.tensor([strength, RIDGE]).repeat_interleave(torch.tensor([phi[0].numel(), len(keep)]))
    spline, base = ridge(torch.cat([phi.flatten(1), F.silu(z) * v], 1), y, strengths).split([phi[0].numel(), len(keep)])
    layer.spline_weight.copy_(spline)
    layer.base_weight.copy_(base.mT)
    return student


def curves(rows: list[dict], key: str) -> Iterator[tuple[str, list[float], list[float]]]:
    for method in METHODS:
        points = sorted((row["parameters"], row[key]) for row in rows if row["method"] == method)
        yield method, *map(list, zip(*points))


def draw(rows: list[dict], before: float, path: Path, env: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = dict(zip(("error", "loss"), figure.subplots(1, 2)))
    for key, label in (("error", "squared error of the block"), ("loss", "held-out loss (nats/token)")):
        for (method, shares, values), colour in zip(curves(rows, key), ("#6b7280", "#1d4ed8", "#c2410c")):
            panels[key].plot(shares, values, "o-", color=colour, markersize=4, label=method)
        panels[key].set(xlabel="share of the block's parameters", ylabel=label)
        panels[key].spines[["top", "right"]].set_visible(False)
        panels[key].grid(color="#e5e7eb", linewidth=0.7)
    panels["loss"].axhline(before, color="#1f2937", linewidth=0.8, linestyle="--", label="before")
    panels["loss"].legend(frameon=False, fontsize=8)
    write_figure(path, figure, env)


if __name__ == "__main__":
    main()
