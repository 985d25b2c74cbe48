"""The KAN layer in plain torch: the backend for CPU and for every device and dtype that the Triton kernels do not take.

    y[m, o] = sum_i gate[m, i] * ( base_weight[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

M rows (tokens), I in, O out, C = G + k splines an edge. Phi (rows, I*C) holds the splines of a chunk of rows. A chunk
is small enough for the cache, and nothing of size M*I*C ever exists: backward evaluates Phi again from x. Only the
k + 1 live splines of an input are computed, scattered into a zeroed Phi on the way to the matrix product and gathered
from dPhi = dy @ W^T on the way back: dx = gate * sum_r dPhi[live r] B'_r(x), dgate = sum_r dPhi[live r] B_r(x).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kansformer import splines

# Rows in a chunk of Phi. CPU: 256 was the fastest of 64, 128, 256 and 512 at I*C = 4096 and 1824 (2 cores, 1 MB of L2
# each). Elsewhere launches cost more than cache misses, so a chunk fills a fixed amount of memory instead.
CPU_CHUNK_ROWS = 256
CHUNK_BYTES = 256 * 2**20


def forward(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
) -> Tensor:
    """x (M, I), gate (M, I) or None, spline_weight (I*C, O), grid (I, 2) or (2,), base_weight (O, I): y (M, O)."""
    dtype = spline_weight.dtype
    if base_weight is not None:
        y = F.linear(_base_input(x, gate, base_activation, dtype), base_weight)
    else:
        y = x.new_zeros(x.shape[0], spline_weight.shape[1], dtype=dtype)
    if use_decode(x.shape[0], grid_size + spline_order, spline_order, x.device.type):
        return y.add_(_decode(x, gate, spline_weight, grid, grid_size, spline_order))
    phi = None
    for rows in _chunks(x, spline_weight):
        live, values, _ = _live(x[rows], grid, grid_size, spline_order)
        phi = _scatter(live, values, None if gate is None else gate[rows], spline_weight, phi)
        y[rows].addmm_(phi, spline_weight)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dgate, dspline_weight, dbase_weight), each only where `needs` says so."""
    need_x, need_gate, need_spline, need_base = needs
    dtype = spline_weight.dtype
    work = torch.promote_types(torch.promote_types(x.dtype, torch.float32), dtype)
    dx = x.new_zeros(x.shape, dtype=work) if need_x else None
    dgate = x.new_zeros(x.shape, dtype=work) if need_gate else None
    # Chunks add up in float32 or better, whatever the weights' dtype.
    dspline = torch.zeros_like(spline_weight, dtype=work) if need_spline else None
    phi = dphi = None
    if need_x or need_gate or need_spline:
        for rows in _chunks(x, spline_weight):
            live, values, slopes = _live(x[rows], grid, grid_size, spline_order, slopes=need_x)
            gate_rows = None if gate is None else gate[rows]
            if need_spline:
                phi = _scatter(live, values, gate_rows, spline_weight, phi)
                if work == dtype:
                    dspline.addmm_(phi.mT, dy[rows])
                else:
                    dspline += phi.mT @ dy[rows]
            if need_x or need_gate:
                if dphi is None or dphi.shape[0] != live.shape[0]:
                    dphi = dy.new_empty(live.shape[0], spline_weight.shape[0])
                torch.mm(dy[rows], spline_weight.mT, out=dphi)
                for r, value in enumerate(values):
                    d = dphi.gather(1, live + r).to(work)
                    if need_gate:
                        dgate[rows].addcmul_(d, value.to(work))
                    if need_x:
                        dx[rows].addcmul_(d, slopes[r].to(work))
    if gate is not None and need_x:
        dx *= gate
    dbase = None
    if base_weight is not None:
        if need_base:
            dbase = dy.mT @ _base_input(x, gate, base_activation, dtype)
        if need_x or need_gate:
            dinput = (dy @ base_weight).to(work)
            if need_gate:
                dgate.addcmul_(dinput, activation(x.to(work), base_activation))
            if need_x:
                dx += _activation_backward(dinput if gate is None else dinput * gate, x.to(work), base_activation)
    return (
        None if dx is None else dx.to(x.dtype),
        None if dgate is None else dgate.to(gate.dtype),
        None if dspline is None else dspline.to(dtype),
        dbase,
    )


def use_decode(rows: int, count: int, spline_order: int, device_type: str) -> bool:
    """Whether reading only the live rows beats the dense product: live rows read once a token against all C once."""
    return device_type == "cpu" and 0 < rows * (spline_order + 1) <= count * DECODE_RATIO


# Live rows read (rows * (k + 1)) over all rows (C) at which the dense product catches up on CPU.
DECODE_RATIO = 2.0


def activation(x: Tensor, name: str) -> Tensor:
    """The base term's function of x: "silu", "gelu" (exact), "relu" or "identity"."""
    return x if name == "identity" else getattr(F, name)(x)


def _activation_backward(dy: Tensor, x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    return dy


def _base_input(x: Tensor, gate: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """act(x) * gate in x's own dtype, exactly as SwiGLU computes it, then cast to the weights' dtype."""
    a = activation(x, name)
    return (a if gate is None else a * gate).to(dtype)


def _chunks(x: Tensor, spline_weight: Tensor) -> list[slice]:
    rows = CPU_CHUNK_ROWS
    if x.device.type != "cpu":
        rows = max(CPU_CHUNK_ROWS, CHUNK_BYTES // max(1, spline_weight.shape[0] * spline_weight.element_size()))
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def _live(
    x: Tensor, grid: Tensor, grid_size: int, spline_order: int, slopes: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Columns of Phi (rows, I) of the first live splines; values and derivatives of the k + 1, each (rows, I)."""
    first, s = splines.live_basis(x, grid, grid_size, spline_order)
    first += torch.arange(x.shape[1], device=x.device) * (grid_size + spline_order)
    offsets = range(spline_order + 1)
    values = [splines.cardinal(s - r, spline_order) for r in offsets]
    if not slopes:
        return first, values, []
    inverse_h = splines.inverse_width(grid, grid_size, s.dtype)
    return first, values, [splines.cardinal_derivative(s - r, spline_order) * inverse_h for r in offsets]


def _scatter(live: Tensor, values: list[Tensor], gate: Tensor | None, weight: Tensor, phi: Tensor | None) -> Tensor:
    """Phi (rows, I*C) in the weights' dtype, into the buffer `phi` where its size fits."""
    if phi is None or phi.shape[0] != live.shape[0]:
        phi = weight.new_empty(live.shape[0], weight.shape[0])
    phi.zero_()
    for r, value in enumerate(values):
        phi.scatter_(1, live + r, (value if gate is None else value * gate).to(weight.dtype))
    return phi


def _decode(x: Tensor, gate: Tensor | None, weight: Tensor, grid: Tensor, grid_size: int, spline_order: int) -> Tensor:
    """The spline term for few rows: a weighted sum of the live coefficient rows, one bag a thread at least."""
    live, values, _ = _live(x, grid, grid_size, spline_order)
    index = torch.stack([live + r for r in range(spline_order + 1)], -1)
    values = torch.stack(values, -1)
    if gate is not None:
        values = values * gate.unsqueeze(-1)
    # embedding_bag sums a bag on one thread: split the inputs of a row into enough bags for all threads.
    rows, inputs = x.shape
    bags = min(inputs, math.ceil(DECODE_BAGS / rows))
    step = math.ceil(inputs / bags)
    starts = torch.arange(0, inputs, step, device=x.device)
    offsets = (torch.arange(rows, device=x.device).unsqueeze(1) * inputs + starts) * (spline_order + 1)
    sums = F.embedding_bag(
        index.view(-1), weight, offsets.view(-1), mode="sum", per_sample_weights=values.to(weight.dtype).view(-1)
    )
    return sums.view(rows, len(starts), -1).sum(1)


DECODE_BAGS = 16
