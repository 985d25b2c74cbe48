"""What a trained model loses with its hidden units, and what it gains with a finer grid: KAN beside SwiGLU.

    python train/demo.py --models kan_gated swiglu  # trains the two that are compared where none are given
    python benchmarks/bench_prune.py [--models runs/demo/kan_gated/model runs/demo/swiglu/model] [--finetune_steps 200]

1. Criteria: how well each one ranks units by the loss that the model suffers without them (Spearman correlation over
   single units) and what the model loses with `--share` of all units gone, chosen within each block or over all.
2. Curve: held-out loss against the share removed, for every model, at once and after a short fine-tuning. The model
   with nothing removed is fine-tuned as well: that is what the others are to be compared with.
3. Grid: held-out loss of KAN models on coarser and finer grids, at once and after the same fine-tuning; G -> G is the
   control.

The last tenth of the text is held out, as in train.py's default split; units are measured on text before it.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from harness import RESULTS, ROOT, environment, header, markdown, write, write_figure, write_json
from torch import Tensor, nn
from transformers import PreTrainedModel

from kansformer.inspect.loading import load
from kansformer.layers import EdgeLayer, FourierLinear, KANLinear
from kansformer.prune import Units, choose_units, feed_forward_blocks, mean_loss, measure_units, remove_units

COLOURS = {
    "kan_fourier": "#7e22ce",
    "kan": "#c2410c",
    "kan_mix": "#a16207",
    "kan_gated": "#c2410c",
    "swiglu": "#1d4ed8",
    "mlp": "#0f766e",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [ROOT / f"runs/demo/{name}/model" for name in ("kan_gated", "swiglu")]
    parser.add_argument("--models", type=Path, nargs="+", default=trained, help="folders of saved models")
    parser.add_argument("--text", type=Path, default=ROOT / "train/tinyshakespeare.txt")
    parser.add_argument("--held_out", type=Path, help="a text of its own in place of the last tenth of --text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--finetuned_shares", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--share", type=float, default=0.3, help="removed in the comparison of criteria")
    parser.add_argument("--probes", type=int, default=12, help="units of each block whose loss is measured alone")
    parser.add_argument("--finetune_steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of fine-tuning, its highest")
    parser.add_argument("--measure_tokens", type=int, default=16384)
    parser.add_argument("--held_out_tokens", type=int, default=32768)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "inspect")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = ("share", "probes", "finetune_steps", "learning_rate", "measure_tokens", "held_out_tokens", "batch_size")
    env = environment(device, dtype="float32", **{key: getattr(options, key) for key in keys})
    print(header(env), flush=True)
    result = {"environment": env, "models": [study(folder, options, device) for folder in options.models]}
    text = "\n\n".join([header(env), *tables(result)]) + "\n"
    print(f"\n{text}")
    write(options.output / "prune.md", text)
    write_json(options.output / "prune.json", result)
    write_figure(options.output / "prune.png", picture(result), env)
    print(json.dumps({m["name"]: m["loss"] for m in result["models"]}))


def study(folder: Path, options: argparse.Namespace, device: str) -> dict:
    """All three parts for one model."""
    model, tokenizer = load(folder)
    model.to(device)
    text = options.text.read_text()
    cut = len(text) if options.held_out else math.floor(0.9 * len(text))
    held_out = options.held_out.read_text() if options.held_out else text[cut:]

    def windows(part: str, tokens: int | None) -> Tensor:
        ids = torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])[:tokens]
        return ids.unfold(0, options.sequence_length, options.sequence_length)

    train, test = windows(text[:cut], None), list(windows(held_out, options.held_out_tokens).split(options.batch_size))
    measured = list(train[-(options.measure_tokens // options.sequence_length) :].split(options.batch_size))
    units = measure_units(model, measured)
    name, loss = model.config.ffn_summary, mean_loss(model, test)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, held-out loss {loss:.4f}", flush=True)

    def tuned(candidate: PreTrainedModel) -> float | None:
        if not options.finetune_steps:
            return None
        finetune(candidate, train, options.finetune_steps, options.batch_size, options.learning_rate)
        return mean_loss(candidate, test)

    rows = []
    for share in [0.0, *options.shares]:
        smaller = remove_units(model, choose_units([u.importance for u in units], share), units)
        row = {"share": share, "parameters": sum(p.numel() for p in smaller.parameters())}
        row |= {"sizes": smaller.config.intermediate_size, "loss": mean_loss(smaller, test)}
        if share in (0.0, *options.finetuned_shares):
            row["finetuned"] = tuned(smaller)
        rows.append(row)
        print(row, flush=True)
    grids = []
    if hasattr(model, "extend_grid") and any(isinstance(m, KANLinear) for m in model.modules()):
        size = model.config.grid_size
        for new in sorted({max(1, size // 2), size, 2 * size}):
            other = copy.deepcopy(model)
            other.extend_grid(new)
            row = {"grid_size": new, "parameters": sum(p.numel() for p in other.parameters())}
            grids.append(row | {"loss": mean_loss(other, test), "finetuned": tuned(other)})
            print(grids[-1], flush=True)
    return {
        "name": name,
        "parameters": parameters,
        "loss": loss,
        "criteria": criteria(model, units, measured, test, options),
        "curve": rows,
        "grid_size": getattr(model.config, "grid_size", None),
        "grids": grids,
    }


def criteria(
    model: PreTrainedModel, units: Sequence[Units], measured: list[Tensor], test: list[Tensor], options
) -> list[dict]:
    """How each criterion ranks single units, and what its choice of `share` costs."""
    torch.manual_seed(0)
    scores = {
        "taylor": [u.importance for u in units],
        "energy": [u.importance for u in measure_units(model, measured, "energy")],
        "magnitude": [weight_energy(block.down_proj) for block in feed_forward_blocks(model)],
        "chance": [torch.rand(len(u.importance)) for u in units],
    }
    probed = [torch.randperm(len(u.importance))[: options.probes] for u in units]
    few = measured[:2]
    rises = single_unit_rises(model, probed, few)
    full, rows = mean_loss(model, test), []
    for name, score in scores.items():
        at = torch.cat([s[p].double() for s, p in zip(score, probed)])
        row = {"criterion": name, "spearman": spearman(at, rises)}
        for scope in ("uniform", "global"):
            smaller = remove_units(model, choose_units(score, options.share, scope), units)
            row[scope] = mean_loss(smaller, test) - full
        rows.append(row)
        print(row, flush=True)
    return rows


def weight_energy(layer: nn.Linear | EdgeLayer) -> Tensor:
    """The sum of squares of a unit's outgoing weights, what a criterion without data would take."""
    if isinstance(layer, FourierLinear):
        return sum(weight_energy(waves) for waves in layer.children())
    if isinstance(layer, KANLinear):
        squares = layer.spline_weight.unflatten(0, (layer.in_features, layer.num_basis)).square().sum((1, 2))
        if layer.base_weight is not None:
            squares = squares + layer.base_weight.square().sum(0)
        return squares.detach().cpu()
    return layer.weight.square().sum(0).detach().cpu()


def single_unit_rises(model: PreTrainedModel, probed: Sequence[Tensor], batches: list[Tensor]) -> Tensor:
    """What the loss rises by without each of the probed units alone, in float64: single units change little."""
    exact = copy.deepcopy(model).double()
    full, rises = mean_loss(exact, batches), []
    for block, chosen in zip(feed_forward_blocks(exact), probed):
        layer = block.down_proj
        for h in chosen.tolist():
            present = torch.ones(layer.in_features, dtype=torch.float64, device=next(exact.parameters()).device)
            present[h] = 0

            def silence(module, args, kwargs, present=present):
                if isinstance(module, EdgeLayer):
                    return args, kwargs | {"gate": present.expand_as(args[0]) * kwargs.get("gate", 1)}
                return (args[0] * present,), kwargs

            hook = layer.register_forward_pre_hook(silence, with_kwargs=True)
            rises.append(mean_loss(exact, batches) - full)
            hook.remove()
    return torch.tensor(rises)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def finetune(model: PreTrainedModel, train: Tensor, steps: int, batch_size: int, learning_rate: float) -> None:
    """AdamW on random windows, the same for every model: a tenth of the steps of warm-up, then a cosine to zero."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 10)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warmup, cosine)
        batch = train[torch.randint(len(train), (batch_size,))].to(model.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def tables(result: dict) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    parts, steps = [], result["environment"]["finetune_steps"]
    columns = ["model", "units gone", "parameters", "loss", f"after {steps} steps"]
    rows = [
        [m["name"], f"{r['share']:.0%}", f"{r['parameters']:,}", number(r["loss"]), number(r.get("finetuned"))]
        for m in result["models"]
        for r in m["curve"]
    ]
    parts.append(
        "Held-out loss (nats a token) against the share of hidden units removed:\n\n" + markdown(columns, rows)
    )
    share = f"{result['environment']['share']:.0%}"
    columns = ["criterion", "model", "Spearman", f"loss rise, {share} of each block", f"{share} of all"]
    rows = [
        [r["criterion"], m["name"], f"{r['spearman']:.2f}", f"{r['uniform']:+.4f}", f"{r['global']:+.4f}"]
        for m in result["models"]
        for r in m["criteria"]
    ]
    parts.append("Which units matter, by criterion:\n\n" + markdown(columns, rows))
    columns = ["model", "grid", "parameters", "loss", f"after {steps} steps"]
    rows = [
        [
            m["name"],
            f"{m['grid_size']} -> {r['grid_size']}",
            f"{r['parameters']:,}",
            f"{r['loss']:.6f}",
            number(r["finetuned"]),
        ]
        for m in result["models"]
        for r in m["grids"]
    ]
    parts.append("Other grids:\n\n" + markdown(columns, rows))
    return parts


def picture(result: dict) -> plt.Figure:
    """Held-out loss against parameters and against the share removed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for m in result["models"]:
        colour = COLOURS.get(m["name"], "#374151")
        for axis, key, scale in ((axes[0], "share", 100), (axes[1], "parameters", 1e-6)):
            points = [(scale * r[key], r["loss"]) for r in m["curve"]]
            axis.plot(*zip(*points), "o-", color=colour, markersize=4, label=m["name"])
            tuned = [(scale * r[key], r["finetuned"]) for r in m["curve"] if r.get("finetuned") is not None]
            if tuned:
                label = f"{m['name']}, {result['environment']['finetune_steps']} steps later"
                axis.plot(*zip(*tuned), "o--", color=colour, markersize=4, markerfacecolor="white", label=label)
    axes[0].set(xlabel="hidden units removed (%)", ylabel="held-out loss (nats a token)")
    axes[1].set(xlabel="parameters (millions)")
    axes[1].invert_xaxis()
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(axis="y", color="#e5e7eb")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
