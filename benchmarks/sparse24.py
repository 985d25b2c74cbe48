"""2:4 sparse tensor cores for the basis: the operand, emulated bit for bit, and what the product should then cost.

    python benchmarks/sparse24.py --tokens 16384 --width 1024 2048 4096

A sparse product (`mma.sp`, `wgmma.mma_async.sp`) runs at up to twice the dense rate where each group of four numbers
along the reduction has at most two that are not zero. Of the C splines of one input only the k + 1 from f on can be.
Put those with c = g (mod C/4) in group g, C a multiple of 4: the window then meets a group in at most
ceil((k + 1) / (C/4)) neighbours p, c = g + p C/4, so that

    k + 1 <= C / 2      is enough: k = 1 from C = 4 on, k = 2 and 3 from C = 8 on,

and the two that are stored are p0 = clamp(ceil((f - g) / (C/4)), 0, 2) and p0 + 1, whatever x is: a closed form in
registers, of C/2 instead of C splines. The metadata of a group are the four bits p0 | (p0 + 1) << 2. The dense operand
is the weights with the rows of each input in the order (g, p): `order`.

The layout of values and metadata is checked against torch's own reader of CUTLASS's format, on CPU
(tests/test_sparse24.py). Prints predictions on benchmarks/roofline.py's terms; nothing here has run on a GPU.
"""

import argparse
import json

import torch
from harness import markdown
from roofline import FORWARD, STEP_ELEMENTS, Kernel, Machine, kan_layer
from torch import Tensor
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets as reordering

from kansformer import splines
from kansformer.layers import match_intermediate_size

METADATA = 2.0  # instructions a group: p0 from f, and its bits moved in place (estimated from the source)


def fits(C: int, spline_order: int) -> bool:
    """Whether the basis of every input has at most two non-zeros in every group."""
    return C % 4 == 0 and 2 * (spline_order + 1) <= C


def order(C: int) -> Tensor:
    """(C,): the spline c at each place of the order (g, p)."""
    return torch.arange(C).view(4, C // 4).T.flatten()


def operand(x: Tensor, grid: Tensor, grid_size: int, spline_order: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The basis at x (M, I), compressed: values (M, I*C/2) in `dtype`, metadata (M, I*C/4), four bits each.

    Raises:
        ValueError: where C and the order do not fit the pattern.
    """
    C = splines.num_basis(grid_size, spline_order)
    if not fits(C, spline_order):
        raise ValueError(f"C = {C} with spline_order {spline_order} has more than two non-zeros in a group of four")
    stride = C // 4
    first, _ = splines.live_basis(x, grid, grid_size, spline_order)
    behind = first.long().unsqueeze(-1) - torch.arange(stride)
    p = behind.add(stride - 1).div(stride, rounding_mode="floor").clamp(0, 2)  # (M, I, C/4)
    c = torch.arange(stride).unsqueeze(-1) + stride * torch.stack([p, p + 1], -1)
    values = splines.basis(x, grid, grid_size, spline_order).gather(-1, c.flatten(-2))
    return values.flatten(1).to(dtype), (p | (p + 1) << 2).flatten(1)


def cutlass(metadata: Tensor) -> Tensor:
    """(M, K/4) of four bits as CUTLASS has it: (M, K/16) int16, reordered. M a multiple of 32, K of 16."""
    rows, groups = metadata.shape
    words = (metadata.view(rows, groups // 4, 4) << torch.tensor([0, 4, 8, 12])).sum(-1).to(torch.int16)
    places = reordering(rows, groups // 4, torch.int16, metadata.device)
    return torch.empty_like(words).flatten().scatter_(0, places, words.flatten()).view_as(words)


def sparse_forward(M: int, I: int, O: int, C: int, spline_order: int, gate: bool, block_o: int = 256) -> Kernel:
    """The dense forward kernel with half the products' time and half the splines. No base term: it is dense."""
    dense = kan_layer(M, I, O, C, spline_order, gate=gate, base=False, block_o=block_o)[0]
    blocks = -(-O // block_o)
    step, first = FORWARD[spline_order, gate]
    issue = M * I * blocks * ((C / 2 * step + first) / STEP_ELEMENTS + C / 4 * METADATA)
    return Kernel("kan forward, 2:4", dense.flops / 2, dense.bytes, issue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 4096])
    options = parser.parse_args()
    machine, rows, found = Machine(), [], []
    for d in options.width:
        for C, k in ((4, 1), (8, 1), (8, 2), (8, 3)):
            h = match_intermediate_size("kan_gated", d, reference="mlp", grid_size=C - k, spline_order=k)
            dense = kan_layer(options.tokens, h, d, C, k, gate=True, base=False)[0].times(machine)
            sparse = sparse_forward(options.tokens, h, d, C, k, gate=True).times(machine)
            low, high = (sparse[end] / dense[end] for end in ("least", "most"))
            found.append({"d": d, "C": C, "k": k, "h": h, "dense": dense, "sparse": sparse})
            cells = [f"{1e3 * times[end]:.3f}" for times in (dense, sparse) for end in ("least", "most")]
            bound = max(("tensor", "memory", "issue"), key=sparse.get)
            rows.append([f"{h} -> {d}, C = {C}, k = {k}", *cells, f"{low:.2f}x, {high:.2f}x", bound])
    print(f"Predicted, {options.tokens} tokens, bf16, the down projection of kan_gated, forward, ms; {machine}")
    columns = ["layer", "dense least", "most", "2:4 least", "most", "2:4 against dense", "2:4 is bound by"]
    print(markdown(columns, rows))
    print(json.dumps({"machine": vars(machine), "rows": found}))


if __name__ == "__main__":
    main()
