"""The kernels one by one: every tile worth trying, and the plain alternative, against the matmul ceiling.

    python benchmarks/bench_kernels.py                                  # cuda, bfloat16

For the KAN layers of the blocks in benchmarks/bench_ffn.py: forward, dx and dW under each of `candidate_configs`, the
shipped one first, and the alternative that writes Phi (M, I*C) to memory: splines by one compiled kernel, then cuBLAS.
Each is compared with float64 on a few rows before it is timed; one that fails or is wrong gets a row that says so, and
the exit status is 1. Compiling takes most of the time: `--workers` processes do it ahead, the timed one finds it done.
`--wide` tries every tile that fits. The share is of a large product's TFLOP/s in this run.
Decoding is one row under each of DECODE; its TFLOP/s are the dense product's, of which it reads k + 1 of C rows.
Writes kernels_<device>.{json,md}, anew after every layer; a tile that wins goes to kansformer/kernels/triton_config.py
with its figures.

`--device cpu` is for tests/test_benchmarks.py, which walks through all of it in Triton's interpreter; such times mean
nothing.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_ffn import matmul_ceiling
from harness import RESULTS, environment, header, markdown, ratio, side_by_side, summary, write, write_json
from torch import Tensor

from kansformer import splines
from kansformer.kernels import torch_kan, triton_config, triton_decode, triton_kan
from kansformer.layers import match_intermediate_size

# (block, C, k): its layer h -> d
LAYERS = (("kan_gated", 4, 1), ("kan_gated", 8, 1), ("kan", 8, 1), ("kan", 8, 3))
KERNELS = ("forward", "backward_x", "backward_w", "decode")
# The shipped sizes first; LEAST_SHARE is no argument.
DECODE = ({}, {"BLOCK_I": 8}, {"BLOCK_I": 16}, {"BLOCK_I": 16, "BLOCK_O": 128}, {"BLOCK_I": 32, "num_warps": 8})
WORST = 0.02  # of the norm, in bfloat16
TILES = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4))


@dataclasses.dataclass
class Layer:
    x: Tensor
    gate: Tensor | None
    weight: Tensor
    grid: Tensor
    base: Tensor | None
    G: int
    k: int
    dy: Tensor

    @property
    def arguments(self) -> tuple:
        return self.x, self.gate, self.weight, self.grid, self.base, self.G, self.k, "silu"

    def rows(self, count: int) -> "Layer":
        gate = None if self.gate is None else self.gate[:count]
        return dataclasses.replace(self, x=self.x[:count], gate=gate, dy=self.dy[:count])

    def double(self) -> "Layer":
        names = ("x", "gate", "weight", "grid", "base", "dy")
        values = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{n: v.double() for n, v in values.items() if v is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--layers", type=int, nargs="+", choices=range(len(LAYERS)), help="by their place in LAYERS")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--wide", action="store_true", help="every tile that fits, not only the candidates")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0, help="processes that compile and check; 0: this one does")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    env = environment(options.device, dtype=str(dtype).removeprefix("torch."), tokens=options.tokens)
    ceiling = env["matmul_tflops"] = matmul_ceiling(dtype) if cuda else None
    print(header(env), flush=True)
    rows: list[dict] = []
    cases = []
    for d in options.width:
        for which in options.layers or range(len(LAYERS)):
            block, C, k = LAYERS[which]
            h = match_intermediate_size(block, d, reference="mlp", multiple_of=16, grid_size=C - k, spline_order=k)
            case = options.tokens, h, d, C, k, block == "kan_gated", options.device, dtype
            names = {kernel: list(variants(kernel, make(*case), options.wide)) for kernel in options.kernels}
            cases.append((f"{block} {h} -> {d}, C = {C}, k = {k}", case, names))
    with workers(options.workers) as pool:
        jobs = [
            pool.submit(check, case, kernel, name, options.wide)
            for _, case, names in cases
            for kernel, group in names.items()
            for name in group
        ]
        found = {(case, kernel, name): result for case, kernel, name, result in (job.result() for job in jobs)}
    for title, case, names in cases:
        torch.compiler.reset()  # of every layer's shapes their own kernels, as fast as they can be
        layer = make(*case)
        for kernel, group in names.items():
            errors = {name: found[case, kernel, name] for name in group}
            for row in measure(kernel, layer, errors, options.rounds, options.device, options.wide):
                row["share"] = row["tflops"] / ceiling if ceiling and "tflops" in row else None
                rows.append({"layer": title, "kernel": kernel} | row)
                print(rows[-1], flush=True)
        text = report(rows, env, options)
    print(text)
    sys.exit(any("failed" in row for row in rows) and not options.wide)


class Here(concurrent.futures.Executor):
    """Calls are made at once, in this process."""

    def submit(self, function: Callable, /, *arguments: object) -> concurrent.futures.Future:
        done: concurrent.futures.Future = concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


def workers(count: int) -> concurrent.futures.Executor:
    if count == 0:
        return Here()
    context = multiprocessing.get_context("spawn")  # a forked process has no CUDA
    return concurrent.futures.ProcessPoolExecutor(count, mp_context=context)


def report(rows: list[dict], env: dict, options: argparse.Namespace) -> str:
    columns = ["layer", "kernel", "variant", "ms", "against shipped", "TFLOP/s", "of the ceiling", "error"]
    cells = []
    for r in rows:
        if "failed" in r:
            cells.append([r["layer"], r["kernel"], r["variant"], "-", "-", "-", "-", r["failed"]])
            continue
        share = "-" if r["share"] is None else f"{r['share']:.2f}"
        figures = [f"{r['ms']['median']:.3f}", f"{r['ratio']:.2f}x", f"{r['tflops']:.4g}", share, f"{r['error']:.1e}"]
        cells.append([r["layer"], r["kernel"], r["variant"], *figures])
    text = f"{header(env)}\n\n{markdown(columns, cells)}\n"
    name = options.output / f"kernels_{options.device}"
    write(name.with_suffix(".md"), "# Kernels\n\n`python benchmarks/bench_kernels.py`\n\n" + text)
    write_json(name.with_suffix(".json"), {"environment": env, "rows": rows})
    return text


def make(M: int, I: int, O: int, C: int, k: int, gated: bool, device: str, dtype: torch.dtype) -> Layer:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    grid = torch.tensor([-2.0, 2.0], device=device).expand(I, 2).contiguous()
    base = None if gated else draw(O, I, scale=I**-0.5)
    gate = draw(M, I) if gated else None
    return Layer(draw(M, I), gate, draw(I * C, O, scale=I**-0.5), grid, base, C - k, k, draw(M, O))


def variants(kernel: str, layer: Layer, wide: bool) -> dict[str, Callable[[Layer], list[Tensor]]]:
    """Every configuration, the shipped one first, and the alternative."""
    M, I = layer.x.shape
    O, C = layer.weight.shape[1], layer.G + layer.k
    capability, _ = triton_kan._device_properties(layer.x.device.index)
    gated, based = layer.gate is not None, layer.base is not None
    sizes = M, I, O, C, layer.weight.dtype, gated, based, capability
    if kernel == "decode":
        configs = DECODE
    else:
        candidates = triton_config.candidate_configs(kernel, *sizes, order=layer.k)
        configs = [dataclasses.asdict(c) for c in candidates]
        configs += [c for c in wide_configs(kernel, C) if c not in configs] if wide else []
    found = {}
    for config in configs:
        numbers = ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
        found[numbers or "shipped"] = functools.partial(fused, kernel, config=config)
    return found | {"basis + cuBLAS": functools.partial(alternative, kernel)}


def wide_configs(kernel: str, C: int) -> list[dict]:
    """Tiles of 16-bit types whose accumulator leaves registers free and whose operands fit in 227 KiB."""
    block_c = triton_config.function_block(C) if kernel == "backward_x" else 1
    found = []
    # Rows and columns of the accumulator, terms of its sum, warps.
    for (m, n, warps), k, stages in itertools.product(TILES, (32, 64, 128), (2, 3, 4)):
        if 2 * stages * k * (m + n) > 227 * 1024:
            continue
        sides = {"forward": (m, k, n), "backward_x": (m, n // block_c, k), "backward_w": (k, m, n)}[kernel]
        found.append(dataclasses.asdict(triton_config.Config(*sides, warps, stages, block_c)))
    return found


def check(case: tuple, kernel: str, name: str, wide: bool) -> tuple:
    """(case, kernel, name, how far it is off, or why it failed). Whatever it needs is compiled afterwards."""
    layer = _layer(*case)
    layer = layer.rows(1) if kernel == "decode" else layer
    run = variants(kernel, layer, wide)[name]
    try:
        few = layer.rows(32)
        off = max(error(a, b) for a, b in zip(run(few), reference(kernel, few.double())))
        if name == "basis + cuBLAS":
            run(layer)  # compiled for these rows alone
    except Exception as fault:  # whatever a compiler or a device makes of a tile, the others are worth measuring
        return case, kernel, name, f"{type(fault).__name__}: {fault}".partition("\n")[0]
    return case, kernel, name, off if off < WORST else f"off by {off:.2e} of its norm"


def measure(kernel: str, layer: Layer, errors: dict, rounds: int, device: str, wide: bool) -> list[dict]:
    """A row for every configuration and for the alternative; `errors` are the results of `check`."""
    layer = layer.rows(1) if kernel == "decode" else layer
    failed = [{"variant": name, "failed": why} for name, why in errors.items() if isinstance(why, str)]
    runs = variants(kernel, layer, wide)
    calls = {name: functools.partial(runs[name], layer) for name, off in errors.items() if not isinstance(off, str)}
    if not calls:
        return failed
    times = side_by_side(calls, rounds, device, launches=False)
    shipped = next(iter(calls))
    (M, I), O = layer.x.shape, layer.weight.shape[1]
    flops = 2 * M * O * I * (layer.G + layer.k + (layer.base is not None))
    return [
        {"variant": name, "ms": summary(times[name]), "ratio": ratio(times[name], times[shipped])}
        | {"tflops": flops / summary(times[name])["median"] / 1e9, "error": errors[name]}
        for name in calls
    ] + failed


@functools.lru_cache(maxsize=1)
def _layer(*case: object) -> Layer:
    return make(*case)


def fused(kernel: str, layer: Layer, config: dict) -> list[Tensor]:
    if kernel == "decode":
        _, sms = triton_kan._device_properties(layer.x.device.index)
        return [triton_decode.decode(*layer.arguments, **config, sms=sms)]
    config = triton_config.Config(**config)
    if kernel == "forward":
        found = [triton_kan.forward(*layer.arguments, config=config)]
    elif kernel == "backward_x":
        found = triton_kan.backward_x(layer.dy, *layer.arguments, config=config)
    else:
        needs = True, layer.base is not None
        found = triton_kan.backward_w(layer.dy, *layer.arguments, *needs, config=config)
    return [tensor for tensor in found if tensor is not None]


def reference(kernel: str, layer: Layer) -> list[Tensor]:
    if kernel in ("forward", "decode"):
        return [torch_kan.forward(*layer.arguments)]
    inputs = kernel == "backward_x"
    needs = inputs, inputs and layer.gate is not None, not inputs, not inputs and layer.base is not None
    return [tensor for tensor in torch_kan.backward(layer.dy, *layer.arguments, needs) if tensor is not None]


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def compiled(function: Callable) -> Callable:
    """One fused kernel on a GPU; as it is elsewhere."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


@compiled
def _phi(x: Tensor, gate: Tensor | None, grid: Tensor, G: int, k: int, dtype: torch.dtype) -> Tensor:
    phi = splines.basis(x, grid, G, k)
    return (phi if gate is None else phi * gate.unsqueeze(-1)).to(dtype).flatten(1)


@compiled
def _base(x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    a = torch_kan.activation(x, "silu")
    return (a if gate is None else a * gate).to(dtype)


@compiled
def _gradients(
    dphi: Tensor, dbase: Tensor | None, x: Tensor, gate: Tensor | None, grid: Tensor, G: int, k: int
) -> tuple[Tensor, Tensor | None]:
    dphi = dphi.unflatten(1, (-1, G + k)).float()
    dx = (dphi * splines.basis(x, grid, G, k, derivative=True)).sum(-1)
    dgate = None if gate is None else (dphi * splines.basis(x, grid, G, k)).sum(-1)
    if dbase is not None:
        p = torch.sigmoid(x.float())
        dx = dx + dbase * (p * (1 + x * (1 - p)))
        dgate = None if gate is None else dgate + dbase * torch_kan.activation(x, "silu")
    dx = dx if gate is None else dx * gate
    return dx.to(x.dtype), None if dgate is None else dgate.to(x.dtype)


def alternative(kernel: str, layer: Layer) -> list[Tensor]:
    """Phi or dPhi in memory, products by cuBLAS."""
    x, gate, weight, grid, base, G, k, _ = layer.arguments
    if kernel == "backward_x":
        dbase = None if base is None else layer.dy @ base
        found = _gradients(layer.dy @ weight.mT, dbase, x, gate, grid, G, k)
        return [tensor for tensor in found if tensor is not None]
    phi = _phi(x, gate, grid, G, k, weight.dtype)
    if kernel in ("forward", "decode"):
        y = phi @ weight
        return [y if base is None else y.addmm_(_base(x, gate, weight.dtype), base.mT)]
    found = [phi.mT @ layer.dy]
    return found if base is None else [*found, layer.dy.mT @ _base(x, gate, weight.dtype)]


if __name__ == "__main__":
    main()
