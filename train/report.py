"""Report of one run or of several side by side: curves, figures, starts and warnings, from what the runs wrote.

    python train/report.py runs/kan_gated                           # also of a run that goes on or was stopped
    python train/report.py runs/kan_gated runs/swiglu --output runs/comparison

writes report.md and curves.png into --output (one run: its own folder; several: the folder that holds the first).
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
import transformers
import yaml
from metrics import read
from settings import Settings

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0e7490")
INK, FAINT, RULE = "#1f2937", "#9ca3af", "#e5e7eb"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


class History:
    """What the files of a run folder say.

    Attributes: name; settings; steps and evaluations, the lines of metrics.jsonl with a loss or a val_loss; starts,
    updates (of grids) and warnings, its events; results, empty before the end.

    Raises:
        FileNotFoundError: if there is no metrics.jsonl.
    """

    def __init__(self, folder: Path):
        if not (folder / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl: give the output_dir of a run")
        self.name = folder.resolve().name
        lines = read(folder / "metrics.jsonl")
        self.steps = [line for line in lines if "loss" in line]
        self.evaluations = [line for line in lines if "val_loss" in line]
        self.starts, self.updates, self.warnings = (
            [line for line in lines if line.get("event") == event] for event in ("start", "grid_update", "warning")
        )
        self.settings = yaml.safe_load((folder / "settings.yaml").read_text())
        results = folder / "results.json"
        self.results = json.loads(results.read_text()) if results.is_file() else {}


def write(folders: list[Path], output: Path) -> Path:
    """Write report.md and curves.png of the runs in `folders` to `output`; the path of report.md."""
    histories = [History(folder) for folder in folders]
    names = [history.name for history in histories]
    if len(set(names)) < len(names):  # a/run and b/run
        for history, folder in zip(histories, folders):
            history.name = "/".join(folder.resolve().parts[-2:])
    output.mkdir(parents=True, exist_ok=True)
    drawn = draw(histories, output / "curves.png") if any(history.steps for history in histories) else None
    scratch = output / ".report.md.tmp"
    scratch.write_text(page(histories, drawn))
    return scratch.replace(output / "report.md")


def page(histories: list[History], curves: Path | None) -> str:
    names = [history.name for history in histories]
    columns = [figures(history) for history in histories]
    rows = list(dict.fromkeys(key for column in columns for key in column))
    parts = [
        f"# {' and '.join(names)}",
        table(["", *names], [[row, *(c.get(row, "") for c in columns)] for row in rows]),
    ]
    if curves is not None:
        parts.append(f"![Curves of {' and '.join(names)}]({curves.name})")
    for history in histories:
        title = f" of {history.name}" if len(histories) > 1 else ""
        keys = [key for key in ("date", "world_size", "device", "precision", "torch", "commit") if history.starts]
        starts = [[f"{line['step']:,}", *(line.get(key) or "" for key in keys)] for line in history.starts]
        parts += [f"## Starts{title}", table(["from step", *keys], starts)] if starts else []
        if history.updates:
            parts.append(f"Grids updated before steps {', '.join(str(line['step'] + 1) for line in history.updates)}.")
        if history.warnings:
            parts.append(f"## Warnings{title}")
            parts.append("\n".join(f"- step {line['step']:,}: {line['message']}" for line in history.warnings))
    parts += ["## Settings", settings_table(histories)]
    return "\n\n".join(parts) + "\n"


def figures(history: History) -> dict[str, str]:
    """The rows of the first table, in words."""
    steps, evaluations, results = history.steps, history.evaluations, history.results
    asked = history.settings["steps"]
    done = steps[-1]["step"] if steps else 0
    rows = {"steps": f"{done:,}" + (f" of {asked:,}" if done < asked else "")}
    sizes = {"parameters": "parameters", "feed_forward_parameters": "feed-forward parameters"}
    known = (history.starts[-1] if history.starts else {}) | results
    rows |= {row: f"{known[key]:,}" for key, row in sizes.items() if key in known}
    if evaluations:
        last, best = evaluations[-1], min(evaluations, key=lambda line: line["val_loss"])
        rows["validation loss (nats/token)"] = f"{last['val_loss']:.4f}"
        rows["bits per byte"] = f"{last['val_bits_per_byte']:.4f}"
        rows["best validation loss, at step"] = f"{best['val_loss']:.4f}, {best['step']:,}"
        if "out_of_grid" in last:
            rows["inputs outside the grids, and of the worst layer"] = (
                f"{last['out_of_grid']:.1%}, {last['out_of_grid_worst']:.1%}"
            )
    if steps:
        median = statistics.median(line["tokens_per_second"] for line in steps)
        rows["training tokens"] = f"{steps[-1]['tokens']:,}"
        rows["tokens/s (median)"] = f"{median:,.0f}"
        rows["hours of training, at that rate"] = f"{steps[-1]['tokens'] / median / 3600:.2f}"
        if "model_flops_per_second" in steps[-1]:
            rate = statistics.median(line["model_flops_per_second"] for line in steps)
            rows["model FLOP/s (median)"] = f"{rate:.3g}"
        if "mfu" in steps[-1]:
            rows["model FLOPs utilisation"] = f"{statistics.median(line['mfu'] for line in steps):.1%}"
        rows["peak memory (MB)"] = f"{max(line['peak_memory_bytes'] for line in steps) / 1e6:,.0f}"
        if "activation_memory_bytes" in steps[-1]:
            rows["of it activations (MB)"] = f"{steps[-1]['activation_memory_bytes'] / 1e6:,.0f}"
    if history.starts:
        rows["starts"] = str(len(history.starts))
    rows["warnings"] = str(len(history.warnings))
    return rows


def settings_table(histories: list[History]) -> str:
    """The settings that differ from the defaults or between the runs."""
    defaults = dataclasses.asdict(Settings())
    keys = dict.fromkeys(key for history in histories for key in history.settings)
    rows = []
    for key in keys:
        values = [history.settings.get(key) for history in histories]
        if any(value != defaults.get(key) for value in values):
            rows.append([key, *(json.dumps(value).replace(f"{ROOT}/", "") for value in values)])
    if len(histories) > 1:
        rows.sort(key=lambda row: len(set(row[1:])) == 1)  # what differs first
    return table(["setting", *(history.name for history in histories)], rows)


def table(columns: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def draw(histories: list[History], path: Path) -> Path:
    """Loss above; learning rate, gradient norm, tokens/s and out-of-grid share below."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "kansformer[train]"') from error

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 7.6), layout="constrained")
        panels = figure.subplot_mosaic([["loss", "loss"], ["lr", "norm"], ["speed", "grid"]], height_ratios=[2, 1, 1])
        for history, colour in zip(histories, (COLOURS * len(histories))[: len(histories)]):
            _draw_run(panels, history, colour)
        loss = panels["loss"]
        losses = [line["loss"] for history in histories for line in history.steps]
        evaluations = [line["val_loss"] for history in histories for line in history.evaluations]
        top = statistics.quantiles(losses, n=20)[-1] if len(losses) > 20 else max(losses)  # not the first steps' fall
        bottom = min(losses + evaluations)
        margin = 0.05 * (top - bottom) or 0.5
        loss.set_ylim(bottom - margin, top + margin)
        loss.set(title="loss (nats/token): training (line), validation (dots); triangles: warnings")
        panels["lr"].set(title="learning rate", ylim=(0, None))
        positive = any(line["grad_norm"] > 0 for history in histories for line in history.steps)
        panels["norm"].set(title="gradient norm", yscale="log" if positive else "linear")
        for axis in (panels["norm"].yaxis.set_major_formatter, panels["norm"].yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
        panels["speed"].set(title="tokens/s", ylim=(0, None), xlabel="step")
        panels["grid"].set(title="inputs outside the grids (dashed: the worst layer)", xlabel="step")
        panels["grid"].set_ylim(0, 1.08 * panels["grid"].get_ylim()[1])
        panels["speed"].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panels["grid"].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        if not any("out_of_grid" in line for history in histories for line in history.evaluations):
            panels["grid"].text(0.5, 0.5, "no grids", transform=panels["grid"].transAxes, ha="center", color=FAINT)
        last = max(line["step"] for history in histories for line in history.steps)
        for axes in panels.values():
            axes.set_xlim(0, last)
        if len(histories) > 1:
            loss.legend()
        scratch = path.with_suffix(".part.png")
        figure.savefig(scratch)
    return scratch.replace(path)


def _draw_run(panels: dict, history: History, colour: str) -> None:
    steps = [line["step"] for line in history.steps]
    column = lambda key: [line[key] for line in history.steps]  # noqa: E731
    losses = column("loss")
    if len(losses) > 60:
        panels["loss"].plot(steps, losses, color=colour, alpha=0.25, linewidth=0.7)
        losses = _smooth(losses, len(losses) // 50)
    panels["loss"].plot(steps, losses, color=colour, alpha=0.7, linewidth=1.1)
    evaluated = [line["step"] for line in history.evaluations]
    values = [line["val_loss"] for line in history.evaluations]
    label = history.name + (f"  {values[-1]:.4f}" if values else "")
    panels["loss"].plot(evaluated, values, "o-", color=colour, markersize=4, linewidth=1.6, label=label, zorder=3)
    panels["lr"].plot(steps, column("lr"), color=colour)
    panels["norm"].plot(steps, column("grad_norm"), color=colour, linewidth=0.8)
    panels["speed"].plot(steps, column("tokens_per_second"), color=colour, linewidth=0.8)
    shares = [line for line in history.evaluations if "out_of_grid" in line]
    for key, style in (("out_of_grid", "o-"), ("out_of_grid_worst", "o--")):
        panels["grid"].plot(
            [line["step"] for line in shares],
            [line[key] for line in shares],
            style,
            color=colour,
            markersize=3,
        )
    events = [(line["step"], "restart") for line in history.starts[1:]]
    events += [(line["step"], "grids") for line in history.updates]
    for step, text in events:
        for axes in panels.values():
            axes.axvline(step, color=colour, alpha=0.5, linewidth=0.8, linestyle=":")
        panels["loss"].annotate(
            text,
            (step, 1),
            (3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=7,
            color=colour,
        )
    for line in history.warnings:
        panels["loss"].plot(line["step"], 0.02, "^", color=colour, transform=panels["loss"].get_xaxis_transform())


def _smooth(values: list[float], width: int) -> list[float]:
    """Running mean over up to `width` values on either side."""
    return [statistics.fmean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]


def model_card(settings: Settings, results: dict, config) -> str:
    cells = [
        [key, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"]
        for key, value in results.items()
        if value is not None
    ]
    chosen = "the best evaluation" if settings.final_model == "best" else "the last step"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kansformer, kan]
---
# {Path(settings.output_dir).name}

A `{config.model_type}` language model (feed-forward: `{getattr(config, "ffn_summary", "of the architecture")}`),
trained by `train/train.py` on `{settings.data}`, tokenizer `{settings.tokenizer}`; the weights of {chosen}.

{table(["figure", "value"], cells)}

`val_loss` is in nats per token, `val_bits_per_byte` in bits per UTF-8 byte of the held-out text ({held_out(settings)});
every token of it counts once. The random seed was {settings.seed}; another one gives other figures.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# Runs the code in the folder. With kansformer installed and imported it needs no trust_remote_code.
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0]))
```

Settings:

```yaml
{yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False).strip()}
```

Made with torch {torch.__version__}, transformers {transformers.__version__}.
"""


def held_out(settings: Settings) -> str:
    share = f"{settings.val_fraction:.2%}"
    kinds = {"tail": f"the last {share}", "document": f"{share} of the documents, by hash", "file": "files of its own"}
    return kinds[settings.val_split]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help="where report.md and curves.png go")
    options = parser.parse_args(arguments)
    own = options.runs[0] if len(options.runs) == 1 else options.runs[0].resolve().parent
    print(write(options.runs, options.output or own))


if __name__ == "__main__":
    main(sys.argv[1:])
