"""What the kernels should cost, from shapes alone: written down before it is measured.

    python benchmarks/roofline.py --tokens 16384 --width 1024 [--tflops 790 --bandwidth 4300 ...]

A kernel takes at least the longest of three times:

    tensor   FLOPs of its products / tensor-core rate
    memory   bytes of its inputs and outputs, each once / memory bandwidth
    issue    instructions / issue rate. Every block of outputs evaluates the splines again, so

        forward, dW   M I C * (O / BLOCK_O) * instructions an element of Phi
        dx            M I C * instructions an element of dPhi, once: in the epilogue

and at most tensor + issue, if nothing overlaps: on Hopper the products of one step run while the next splines are
evaluated, so the truth should lie nearer the lower end. Both ends are printed. A table, then one json line.
"""

import argparse
import dataclasses
import json

# Instructions a thread, counted in the SASS of the tiles shipped for sm_90 (bfloat16, C = 8, triton 3.6; tests/aot.py
# counts loops, tests/test_kernels.py compares one). All of a loop is in them: splines, conversion to 16 bits and
# through shared memory to the product's operand, copies of the next tiles, addresses, barriers. By (k, gated).
#
# A step of forward, c > 0, and what c = 0 adds to it, for 32 elements of Phi; a step of dW, for as many.
FORWARD = {
    (1, False): (284, 277), (2, False): (493, 275), (3, False): (556, 275),
    (1, True): (456, 257), (2, True): (648, 257), (3, True): (712, 257),
}  # fmt: skip
WEIGHT = {(1, False): 391, (2, False): 615, (3, False): 679, (1, True): 526, (2, True): 714, (3, True): 778}
# The base term's steps of forward and dW, 32 elements.
BASE_STEP = 652, 682
# dx but for its products' loops, an element of dPhi; with the base term where there is no gate.
EPILOGUE = {(1, False): 27, (2, False): 18, (3, False): 20, (1, True): 20, (2, True): 23, (3, True): 25}
STEP_ELEMENTS = 32
ELEMENT_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU; the defaults are an H200 (clock and multiprocessors from its data sheet; the rates are to be measured)."""

    tflops: float = 790.0  # bf16 products, TFLOP/s
    bandwidth: float = 4300.0  # GB/s
    sms: int = 132
    lanes: int = 128  # fp32 instructions a clock and multiprocessor
    ghz: float = 1.75

    @property
    def issue_rate(self) -> float:
        return self.sms * self.lanes * self.ghz * 1e9


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Work of one kernel."""

    name: str
    flops: float
    bytes: float
    instructions: float = 0.0

    def times(self, machine: Machine) -> dict[str, float]:
        """Seconds: each bound, and the least and most it should take."""
        tensor = self.flops / (machine.tflops * 1e12)
        memory = self.bytes / (machine.bandwidth * 1e9)
        issue = self.instructions / machine.issue_rate
        return {
            "tensor": tensor,
            "memory": memory,
            "issue": issue,
            "least": max(tensor, memory, issue),
            "most": max(tensor + issue, memory),
        }


def kan_layer(M: int, I: int, O: int, C: int, order: int, *, gate=False, base=True, block_o: int = 256) -> list[Kernel]:
    """Forward, dx and dW of one KAN layer."""
    weights = I * O * (C + base)
    flops = 2 * M * weights
    inputs = M * I * (1 + gate)
    blocks = -(-O // block_o)
    forward_bytes = ELEMENT_BYTES * (inputs + M * O + weights)
    backward_bytes = ELEMENT_BYTES * (M * O + inputs + weights)
    evaluations = M * I * blocks / STEP_ELEMENTS
    step, first = FORWARD[order, gate]
    forward = evaluations * (C * step + first + base * BASE_STEP[0])
    weight = evaluations * (C * WEIGHT[order, gate] + base * BASE_STEP[1])
    return [
        Kernel("kan forward", flops, forward_bytes, forward),
        Kernel("kan dx", flops, backward_bytes + ELEMENT_BYTES * inputs, M * I * C * EPILOGUE[order, gate]),
        Kernel("kan dW", flops, backward_bytes, weight),
    ]


def linear_layer(M: int, I: int, O: int) -> list[Kernel]:
    """Forward, dx and dW of a linear layer."""
    flops, moved = 2 * M * I * O, ELEMENT_BYTES * (M * I + M * O + I * O)
    return [Kernel(f"linear {name}", flops, moved) for name in ("forward", "dx", "dW")]


def elementwise(M: int, width: int, reads: int, writes: int, name: str) -> Kernel:
    return Kernel(name, 0.0, ELEMENT_BYTES * M * width * (reads + writes))


def block(
    kind: str, M: int, d: int, parameters: int, C: int, order: int, block_o: int = 256
) -> tuple[int, list[Kernel]]:
    """The hidden width and the kernels, forward and backward, of a feed-forward block of about `parameters` weights.

    Elementwise work is counted as one fused kernel a pass, and not at all where a compiler fuses it into a product.
    """
    if kind == "mlp":
        h = parameters // (2 * d)
        point = [elementwise(M, h, 1, 1, "gelu forward"), elementwise(M, h, 2, 1, "gelu backward")]
        return h, linear_layer(M, d, h) + point + linear_layer(M, h, d)
    if kind == "swiglu":
        h = parameters // (3 * d)
        point = [elementwise(M, h, 2, 1, "silu * up forward"), elementwise(M, h, 3, 2, "silu * up backward")]
        return h, linear_layer(M, d, 2 * h) + point + linear_layer(M, h, d)
    norm = lambda h: [elementwise(M, h, 1, 1, "norm forward"), elementwise(M, h, 2, 1, "norm backward")]  # noqa: E731
    if kind == "kan":
        h = parameters // (2 * d * (C + 1))
        return h, kan_layer(M, d, h, C, order, block_o=block_o) + norm(h) + kan_layer(
            M, h, d, C, order, block_o=block_o
        )
    if kind == "kan_mix":
        h = parameters // (d * (C + 2))
        return h, linear_layer(M, d, h) + norm(h) + kan_layer(M, h, d, C, order, block_o=block_o)
    if kind == "kan_gated":
        h = parameters // (d * (C + 2))
        down = kan_layer(M, h, d, C, order, gate=True, base=False, block_o=block_o)
        return h, linear_layer(M, d, 2 * h) + norm(h) + down
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
    parser.add_argument("--sms", type=int, default=machine.sms)
    parser.add_argument("--ghz", type=float, default=machine.ghz)
    parser.add_argument("--block-o", type=int, default=256, help="outputs a program owns")
    args = parser.parse_args()
    machine = Machine(args.tflops, args.bandwidth, args.sms, machine.lanes, args.ghz)
    blocks = [("mlp", 0, 0), ("swiglu", 0, 0), ("kan", 8, 1), ("kan", 8, 2), ("kan", 8, 3)]
    blocks += [("kan_mix", 7, 1), ("kan_gated", 4, 1), ("kan_gated", 8, 1)]
    print(f"{args.tokens} tokens, bf16, forward + backward, milliseconds; {machine}")
    print(
        f"{'block':22}{'d':>6}{'hidden':>8}{'tensor':>9}{'memory':>9}{'issue':>9}{'least':>9}{'most':>9}{'of mlp':>14}"
    )
    rows = []
    for d in args.width:
        reference = None
        for kind, C, order in blocks:
            hidden, kernels = block(kind, args.tokens, d, 2 * args.expansion * d * d, C, order, args.block_o)
            times = [kernel.times(machine) for kernel in kernels]
            total = {bound: 1e3 * sum(t[bound] for t in times) for bound in times[0]}
            reference = reference or total
            name = kind if not C else f"{kind} k={order} C={C}"
            low, high = total["least"] / reference["least"], total["most"] / reference["most"]
            print(
                f"{name:22}{d:6}{hidden:8}" + "".join(f"{ms:9.3f}" for ms in total.values()) + f"{low:8.2f}-{high:.2f}"
            )
            rows.append({"block": name, "width": d, "hidden": hidden, "milliseconds": total, "of_mlp": [low, high]})
    decode = [
        {"C": C, "order": k, "bytes_of_dense": decode_bytes(1, 1, 1, C, k) / (ELEMENT_BYTES * (C + 1))}
        for C, k in ((4, 1), (8, 1), (8, 3), (16, 3), (64, 3))
    ]
    for row in decode:
        print(f"decode k={row['order']} C={row['C']}: reads {row['bytes_of_dense']:.2f} of a KAN layer's weights")
    print(json.dumps({"machine": dataclasses.asdict(machine), "tokens": args.tokens, "blocks": rows, "decode": decode}))


if __name__ == "__main__":
    main()
