"""What a feed-forward block should cost on a GPU, from shapes alone: a bound to hold measurements against.

    python benchmarks/roofline.py --tokens 16384 --width 1024 [--tflops 790 --bandwidth 4260 ...]

Kernels run one after another, and each takes at least the longer of FLOPs of its products / tensor-core rate and bytes
of its inputs and outputs, each once, / memory bandwidth. Elementwise work of the MLP blocks is one fused kernel a pass,
as a compiler makes it; that of a KAN layer is what kansformer/kernels/triton_{kan,waves}.py launch. A table, then one
json line.
"""

import argparse
import dataclasses
import json

ELEMENT_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU; the defaults are what benchmarks/bench_kernels.py measured on an H200."""

    tflops: float = 790.0  # bf16 products, TFLOP/s
    bandwidth: float = 4260.0  # GB/s

    def seconds(self, kernel: "Kernel") -> float:
        return max(kernel.flops / (self.tflops * 1e12), kernel.bytes / (self.bandwidth * 1e9))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Work of one kernel; `product`: on tensor cores."""

    name: str
    flops: float
    bytes: float

    @property
    def product(self) -> bool:
        return self.flops > 0


def product(name: str, M: int, K: int, N: int) -> Kernel:
    """(M, K) @ (K, N)."""
    return Kernel(name, 2 * M * K * N, ELEMENT_BYTES * (M * K + K * N + M * N))


def elementwise(name: str, elements: int) -> Kernel:
    """`elements` read or written."""
    return Kernel(name, 0.0, ELEMENT_BYTES * elements)


def linear_layer(M: int, I: int, O: int) -> list[Kernel]:
    """Forward, dx and dW of a linear layer."""
    return [product("linear forward", M, I, O), product("linear dx", M, O, I), product("linear dW", I, M, O)]


def kan_layer(M: int, I: int, O: int, C: int, *, gate: bool = False, base: bool = True) -> list[Kernel]:
    """Forward and backward of one KAN layer; a norm moves nothing more (rows are read again, from cache)."""
    inputs, phi = M * I * (1 + gate), M * I * (C + base)  # the base function goes where Phi goes
    kernels = [
        elementwise("phi", inputs + phi),
        product("forward", M, I * C, O),
        product("dPhi", M, O, I * C),
        elementwise("fold", 2 * inputs + phi),
        product("dW", I * C, M, O),
    ]
    if C in (4, 8, 16):
        kernels.append(elementwise("phi again, by fold", phi))
    else:
        kernels.append(elementwise("phi again", inputs + phi))
    return kernels + (linear_layer(M, I, O) if base else [])


def block(kind: str, M: int, d: int, parameters: int, C: int) -> tuple[int, list[Kernel]]:
    """The hidden width and the kernels, forward and backward, of a feed-forward block of about `parameters` weights."""
    if kind == "mlp":
        h = parameters // (2 * d)
        point = [elementwise("gelu forward", 2 * M * h), elementwise("gelu backward", 3 * M * h)]
        return h, linear_layer(M, d, h) + point + linear_layer(M, h, d)
    if kind == "swiglu":
        h = parameters // (3 * d)
        point = [elementwise("silu * up forward", 3 * M * h), elementwise("silu * up backward", 5 * M * h)]
        return h, 2 * linear_layer(M, d, h) + point + linear_layer(M, h, d)
    if kind == "kan":
        h = parameters // (2 * d * (C + 1))
        return h, kan_layer(M, d, h, C) + kan_layer(M, h, d, C)
    if kind == "kan_mix":
        h = parameters // (d * (C + 2))
        return h, linear_layer(M, d, h) + kan_layer(M, h, d, C)
    if kind == "kan_gated":
        h = parameters // (d * (C + 2))
        return h, 2 * linear_layer(M, d, h) + kan_layer(M, h, d, C, gate=True, base=False)
    if kind == "kan_fourier":
        h = parameters // (3 * d)
        point = [elementwise("waves", 3 * M * h), elementwise("fold and waves", 6 * M * h)]
        return h, linear_layer(M, d, h) + point + 2 * linear_layer(M, h, d)
    raise ValueError(f"unknown block {kind!r}")


def decode_bytes(M: int, I: int, O: int, C: int, order: int, base: bool = True) -> float:
    """Bytes of weights that the decode kernel reads for M rows, no row shared."""
    return ELEMENT_BYTES * M * I * O * (order + 1 + base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = Machine()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, nargs="+", default=[768, 1024, 2048, 4096])
    parser.add_argument("--expansion", type=int, default=4, help="hidden size of the MLP in widths")
    parser.add_argument("--tflops", type=float, default=machine.tflops, help="bf16 matmul rate, TFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=machine.bandwidth, help="memory, GB/s")
    args = parser.parse_args()
    machine = Machine(args.tflops, args.bandwidth)
    blocks = [("mlp", 0), ("swiglu", 0), ("kan", 8), ("kan_mix", 8)]
    blocks += [("kan_gated", 4), ("kan_gated", 8), ("kan_fourier", 0)]
    print(f"{args.tokens} tokens, bf16, forward + backward, milliseconds; {machine}")
    print(f"{'block':18}{'d':>6}{'hidden':>8}{'products':>10}{'the rest':>10}{'together':>10}{'of mlp':>8}")
    rows = []
    for d in args.width:
        reference = None
        for kind, C in blocks:
            hidden, kernels = block(kind, args.tokens, d, 2 * args.expansion * d * d, C)
            products, rest = (
                1e3 * sum(machine.seconds(kernel) for kernel in kernels if kernel.product == wanted)
                for wanted in (True, False)
            )
            reference = reference or products + rest
            name, of_mlp = f"{kind} C={C}" if C else kind, (products + rest) / reference
            print(f"{name:18}{d:6}{hidden:8}{products:10.3f}{rest:10.3f}{products + rest:10.3f}{of_mlp:8.2f}")
            milliseconds = {"products": products, "rest": rest}
            rows.append({"block": name, "width": d, "hidden": hidden, "milliseconds": milliseconds, "of_mlp": of_mlp})
    decode = [
        {"C": C, "order": k, "bytes_of_dense": decode_bytes(1, 1, 1, C, k) / (ELEMENT_BYTES * (C + 1))}
        for C, k in ((4, 1), (8, 1), (8, 3), (16, 3), (64, 3))
    ]
    for row in decode:
        print(f"decode k={row['order']} C={row['C']}: reads {row['bytes_of_dense']:.2f} of a KAN layer's weights")
    print(json.dumps({"machine": dataclasses.asdict(machine), "tokens": args.tokens, "blocks": rows, "decode": decode}))


if __name__ == "__main__":
    main()
