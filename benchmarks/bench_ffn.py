"""Feed-forward blocks side by side at equal parameters: time, memory and decoding, KAN blocks against MLP blocks.

    python benchmarks/bench_ffn.py --compiled           # CPU: d = 512, 2,048 tokens, float32; decoding at d = 2,048
    python benchmarks/bench_ffn.py --device cuda        # d = 768 to 4,096, 16,384 tokens, bfloat16; gpu tests first

Every block has the parameters of a GELU MLP of 4d units. Peers take part where they are installed (inkan, pykan,
efficient-kan). Prints a table and, last, one JSON line; writes both and a picture to benchmarks/results/.

FLOPs of a block: 2 P forward and 6 P forward and backward per token for P parameters, the products alone. Bytes read to
decode one token: P times the element size for an MLP; a KAN layer reads k + 1 of its C rows of spline coefficients, and
the base weights whole. On cuda a token goes through as many layers as no cache holds, in one CUDA graph, as a model is
served; the time is a layer's.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import (
    GPU_TESTS,
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

from kansformer.functional import choose_backend
from kansformer.layers import EdgeLayer, KANLinear, feed_forward, match_intermediate_size

CUBIC = {"grid_size": 5, "spline_order": 3, "base_activation": "silu"}
# name: (ffn_type, options)
BLOCKS = {
    "mlp": ("mlp", {}),
    "swiglu": ("swiglu", {}),
    "kan k=3 C=8": ("kan", CUBIC),
    "kan k=2 C=8": ("kan", CUBIC | {"grid_size": 6, "spline_order": 2}),
    "kan k=1 C=8": ("kan", CUBIC | {"grid_size": 7, "spline_order": 1}),
    "kan_mix k=1 C=8": ("kan_mix", {"grid_size": 7}),
    "kan_gated k=1 C=4": ("kan_gated", {}),
    "kan_gated k=1 C=4 no norm": ("kan_gated", {"ffn_norm": False}),
    "kan_gated k=1 C=8": ("kan_gated", {"grid_size": 7}),
    "kan_fourier": ("kan_fourier", {}),
}
REFERENCE = "mlp"
TORCH_BACKEND = ("kan k=3 C=8", "kan_gated k=1 C=4", "kan_fourier")  # on cuda with the other backend, too
COLD_BYTES = 400e6  # of weights that a token meets on cuda: several times any cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden_size", type=int, nargs="+", help="widths for training (512; 768 to 4096 on cuda)")
    parser.add_argument("--decode_size", type=int, nargs="+", default=[2048], help="widths for decoding")
    parser.add_argument("--tokens", type=int, help="tokens a step (2048; 16384 on cuda)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, each variant once a round")
    parser.add_argument("--only", nargs="+", help="blocks to run beside the MLP, by the start of their names")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: compiled blocks too, as on cuda")
    parser.add_argument("--profile", action="store_true", help="on cuda: the kernels of a step, too")
    parser.add_argument("--no_tests", action="store_true", help="on cuda: do not run the gpu tests first")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for ffn_<device>.{json,md,png}")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if cuda and not args.no_tests:  # correctness before speed
        subprocess.run([sys.executable, *GPU_TESTS], cwd=ROOT, check=True)
    widths = args.hidden_size or ([768, 1024, 2048, 4096] if cuda else [512])
    tokens = args.tokens or (16384 if cuda else 2048)
    dtype = torch.bfloat16 if cuda else torch.float32
    blocks = {n: b for n, b in BLOCKS.items() if not args.only or n == REFERENCE or n.startswith(tuple(args.only))}

    env = environment(args.device, dtype=str(dtype).removeprefix("torch."), backend=backend(args.device, dtype))
    env |= peer_versions()
    print(header(env))
    result = {"environment": env, "training": [], "decoding": []}
    if cuda:
        env["matmul_tflops"] = matmul_ceiling(dtype)
    name = args.output / f"ffn_{args.device}"
    options = args.rounds, args.compiled, args.profile and cuda
    for d in widths:
        result["training"] += training(d, tokens, blocks, args.device, dtype, *options)
        write_json(name.with_suffix(".json"), result)
    for d in args.decode_size:
        result["decoding"] += decoding(d, blocks, args.device, dtype, args.rounds)
    flags = " --device cuda" + " --profile" * args.profile if cuda else " --compiled" * args.compiled
    report = f"{header(env)}\n\n{training_table(result)}\n\n{decoding_table(result)}\n{profiles(result)}"
    print(report)
    write(
        name.with_suffix(".md"),
        f"# Feed-forward blocks at equal parameters\n\n`python benchmarks/bench_ffn.py{flags}`\n\n" + report,
    )
    write_json(name.with_suffix(".json"), result)
    draw(result, name.with_suffix(".png"))
    print(json.dumps({"written": str(name) + ".{md,json,png}", "environment": env}))


def backend(device: str, dtype: torch.dtype) -> str:
    x, weight = torch.empty(2, 2, device=device), torch.empty(16, 2, device=device, dtype=dtype)
    return choose_backend(x, weight, spline_order=3)


def build(name: str, kind: str, options: dict, d: int, device: str, dtype: torch.dtype) -> nn.Module:
    # Rows of a multiple of 16 elements are what both cuBLAS and triton load by vectors
    size = match_intermediate_size(kind, d, reference="mlp", multiple_of=16 if device == "cuda" else 8, **options)
    return feed_forward(kind, d, size, device=device, dtype=dtype, **options)


def peer_versions() -> dict[str, str]:
    """Of the peers that are installed."""
    packages = importlib.metadata.packages_distributions()
    found = {package for name in PEERS for package in packages.get(name, ())}
    return {package: importlib.metadata.version(package) for package in sorted(found)}


def peers(d: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Two layers d -> h -> d of each installed peer at its default cubic, C = 8, at the MLP's parameters."""
    found: dict[str, nn.Module] = {}
    target = 8 * d * d
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is None:
            continue
        layer = make()

        def parameters(h: int, layer: Callable = layer) -> int:
            return sum(p.numel() for p in nn.Sequential(layer(d, h), layer(h, d)).parameters() if p.requires_grad)

        one, two = parameters(1), parameters(2)
        h = round((target - (2 * one - two)) / (two - one))
        found[name] = nn.Sequential(layer(d, h), layer(h, d)).to(device=device, dtype=dtype)
    return found


def _pykan() -> Callable:
    from kan.KANLayer import KANLayer

    class Layer(KANLayer):
        def __init__(self, in_dim: int, out_dim: int) -> None:
            super().__init__(in_dim=in_dim, out_dim=out_dim, num=5, k=3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return Layer


def _inkan() -> Callable:
    from inkan import KANLayer

    return lambda i, o: KANLayer(i, o, grid_size=5, spline_order=3)


def _efficient_kan() -> Callable:
    from efficient_kan import KANLinear as Layer

    return lambda i, o: Layer(i, o, grid_size=5, spline_order=3)


PEERS = {"inkan": _inkan, "kan": _pykan, "efficient_kan": _efficient_kan}


def training(
    d: int,
    tokens: int,
    blocks: dict,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool = False,
    profile: bool = False,
) -> list[dict]:
    """Every block, and compiled too where asked for and on cuda: a row each."""
    modules = {name: build(name, *block, d, device, dtype) for name, block in blocks.items()}
    modules |= {f"peer {name}": module for name, module in peers(d, device, dtype).items()}
    for name in set(TORCH_BACKEND) & set(blocks) if device == "cuda" else ():
        modules[f"{name} torch"] = build(name, *blocks[name], d, device, dtype)
        for layer in modules[f"{name} torch"].children():
            if isinstance(layer, EdgeLayer):
                layer.backend = "torch"
    x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def forward(module: nn.Module) -> Callable:
        def run() -> None:
            with torch.no_grad():
                module(x)

        return run

    def step(module: nn.Module) -> Callable:
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(module(x), inputs, dy)

    torch.compiler.reset()  # else the limit on compiled forms of one forward makes later widths run eagerly
    fused = {f"{n} compiled": torch.compile(m) for n, m in modules.items()} if compiled or device == "cuda" else {}
    saved = {name: saved_bytes(module, x) for name, module in modules.items()}
    peaks = {name: peak_memory(step(module)) if device == "cuda" else None for name, module in modules.items()}
    runs = modules | fused
    forwards = side_by_side({name: forward(m) for name, m in runs.items()}, rounds, device, launches=False)
    steps = side_by_side({name: step(m) for name, m in runs.items()}, rounds, device, launches=False)
    # The reference at its best: compiled where that is at hand.
    best = f"{REFERENCE} compiled" if fused else REFERENCE
    rows = []
    for name, module in runs.items():
        plain = name.removesuffix(" compiled")
        weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
        rows.append(
            {
                "d": d,
                "tokens": tokens,
                "block": name,
                "parameters": weights,
                "forward_ms": summary(forwards[name]),
                "step_ms": summary(steps[name]),
                "forward_ratio": ratio(forwards[name], forwards[best]),
                "step_ratio": ratio(steps[name], steps[best]),
                "reference": best,
                "step_tflops": 6 * weights * tokens / summary(steps[name])["median"] / 1e9,
                "saved_mb": saved[plain] / 1e6,
                "saved_ratio": saved[plain] / saved[REFERENCE],
                "peak_mb": peaks[plain],
                "kernels": kernels(step(module)) if profile else None,
            }
        )
    return rows


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward: every storage that autograd saves, once, parameters and buffers not."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    for own in (*module.parameters(), *module.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    del y
    return sum(kept.values())


def kernels(step: Callable, most: int = 16) -> list[dict]:
    """The kernels of a step that take longest: name, calls and microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [{"name": e.key[:80], "calls": e.count, "us": round(e.self_device_time_total, 1)} for e in found[:most]]


def peak_memory(step: Callable) -> float:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def matmul_ceiling(dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of a large product on random data."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * n**3 / summary(side_by_side({"": lambda: a @ b}, 20, "cuda", launches=False)[""])["median"] / 1e9


def decoding(d: int, blocks: dict, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    """One token at a time. Every call has a new token: the same one again would find its live rows in cache."""
    modules = {name: build(name, *block, d, device, dtype) for name, block in blocks.items()}
    tokens = iter(torch.randn(10**5, 1, d).to(dtype).unbind())
    token = torch.zeros(1, d, device=device, dtype=dtype)

    def run(module: nn.Module) -> Callable:
        def call() -> None:
            with torch.inference_mode():
                module(token)

        return call

    layers = 1
    calls = {name: run(m) for name, m in modules.items()}
    if device == "cuda":
        layers = min(64, int(COLD_BYTES / bytes_read(modules[REFERENCE])) + 1)
        for name, block in blocks.items():
            stack = [modules[name], *(build(name, *block, d, device, dtype) for _ in range(layers - 1))]
            calls[name] = graph([run(module) for module in stack])
    new_token = lambda: token.copy_(next(tokens))  # noqa: E731
    times = side_by_side(calls, 4 * rounds, device, before=new_token, launches=False)
    times = {name: [value / layers for value in values] for name, values in times.items()}
    rows = []
    for name, module in modules.items():
        read, total = bytes_read(module), bytes_read(modules[REFERENCE])
        milliseconds = summary(times[name])
        rows.append(
            {
                "d": d,
                "block": name,
                "parameters": sum(p.numel() for p in module.parameters()),
                "layers": layers,
                "ms": milliseconds,
                "ratio": ratio(times[name], times[REFERENCE]),
                "bytes_ratio": read / total,
                "gb_per_s": read / milliseconds["median"] / 1e6,
            }
        )
    return rows


def graph(calls: list[Callable]) -> Callable:
    """All calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate before the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()

    def replay() -> list[Callable]:
        captured.replay()
        return calls  # and so the weights live, which a graph does not hold

    return replay


def bytes_read(module: nn.Module) -> int:
    """Bytes of weights that one token needs."""
    total = 0
    for m in module.modules():
        if isinstance(m, KANLinear):
            live = (m.spline_order + 1) / m.num_basis
            total += live * m.spline_weight.nbytes + (0 if m.base_weight is None else m.base_weight.nbytes)
        elif isinstance(m, nn.Linear):
            total += m.weight.nbytes
    return int(total)


def training_table(result: dict) -> str:
    columns = [
        "block",
        "d",
        "parameters",
        "forward ms",
        "fwd+bwd ms",
        "20-80%",
        "vs MLP",
        "TFLOP/s",
        "saved MB",
        "vs MLP",
        "peak MB",
    ]
    rows = []
    for r in result["training"]:
        step = r["step_ms"]
        rows.append(
            [
                r["block"],
                r["d"],
                f"{r['parameters']:,}",
                f"{r['forward_ms']['median']:.3g}",
                f"{step['median']:.3g}",
                f"{step['q20']:.3g}-{step['q80']:.3g}",
                f"{r['step_ratio']:.2f}x",
                f"{r['step_tflops']:.3g}",
                f"{r['saved_mb']:.1f}",
                f"{r['saved_ratio']:.2f}x",
                "-" if r["peak_mb"] is None else f"{r['peak_mb']:,.0f}",
            ]
        )
    first = result["training"][0]
    title = f"Training, {first['tokens']:,} tokens; times against `{first['reference']}`:"
    return f"{title}\n\n{markdown(columns, rows)}"


def decoding_table(result: dict) -> str:
    columns = ["block", "d", "parameters", "ms a token", "20-80%", "vs MLP", "bytes read vs MLP", "GB/s"]
    rows = [
        [
            r["block"],
            r["d"],
            f"{r['parameters']:,}",
            f"{r['ms']['median']:.3g}",
            f"{r['ms']['q20']:.3g}-{r['ms']['q80']:.3g}",
            f"{r['ratio']:.2f}x",
            f"{r['bytes_ratio']:.2f}x",
            f"{r['gb_per_s']:.1f}",
        ]
        for r in result["decoding"]
    ]
    graphed = any(r["layers"] > 1 for r in result["decoding"])
    how = "a layer of as many as no cache holds, in one CUDA graph" if graphed else "a new token each call"
    return f"Decoding, one token a call, {how}:\n\n{markdown(columns, rows)}"


def profiles(result: dict) -> str:
    """For every compiled block that was profiled, its kernels."""
    text = ""
    for r in result["training"]:
        if r["kernels"] and r["block"].endswith("compiled"):
            rows = [[kernel["name"], kernel["calls"], f"{kernel['us']:,.0f}"] for kernel in r["kernels"]]
            title = f"The longest kernels of a step of `{r['block']}`, d = {r['d']}:"
            text += f"\n{title}\n\n{markdown(['kernel', 'calls', 'us'], rows)}\n"
    return text


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def ratios(rows: list[dict], d: int, key: str) -> dict[str, float]:
        return {r["block"].removesuffix(" compiled"): r[key] for r in rows if r["d"] == d}

    training = [r for r in result["training"] if " torch" not in r["block"]]
    compiled = [r for r in training if r["block"].endswith(" compiled")]
    how = ", compiled" if compiled else ""
    panels = []
    for d in sorted({r["d"] for r in training}):
        panels.append((f"Step{how}, d = {d}", ratios(compiled or training, d, "step_ratio")))
    panels.append((f"Saved for backward, d = {d}", ratios(compiled or training, d, "saved_ratio")))
    if result["decoding"]:
        d = max(r["d"] for r in result["decoding"])
        panels.append((f"Decoding, d = {d}", ratios(result["decoding"], d, "ratio")))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(len(values) for _, values in panels)
    size = (4.6 * columns, lines * (0.9 + 0.3 * longest))
    figure, axes = plt.subplots(lines, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes.flat, panels):
        names = list(values)[::-1]
        colours = [
            "#c2410c" if n.startswith("kan") else "#9ca3af" if n.startswith("peer") else "#1d4ed8" for n in names
        ]
        bars = axis.barh(names, [values[n] for n in names], color=colours, height=0.7)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="#1f2937", linewidth=0.8)
        axis.set_xlim(0, 1.15 * max(values.values()))
        axis.set_title(f"{title} (MLP = 1)", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    write_figure(path, figure, result["environment"])
    plt.close(figure)


if __name__ == "__main__":
    main()
