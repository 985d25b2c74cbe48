"""The demonstration: a KAN transformer learns Shakespeare beside a SwiGLU transformer of equal size.

    python train/demo.py [--models kan_fourier swiglu] [--steps N] [--output_dir runs/demo]

Each model is trained by `train.py` in a process of its own (so that peak memory is its own), on the same text in the
same order, from the same seed; then loaded as any Hugging Face model, asked for a sample, and drawn.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from matplotlib.ticker import FuncFormatter
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import kansformer  # registers the model with the Auto classes
from kansformer.inspect.edges import BINS, MARGIN, edge_curves, measure

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = REPOSITORY / "configs/train/demo.yaml"
COLOURS = {"kan_fourier": "#c2410c", "kan_gated": "#a16207", "swiglu": "#1d4ed8"}  # and the models there are
PROMPT = "ROMEO:\n"
EDGES = 5  # drawn as EDGES x EDGES
INK, FAINT = "#1f2937", "#9ca3af"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=COLOURS, default=["kan_fourier", "swiglu"])
    parser.add_argument("--steps", type=int, help="steps a model, in place of the settings file's")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    output, models = arguments.output_dir, list(dict.fromkeys(arguments.models))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    header = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"kansformer {kansformer.__version__} at commit {commit()}; device: {device}"
    )
    print(header, flush=True)
    started = time.perf_counter()
    for name in models:
        train(name, output, arguments.steps)
    plt.rcParams.update(STYLE)
    pictures = {"loss curves": draw_losses(output, models)}
    pictures |= {f"edge functions of {name}": draw_edges(output, name) for name in models if name != "swiglu"}
    results = {name: json.loads((output / name / "results.json").read_text()) for name in models}
    (output / "table.json").write_text(json.dumps({"environment": header} | results, indent=1) + "\n")
    (output / "table.md").write_text(f"{header}\n\n{table(results)}")
    for name in models:
        print(f"\n--- a sample of {name} ---\n{sample(output / name / 'model')}")
    print(f"\n{table(results)}\n{time.perf_counter() - started:.0f} seconds in all.\n")
    print(f"table: {output / 'table.md'} and table.json")
    print("\n".join(f"{what}: {path}" for what, path in pictures.items()))
    print("models: " + ", ".join(str(output / name / "model") for name in models))


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def train(name: str, output: Path, steps: int | None) -> None:
    """Train one model from the start, in a process of its own."""
    print(f"\n=== {name} ===", flush=True)
    shutil.rmtree(output / name, ignore_errors=True)
    command = [sys.executable, str(REPOSITORY / "train/train.py"), str(SETTINGS)]
    command += ["--model", str(REPOSITORY / f"configs/models/tiny_{name}.json"), "--output_dir", str(output / name)]
    if steps:
        command += ["--steps", str(steps), "--warmup_steps", str(min(100, steps // 5))]
    subprocess.run(command, check=True)


def table(results: dict) -> str:
    """The comparison as markdown."""
    columns = {
        "parameters": ("parameters", "{:,}"),
        "feed-forward parameters": ("feed_forward_parameters", "{:,}"),
        "validation loss (nats/token)": ("val_loss", "{:.3f}"),
        "bits per byte": ("val_bits_per_byte", "{:.3f}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "peak memory (MB)": ("peak_memory_bytes", "{:,.0f}"),
    }
    lines = ["| model | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name, figures in results.items():
        values = figures | {"peak_memory_bytes": figures["peak_memory_bytes"] / 1e6}
        cells = [pattern.format(values[key]) for key, pattern in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sample(folder: Path, max_new_tokens: int = 240) -> str:
    """Text that a saved model writes after PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_k=50)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def draw_losses(output: Path, models: list[str]) -> Path:
    """Validation loss (points) and smoothed training loss (lines) of each model."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    finals = {}
    for name in models:
        colour = COLOURS[name]
        lines = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        steps, losses = np.array([(x["step"], x["loss"]) for x in lines if "loss" in x]).T
        width = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color=colour, alpha=0.35, linewidth=1.2)
        steps, losses = np.array([(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]).T
        axes.plot(steps, losses, "o-", color=colour, markersize=4, linewidth=1.8, clip_on=False)
        finals[name] = (steps[-1], losses[-1])
    for rank, name in enumerate(sorted(finals, key=lambda name: finals[name][1])):
        step, loss = finals[name]
        offset = 18 * rank - 9 * (len(finals) - 1)
        text = f"{name}  {loss:.3f}"
        axes.annotate(text, (step, loss), (8, offset), textcoords="offset points", color=COLOURS[name], va="center")
    top = np.percentile([x["loss"] for x in lines if "loss" in x], 92)
    axes.set(xlabel="steps", ylabel="loss (nats per byte)", ylim=(None, top), xlim=(0, step))
    axes.set_title("Tiny Shakespeare: validation (dots) and training loss (faint)", loc="left", fontsize=10)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    return save(figure, output / "loss.png")


@torch.no_grad()
def draw_edges(output: Path, name: str) -> Path:
    """The functions of the strongest edges of a model's highest KAN layer, over the density of their inputs."""
    folder = output / name
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    set_seed(0)  # the settings' seed: the model as it was before training
    before = AutoModelForCausalLM.from_config(model.config)
    seen = measure(model, held_out(AutoTokenizer.from_pretrained(folder / "model")))[-1]
    layer, initial, index = seen.layer, before.get_submodule(seen.name), seen.name.split(".")[2]
    edges = seen.strongest(EDGES**2)  # one for each input and each output: more to see

    lo, hi = seen.ranges[0].tolist()
    x = torch.linspace(lo, hi, 241).double()
    curves, start = (edge_curves(m, edges, x.expand(len(edges), -1)) for m in (layer, initial))
    knots = torch.linspace(lo, hi, getattr(layer, "grid_size", -1) + 1).double()  # none on a wave
    at_knots = edge_curves(layer, edges, knots.expand(len(edges), -1))
    bins = torch.linspace(lo - MARGIN * (hi - lo), hi + MARGIN * (hi - lo), BINS + 1)
    figure, axes = plt.subplots(EDGES, EDGES, figsize=(8.2, 8.0), layout="constrained", sharex=True)
    for n, (axis, (i, o)) in enumerate(zip(axes.flat, edges.tolist())):
        density = axis.twinx()
        density.stairs(seen.density[i] / bins.diff(), bins, fill=True, color="#e5e7eb")
        density.set(ylim=(0, 6.4 / (hi - lo)), yticks=[])
        density.spines[:].set_visible(False)
        axis.set_zorder(density.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.axhline(0, color=FAINT, linewidth=0.5)
        axis.plot(x, start[n], color=FAINT, linewidth=1.1, linestyle=(0, (4, 2)))
        axis.plot(x, curves[n], color=COLOURS[name], linewidth=1.7)
        axis.plot(knots, at_knots[n], "o", color=COLOURS[name], markersize=3)
        reach = 1.15 * max(curves[n].abs().max().item(), start[n].abs().max().item())
        axis.set(xlim=(lo, hi), ylim=(-reach, reach), xticks=[lo, 0, hi])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.locator_params(axis="y", nbins=3)
        axis.tick_params(labelsize=7, length=2)
        axis.set_title(f"z{i} → y{o}", fontsize=8, pad=3)
    dots = "dots: knots; " if len(knots) else ""
    figure.suptitle(
        f"Learned edge functions φ(z), layer {index}: the strongest edge of each of {EDGES**2} hidden units\n"
        f"dashed: before training; {dots}shaded: density of the input on held-out text",
        fontsize=9.5,
    )
    return save(figure, output / f"edges_{name}.png")


def held_out(tokenizer) -> list[torch.Tensor]:
    """The end of the text, which no model was trained on: int64 (32, 256)."""
    text = (REPOSITORY / "train/tinyshakespeare.txt").read_text()[-8192:]
    return [torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: 32 * 256].view(-1, 256)]


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
