"""Decoding: what locality buys. A KAN layer reads k + 1 of its C coefficient rows for a token; an MLP reads everything.

    python benchmarks/bench_decode.py                   # CPU, float32
    python benchmarks/bench_decode.py --device cuda     # bfloat16

Four tables: blocks of equal parameters at batch 1 to 64; time as C grows at fixed width; live rows against the dense
product over rows (where `use_decode` should switch); whole models of equal parameters (configs/models/), one token at a
time behind a cache, and their prefill. Every call gets new tokens, or the same live rows would be found in cache.
Random weights: speed does not depend on them. Prints the tables and, last, one JSON line; writes both and a picture to
benchmarks/results/.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from bench_ffn import BLOCKS, REFERENCE, backend, build, bytes_read
from harness import (
    RESULTS,
    ROOT,
    environment,
    header,
    markdown,
    ratio,
    side_by_side,
    summary,
    write,
    write_figure,
    write_json,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import kansformer  # noqa: F401 (registers the model)
from kansformer.kernels import torch_kan
from kansformer.layers import KANLinear

GROWTH = (8, 16, 32, 64)
SIZES = ("tiny", "125m", "350m", "1b")
CUBIC_16 = {"kan k=3 C=16": ("kan", {"grid_size": 13, "spline_order": 3, "base_activation": "silu"})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden_size", type=int, default=2048, help="width of the blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--models", nargs="*", choices=SIZES, default=["tiny", "125m", "350m"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for decode_<device>.{json,md,png}")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    env = environment(args.device, dtype=str(dtype).removeprefix("torch."), backend=backend(args.device, dtype))
    env["copy_gb_per_s"] = copy_bandwidth(args.device)
    print(header(env))
    d, device, rounds = args.hidden_size, args.device, args.rounds
    name = args.output / f"decode_{device}"
    result = {
        "environment": env,
        "blocks": [row for batch in args.batches for row in blocks(d, batch, device, dtype, rounds)],
        "growth": growth(d, device, dtype, rounds),
        "crossover": crossover(d, dtype, rounds) if device == "cpu" else [],
        "models": [],
    }
    report = save(name, result)
    for size in args.models:
        result["models"] += models(size, device, dtype, max(5, rounds // 3))
        report = save(name, result)  # what was measured is there whatever happens next
    print(report)
    draw(result, name.with_suffix(".png"))
    print(json.dumps({"written": f"{name}.{{md,json,png}}", "environment": env}))


def save(name: Path, result: dict) -> str:
    report = f"{header(result['environment'])}\n\n" + "\n\n".join(tables(result)) + "\n"
    write(name.with_suffix(".md"), "# Decoding\n\n`python benchmarks/bench_decode.py`\n\n" + report)
    write_json(name.with_suffix(".json"), result)
    return report


def copy_bandwidth(device: str, size: int = 2**28) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = side_by_side({"": lambda: target.copy_(source)}, 10, device, launches=False)[""]
    return 2 * size / summary(times)["median"] / 1e6


class NewTokens:
    """A fresh batch of normal inputs before every call."""

    def __init__(self, batch: int, d: int, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = (batch, d), device, dtype
        self.x = torch.empty(0)

    def draw(self) -> None:
        self.x = torch.randn(self.shape).to(self.device, self.dtype)

    def into(self, module: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                module(self.x)

        return call


def blocks(d: int, batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    modules = {name: build(name, *block, d, device, dtype) for name, block in (BLOCKS | CUBIC_16).items()}
    tokens = NewTokens(batch, d, device, dtype)
    calls = {name: tokens.into(module) for name, module in modules.items()}
    times = side_by_side(calls, rounds, device, before=tokens.draw, launches=False)
    return [
        {
            "d": d,
            "batch": batch,
            "block": name,
            "parameters": sum(p.numel() for p in module.parameters()),
            "ms": summary(times[name]),
            "ratio": ratio(times[name], times[REFERENCE]),
            "bytes_ratio": bytes_read(module) / bytes_read(modules[REFERENCE]),
            "gb_per_s": bytes_read(module) / summary(times[name])["median"] / 1e6,
        }
        for name, module in modules.items()
    ]


def growth(d: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    """One KAN layer d -> d at batch 1 as its parameters grow with C."""
    rows = []
    for order in (1, 3):
        layers = {
            count: KANLinear(d, d, count - order, order, base_activation=None, device=device, dtype=dtype)
            for count in GROWTH
        }
        tokens = NewTokens(1, d, device, dtype)
        calls = {str(count): tokens.into(layer) for count, layer in layers.items()}
        times = side_by_side(calls, rounds, device, before=tokens.draw, launches=False)
        for count, layer in layers.items():
            own = times[str(count)]
            rows.append(
                {
                    "order": order,
                    "C": count,
                    "parameters": layer.spline_weight.numel(),
                    "ms": summary(own),
                    "ratio": ratio(own, times[str(GROWTH[0])]),
                }
            )
    return rows


def crossover(d: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Live rows against the dense product for a layer d -> d on CPU, over rows."""
    rows = []
    for order, count in ((1, 4), (1, 8), (3, 8), (3, 16)):
        layer = KANLinear(d, d // 2, count - order, order, base_activation=None, dtype=dtype)
        for batch in (1, 2, 4, 8, 16, 32, 64):
            tokens = NewTokens(batch, d, "cpu", dtype)
            calls = {name: tokens.into(forced(layer, name == "live")) for name in ("live", "dense")}
            times = side_by_side(calls, rounds // 2, "cpu", before=tokens.draw)
            rows.append(
                {
                    "order": order,
                    "C": count,
                    "rows": batch,
                    "live_ms": summary(times["live"])["median"],
                    "dense_ms": summary(times["dense"])["median"],
                    "ratio": ratio(times["live"], times["dense"]),
                    "chosen": "live" if torch_kan.use_decode(batch, count, order, "cpu") else "dense",
                }
            )
    return rows


def forced(layer: nn.Module, live: bool) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with mock.patch.object(torch_kan, "use_decode", return_value=live):
            return layer(x)

    return call


def models(
    size: str,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    kinds: tuple[str, ...] = ("swiglu", "kan_gated"),
    context: int = 128,
) -> list[dict]:
    """Models of equal parameters: a token behind `context` others, and a prefill of 512."""
    built = {}
    for kind in kinds:
        [path] = ROOT.glob(f"configs/models/*{size}_{kind}.json")
        with default_dtype(dtype):
            built[kind] = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).to(device).eval()
    config = built["swiglu"].config
    steps = {kind: decoder(model, config, context, rounds, device) for kind, model in built.items()}
    compiled = {}
    if device == "cuda":
        torch.compiler.reset()
        compiled = {
            f"{kind} compiled": decoder(model, config, context, rounds, device, True) for kind, model in built.items()
        }
    prompt = torch.randint(config.vocab_size, (1, 512), device=device)

    def prefill(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                model(input_ids=prompt, logits_to_keep=1)

        return call

    decode = side_by_side({kind: run.__next__ for kind, run in (steps | compiled).items()}, rounds, device)
    whole = side_by_side({kind: prefill(model) for kind, model in built.items()}, max(3, rounds // 3), device)
    best = "swiglu compiled" if compiled else "swiglu"
    rows = []
    for kind, times in decode.items():
        model = built[kind.removesuffix(" compiled")]
        prefills = whole.get(kind)
        rows.append(
            {
                "model": f"{size} {kind}",
                "parameters": model.num_parameters(),
                "ms": summary(times),
                "ratio": ratio(times, decode[best]),
                "prefill_ms": summary(prefills) if prefills else None,
                "prefill_ratio": ratio(prefills, whole["swiglu"]) if prefills else None,
            }
        )
    return rows


@torch.inference_mode()
def decoder(
    model: nn.Module, config: object, context: int, rounds: int, device: str, compiled: bool = False
) -> Iterator[Tensor]:
    """Each `next` decodes one more random token behind the cache."""
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    cache = StaticCache(config=config, max_cache_len=context + rounds + 8)
    tokens = torch.randint(config.vocab_size, (1, context + rounds + 8), device=device)
    model(input_ids=tokens[:, :context], past_key_values=cache, logits_to_keep=1)
    for position in range(context, tokens.shape[1]):
        yield run(input_ids=tokens[:, position : position + 1], past_key_values=cache, logits_to_keep=1).logits


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tables(result: dict) -> list[str]:
    d = result["blocks"][0]["d"]
    batches = sorted({r["batch"] for r in result["blocks"]})
    names = list(dict.fromkeys(r["block"] for r in result["blocks"]))
    at = {(r["block"], r["batch"]): r for r in result["blocks"]}
    block_rows = [
        [
            name,
            f"{at[name, batches[0]]['parameters']:,}",
            f"{at[name, batches[0]]['bytes_ratio']:.2f}x",
            f"{at[name, batches[0]]['ms']['median']:.3g}",
            f"{at[name, batches[0]]['gb_per_s']:.3g}",
            *(f"{at[name, batch]['ratio']:.2f}x" for batch in batches),
        ]
        for name in names
    ]
    columns = ["block", "parameters", "bytes vs MLP", "ms at batch 1", "GB/s", *(f"batch {b}" for b in batches)]
    found = [f"Blocks at d = {d}, time against the MLP's at the same batch:\n\n{markdown(columns, block_rows)}"]
    growth_rows = [
        [f"k = {r['order']}, C = {r['C']}", f"{r['parameters']:,}", f"{r['ms']['median']:.3g}", f"{r['ratio']:.2f}x"]
        for r in result["growth"]
    ]
    found.append(
        f"One KAN layer {d} -> {d} at batch 1 as C grows, without base term:\n\n"
        + markdown(["layer", "parameters", "ms", f"vs C = {GROWTH[0]}"], growth_rows)
    )
    if result["crossover"]:
        crossover_rows = [
            [
                f"k = {r['order']}, C = {r['C']}",
                r["rows"],
                f"{r['live_ms']:.3g}",
                f"{r['dense_ms']:.3g}",
                f"{r['ratio']:.2f}x",
                r["chosen"],
            ]
            for r in result["crossover"]
        ]
        columns = ["layer", "rows", "live rows ms", "dense product ms", "live vs dense", "chosen"]
        found.append(f"Live rows against the dense product, {d} -> {d // 2}:\n\n{markdown(columns, crossover_rows)}")
    if result["models"]:
        model_rows = [
            [
                r["model"],
                f"{r['parameters']:,}",
                f"{r['ms']['median']:.3g}",
                f"{r['ratio']:.2f}x",
                f"{r['prefill_ms']['median']:.4g}" if r["prefill_ms"] else "-",
                f"{r['prefill_ratio']:.2f}x" if r["prefill_ms"] else "-",
            ]
            for r in result["models"]
        ]
        columns = ["model", "parameters", "ms a token", "vs SwiGLU", "prefill of 512, ms", "vs SwiGLU"]
        found.append(f"Whole models, batch 1, 128 tokens of context:\n\n{markdown(columns, model_rows)}")
    return found


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    first = min(r["batch"] for r in result["blocks"])
    rows = [r for r in result["blocks"] if r["batch"] == first][::-1]
    colours = ["#c2410c" if r["block"].startswith("kan") else "#1d4ed8" for r in rows]
    bars = left.barh([r["block"] for r in rows], [r["ratio"] for r in rows], color=colours, height=0.7)
    left.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    left.plot([r["bytes_ratio"] for r in rows], range(len(rows)), "|", color="#1f2937", markersize=14)
    left.axvline(1, color="#1f2937", linewidth=0.8)
    left.set_title(f"One token, d = {rows[0]['d']}, equal parameters (MLP = 1; mark: bytes read)", fontsize=10)
    for order, colour in ((1, "#c2410c"), (3, "#0f766e")):
        line = [r for r in result["growth"] if r["order"] == order]
        right.plot([r["C"] for r in line], [r["ratio"] for r in line], "o-", color=colour, label=f"time, k = {order}")
    line = [r for r in result["growth"] if r["order"] == 1]
    right.plot([r["C"] for r in line], [r["C"] / GROWTH[0] for r in line], "--", color="#9ca3af", label="parameters")
    right.set_xscale("log", base=2), right.set_yscale("log", base=2)
    right.set_xticks(GROWTH, [str(c) for c in GROWTH])
    right.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    right.set_xlabel("C, splines an edge")
    right.set_title(f"One KAN layer, one token: against C = {GROWTH[0]}", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    write_figure(path, figure, result["environment"])
    plt.close(figure)


if __name__ == "__main__":
    main()
