"""A KAN layer on a GPU, piece by piece: what its splines cost beside its products, and the sizes that can be chosen.

    python benchmarks/bench_kernels.py                                  # cuda, bfloat16

For the KAN layers of the blocks in benchmarks/bench_ffn.py. `phi` and `fold` are the kernels that write Phi and read
dPhi: their bytes, each once, against a large copy. `product` is Phi @ W alone, `forward`, `dx` and `dW` are all of it,
under several sizes of a chunk of Phi, the shipped one first: 2 M I C O FLOPs against a large product's. `decode` is one
token, every call with other weights and inputs, since in a model they are not in cache either: its bytes are the rows
that it needs; `dense` reads all by one product. For the layer of waves, `waves` writes sines and cosines, `fold and
waves` reads their gradients and leaves them in their place, and `backward` is all of it.
Everything is compared with float64 on a few rows before it is timed; what is wrong gets a row that says so, and the
exit status is 1. Writes kernels_<device>.{json,md}, anew after every layer.

`--device cpu` is for tests/test_benchmarks.py, which walks through all of it in Triton's interpreter; such times mean
nothing.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from bench_ffn import COLD_BYTES, matmul_ceiling
from harness import RESULTS, environment, header, markdown, side_by_side, summary, write, write_json
from torch import Tensor

from kansformer.functional import fourier_linear
from kansformer.kernels import torch_kan, triton_decode, triton_kan, triton_waves
from kansformer.layers import match_intermediate_size

# (block, C, k, norm inside): its layer h -> d
LAYERS = (
    ("kan_gated", 4, 1, True),
    ("kan_gated", 4, 1, False),
    ("kan_gated", 8, 1, True),
    ("kan_mix", 8, 1, True),
    ("kan", 8, 3, False),
)
CHUNK_MIB = (triton_kan.CHUNK_BYTES // 2**20, 64, 128, 256, 512)
DECODE = ({}, {"num_warps": 4}, {"BLOCK_I": 16}, {"BLOCK_I": 16, "num_warps": 4}, {"BLOCK_O": 128})
WORST = 0.02  # of the norm, in bfloat16


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
    norm_eps: float | None

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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    env = environment(options.device, dtype=str(dtype).removeprefix("torch."), tokens=options.tokens)
    env["matmul_tflops"] = matmul_ceiling(dtype) if cuda else None
    env["copy_gb_per_s"] = copy_ceiling(dtype) if cuda else None
    print(header(env), flush=True)
    rows: list[dict] = []
    for title, groups in layers(options, dtype):
        for group in groups:
            rows += [{"layer": title} | row for row in measure(group, options.rounds, options.device)]
        text = report(rows, env, options)
    print(text)
    sys.exit(any("failed" in row for row in rows))


def layers(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, tuple[list["Piece"], ...]]]:
    """Each layer's title, and its pieces in groups that take turns."""
    for d, (block, C, k, norm) in itertools.product(options.width, LAYERS):
        h = match_intermediate_size(block, d, reference="mlp", multiple_of=16, grid_size=C - k, spline_order=k)
        layer = make(options.tokens, h, d, C, k, block, norm, options.device, dtype)
        title = f"{block} {h} -> {d}, C = {C}, k = {k}" + ", norm" * norm
        yield title, (training(layer), decoding(layer, options.device == "cuda"))
    for d in options.width:
        h = match_intermediate_size("kan_fourier", d, reference="mlp", multiple_of=16)
        yield f"kan_fourier {h} -> {d}", (waves(options.tokens, h, d, options.device, dtype),)


@dataclasses.dataclass
class Piece:
    """Something to time."""

    name: str
    run: Callable[[], object]
    amount: float  # FLOPs or bytes
    unit: str  # TFLOP/s or GB/s
    error: Callable[[], float]


def training(layer: Layer) -> list[Piece]:
    x, gate, weight, grid, base, G, k, act = layer.arguments
    (M, I), (terms, O) = x.shape, weight.shape
    flops, size = 2 * M * O * (terms + (0 if base is None else I)), weight.element_size()
    inputs = x.nbytes * (1 if gate is None else 2)
    few = layer.rows(32)
    exact = few.double()
    settings = few.grid, G, k
    eps = layer.norm_eps
    activation = None if base is None else act
    phi, _ = triton_kan.phi(x, gate, grid, G, k, weight.dtype, activation, eps)
    dinput = None if base is None else layer.dy @ base
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)

    def phi_error() -> float:
        identity = torch.eye(terms, dtype=torch.float64, device=x.device)[:, :512]
        found = triton_kan.phi(few.x, few.gate, *settings, weight.dtype, activation, eps)[0][:, :512]
        none = None if base is None else torch.zeros(identity.shape[1], len(exact.grid)).to(identity)
        arguments = exact.x, exact.gate, identity, exact.grid, none, G, k, act, eps
        return error(found, torch_kan.forward(*arguments))

    def gradients(needs: tuple[bool, bool, bool, bool]) -> Callable[[], float]:
        def worst() -> float:
            found, expected = (
                kernels.backward(part.dy, *part.arguments, needs, eps)
                for kernels, part in ((triton_kan, few), (torch_kan, exact))
            )
            return max(error(a, b) for a, b in zip(found, expected) if b is not None)

        return worst

    inward, outward = (True, gate is not None, False, False), (False, False, True, base is not None)
    forward_error = lambda: error(triton_kan.forward(*few.arguments, eps), torch_kan.forward(*exact.arguments, eps))  # noqa: E731
    fold = lambda phi_too=False: triton_kan.fold(dx, dgate, phi, dinput, x, gate, grid, G, k, act, phi_too, eps)  # noqa: E731
    make_phi = lambda: triton_kan.phi(x, gate, grid, G, k, weight.dtype, activation, eps)  # noqa: E731
    extra = 0 if base is None else dinput.nbytes
    pieces = [
        Piece("phi", make_phi, inputs + phi.nbytes + extra, "GB/s", phi_error),
        Piece("fold", fold, 2 * inputs + phi.nbytes + extra, "GB/s", gradients(inward)),
        Piece("product", lambda: phi @ weight, 2 * M * O * terms, "TFLOP/s", lambda: 0.0),
    ]
    if triton_kan.in_words(weight.dtype, G + k):
        moved = 2 * inputs + 2 * phi.nbytes + 2 * extra
        pieces.append(Piece("fold and phi", lambda: fold(True), moved, "GB/s", gradients((*inward[:2], True, False))))
    for mib in CHUNK_MIB:
        note = f", chunks of {mib} MiB" if mib != CHUNK_MIB[0] else ""
        if note and M * terms * size <= mib * 2**20:
            continue
        runs = {
            "forward": (lambda: triton_kan.forward(*layer.arguments, eps), forward_error),
            "dx": (lambda: triton_kan.backward(layer.dy, *layer.arguments, inward, eps), gradients(inward)),
            "dW": (lambda: triton_kan.backward(layer.dy, *layer.arguments, outward, eps), gradients(outward)),
        }
        for name, (run, off) in runs.items():
            pieces.append(Piece(name + note, chunked(run, mib), flops, "TFLOP/s", off))
    return pieces


def waves(M: int, I: int, O: int, device: str, dtype: torch.dtype, frequency: float = 1.5) -> list[Piece]:
    draw = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    x, dy, a, b = draw(M, I), draw(M, O), draw(O, I), draw(O, I)
    dsine, dcosine = draw(M, I), draw(M, I)
    exact = [t.double().requires_grad_() for t in (x[:32], a, b)]
    y = fourier_linear(*exact, frequency, backend="torch")
    gradients = torch.autograd.grad(y, exact, dy[:32].double())

    def waves_error() -> float:
        sine, cosine = triton_waves.waves(x[:32], frequency, dtype)
        angle = (frequency * exact[0]).detach()
        return max(error(sine, angle.sin()), error(cosine, angle.cos()))

    def backward_error() -> float:
        found = triton_waves.backward(dy[:32], x[:32], a, b, frequency, everything)
        return max(map(error, found, gradients))

    everything = (True, True, True)
    forward_error = lambda: error(triton_waves.forward(x[:32], a, b, frequency), y.detach())  # noqa: E731
    fold = lambda: triton_waves.fold(dsine, dcosine, x, frequency, True)  # noqa: E731
    backward = lambda: triton_waves.backward(dy, x, a, b, frequency, everything)  # noqa: E731
    return [
        Piece("waves", lambda: triton_waves.waves(x, frequency, dtype), 3 * x.nbytes, "GB/s", waves_error),
        Piece("fold and waves", fold, 6 * x.nbytes, "GB/s", backward_error),
        Piece("product", lambda: x @ a.mT, 2 * M * I * O, "TFLOP/s", lambda: 0.0),
        Piece("forward", lambda: triton_waves.forward(x, a, b, frequency), 4 * M * I * O, "TFLOP/s", forward_error),
        Piece("backward", backward, 8 * M * I * O, "TFLOP/s", backward_error),
    ]


def chunked(run: Callable[[], object], mib: int) -> Callable[[], object]:
    def call() -> None:
        with mock.patch.object(triton_kan, "CHUNK_BYTES", mib * 2**20):
            run()

    return call


def decoding(layer: Layer, cold: bool) -> list[Piece]:
    layer = layer.rows(1)
    live = layer.weight.nbytes * (layer.k + 1) / (layer.G + layer.k) + (0 if layer.base is None else layer.base.nbytes)
    dense = layer.weight.nbytes + (0 if layer.base is None else layer.base.nbytes)
    copies = [dataclasses.replace(layer, x=torch.randn_like(layer.x), weight=layer.weight.clone()) for _ in range(
        int(COLD_BYTES / layer.weight.nbytes) + 1 if cold else 1
    )]  # fmt: skip
    expected = torch_kan.forward(*layer.double().arguments)
    _, sms = triton_kan.device_properties(layer.x.device.index)

    def live_rows(sizes: dict) -> Callable[[Layer], Tensor]:
        return lambda one: triton_decode.decode(*one.arguments, **sizes, sms=sms)

    def all_rows(one: Layer) -> Tensor:
        with mock.patch.object(triton_kan, "use_decode", return_value=False):
            return triton_kan.forward(*one.arguments)

    def piece(name: str, run: Callable[[Layer], Tensor], amount: float) -> Piece:
        turns = itertools.cycle(copies)
        return Piece(name, lambda: run(next(turns)), amount, "GB/s", lambda: error(run(layer), expected))

    named = {", ".join(f"{name} {value}" for name, value in sizes.items()): sizes for sizes in DECODE}
    found = [piece(f"decode {name}".strip(), live_rows(sizes), live) for name, sizes in named.items()]
    return [*found, piece("dense, one token", all_rows, dense)]


def measure(pieces: list[Piece], rounds: int, device: str) -> Iterator[dict]:
    calls, errors = {}, {}
    for piece in pieces:
        try:
            errors[piece.name] = piece.error()
        except Exception as fault:  # whatever a compiler or a device makes of one, the others are worth measuring
            yield {"piece": piece.name, "failed": f"{type(fault).__name__}: {fault}".partition("\n")[0]}
            continue
        if errors[piece.name] < WORST:
            calls[piece.name] = piece.run
        else:
            yield {"piece": piece.name, "failed": f"off by {errors[piece.name]:.2e} of its norm"}
    times = side_by_side(calls, rounds, device, launches=False)
    for piece in pieces:
        if piece.name in calls:
            ms = summary(times[piece.name])
            rate = piece.amount / ms["median"] / (1e9 if piece.unit == "TFLOP/s" else 1e6)
            yield {"piece": piece.name, "ms": ms, "rate": rate, "unit": piece.unit, "error": errors[piece.name]}


def report(rows: list[dict], env: dict, options: argparse.Namespace) -> str:
    columns = ["layer", "piece", "ms", "20-80%", "rate", "of the ceiling", "error"]
    ceilings = {"TFLOP/s": env["matmul_tflops"], "GB/s": env["copy_gb_per_s"]}
    cells = []
    for r in rows:
        if "failed" in r:
            cells.append([r["layer"], r["piece"], "-", "-", "-", "-", r["failed"]])
            continue
        ceiling, ms = ceilings[r["unit"]], r["ms"]
        share = f"{r['rate'] / ceiling:.2f}" if ceiling else "-"
        times = [f"{ms['median']:.4f}", f"{ms['q20']:.4f}-{ms['q80']:.4f}"]
        cells.append([r["layer"], r["piece"], *times, f"{r['rate']:.4g} {r['unit']}", share, f"{r['error']:.1e}"])
    text = f"{header(env)}\n\n{markdown(columns, cells)}\n"
    name = options.output / f"kernels_{options.device}"
    write(name.with_suffix(".md"), "# Kernels\n\n`python benchmarks/bench_kernels.py`\n\n" + text)
    write_json(name.with_suffix(".json"), {"environment": env, "rows": rows})
    return text


def copy_ceiling(dtype: torch.dtype, size: int = 2**30) -> float:
    """GB/s of a large copy, bytes read and written."""
    a = torch.randn(size // dtype.itemsize, device="cuda").to(dtype)
    b = torch.empty_like(a)
    return 2 * size / summary(side_by_side({"": lambda: b.copy_(a)}, 20, "cuda", launches=False)[""])["median"] / 1e6


def make(M: int, I: int, O: int, C: int, k: int, block: str, norm: bool, device: str, dtype: torch.dtype) -> Layer:
    """A layer of a block as it trains: a gate in `kan_gated`, a base term in `kan`."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    grid = torch.tensor([-2.0, 2.0], device=device).expand(I, 2).contiguous()
    base = draw(O, I, scale=I**-0.5) if block == "kan" else None
    gate = draw(M, I) if block == "kan_gated" else None
    weight, dy = draw(I * C, O, scale=I**-0.5), draw(M, O)
    return Layer(draw(M, I), gate, weight, grid, base, C - k, k, dy, 1e-6 if norm else None)


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
