"""Whole models of equal parameters: training, prefill, decoding, memory; and how the cost of a step grows.

    python benchmarks/bench_models.py                                        # CPU, float32
    python benchmarks/bench_models.py --device cuda --models small_30m 125m 350m 1b --sequence_length 1024

One training step is forward, backward and AdamW; `--compiled` times it under torch.compile too, against a compiled
SwiGLU. The models of a size (configs/models/: SwiGLU, `kan_gated`, `kan_fourier`) take turns, and
so do the two blocks at every point of the scaling table: there one of width, depth, tokens and G changes and the rest
stays at the tiny model's, both blocks at equal parameters, the KAN block's time over SwiGLU's beside the time itself.
Saved for backward counts each storage once and no parameter. Random weights: speed does not depend on them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_decode import default_dtype, models
from harness import RESULTS, ROOT, environment, header, markdown, ratio, side_by_side, summary, write, write_json
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kansformer import KansformerConfig

sys.path.insert(0, str(ROOT / "train"))

from metrics import saved_bytes

KINDS = ("swiglu", "kan_gated", "kan_fourier")
SIZES = ("tiny", "small_5m", "small_30m", "125m", "350m", "1b")
TINY = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
GROWTH = {
    "width": [{"hidden_size": d, "num_attention_heads": d // 32} for d in (64, 128, 256, 512)],
    "depth": [{"num_hidden_layers": layers} for layers in (2, 4, 8)],
    "tokens": [{"sequence_length": length} for length in (64, 128, 256, 512)],
    "G": [{"grid_size": G} for G in (1, 3, 7, 15)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="*", choices=SIZES, default=["tiny", "small_5m"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="compiled steps of the models, too")
    parser.add_argument("--growth", nargs="*", choices=GROWTH, default=list(GROWTH))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for models_<device>.{json,md}")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    shape = {"batch_size": options.batch_size, "sequence_length": options.sequence_length}
    env = environment(options.device, dtype=str(dtype).removeprefix("torch."), **shape, rounds=options.rounds)
    print(header(env), flush=True)
    result = {"environment": env, "models": [], "growth": []}
    output = options.output / f"models_{options.device}.json"
    for name in options.models:
        trained = of_size(name, dtype, options)
        rows = models(name, options.device, dtype, 3 * options.rounds, KINDS)
        served = {row["model"].removeprefix(f"{name} "): row for row in rows}
        for row in trained:
            decoding = served.get(f"{row['kind']} compiled", served[row["kind"]])  # as one would serve it
            prefill = {key: served[row["kind"]][key] for key in ("prefill_ms", "prefill_ratio")}
            result["models"].append(row | {"served": decoding | prefill})
        print(f"{name}: {trained[1]['ratio']:.2f}x", flush=True)
        write_json(output, result)
    for axis in options.growth:
        result["growth"] += [point(axis, change, dtype, options) for change in GROWTH[axis]]
    text = "\n\n".join([header(env), *tables(result)])
    flags = " --compiled" if options.compiled else ""
    write(output.with_suffix(".md"), f"# Whole models\n\n`python benchmarks/bench_models.py{flags}`\n\n{text}\n")
    write_json(output, result)
    print("\n" + text)


def of_size(name: str, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    configs = {}
    for kind in KINDS:
        configs[kind] = AutoConfig.from_pretrained(ROOT / "configs" / "models" / f"{name}_{kind}.json")
    shape = options.batch_size, options.sequence_length
    return compare(configs, *shape, dtype, options, {"size": name}, options.compiled)


def point(axis: str, change: dict, dtype: torch.dtype, options: argparse.Namespace) -> dict:
    """The two blocks where one thing changes."""
    fields = TINY | change
    length = fields.pop("sequence_length", 128)
    configs = {}
    for kind in ("swiglu", "kan_gated"):
        own = fields if kind == "kan_gated" else {key: value for key, value in fields.items() if key != "grid_size"}
        configs[kind] = KansformerConfig(**own, ffn_type=kind, **exact_width(kind, fields))
    key = {"width": "hidden_size", "depth": "num_hidden_layers", "tokens": "sequence_length", "G": "grid_size"}[axis]
    swiglu, kan = compare(configs, 8, length, dtype, options, {"axis": axis, "value": change[key]})
    return kan | {"swiglu_ms": swiglu["ms"]}


def exact_width(kind: str, fields: dict) -> dict:
    """SwiGLU's 8/3 d, and the same parameters with C = G + 1 splines an edge."""
    swiglu = -(-8 * fields["hidden_size"] // 24) * 8
    return {"intermediate_size": swiglu if kind == "swiglu" else round(3 * swiglu / (fields.get("grid_size", 3) + 3))}


def compare(
    configs: dict,
    batch: int,
    length: int,
    dtype: torch.dtype,
    options: argparse.Namespace,
    where: dict,
    compiled: bool = False,
) -> list:
    built, rows = {}, []
    tokens = torch.randint(configs["swiglu"].vocab_size, (batch, length), device=options.device)
    for kind, config in configs.items():
        with default_dtype(dtype):
            built[kind] = AutoModelForCausalLM.from_config(config).to(options.device)
    steps = {kind: step(model, tokens) for kind, model in built.items()}
    if compiled:
        torch.compiler.reset()
        steps |= {f"{kind} compiled": step(torch.compile(model), tokens) for kind, model in built.items()}
    times = side_by_side(steps, options.rounds, options.device)
    for kind, model in built.items():
        with saved_bytes(model) as kept:
            model(input_ids=tokens, labels=tokens, use_cache=False)
        row = where | {"kind": kind, "parameters": model.num_parameters(), "ms": summary(times[kind])}
        row["tokens_per_second"] = 1e3 * batch * length / row["ms"]["median"]
        row["compiled_ms"] = summary(times[f"{kind} compiled"]) if compiled else None
        row["compiled_ratio"] = ratio(times[f"{kind} compiled"], times["swiglu compiled"]) if compiled else None
        rows.append(row | {"ratio": ratio(times[kind], times["swiglu"]), "saved_bytes": sum(kept)})
    return rows


def step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def tables(result: dict) -> list[str]:
    found = []
    if result["models"]:
        rows = []
        for row in result["models"]:
            served = row["served"]
            compiled = "-" if row["compiled_ratio"] is None else f"{row['compiled_ratio']:.2f}x"
            training = [f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}x", compiled]
            training.append(f"{row['saved_bytes'] / 1e6:,.0f}")
            serving = [f"{served['prefill_ratio']:.2f}x", f"{served['ms']['median']:.3g}", f"{served['ratio']:.2f}x"]
            rows.append([f"{row['size']} {row['kind']}", f"{row['parameters']:,}", *training, *serving])
        columns = ["model", "parameters", "training tokens/s", "step vs SwiGLU", "both compiled"]
        columns += ["saved for backward, MB"]
        columns += ["prefill of 512 vs SwiGLU", "ms a decoded token", "vs SwiGLU"]
        found.append("Equal parameters:\n\n" + markdown(columns, rows))
    if result["growth"]:
        rows = []
        for row in result["growth"]:
            times = [f"{row['swiglu_ms']['median']:.3g}", f"{row['ms']['median']:.3g}", f"{row['ratio']:.2f}x"]
            rows.append([f"{row['axis']} = {row['value']}", f"{row['parameters']:,}", *times])
        columns = ["what changes", "parameters", "SwiGLU, ms a step", "kan_gated, ms a step", "ratio"]
        found.append("How the cost of a training step grows, from the tiny model:\n\n" + markdown(columns, rows))
    return found


if __name__ == "__main__":
    main()
