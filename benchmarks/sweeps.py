"""Every sweep of param_efficiency.py on one page: what SwiGLU needs to match each KAN block.

    python benchmarks/sweeps.py

reads benchmarks/results/efficiency_*/table.json and writes sweeps.md and sweeps.png beside them, the least trained
models first. Nothing is run. A block is compared with SwiGLU at its best, of any width, and any widths of its layers,
that its sweep has, and only where one of them has as many parameters as the block in every size (with more, SwiGLU
would rather be wider too); at equal weights read, where SwiGLU is there with more than one number of parameters.
"""

import json
import statistics
from pathlib import Path

from harness import RESULTS, markdown, write, write_figure
from param_efficiency import members, searched

from kansformer import FFN_TYPES, KansformerConfig

# Kinds of block without splines, on the page
PEERS = {"gr_kan": "GR-KAN of KAT", "chebyshev": "Chebyshev of kan-lm-study", "sine": "sine MLP"}
AXES = {"parameters": "equal parameters", "seconds": "equal training seconds", "weights_read": "equal weights read"}


def main() -> None:
    results = load(RESULTS)
    parts = ["# What SwiGLU needs to match a KAN block", "`python benchmarks/sweeps.py`"]
    parts.append(
        "Above 1x the KAN block is ahead; with 95% intervals, the least trained models first. Where no SwiGLU of about "
        "as many parameters was trained there is a dash."
    )
    parts.append(table(results))
    parts += [beside(result) for result in results if {*PEERS.values()} & {*kan_blocks(result).values()}]
    parts.append(edges(results))
    parts.append("![What SwiGLU needs to match, by sweep](sweeps.png)")
    for result in results:
        env, name = result["environment"], result["sweep"]["name"]
        made = sorted({run for cell in result["cells"] for run in cell["trained"].split("; ")})
        seeds = sorted({len(cell["losses"]) for cell in result["cells"]})
        where = f"{env['device']}, torch {env['torch']}, {env['dtype']}, {' or '.join(map(str, seeds))} seeds"
        parts.append(f"[{title(result)}]({name}/table.md): trained at {'; '.join(made)}, on {where}.")
    write(RESULTS / "sweeps.md", "\n\n".join(parts) + "\n")
    draw(results, RESULTS / "sweeps.png")
    print(table(results), headline(results), sep="\n\n")


def load(folder: Path) -> list[dict]:
    """The table.json of every sweep, that with the fewest tokens a parameter first."""
    results = [json.loads(path.read_text()) for path in folder.glob("efficiency_*/table.json")]
    return sorted(results, key=lambda result: (min(tokens_a_parameter(result)), result["sweep"]["name"]))


def title(result: dict) -> str:
    """The sweep's name, its kind of token and its optimizer: "wide_muon (bytes, Muon)"."""
    train = result["sweep"]["train"]
    kind = "bytes" if train["tokenizer"] == "byte" else train["tokenizer"].replace("bpe:", "BPE ")
    optimizer = {"adamw": "AdamW", "muon": "Muon"}[train.get("optimizer", "adamw")]
    return f"{result['sweep']['name'].removeprefix('efficiency_')} ({kind}, {optimizer})"


def tokens_a_parameter(result: dict) -> list[float]:
    """Of the reference, by size."""
    train, reference = result["sweep"]["train"], result["sweep"]["reference"]
    tokens = train["steps"] * train["batch_size"] * train["sequence_length"]
    return [tokens / cell["parameters"] for cell in result["cells"] if cell["model"] == reference]


def kan_blocks(result: dict) -> dict[str, str]:
    """Name in the sweep: name on the page."""
    names = {}
    for name, model in result["sweep"]["models"].items():
        kinds = [model["ffn_type"]] if isinstance(model["ffn_type"], str) else model["ffn_type"]
        kan = [kind for kind in kinds if kind not in ("mlp", "swiglu")]
        if not kan:
            continue
        if "grid_size" not in FFN_TYPES[kan[0]].fields:
            names[name] = PEERS.get(kan[0], kan[0])
        else:
            fields = KansformerConfig().to_dict() | model
            splines = fields["grid_size"] + fields["spline_order"]
            names[name] = f"{kan[0]} C={splines}" + f", k={fields['spline_order']}" * (fields["spline_order"] > 1)
            names[name] += ", wide" * (model.get("match") == "weights_read")
            names[name] += ", refined" * ("coarse_grids" in model) + ", no norm" * (not fields["ffn_norm"])
        names[name] += f", {len(kan)} of {len(kinds)} layers" * (len(kan) < len(kinds))
    return names


def needed(result: dict, model: str, axis: str) -> dict | None:
    """The comparison of a model with SwiGLU at equal `axis`; None where none would be fair."""
    sweep = result["sweep"]
    parameters = {(cell["model"], cell["size"]): cell["parameters"] for cell in result["cells"]}

    def level(name: str, other: str, size: str) -> bool:
        return abs(parameters[name, size] / parameters[other, size] - 1) < 0.02

    def fair(baseline: list[str]) -> bool:
        several = any(not level(name, baseline[0], size) for name in baseline for size in sweep["sizes"])
        found = [any(level(name, model, size) for name in baseline) for size in sweep["sizes"]]
        return (axis == "weights_read" and several) or all(found)

    def plain(name: str) -> bool:
        fields = sweep["models"][name]
        return fields["ffn_type"] == "swiglu" and fields.keys() <= {"ffn_type", "match", "widths"}

    baselines = [names for names in map(members, sweep["baselines"]) if all(map(plain, names)) and fair(names)]
    if not baselines:
        return None
    wanted = {"model": model, "baseline": ", ".join(max(baselines, key=len)), "axis": axis}
    return next((line for line in result["comparisons"] if wanted.items() <= line.items()), None)


def compared(result: dict) -> dict[str, list[dict | None]]:
    """Name on the page: its comparison on every axis; of the blocks that have a fair one."""
    lines = {name: [needed(result, model, axis) for axis in AXES] for model, name in kan_blocks(result).items()}
    return {name: found for name, found in lines.items() if any(found)}


def table(results: list[dict], blocks: tuple[str, ...] | None = None) -> str:
    """What SwiGLU needs to match each block, or those of these names."""
    rows = []
    for result in results:
        tokens = tokens_a_parameter(result)
        span = " to ".join(f"{count:.{int(count < 10)}f}" for count in (min(tokens), max(tokens)))
        for name, lines in compared(result).items():
            if blocks and name not in blocks:
                continue
            rows.append([title(result), span, name, *map(ratio, lines)])
    return markdown(["sweep", "tokens a parameter", "block", *AXES.values()], rows)


def headline(results: list[dict]) -> str:
    """The rows of `table` that README shows: every text at its usual widths, and the longest training."""
    names = [f"efficiency_{name}" for name in ("classics", "wikitext2", "tinyshakespeare", "long")]
    blocks = ("kan_fourier", "kan_gated C=4, 2 of 4 layers", "kan_gated C=4", "kan_gated C=8, wide, refined")
    return table([result for result in results if result["sweep"]["name"] in names], blocks)


def beside(result: dict) -> str:
    """Every block of a sweep that has peers', the lowest loss at the largest size first, at equal parameters."""
    sweep, sizes = result["sweep"], list(result["sweep"]["sizes"])
    cells = {(cell["model"], cell["size"]): cell for cell in result["cells"]}
    names = kan_blocks(result)
    rows = []
    for model, fields in sweep["models"].items():
        if "match" in fields:
            continue
        losses = [statistics.fmean(cells[model, size]["losses"]) for size in sizes]
        found = (needed(result, model, axis) for axis in ("parameters", "seconds"))
        rows.append([names.get(model, model), *(f"{loss:.4f}" for loss in losses), *map(ratio, found)])
    rows.sort(key=lambda row: row[len(sizes)])
    return f"{title(result)}, losses in nats a token:\n\n" + markdown(
        ["block", *sizes, AXES["parameters"], AXES["seconds"]], rows
    )


def edges(results: list[dict]) -> str:
    """How often the best rate was one that had none on its other side."""
    best = [(cell["learning_rate"], searched(cell)) for result in results for cell in result["cells"]]
    largest, smallest = (sum(rate == end(rates) for rate, rates in best) for end in (max, min))
    return f"The best rate is the largest that was tried in {largest} of {len(best)} cells, the smallest in {smallest}."


def ratio(line: dict | None) -> str:
    if line is None:
        return "-"
    interval = "" if line["interval"] is None else " ({:.2f} to {:.2f})".format(*line["interval"])
    return f"{line['ratio']:.2f}x{interval}"


def draw(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    colours = {"C=4": "#1d4ed8", "C=4, no norm": "#0891b2", "C=8": "#b45309", "C=8, wide": "#15803d"}
    colours |= {"C=8, wide, refined": "#7e22ce", "C=16, wide, refined": "#be185d"}
    colours |= {"kan_fourier": "#dc2626", "sine MLP": "#9ca3af"}
    rows = [
        (f"{title(result)}: {name.removeprefix('kan_gated ')}", lines)
        for result in results
        for name, lines in compared(result).items()
    ]
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for at, (panel, label) in enumerate(zip(panels, AXES.values())):
        for y, (name, lines) in enumerate(rows):
            if lines[at] is not None:
                x, (low, high) = lines[at]["ratio"], lines[at]["interval"] or 2 * [lines[at]["ratio"]]
                colour = colours.get(name.partition(": ")[2], "#000000")
                panel.errorbar(x, y, xerr=[[x - low], [high - x]], fmt="o", color=colour, markersize=4, capsize=2)
        panel.axvline(1, color="#6b7280", linewidth=1)
        panel.set(xscale="log", title=f"at {label}", xlabel="what SwiGLU needs to match", xlim=(0.5, 4))
        ticks = (0.5, 0.7, 1, 1.5, 2, 3)
        panel.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        panel.minorticks_off()
        panel.grid(axis="x", color="#e5e7eb", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    panels[0].invert_yaxis()
    write_figure(path, figure, results[0]["environment"])


if __name__ == "__main__":
    main()
