"""The KAN layer in plain torch: the backend for CPU and for every device and dtype that the Triton kernels do not take.

    y[m, o] = sum_i gate[m, i] * ( base_weight[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

Without a base term the splines go on as constants beyond the grid: x is taken as the grid's closest point.

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

# Size of a chunk of Phi. CPU: it has to stay in the last cache together with a few tensors of half its size, and every
# further chunk costs some forty operations on all threads. Elsewhere launches cost more than cache misses.
CPU_CHUNK_BYTES = 8 * 2**20
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
    norm_eps: float | None = None,
) -> Tensor:
    """x (M, I), gate (M, I) or None, spline_weight (I*C, O), grid (I, 2) or (2,), base_weight (O, I): y (M, O)."""
    if norm_eps is not None:
        x = normalise(x, norm_eps)
    dtype = spline_weight.dtype
    y = None if base_weight is None else F.linear(base_input(x, gate, base_activation, dtype), base_weight)
    if use_decode(x.shape[0], grid_size + spline_order, spline_order, x.device.type):
        splines_alone = _decode(x, gate, spline_weight, grid, grid_size, spline_order, base_weight is None)
        return splines_alone if y is None else y.add_(splines_alone)
    if y is None:
        y = x.new_zeros(x.shape[0], spline_weight.shape[1], dtype=dtype)
    phi = None
    for rows in _chunks(x, spline_weight):
        phi = _buffer(phi, len(x[rows]), spline_weight)
        columns, values, _ = _live(x[rows], grid, grid_size, spline_order, base_weight is None)
        _scatter(columns, values, None if gate is None else gate[rows], phi)
        y[rows].addmm_(phi, spline_weight)
    return y


def use_decode_int8(M: int, I: int, O: int, C: int, spline_order: int) -> bool:
    """Whether to read the live rows alone; to dequantise all C of them takes longer than the product with one row."""
    return 0 < M * (spline_order + 1) <= C * DECODE_RATIO


def decode_int8(
    x: Tensor,
    gate: Tensor | None,
    quantized: Tensor,
    scale: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
) -> Tensor:
    """`forward` with spline_weight = quantized * scale[:, None], (I*C, O) int8 and (I*C,), for few rows."""
    columns, values, _ = _live(x, grid, grid_size, spline_order, base_weight is None)
    if gate is not None:
        values = values * gate.unsqueeze(1)
    columns, values = columns.flatten(1), values.flatten(1)
    values = values.to(torch.promote_types(torch.float32, scale.dtype)) * scale[columns]
    y = values.new_zeros(len(x), quantized.shape[1])
    for row, weights, live in zip(y, values, columns):
        for some, of in zip(weights.split(INT8_ROWS), live.split(INT8_ROWS)):
            row.addmv_(quantized[of].to(y.dtype).mT, some)
    y = y.to(scale.dtype)
    return y if base_weight is None else y.add_(F.linear(base_input(x, gate, base_activation, y.dtype), base_weight))


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
    norm_eps: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dgate, dspline_weight, dbase_weight), each only where `needs` says so."""
    need_x, need_gate, need_spline, need_base = needs
    dtype = spline_weight.dtype
    # Chunks add up in float32 or better, whatever the weights' dtype.
    work = torch.promote_types(torch.float32, dtype)
    # Contiguous, whatever the strides of what they are gradients of: what the operator promises when it is traced.
    dx = x.new_empty(x.shape) if need_x else None
    dgate = gate.new_empty(gate.shape) if need_gate else None
    dspline = spline_weight.new_zeros(spline_weight.shape, dtype=work) if need_spline else None
    dbase = base_weight.new_zeros(base_weight.shape, dtype=work) if need_base else None
    buffer = None
    for rows in _chunks(x, spline_weight):
        dy_rows, x_rows, gate_rows = dy[rows], x[rows], None if gate is None else gate[rows]
        if norm_eps is not None:
            x_rows = normalise(x_rows, norm_eps)
        columns, values, slopes = _live(x_rows, grid, grid_size, spline_order, base_weight is None, need_x)
        buffer = _buffer(buffer, len(x_rows), spline_weight)
        if need_spline:
            _scatter(columns, values, gate_rows, buffer)
            _add_product(dspline, buffer.mT, dy_rows)
        if need_base:
            _add_product(dbase, dy_rows.mT, base_input(x_rows, gate_rows, base_activation, dtype))
        if not (need_x or need_gate):
            continue
        dphi = torch.mm(dy_rows, spline_weight.mT, out=buffer)
        live = dphi.gather(1, columns.flatten(1)).view_as(values)
        dinput = dy_rows @ base_weight if base_weight is not None else None
        if need_gate:
            d = (live * values).sum(1)
            if dinput is not None:
                d = d.addcmul_(dinput, activation(x_rows, base_activation))
            dgate[rows] = d
        if need_x:
            d = (live * slopes).sum(1).mul_(splines.inverse_width(grid, grid_size, slopes.dtype))
            if dinput is not None:
                d += activation_backward(dinput.to(x.dtype), x_rows, base_activation)
            d = d if gate is None else d.mul_(gate_rows)
            dx[rows] = d if norm_eps is None else normalise_backward(d, x[rows], norm_eps)
    return dx, dgate, None if dspline is None else dspline.to(dtype), None if dbase is None else dbase.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def use_decode(rows: int, count: int, spline_order: int, device_type: str) -> bool:
    """Whether reading only the live rows beats the dense product: live rows read once a token against all C once."""
    return device_type == "cpu" and 0 < rows * (spline_order + 1) <= count * DECODE_RATIO


# Live rows read (rows * (k + 1)) over all rows (C) up to which they beat the dense product on CPU: 0.67 to 0.86 of its
# time there, 0.89 to 1.32 at twice that (benchmarks/bench_decode.py, d = 2048, k = 1 and 3, C = 4 to 16).
DECODE_RATIO = 4.0


# int8 rows dequantised at a time: of 2,048 float32 outputs they make 2 MiB, which stay in cache.
INT8_ROWS = 256


def activation(x: Tensor, name: str) -> Tensor:
    """The base term's function of x: "silu", "gelu" (exact), "relu" or "identity"."""
    return x if name == "identity" else getattr(F, name)(x)


def activation_backward(dy: Tensor, x: Tensor, name: str) -> Tensor:
    """dx of `activation(x, name)`."""
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    return dy


def normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), the mean over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def normalise_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dx of y = normalise(x), with r = 1 / sqrt(mean(x^2) + eps): r (dy - y mean(dy y)); float32 at least."""
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = wide * scale
    return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)


def base_input(x: Tensor, gate: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """act(x) * gate in x's own dtype, exactly as SwiGLU computes it, then cast to the weights' dtype."""
    a = activation(x, name)
    return (a if gate is None else a * gate).to(dtype)


def _chunks(x: Tensor, spline_weight: Tensor) -> list[slice]:
    budget = CPU_CHUNK_BYTES if x.device.type == "cpu" else CHUNK_BYTES
    rows = max(1, budget // max(1, spline_weight.shape[0] * spline_weight.element_size()))
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def _live(
    x: Tensor, grid: Tensor, grid_size: int, spline_order: int, constant_outside: bool, slopes: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Columns in Phi, values and (if asked) derivatives in t of the k + 1 live splines, each (rows, k + 1, I)."""
    first, s = splines.live_basis(x, grid, grid_size, spline_order, constant_outside)
    r = torch.arange(spline_order + 1, device=x.device).unsqueeze(-1)
    if constant_outside:
        values, derivatives = _inside(s + (1 - spline_order) / 2, spline_order, slopes)
        if slopes:
            t = splines.position(x, grid, grid_size)
            derivatives.masked_fill_(((t < 0) | (t >= grid_size)).unsqueeze(1), 0)
    elif x.device.type == "cpu" and (spline_order > 1 or slopes):  # elsewhere nonzero would wait for the device
        u = s + (1 - spline_order) / 2
        values, derivatives = _inside(u, spline_order, slopes)
        outside = ((u < 0) | (u >= 1)).nonzero(as_tuple=True)
        value, derivative = _cardinal(s[outside].unsqueeze(-1) - r.flatten(), spline_order, slopes)
        values[outside[0], :, outside[1]] = value
        if slopes:
            derivatives[outside[0], :, outside[1]] = derivative
    else:
        values, derivatives = _cardinal(s.unsqueeze(1) - r, spline_order, slopes)
    first += torch.arange(x.shape[1], device=x.device) * (grid_size + spline_order)
    return first.unsqueeze(1) + r, values, derivatives


def _inside(u: Tensor, spline_order: int, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """Values and, if asked, derivatives of the live splines at u = t - floor(t) in [0, 1), (rows, k + 1, I) each.

    On one interval each is a fixed polynomial of u or of w = 1 - u, a quarter of the work of M_3 at k + 1 points:

        k = 1:  w,  u
        k = 2:  w^2 / 2,  1/2 + u w,  u^2 / 2
        k = 3:  w^3 / 6,  2/3 - u^2 + u^3 / 2,  2/3 - w^2 + w^3 / 2,  u^3 / 6
    """
    rows, inputs = u.shape
    values = u.new_empty(rows, spline_order + 1, inputs)
    derivatives = torch.empty_like(values) if slopes else None
    if spline_order == 1:
        torch.sub(1, u, out=values[:, 0])
        values[:, 1] = u
        if slopes:
            derivatives[:, 0], derivatives[:, 1] = -1, 1
        return values, derivatives
    w = 1 - u
    u2, w2 = u * u, w * w
    if spline_order == 2:
        torch.mul(w2, 1 / 2, out=values[:, 0])
        torch.mul(u, w, out=values[:, 1]).add_(1 / 2)
        torch.mul(u2, 1 / 2, out=values[:, 2])
        if slopes:
            torch.neg(w, out=derivatives[:, 0])
            torch.sub(w, u, out=derivatives[:, 1])
            derivatives[:, 2] = u
        return values, derivatives
    torch.mul(w2, w, out=values[:, 0]).mul_(1 / 6)
    torch.mul(u2, u, out=values[:, 3]).mul_(1 / 6)
    torch.sub(2 / 3, u2, out=values[:, 1]).add_(values[:, 3], alpha=3)
    torch.sub(2 / 3, w2, out=values[:, 2]).add_(values[:, 0], alpha=3)
    if slopes:
        torch.mul(w2, -1 / 2, out=derivatives[:, 0])
        torch.mul(u2, 1 / 2, out=derivatives[:, 3])
        torch.mul(u, -2, out=derivatives[:, 1]).add_(derivatives[:, 3], alpha=3)
        torch.mul(w, 2, out=derivatives[:, 2]).add_(derivatives[:, 0], alpha=3)
    return values, derivatives


def _cardinal(s: Tensor, spline_order: int, slope: bool) -> tuple[Tensor, Tensor | None]:
    """splines.cardinal and, if asked, its derivative anywhere, with shared powers and few temporaries.

    With m = max(0, (k+1)/2 - |s|) and n = max(0, m - 1): M_2 = (m^2 - 3 n^2) / 2, M_3 = (m^3 - 4 n^3) / 6.
    """
    m = ((spline_order + 1) / 2 - s.abs()).clamp_min_(0)
    if spline_order == 1:
        return m, splines.cardinal_derivative(s, 1) if slope else None
    n = (m - 1).clamp_min_(0)
    if spline_order == 2:
        value = (m * m).addcmul_(n, n, value=-3).mul_(1 / 2)
        return value, m.sub_(n, alpha=3).copysign_(s).neg_() if slope else None
    m2, n2 = m * m, n * n
    value = m.mul_(m2).addcmul_(n, n2, value=-4).mul_(1 / 6)
    return value, m2.mul_(1 / 2).sub_(n2, alpha=2).copysign_(s).neg_() if slope else None


def _buffer(last: Tensor | None, rows: int, weight: Tensor) -> Tensor:
    """Uninitialised (rows, I*C) in the weights' dtype: the last chunk's where it has the size."""
    return last if last is not None and len(last) == rows else weight.new_empty(rows, weight.shape[0])


def _scatter(columns: Tensor, values: Tensor, gate: Tensor | None, phi: Tensor) -> None:
    """Write Phi (rows, I*C) into `phi`."""
    values = values if gate is None else values * gate.unsqueeze(1)
    phi.zero_().scatter_(1, columns.flatten(1), values.to(phi.dtype).flatten(1))


def _decode(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    constant_outside: bool,
) -> Tensor:
    """The spline term for few rows: a weighted sum of the live coefficient rows. Few operations, because each of them
    costs more than what it does where a layer is small."""
    rows, inputs = x.shape
    first, s = splines.live_basis(x, grid, grid_size, spline_order, constant_outside)
    r = torch.arange(spline_order + 1, device=x.device)
    values, _ = _cardinal(s.unsqueeze(-1) - r, spline_order, False)  # (rows, I, k + 1)
    if gate is not None:
        values = values * gate.unsqueeze(-1)
    count = grid_size + spline_order
    first += torch.arange(0, inputs * count, count, device=x.device)
    # embedding_bag sums a bag on one thread: the inputs of a row are split into enough bags for all threads.
    most = math.ceil(DECODE_BAGS / rows)
    bags = max(n for n in range(1, most + 1) if inputs % n == 0)
    shape = rows * bags, -1
    index = (first.unsqueeze(-1) + r).reshape(shape)
    sums = F.embedding_bag(index, weight, mode="sum", per_sample_weights=values.reshape(shape).to(weight.dtype))
    return sums if bags == 1 else sums.view(rows, bags, -1).sum(1)


DECODE_BAGS = 16
