"""Parameter efficiency: a sweep of feed-forward blocks, sizes, learning rates and seeds, through train/train.py.

    python benchmarks/param_efficiency.py configs/sweeps/classics.yaml    # some four hours on 2 cores
    python benchmarks/param_efficiency.py configs/sweeps/classics.yaml --output runs/headline \
        --models swiglu swiglu_upper kan_gated_lower    # its headline alone, an hour and a half

One yaml declares the sweep:

    name      of its folder in benchmarks/results/
    train     settings of train/train.py that all runs share
    sizes     name: fields of KansformerConfig that make a size; an intermediate_size is the reference's
    models    name: fields of KansformerConfig that make a block, which gets the width of the reference's parameters;
              with `match: weights_read` that at which a decoded token reads as many weights as in the reference; with
              `match: NAME` that of the parameters of the model NAME, which stands before it; `widths: [1, 1, 2, 2]`
              shares that width out over the layers in these parts; `coarse_grids` as in train.py: its grids are
              refined on the way, and what it costs is what every part of the run costs
    reference, baselines    models that the others are compared with; [A, B] is one baseline of the sizes of both
    learning_rates    each model of each size takes its own best, by the first seed
    thorough    true: where that is the lowest or the highest one, the search goes on beyond it, by the same factor; and
              rates within CLOSE of it run with all seeds, of which the one with the lowest mean is the best
    note      what must stand beside its figures, if anything
    seeds     all of them run at that rate; a seed fixes the initial weights and, for all models alike, the text's order
    more_seeds    NAME: [3, 4, 5]: of a model whose comparison needs them

Finished runs are not repeated and killed ones go on, so the same command extends a sweep whose yaml has grown. Runs
share no state: `--workers` of them go side by side. At the end every model's training step is timed, the models of a
size by turns in one process: runs that share a machine say nothing about time. The step has the optimizer, precision
and compilation of `train`, or with `--compiled` compilation in any case. `--rounds 0` times nothing: the times of the
table in the output folder stay, if there is one. `--keep` trains only what that table lacks, models, sizes, seeds
or rates: losses of the same runs stay. A cell names the commits of its losses.

How many parameters (or FLOPs, seconds, weights read) a baseline needs to match a model, over what the model has: with
the baseline's loss L(x) interpolated linearly in log x between its sizes, and s the slope of a line through them all,

    ratio = exp((L(x) - loss) / s),    s = -dL / dlog x

at every size; the geometric mean over sizes. L is the lower convex hull of a baseline's sizes: one that lies above the
line between two others has spent its x badly, since a size between those would do better; the model's sizes above its
own hull do not count either, so that a model needs 1x to match itself. Beyond its sizes the end segments are continued:
ratios of models that have much more than it are the less certain ones.

The interval is 95% of 2,000 draws of every size's mean loss, given the seeds' losses: normal noise of one variance for
the whole sweep, which is drawn too, from its own distribution (so that a mean is Student's t about what was seen; three
seeds resampled would be a fifth too sure). At equal seconds there is none: step times of one pair of models differ
between sweeps by more than their losses' noise is worth.
"""

import argparse
import bz2
import copy
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from harness import RESULTS, ROOT, environment, header, markdown, side_by_side, summary, write, write_figure, write_json
from torch import nn

sys.path.append(str(ROOT / "train"))
import peers  # noqa: F401 (enters its blocks in FFN_TYPES)
from optimizer import optimizer
from settings import Settings

from kansformer import KansformerConfig, KansformerForCausalLM
from kansformer.layers import KANLinear, feed_forward

AXES = {
    "parameters": "parameters in all",
    "feed_forward": "feed-forward parameters",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "weights_read": "weights read for a token",
}
KEYS = {"name", "train", "sizes", "models", "reference", "baselines", "learning_rates", "seeds"}
OPTIONAL = {"note", "thorough", "more_seeds"}
DRAWS = 2000
CLOSE = 0.008  # nats between two rates, by one seed, that may be noise
ALIKE = 0.02  # two sizes of a model whose log x are closer than this are one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a yaml of configs/sweeps")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these alone, the reference among them")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, which share the cores")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=Path, default=Path("runs/sweeps"), help="where runs go, and go on")
    parser.add_argument("--compiled", action="store_true", help="time compiled steps")
    parser.add_argument("--keep", action="store_true", help="losses of the table that is there: train what it lacks")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/NAME")
    options = parser.parse_args()
    sweep = read(options.sweep)
    if options.models:
        if options.output is None:
            parser.error("--models needs an --output: the sweep's own table would lose its other models")
        sweep = restricted(sweep, options.models)
    output = options.output or RESULTS / sweep["name"]
    compiled = options.compiled or sweep["train"].get("compile", False)
    folder = options.runs / sweep["name"]
    dtype = "bfloat16" if sweep["train"].get("precision") == "bf16" else "float32"
    env = environment(
        options.device, dtype=dtype, sweep=options.sweep.name, seeds=sweep["seeds"], rates=sweep["learning_rates"]
    ) | {"timed_steps": "compiled" if compiled else "eager"}
    timed_before = options.rounds == 0 and (options.keep or (output / "table.json").is_file())
    table = table_of(sweep, output) if options.keep or timed_before else None
    cells = trained_cells(sweep, table) if options.keep else {}
    print(header(env | sweep["train"]), flush=True)

    models = {}
    for size, model in itertools.product(sweep["sizes"], sweep["models"]):
        models[size, model] = phases(sweep, size, model)
        write(folder / "configs" / f"{size}_{model}.json", models[size, model][-1][1].to_json_string())
    times = None
    if timed_before:
        times = {(line["size"], line["model"]): line for line in table["step_ms"]}
        times = {key: line for key, line in times.items() if unchanged(sweep, table["sweep"], *key)}
        if untimed := [f"{model} {size}" for size, model in models if (size, model) not in times]:
            raise ValueError(f"the table has no times of {', '.join(untimed)}: give --rounds")
    cells = run_all(sweep, folder, options.workers, options.device, stamp(env), cells)
    env["rates"] = sorted({rate for cell in cells.values() for rate in searched(cell)})
    if times is not None:
        env = table["environment"] | {"seeds": env["seeds"], "rates": env["rates"]}
    else:
        times = step_times(models, sweep["train"] | {"compile": compiled}, options.rounds, options.device)
    for key, cell in cells.items():
        cell |= costs(models[key], sweep["train"])
        cell["seconds"] = sweep["train"]["steps"] * times[key]["median"] / 1e3 if times else None
    result = {"environment": env, "sweep": sweep, "cells": list(cells.values()), "step_ms": list(times.values())}
    result["comparisons"] = compare(sweep, cells)
    result["bytes_a_word"] = bytes_a_word(Path(sweep["train"]["data"]))
    flags = [f"--{name}" for name in ("keep", "compiled") if getattr(options, name)]
    flags += ["--rounds 0"] * (options.rounds == 0)
    flags += ["--models", *options.models, "--output", str(options.output)] if options.models else []
    result["command"] = " ".join(["python benchmarks/param_efficiency.py", str(options.sweep), *flags])
    text = page(sweep, result)
    write(output / "table.md", text)
    write_json(output / "table.json", result)
    draw(result, output / "efficiency.png")
    print("\n" + text)


def read(path: Path) -> dict:
    """The sweep in `path`, checked.

    Raises:
        FileNotFoundError, ValueError: naming the missing or unknown part.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the sweeps of this repository are in configs/sweeps")
    sweep = yaml.safe_load(path.read_text())
    if not isinstance(sweep, dict) or set(sweep) - OPTIONAL != KEYS:
        raise ValueError(f"{path} must have the keys {', '.join(sorted(KEYS))}, not {sorted(sweep or ())}")
    for key, kind in {"sizes": dict, "models": dict, "train": dict, "learning_rates": list, "seeds": list}.items():
        if not isinstance(sweep[key], kind) or not sweep[key]:
            raise ValueError(f"{path}: {key} must be a {kind.__name__} with something in it, not {sweep[key]!r}")
    known = {"match", "widths", "coarse_grids", *KansformerConfig().to_dict()}
    for name, fields in [*sweep["sizes"].items(), *sweep["models"].items()]:
        if not isinstance(fields, dict) or not known.issuperset(fields):
            wrong = ", ".join(sorted(set(fields) - known)) if isinstance(fields, dict) else repr(fields)
            raise ValueError(f"{path}: {name} has {wrong}: no field of KansformerConfig")
    layers = {size.get("num_hidden_layers", KansformerConfig.num_hidden_layers) for size in sweep["sizes"].values()}
    for name, model in sweep["models"].items():
        if len(set(seeds := seeds_of(sweep, name))) < len(seeds):
            raise ValueError(f"{path}: {name} has the seeds {seeds}, one of them twice")
        if "widths" not in model:
            continue
        widths = model["widths"]
        positive = isinstance(widths, list) and all(isinstance(width, (int, float)) and width > 0 for width in widths)
        alone = not isinstance(model["ffn_type"], list) and "intermediate_size" not in model
        if not (positive and {len(widths)} == layers and alone and name != sweep["reference"]):
            raise ValueError(
                f"{path}: {name} has widths {widths!r}; they are one positive number for each layer of every size, of "
                "one ffn_type and without an intermediate_size, and not the reference's"
            )
    sweep["learning_rates"] = [float(rate) for rate in sweep["learning_rates"]]  # yaml reads 1e-3 as a string
    if not isinstance(thorough := sweep.get("thorough", False), bool) or thorough > (len(sweep["learning_rates"]) > 1):
        raise ValueError(f"{path}: thorough is true or false, not {thorough!r}, and true needs two learning_rates")
    named = {
        sweep["reference"],
        *sweep.get("more_seeds", {}),
        *itertools.chain.from_iterable(map(members, sweep["baselines"])),
    }
    if unknown := named - set(sweep["models"]):
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} is none of the models {', '.join(sweep['models'])}")
    if "steps" not in sweep["train"] or {"seed", "learning_rate", "model", "output_dir"} & set(sweep["train"]):
        raise ValueError(f"{path}: train needs steps; seed, learning_rate, model and output_dir are the sweep's own")
    return sweep


def restricted(sweep: dict, models: list[str]) -> dict:
    """The sweep of some of its models, against the baselines that are left, without its note.

    Raises:
        ValueError: naming a model that the sweep does not have, or one that is missing: the reference, one that another
            is matched to, or all of every baseline.
    """
    if unknown := set(models) - set(sweep["models"]):
        raise ValueError(f"{', '.join(sorted(unknown))} is none of the models {', '.join(sweep['models'])}")
    left = {name: model for name, model in sweep["models"].items() if name in models}
    matched = {model["match"] for model in left.values() if "match" in model} & set(sweep["models"])
    if missing := ({sweep["reference"]} | matched) - set(models):
        raise ValueError(f"others are matched to {', '.join(sorted(missing))}: name it too")
    baselines = [baseline for baseline in sweep["baselines"] if set(models).issuperset(members(baseline))]
    if not baselines:
        raise ValueError(f"no baseline is left of {sweep['baselines']}")
    more = {name: seeds for name, seeds in sweep.get("more_seeds", {}).items() if name in models}
    kept = {key: value for key, value in sweep.items() if key != "note"}
    return kept | {"models": left, "baselines": baselines, "more_seeds": more}


def members(baseline: str | list[str]) -> list[str]:
    """The models of a baseline."""
    return [baseline] if isinstance(baseline, str) else baseline


def unsearched(sweep: dict, losses: dict[float, float]) -> list[float]:
    """Rates that are still to be tried where these were, by their `losses`."""
    if listed := [rate for rate in sweep["learning_rates"] if rate not in losses]:
        return listed
    rates, best = sorted(losses), min(losses, key=losses.__getitem__)
    if not sweep.get("thorough") or best not in (rates[0], rates[-1]):
        return []
    beside = rates[1] if best == rates[0] else rates[-2]
    return [float(f"{best * best / beside:.3g}")]


def searched(cell: dict) -> dict[float, float]:
    """Losses of the first seed by rate."""
    return {float(rate): loss for rate, loss in cell["searched"].items()}


def candidates(sweep: dict, losses: dict[float, float]) -> list[float]:
    """Rates that may be the best by their `losses` with one seed."""
    bound = min(losses.values()) + CLOSE * sweep.get("thorough", False)
    return [rate for rate, loss in losses.items() if loss <= bound]


def seeds_of(sweep: dict, model: str) -> list[int]:
    """The seeds of a model: those of all, and its own."""
    return [*sweep["seeds"], *sweep.get("more_seeds", {}).get(model, [])]


def weights_read(module: nn.Module) -> float:
    """Weights that one decoded token needs: k + 1 of the C coefficients of an edge, one row of an untied embedding."""
    unread = 0.0
    for part in module.modules():
        if isinstance(part, KANLinear):
            unread += part.spline_weight.numel() * max(0, 1 - (part.spline_order + 1) / part.num_basis)
    embedding = getattr(getattr(module, "model", None), "embed_tokens", None)
    if embedding is not None and not module.config.tie_word_embeddings:
        unread += embedding.weight.numel() - embedding.embedding_dim
    return sum(parameter.numel() for parameter in module.parameters()) - unread


MATCHED = {"params": lambda module: sum(p.numel() for p in module.parameters()), "weights_read": weights_read}


def configured(sweep: dict, size: str, model: str) -> KansformerConfig:
    """The configuration of one cell; in bf16 of widths that a GPU's tensor cores and loads like."""
    multiple = 16 if sweep["train"].get("precision") == "bf16" else 4
    return configuration(sweep["sizes"][size], sweep["models"][model], sweep["reference"], sweep["models"], multiple)


def phases(sweep: dict, size: str, model: str) -> list[tuple[int, KansformerConfig]]:
    """(steps, configuration) of every part of a run: one, or as many as there are grids on the way."""
    config, start, found = configured(sweep, size, model), 0, []
    for until, grid_size in [*sweep["models"][model].get("coarse_grids", []), (sweep["train"]["steps"], None)]:
        part = copy.deepcopy(config)
        part.grid_size = grid_size or config.grid_size
        found.append((until - start, part))
        start = until
    return found


def configuration(size: dict, model: dict, reference: str, models: dict, multiple: int = 4) -> KansformerConfig:
    """A block matched to the reference, or to another model, to the closest multiple of `multiple` units."""
    fields = size | model
    fields.pop("coarse_grids", None)
    if isinstance(model["ffn_type"], list):  # every kind for itself
        parts = {kind: model | {"ffn_type": kind} for kind in model["ffn_type"]}
        models = models | dict(enumerate(parts.values()))
        found = {kind: configuration(size, part, reference, models, multiple) for kind, part in parts.items()}
        fields["intermediate_size"] = [found[kind].intermediate_size for kind in model["ffn_type"]]
        fields.pop("match", None)
        return KansformerConfig(**fields)
    matched, widths = fields.pop("match", "params"), fields.pop("widths", None)
    before = list(models)[: list(models.values()).index(model)]
    if matched not in (*MATCHED, *before):
        raise ValueError(f"match is {matched!r}; choose {', '.join(MATCHED)} or a model that stands before it")
    if "intermediate_size" in model or model == models[reference]:
        return KansformerConfig(**fields)
    target = configuration(size, models[matched if matched in before else reference], reference, models, multiple)
    matched = "params" if matched in before else matched

    def cost(config: KansformerConfig, width: int) -> float:
        options = (config.ffn_type, config.hidden_size, width)
        return MATCHED[matched](feed_forward(*options, device="meta", **config.ffn_options(config.ffn_type)))

    config = KansformerConfig(**fields | {"intermediate_size": multiple})
    goal = statistics.fmean(cost(target, width) for width in target.intermediate_sizes)
    one, two = cost(config, multiple), cost(config, 2 * multiple)  # the cost is linear in the width
    config.intermediate_size = multiple * max(1, round(1 + (goal - one) / (two - one)))
    if widths is None:
        return config
    unit = config.intermediate_size * config.num_hidden_layers / sum(widths)
    sizes = [multiple * max(1, round(unit * width / multiple)) for width in widths]
    return KansformerConfig(**fields | {"intermediate_size": sizes})


def run_all(
    sweep: dict, folder: Path, workers: int, device: str, made: str, kept: dict | None = None
) -> dict[tuple[str, str], dict]:
    """Every rate with the first seed, every seed at those that may be the best, the other seeds at the best.

    A cell: size, model, rate, losses by seed; losses of the first seed by rate; of all seeds by rates that are close.

    Of cells that are `kept` only missing rates and seeds are run; runs that are not there yet are `made` at a commit.
    """
    every = list(itertools.product(sweep["sizes"], sweep["models"]))
    kept, seeds = kept or {}, sweep["seeds"]
    by_rate = {key: searched(kept[key]) if key in kept else {} for key in every}
    results: dict[tuple, dict] = {}

    def run(job: tuple, searching: bool = False) -> None:
        if job in results:
            return
        try:
            results[job] = train(sweep, folder, *job, device, max(1, (os.cpu_count() or 1) // workers), made)
        except FloatingPointError:  # a rate that is too high is an answer
            if not searching:
                raise
            results[job] = {"val_loss": math.inf}
        done, loss = len(results), results[job]["val_loss"]
        print(f"{done}: size {job[0]}, {job[1]}, rate {job[2]:g}, seed {job[3]}: {loss:.4f}", flush=True)

    def at(key: tuple[str, str], rate: float) -> list[float]:
        """Losses of the seeds of all at a rate; none if one is missing."""
        cell = kept.get(key, {})
        if cell.get("learning_rate") == rate and len(cell["losses"]) >= len(seeds):
            return cell["losses"][: len(seeds)]
        runs = [results.get((*key, rate, seed)) for seed in seeds]
        return cell.get("close", {}).get(str(rate)) or ([run["val_loss"] for run in runs] if all(runs) else [])

    cells = {}
    with ThreadPoolExecutor(workers) as pool:  # the largest first: no worker is left alone with a long run at the end
        while jobs := [(*key, rate, seeds[0]) for key in reversed(every) for rate in unsearched(sweep, by_rate[key])]:
            list(pool.map(lambda job: run(job, searching=True), jobs))
            for size, model, rate, seed in jobs:
                by_rate[size, model][rate] = results[size, model, rate, seed]["val_loss"]
        close = {key: rates for key in reversed(every) if len(rates := candidates(sweep, by_rate[key])) > 1}
        jobs = [
            (*key, rate, seed) for key, rates in close.items() for rate in rates for seed in seeds if not at(key, rate)
        ]
        list(pool.map(run, jobs))
        jobs = []
        for size, model in reversed(every):
            losses, cell = by_rate[size, model], kept.get((size, model))
            of_close = {rate: at((size, model), rate) for rate in close.get((size, model), ())}
            means = {rate: statistics.fmean(found) for rate, found in of_close.items()} or losses
            rate = min(means, key=means.__getitem__)
            if math.isinf(means[rate]):
                raise FloatingPointError(f"{model} {size} diverged at every rate of {sorted(losses)}")
            if cell is None or cell["learning_rate"] != rate:
                cell = {"size": size, "model": model, "trained": "", "learning_rate": rate}
                cell |= {"losses": [], "bits_per_byte": []}
            cell = cell | {"searched": {str(r): losses[r] for r in sorted(losses)}}
            cells[size, model] = cell | {"close": {str(r): found for r, found in sorted(of_close.items())}}
            jobs += [(size, model, rate, seed) for seed in seeds_of(sweep, model)[len(cell["losses"]) :]]
        list(pool.map(run, jobs))
    for size, model, rate, seed in jobs:
        cell, result = cells[size, model], results[size, model, rate, seed]
        cell["losses"] = [*cell["losses"], result["val_loss"]]
        cell["bits_per_byte"] = [*cell["bits_per_byte"], result["val_bits_per_byte"]]
        stamps = {*filter(None, cell["trained"].split("; ")), result["trained"]}
        cell["trained"] = "; ".join(sorted(stamps, key=lambda stamp: stamp.split(", ")[::-1]))  # by date
    return {key: cells[key] for key in every}


def stamp(env: dict) -> str:
    """When and at what commit."""
    return f"commit {env['commit']}, dirty {env['dirty']}, {env['date']}"


def table_of(sweep: dict, output: Path) -> dict:
    """table.json in `output`.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is of other runs: other settings, or another reference.
    """
    path = output / "table.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: without --keep the sweep is run")
    table = json.loads(path.read_text())
    if any(table["sweep"][key] != sweep[key] for key in ("train", "reference")):
        raise ValueError(f"{path} is of another sweep than the yaml now is: without --keep and --rounds 0 it is run")
    return table


def unchanged(sweep: dict, old: dict, size: str, model: str) -> bool:
    """Whether a model of a size is the same in two sweeps."""
    if any(size not in s["sizes"] or model not in s["models"] for s in (sweep, old)):
        return False
    now, then = ([(n, config.to_dict()) for n, config in phases(s, size, model)] for s in (sweep, old))
    return now == then


def trained_cells(sweep: dict, table: dict) -> dict[tuple[str, str], dict]:
    """The cells of a table whose configurations are the sweep's, with the losses of its first seeds."""
    old, found = table["sweep"], {}
    for cell in table["cells"]:
        size, model = cell["size"], cell["model"]
        if not unchanged(sweep, old, size, model):
            continue
        pairs = zip(seeds_of(sweep, model), seeds_of(old, model))
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if same:
            found[size, model] = cell | {key: cell[key][:same] for key in ("losses", "bits_per_byte")}
            if old["seeds"] != sweep["seeds"]:
                found[size, model]["close"] = {}
    return found


def train(
    sweep: dict, folder: Path, size: str, model: str, rate: float, seed: int, device: str, threads: int, made: str
) -> dict:
    """results.json of one run, which train/train.py does, or goes on with, or has done, with the commit, `made`."""
    output = folder / size / model / f"rate_{rate:g}" / f"seed_{seed}"
    config = folder / "configs" / f"{size}_{model}.json"
    settings = sweep["train"] | {"seed": seed, "learning_rate": rate, "output_dir": str(output), "model": str(config)}
    if coarse := sweep["models"][model].get("coarse_grids"):
        settings["coarse_grids"] = coarse
    settings |= {"keep_best": False, "keep_checkpoints": 1, "device": "auto" if device == "cuda" else "cpu"}
    asked = json.dumps(settings | {"config": json.loads(config.read_text())}, sort_keys=True)
    finished, record = output / "results.json", output / "asked.json"
    if record.is_file() and record.read_text() != asked:
        raise ValueError(f"{output} is a run with other settings: remove it, or give another --runs")
    if not finished.is_file():
        write(record, asked)
        arguments = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
        ]
        limits = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks/peers.py"), *arguments],  # train.py, with the peers' blocks
            capture_output=True,
            text=True,
            env=os.environ | limits,
        )
        if done.returncode != 0:
            if "FloatingPointError" in (done.stderr.strip().splitlines() or [""])[-1]:
                raise FloatingPointError(f"the run in {output} diverged:\n{done.stderr[-3000:]}")
            raise RuntimeError(f"the run in {output} failed:\n{done.stderr[-3000:]}")
        write_json(finished, json.loads(finished.read_text()) | {"trained": made})
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return json.loads(finished.read_text())


def costs(parts: list[tuple[int, KansformerConfig]], settings: dict) -> dict:
    """What a model costs, from the shapes of its `phases`: in the end, but FLOPs on the way."""
    tokens, flops = settings["batch_size"] * settings["sequence_length"], 0
    for steps, config in parts:
        with torch.device("meta"):
            model = KansformerForCausalLM(config)
        flops += model.flops_per_token(settings["sequence_length"]) * tokens * steps
    counts = model.parameter_counts()
    return {
        "intermediate_size": config.intermediate_size,
        "parameters": counts["total"],
        "feed_forward": counts["feed_forward"],
        "flops": flops,
        "weights_read": weights_read(model),
    }


def step_times(models: dict, settings: dict, rounds: int, device: str) -> dict[tuple[str, str], dict]:
    """Milliseconds of one training step of every model: forward, backward, update; the models of a size take turns.

    That of a run in several `phases` is the mean over its steps.
    """
    times = {}
    if rounds == 0:
        return times
    torch._dynamo.config.recompile_limit = 64  # models that share a forward method: of 8 it leaves the ninth eager
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for size in dict.fromkeys(size for size, _ in models):
        torch.compiler.reset()
        of_size = {model: parts for (s, model), parts in models.items() if s == size}
        steps = {
            (model, part): stepper(config, settings, device)
            for model, parts in of_size.items()
            for part, (_, config) in enumerate(parts)
        }
        measured = side_by_side(steps, rounds, device)
        for model, parts in of_size.items():
            total = sum(count for count, _ in parts)
            milliseconds = [
                sum(measured[model, part][i] * count / total for part, (count, _) in enumerate(parts))
                for i in range(rounds)
            ]
            times[size, model] = {"size": size, "model": model} | summary(milliseconds)
    return times


def stepper(config: KansformerConfig, settings: dict, device: str):
    """One step of a run without its loop: the optimizer, precision and compilation that the sweep's settings say."""
    settings = Settings(**settings)
    model = KansformerForCausalLM(config).to(device)
    update = optimizer(model, settings)
    forward = torch.compile(model) if settings.compile else model
    shape = settings.batch_size, settings.sequence_length
    tokens = torch.randint(config.vocab_size, shape, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        update.step()
        update.zero_grad()

    return step


def compare(sweep: dict, cells: dict) -> list[dict]:
    """For every model, baseline and axis: loss at equal x, and how much of x the baseline needs to match."""
    comparisons = []
    losses = [cell["losses"] for cell in cells.values()]
    for model, baseline, axis in itertools.product(sweep["models"], map(members, sweep["baselines"]), AXES):
        if model in baseline or next(iter(cells.values()))[axis] is None or len(sweep["sizes"]) < 2:
            continue
        points = [[(cells[size, name][axis], cells[size, name]["losses"]) for name in names for size in sweep["sizes"]]
                  for names in ([model], baseline)]  # fmt: skip
        differences, ratio, interval = match(*points, None if axis == "seconds" else losses)
        line = {"model": model, "baseline": ", ".join(baseline), "axis": axis}
        line |= {"ratio": None if math.isnan(ratio) else ratio, "interval": interval}
        comparisons.append(line | {"difference": dict(zip(sweep["sizes"], differences))})
    return comparisons


def bytes_a_word(folder: Path) -> float | None:
    """Bytes over words of the held-out file, words and ends of lines as WikiText counts them; None without one.

    A word's perplexity under a model of bytes is 2 ** (bits a byte * this).
    """
    opened = {"valid.txt": open, "valid.txt.bz2": bz2.open}
    for name, read_ in opened.items():
        if (folder / name).is_file():
            with read_(folder / name, "rt", encoding="utf-8", newline="\n") as file:
                text = file.read()
            return len(text.encode()) / (len(text.split()) + text.count("\n"))
    return None


Points = list[tuple[float, list[float]]]  # (x, losses by seed) of every size


def match(
    model: Points, baseline: Points, losses: list[list[float]] | None = None
) -> tuple[list[float], float, tuple[float, float] | None]:
    """(loss minus the baseline's at equal x, by size; x that the baseline needs over the model's; its 95% interval).

    The interval comes from the noise of `losses`, by seed, of all that was trained. The ratio is nan where the baseline
    gains nothing by more; the interval None there, without losses, and where all have one seed.
    """
    chance = random.Random(0)

    def once(noise: float = 0.0) -> tuple[list[float], float]:
        def mean(losses: list[float]) -> float:
            return statistics.fmean(losses) + chance.gauss(0, noise / math.sqrt(len(losses)))

        ours, theirs = ([(math.log(x), mean(losses)) for x, losses in points] for points in (model, baseline))
        theirs = frontier(sorted(theirs))
        if len(theirs) < 2:
            return [], math.nan
        slope = -statistics.linear_regression(*zip(*theirs)).slope
        differences = [loss - interpolate(theirs, x) for x, loss in ours]
        best = frontier(sorted(ours))
        gained = -statistics.fmean(difference for point, difference in zip(ours, differences) if point in best)
        return differences, math.exp(min(700, gained / slope)) if slope > 0 else math.nan  # a float ends at exp(709)

    differences, ratio = once()
    freedom = sum(len(seeds) - 1 for seeds in losses or ())
    if not freedom or math.isnan(ratio):
        return differences, ratio, None
    squares = sum((loss - statistics.fmean(seeds)) ** 2 for seeds in losses for loss in seeds)
    draws = [once(math.sqrt(squares / (2 * chance.gammavariate(freedom / 2, 1))))[1] for _ in range(DRAWS)]
    ratios = sorted(ratio for ratio in draws if not math.isnan(ratio))
    return differences, ratio, (ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))])


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The falling part of the lower convex hull of sorted points (log x, y)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and x - hull[-1][0] < ALIKE:  # the better of the two: a line through both could rise to anywhere
            if y >= hull[-1][1]:
                continue
            hull.pop()
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull[: hull.index(min(hull, key=lambda point: point[1])) + 1]


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through sorted points, its end segments continued."""
    pairs = list(itertools.pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def page(sweep: dict, result: dict) -> str:
    """table.md: what it is, where it was made, the tables, the picture."""
    words = f"Every model of `{sweep['name']}` has the parameters of `{sweep['reference']}` of its size"
    for name, model in sweep["models"].items():
        matched = model.get("match", "params")
        if matched == "weights_read":
            words += f", `{name}` the width at which a decoded token reads as many weights"
        elif matched != "params":
            words += f", and `{name}` the parameters of `{matched}`"
        if "widths" in model:
            words += f"; the layers of `{name}` have widths as {':'.join(map(str, model['widths']))}"
        if coarse := model.get("coarse_grids"):
            words += f"; `{name}` has {', '.join(f'{size} intervals until step {until}' for until, size in coarse)}"
    parts = ["# Blocks at equal parameters, and at equal weights read", f"`{result['command']}`", words + "."]
    parts += [sweep["note"]] if "note" in sweep else []
    trained: dict[str, list] = {}
    for cell in result["cells"]:
        trained.setdefault(cell["trained"], []).append(f"{cell['model']} {cell['size']}")
    if set(trained) != {stamp(result["environment"])}:
        (first, _), *others = [(when.replace("; ", " and "), ", ".join(names)) for when, names in trained.items()]
        made = "".join(f"; those of {names} at {when}" for when, names in others)
        parts.append(f"Losses were trained at {first}{made}. Steps are timed at:")
    parts += [header(result["environment"]), *tables(sweep, result)]
    parts.append("![Loss against parameters, FLOPs, seconds and weights read](efficiency.png)")
    return "\n\n".join(parts) + "\n"


def tables(sweep: dict, result: dict) -> list[str]:
    columns = ["model", "size", "parameters", "feed-forward", "read a token", "rate", "loss (nats/token)", "spread"]
    columns += ["bits a byte", "word perplexity", "ms a step"]
    times = {(line["size"], line["model"]): line["median"] for line in result["step_ms"]}
    rows = []
    for cell in sorted(result["cells"], key=lambda cell: list(sweep["sizes"]).index(cell["size"])):
        rates = searched(cell)
        edge = "*" if len(rates) > 1 and cell["learning_rate"] in (min(rates), max(rates)) else ""
        spread = max(cell["losses"]) - min(cell["losses"])
        milliseconds = times.get((cell["size"], cell["model"]))
        loss, bits = statistics.fmean(cell["losses"]), statistics.fmean(cell["bits_per_byte"])
        counts = [f"{cell[key]:,.0f}" for key in ("parameters", "feed_forward", "weights_read")]
        quality = [f"{cell['learning_rate']:g}{edge}", f"{loss:.4f}", f"{spread:.4f}", f"{bits:.4f}"]
        word = "-" if result["bytes_a_word"] is None else f"{2 ** (bits * result['bytes_a_word']):,.0f}"
        time = "-" if milliseconds is None else f"{milliseconds:.0f}"
        rows.append([cell["model"], cell["size"], *counts, *quality, word, time])
    numbers: dict[int, list[str]] = {}
    for model in sweep["models"]:
        numbers.setdefault(len(seeds_of(sweep, model)), []).append(model)
    seeds = f"{len(sweep['seeds'])} seeds"
    more = [f"{count} of {', '.join(names)}" for count, names in numbers.items() if count > len(sweep["seeds"])]
    seeds += f" ({'; '.join(more)})" if more else ""
    parts = [f"Mean over {seeds}; spread: largest minus smallest. *: the rate is at an end of what was searched."]
    parts.append(markdown(columns, rows))
    for baseline in (", ".join(members(baseline)) for baseline in sweep["baselines"]):
        lines = [line for line in result["comparisons"] if line["baseline"] == baseline]
        if not lines:
            continue
        rows = []
        for line in lines:
            ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}x"
            interval = "-" if line["interval"] is None else "{:.2f} to {:.2f}".format(*line["interval"])
            differences = ", ".join(f"{value:+.4f}" for value in line["difference"].values())
            rows.append([line["model"], AXES[line["axis"]], differences, ratio, interval])
        parts.append(f"Against {baseline}. Above 1x it needs more to match; a negative difference is a lower loss.")
        names = ["model", "at equal", f"loss difference, sizes {', '.join(sweep['sizes'])}", "it needs", "95%"]
        parts.append(markdown(names, rows))
    return parts


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    colours = ("#6b7280", "#1d4ed8", "#0891b2", "#c2410c", "#7e22ce", "#15803d", "#db2777", "#a16207")
    axes_of = {axis: label for axis, label in AXES.items() if result["cells"][0][axis] is not None}
    figure = Figure(figsize=(4.2 * len(axes_of), 4.2), layout="constrained")
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for model, colour in zip(result["sweep"]["models"], itertools.cycle(colours)):
        cells = [cell for cell in result["cells"] if cell["model"] == model]
        means = [statistics.fmean(cell["losses"]) for cell in cells]
        below = [mean - min(cell["losses"]) for mean, cell in zip(means, cells)]
        above = [max(cell["losses"]) - mean for mean, cell in zip(means, cells)]
        for panel, axis in zip(panels, axes_of):
            x = [cell[axis] for cell in cells]
            panel.errorbar(x, means, [below, above], color=colour, fmt="o", markersize=3.5, capsize=2, label=model)
            log_x, y = zip(*frontier(sorted(zip(map(math.log, x), means))))
            panel.plot([math.exp(value) for value in log_x], y, color=colour)
    for panel, label in zip(panels, axes_of.values()):
        panel.set(xscale="log", xlabel=label)
        panel.xaxis.set_minor_formatter(lambda x, _: f"{x:.0e}".replace("e+0", "e") if f"{x:e}"[0] in "25" else "")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e+0", "e"))
        panel.grid(color="#e5e7eb", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats/token)")
    panels[0].legend(frameon=False, fontsize=8)
    write_figure(path, figure, result["environment"])


if __name__ == "__main__":
    main()
