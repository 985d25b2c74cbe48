"""The KAN layers, each as one differentiable operator, and the only place that chooses a backend.

    y[m, o] = b[o] + sum_i gate[m, i] * ( base_weight[o, i] * act(x[m, i]) + sum_c W[i*C + c, o] * B_c(x[m, i]) )

(Liu et al. 2024, arXiv:2404.19756, eq. 2.10; `gate` makes every edge a gate function, the product nodes of KAN 2.0,
arXiv:2408.10205.) `torch.library` has operators, `kansformer::kan_linear`, its backward and one for int8, so that what
looks on (torch.compile, export, dispatch modes, tensor subclasses) sees one node whatever the backend; else autograd
alone calls the kernels. Saved for backward: x and gate, no basis. The layer of waves, `fourier_linear`, has operators
for triton alone: in torch its plain operations are what a compiler fuses best, and what a module's export sees.
"""

import functools
import importlib
import importlib.util
import logging
import math
import os
import types
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from kansformer import splines
from kansformer.kernels import torch_kan

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "triton")
BASE_ACTIVATIONS = ("silu", "gelu", "relu", "identity")


def kan_linear(
    x: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    *,
    grid_size: int,
    spline_order: int,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_activation: str = "silu",
    gate: Tensor | None = None,
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a KAN layer: a learned function on every edge from I inputs to O outputs.

    Splines are evaluated in float32 at least (float64 for float64 x); the product runs in the weights' dtype (where
    autocast is on, its) with float32 accumulation. Outside the grid the splines fall to zero over k more knots and the
    base term acts alone; without a base term they go on as constants, and x has no gradient there. NaN in x gives NaN
    in its row. Differentiable any number of times, backward and forward, and under torch.func's transforms: what is not
    a first gradient goes through plain torch, Phi and all.

    Args:
        x: (..., I), any float dtype.
        spline_weight: (I*C, O), C = grid_size + spline_order; row i*C + c. A tensor of torchao is taken too: an
            Int8Tensor with one scale a row is read as int8 for few rows and without gradients, dequantised otherwise.
        grid: (2,) or (I, 2), lo and hi of the grid; float32 or float64.
        grid_size: G >= 1 intervals.
        spline_order: k in 1, 2, 3.
        base_weight: (O, I), an nn.Linear weight on act(x); None for no base term.
        bias: (O,).
        base_activation: "silu", "gelu" (exact), "relu" or "identity".
        gate: (..., I), multiplies every edge function of its input.
        norm_eps: not None takes x / sqrt(mean(x^2) + norm_eps) for x, the mean over the I inputs: an RMS norm without
            gain, which this way saves nothing of its own for backward.
        backend: "auto", "torch" or "triton"; "auto" follows the environment variable KANSFORMER_BACKEND where it is
            set, else takes triton where it can run. See `choose_backend`. Training compiled on a CPU, "auto" gives
            torch.compile plain operations to fuse in place of the operator.
    Returns:
        (..., O) in the weights' dtype (autocast's where it is on).
    Raises:
        ValueError, TypeError: on shapes, dtypes or settings that do not fit together, naming them.
        RuntimeError: if `backend` names one that cannot run here, saying why.
    """
    _check(x, spline_weight, grid, grid_size, spline_order, base_weight, bias, base_activation, gate, norm_eps)
    dtype = _product_dtype(x, spline_weight)
    if base_weight is not None:
        base_weight = base_weight.to(dtype)
    if gate is not None and gate.dtype.itemsize > dtype.itemsize:
        gate = gate.to(dtype)  # its product with a function is rounded to it next; half as much to keep
    rows = x.reshape(-1, x.shape[-1]), None if gate is None else gate.reshape(-1, x.shape[-1])
    layer = grid, base_weight, grid_size, spline_order, base_activation
    settings = *layer, norm_eps, backend
    if under_transform():
        weight = spline_weight.dequantize() if hasattr(spline_weight, "qdata") else spline_weight
        y = _plain(*rows, weight.to(dtype), *settings)
    elif hasattr(spline_weight, "qdata"):  # of torchao
        if _int8_by_rows(spline_weight) and not (torch.is_grad_enabled() and any(_needs_grad(rows, base_weight))):
            scale, (inputs, gates) = spline_weight.scale.flatten().to(dtype), rows
            inputs = inputs if norm_eps is None else torch_kan.normalise(inputs, norm_eps)
            y = torch.ops.kansformer.kan_linear_int8(inputs, gates, spline_weight.qdata, scale, *layer, backend)
        else:
            y = torch.ops.kansformer.kan_linear(*rows, spline_weight.dequantize().to(dtype), *settings)
    elif x.device.type == "cpu" and _inline(backend, *_needs_grad(rows, spline_weight, base_weight)):
        if grid.dim() == 2:
            # Equal values, each end contiguous, by an operator that inductor does not fuse: reading ends with a stride
            # its loops over the inputs become loops over the rows, with a dozen transposes a tile.
            settings = grid.mT.cummax(0).values.mT, *settings[1:]
        y = checkpoint(_plain, *rows, spline_weight.to(dtype), *settings, use_reentrant=False, preserve_rng_state=False)
    else:
        weight = spline_weight.to(dtype)
        if _observed(*rows, weight, grid, base_weight):
            operator = torch.ops.kansformer.kan_linear
        else:
            operator = _KanLinear.apply if torch.is_grad_enabled() else _forward
        y = operator(*rows, weight, *settings)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.view(*x.shape[:-1], spline_weight.shape[1])


def fourier_linear(
    x: Tensor, sin_weight: Tensor, cos_weight: Tensor, frequency: float, *, backend: str = "auto"
) -> Tensor:
    """Apply a KAN layer of waves (Xu et al. 2024, arXiv:2406.01034), w the `frequency`:

        y_o = sum_i sin_weight[o, i] sin(w x_i) + cos_weight[o, i] cos(w x_i)

    The triton backend has sines and cosines in float32, products in the weights' dtype (where autocast is on, its) with
    float32 accumulation, and keeps x alone for backward; from |w x| of 10^5 on its waves lose accuracy, but stay within
    [-1, 1]. The torch backend is plain operations. Differentiable as `kan_linear` is.

    Args:
        x: (..., I), any float dtype.
        sin_weight, cos_weight: (O, I), of one dtype.
        frequency: w, the same for every edge.
        backend: "auto", "torch" or "triton", as for `kan_linear`.
    Returns:
        (..., O) in the weights' dtype (autocast's where it is on).
    Raises:
        ValueError, TypeError: on shapes or dtypes that do not fit together, naming them.
        RuntimeError: if `backend` names one that cannot run here, saying why.
    """
    _check_waves(x, sin_weight, cos_weight)
    dtype = _product_dtype(x, sin_weight)
    chosen = _waves_backend(x.device, x.dtype, dtype, backend)
    inputs = x.reshape(-1, x.shape[-1]), sin_weight.to(dtype), cos_weight.to(dtype), float(frequency)
    if chosen == "torch" or under_transform():
        operator = _plain_waves
    elif _observed(*inputs[:3]):
        operator = torch.ops.kansformer.fourier_linear
    else:
        operator = _FourierLinear.apply if torch.is_grad_enabled() else _waves_forward
    return operator(*inputs).view(*x.shape[:-1], len(sin_weight))


def choose_backend(
    x: Tensor, spline_weight: Tensor, *, spline_order: int, base_activation: str = "silu", backend: str = "auto"
) -> str:
    """The backend, "torch" or "triton", that `kan_linear` takes for these tensors.

    "auto" defers to the environment variable KANSFORMER_BACKEND, and without it takes triton for CUDA tensors where the
    kernels support the case, torch otherwise. That CUDA tensors go to torch is logged, once for each reason.

    Raises:
        ValueError: if the name is not known.
        RuntimeError: if triton is asked for and cannot run here, with the reason.
    """
    return _choose(
        "kan_linear",
        "triton_kan",
        x.device,
        backend,
        lambda: _kernels("triton_kan").unsupported(
            x, spline_weight, spline_order=spline_order, base_activation=base_activation
        ),
    )


def _choose(
    function: str, module: str, device: torch.device, backend: str, unsupported: Callable[[], str | None]
) -> str:
    asked = _asked(backend)
    if asked not in ("auto", *BACKENDS):
        source = "KANSFORMER_BACKEND" if backend == "auto" else "backend"
        raise ValueError(f"{source} is {asked!r}; choose one of 'auto', {', '.join(map(repr, BACKENDS))}")
    if asked == "torch" or (asked == "auto" and device.type != "cuda"):
        return "torch"
    reason = _triton_missing(module) or unsupported()
    if reason is None:
        return "triton"
    if asked == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {reason}. Use backend='auto' or 'torch'")
    _log_once(f"{function} takes the torch backend on {device}: {reason}")
    return "torch"


def may_fuse(x: Tensor, backend: str = "auto") -> bool:
    """Whether a layer of waves may have kernels for x: on a GPU, or because they are asked for."""
    asked = _asked(backend)
    return asked != "torch" and (asked != "auto" or x.is_cuda is True)  # not of what stands for x in torch.fx


@torch.compiler.assume_constant_result  # compilers guard its arguments
def _waves_backend(device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> str:
    unsupported = lambda: _kernels("triton_waves").unsupported(device, x_dtype, dtype)  # noqa: E731
    return _choose("fourier_linear", "triton_waves", device, backend, unsupported)


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _asked(backend: str) -> str:
    return os.environ.get("KANSFORMER_BACKEND", "auto") if backend == "auto" else backend


@functools.cache
def _triton_missing(module: str) -> str | None:
    for package in ("triton", "kansformer"):  # a model's own copy of this file runs without kansformer
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    if importlib.util.find_spec(f"kansformer.kernels.{module}") is None:  # or beside an older one
        return f"the package kansformer is too old: it has no {module}"
    return None


def _kernels(name: str) -> types.ModuleType:
    return importlib.import_module(f"kansformer.kernels.{name}")  # where it is used: triton comes with CUDA builds


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _implementation(
    x: Tensor, spline_weight: Tensor, spline_order: int, base_activation: str, backend: str
) -> types.ModuleType:
    chosen = choose_backend(
        x, spline_weight, spline_order=spline_order, base_activation=base_activation, backend=backend
    )
    return torch_kan if chosen == "torch" else _kernels("triton_kan")


def _forward(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    norm_eps: float | None,
    backend: str,
) -> Tensor:
    kernels = _implementation(x, spline_weight, spline_order, base_activation, backend)
    return kernels.forward(
        x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, norm_eps
    )


# Any strides will do: held to those of eager mode, a compiler copies what it has padded.
ANY_LAYOUT = (torch.Tag.flexible_layout,)

_kan_linear = torch.library.custom_op("kansformer::kan_linear", _forward, mutates_args=(), tags=ANY_LAYOUT)


def _observed(*tensors: Tensor | None) -> bool:
    """Whether anything needs to see one operator: a compiler, exporter or tracer, a dispatch mode, a tensor subclass.

    Where nothing does, calling through torch.library only costs: a fifth of a small layer's time with one row.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)
    return not plain or any(map(torch._C._functorch.is_batchedtensor, given))


@_kan_linear.register_fake
def _(x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, norm_eps, backend):
    return spline_weight.new_empty(x.shape[0], spline_weight.shape[1])


def _int8_by_rows(weight: Tensor) -> bool:
    return weight.qdata.dtype == torch.int8 and weight.scale.numel() == len(weight)


def under_transform() -> bool:
    """Whether torch.func (grad, jvp, vmap, ...) or forward-mode differentiation is at work, which only plain operations
    take part in: through the operator tangents would be zero, without a word."""
    if torch.compiler.is_dynamo_compiling():
        return torch._C._are_functorch_transforms_active()  # a constant to dynamo, which traces tangents as one of them
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _needs_grad(rows: tuple[Tensor, Tensor | None], *weights: Tensor | None) -> Iterator[bool]:
    return (tensor.requires_grad for tensor in (*rows, *weights) if tensor is not None)


def _inline(backend: str, *needs_grad: bool) -> bool:
    """Whether torch.compile traces a training step and may choose: its fused loops beat the operator's forty passes.

    Under a checkpoint, so that Phi is evaluated again for backward instead of kept. Inference keeps the operator, which
    reads live rows alone.
    """
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    return any(needs_grad) and _asked(backend) == "auto"


@torch.library.custom_op("kansformer::kan_linear_int8", mutates_args=(), tags=ANY_LAYOUT)
def _kan_linear_int8(
    x: Tensor,
    gate: Tensor | None,
    quantized: Tensor,
    scale: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    backend: str,
) -> Tensor:
    """`kan_linear` with spline_weight = quantized * scale[:, None], (I*C, O) int8 and (I*C,); without gradients.

    Few rows read the live int8 rows alone. Many are bound by arithmetic: the weights are dequantised for them.
    """
    kernels = _implementation(x, scale, spline_order, base_activation, backend)
    M, I, O = *x.shape, quantized.shape[1]
    settings = grid, base_weight, grid_size, spline_order, base_activation
    if kernels.use_decode_int8(M, I, O, grid_size + spline_order, spline_order):
        return kernels.decode_int8(x, gate, quantized, scale, *settings)
    return kernels.forward(x, gate, quantized.to(scale.dtype).mul_(scale[:, None]), *settings)


@_kan_linear_int8.register_fake
def _(x, gate, quantized, scale, grid, base_weight, grid_size, spline_order, base_activation, backend):
    return scale.new_empty(x.shape[0], quantized.shape[1])


def _gradients(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    norm_eps: float | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, gate, spline_weight and base_weight that `needs` asks for, in this order."""
    kernels = _implementation(x, spline_weight, spline_order, base_activation, backend)
    gradients = kernels.backward(
        dy, x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, tuple(needs), norm_eps
    )
    return [g for g, needed in zip(gradients, needs) if needed]


_kan_linear_backward = torch.library.custom_op(
    "kansformer::kan_linear_backward", _gradients, mutates_args=(), tags=ANY_LAYOUT
)


@_kan_linear_backward.register_fake
def _(
    dy, x, gate, spline_weight, grid, base_weight, grid_size, spline_order, base_activation, norm_eps, backend, needs
):
    primals = (x, gate, spline_weight, base_weight)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in zip(primals, needs) if n]


def _setup_context(ctx, inputs, output):
    x, gate, spline_weight, grid, base_weight, *ctx.settings = inputs
    ctx.save_for_backward(x, gate, spline_weight, grid, base_weight)


def _backward(ctx, dy):
    tensors = x, gate, spline_weight, _, base_weight = ctx.saved_tensors
    primals = x, gate, spline_weight, base_weight
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    operators = torch.ops.kansformer.kan_linear_backward, _gradients
    dx, dgate, dspline, dbase = _gradients_of(dy, primals, wanted, _plain, operators, tensors, ctx.settings)
    return dx, dgate, dspline, None, dbase, None, None, None, None, None


def _gradients_of(
    dy: Tensor,
    primals: tuple[Tensor | None, ...],
    wanted: list[bool],
    plain: Callable[..., Tensor],
    operators: tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]],
    tensors: tuple[Tensor | None, ...],
    settings: Sequence[object],
) -> Iterator[Tensor | None]:
    """The gradients of the primals that are wanted, None for the others, of plain(*tensors, *settings).

    By one of two operators, the first for what looks on. Where the gradients must themselves be differentiable
    (create_graph=True) or dy is a batch (is_grads_batched=True), which kernels do not take: through plain operations.
    """
    differentiable = torch.is_grad_enabled()
    if differentiable or torch._C._functorch.is_legacy_batchedtensor(dy):
        with torch.enable_grad():
            y = plain(*tensors, *settings)
        chosen = [primal for primal, needed in zip(primals, wanted) if needed]
        gradients = torch.autograd.grad(y, chosen, dy, create_graph=differentiable)
    else:
        observed, direct = operators
        operator = observed if _observed(dy, *tensors) else direct
        gradients = operator(dy, *tensors, *settings, wanted)
    gradients = iter(gradients)
    return (next(gradients) if needed else None for needed in wanted)


_kan_linear.register_autograd(_backward, setup_context=_setup_context)


class _KanLinear(torch.autograd.Function):
    """The operator where nothing but autograd sees it: 0.2 ms of a processor less a step and layer."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _forward(*inputs)

    backward = staticmethod(_backward)


def _plain(
    x: Tensor,
    gate: Tensor | None,
    spline_weight: Tensor,
    grid: Tensor,
    base_weight: Tensor | None,
    grid_size: int,
    spline_order: int,
    base_activation: str,
    norm_eps: float | None,
    backend: str = "torch",
) -> Tensor:
    """The layer as plain torch operations, Phi and all.

    Phi has the functions outside and the inputs inside, and the weights follow: fused loops over C = 4 neighbours fill
    half a vector register, and take three times as long.
    """
    if norm_eps is not None:
        x = torch_kan.normalise(x, norm_eps)
    phi = splines.basis(x, grid, grid_size, spline_order, dim=-2, constant_outside=base_weight is None)  # (M, C, I)
    if gate is not None:
        phi = phi * gate.unsqueeze(-2)
    weight = spline_weight.unflatten(0, (-1, grid_size + spline_order)).transpose(0, 1)  # (C, I, O)
    y = phi.flatten(-2).to(spline_weight.dtype) @ weight.flatten(0, 1)
    if base_weight is None:
        return y
    a = torch_kan.activation(x, base_activation)
    return y + F.linear((a if gate is None else a * gate).to(base_weight.dtype), base_weight)


def _waves_forward(x: Tensor, sin_weight: Tensor, cos_weight: Tensor, frequency: float) -> Tensor:
    return _kernels("triton_waves").forward(x, sin_weight, cos_weight, frequency)


_fourier_linear = torch.library.custom_op(
    "kansformer::fourier_linear", _waves_forward, mutates_args=(), tags=ANY_LAYOUT
)


@_fourier_linear.register_fake
def _(x, sin_weight, cos_weight, frequency):
    return sin_weight.new_empty(x.shape[0], sin_weight.shape[0])


def _waves_gradients(
    dy: Tensor, x: Tensor, sin_weight: Tensor, cos_weight: Tensor, frequency: float, needs: list[bool]
) -> list[Tensor]:
    """The gradients of x, sin_weight and cos_weight that `needs` asks for, in this order."""
    gradients = _kernels("triton_waves").backward(dy, x, sin_weight, cos_weight, frequency, tuple(needs))
    return [g for g, needed in zip(gradients, needs) if needed]


_fourier_linear_backward = torch.library.custom_op(
    "kansformer::fourier_linear_backward", _waves_gradients, mutates_args=(), tags=ANY_LAYOUT
)


@_fourier_linear_backward.register_fake
def _(dy, x, sin_weight, cos_weight, frequency, needs):
    primals = (x, sin_weight, cos_weight)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in zip(primals, needs) if n]


def _setup_waves(ctx, inputs, output):
    *tensors, ctx.frequency = inputs
    ctx.save_for_backward(*tensors)


def _waves_backward(ctx, dy):
    wanted, tensors = list(ctx.needs_input_grad[:3]), ctx.saved_tensors  # once: a checkpoint unpacks no second time
    operators = torch.ops.kansformer.fourier_linear_backward, _waves_gradients
    return *_gradients_of(dy, tensors, wanted, _plain_waves, operators, tensors, (ctx.frequency,)), None


_fourier_linear.register_autograd(_waves_backward, setup_context=_setup_waves)


class _FourierLinear(torch.autograd.Function):
    """As `_KanLinear`."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_waves(ctx, inputs, None)
        return _waves_forward(*inputs)

    backward = staticmethod(_waves_backward)


def _plain_waves(x: Tensor, sin_weight: Tensor, cos_weight: Tensor, frequency: float) -> Tensor:
    """The layer of waves as plain torch operations."""
    y, dtype = frequency * x, sin_weight.dtype
    return F.linear(y.sin().to(dtype), sin_weight) + F.linear(y.cos().to(dtype), cos_weight)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """The layers' operators as plain operations, for exporters that know no other: a table for `run_decompositions`.

    program = torch.export.export(model, (), inputs).run_decompositions(kansformer.decompositions())
    torch.onnx.export(program, dynamo=True)
    """
    return {
        torch.ops.kansformer.kan_linear.default: _plain,
        torch.ops.kansformer.fourier_linear.default: _plain_waves,
    }


@register_flop_formula(torch.ops.kansformer.kan_linear)
def _forward_flops(x, gate, spline_weight, grid, base_weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * (math.prod(spline_weight) + (math.prod(base_weight) if base_weight is not None else 0))


@register_flop_formula(torch.ops.kansformer.kan_linear_int8)
def _int8_flops(x, gate, quantized, scale, grid, base_weight, *args, out_shape=None, **kwargs) -> int:
    return _forward_flops(x, gate, quantized, grid, base_weight)


@register_flop_formula(torch.ops.kansformer.kan_linear_backward)
def _backward_flops(dy, x, gate, spline_weight, grid, base_weight, *args, out_shape=None, **kwargs) -> int:
    needs = args[-1]
    spline = 2 * x[0] * math.prod(spline_weight)
    base = 2 * x[0] * math.prod(base_weight) if base_weight is not None else 0
    return (needs[0] or needs[1]) * (spline + base) + needs[2] * spline + needs[3] * base


@register_flop_formula(torch.ops.kansformer.fourier_linear)
def _waves_flops(x, sin_weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * x[0] * math.prod(sin_weight)


@register_flop_formula(torch.ops.kansformer.fourier_linear_backward)
def _waves_backward_flops(dy, x, sin_weight, *args, out_shape=None, **kwargs) -> int:
    needs_x, needs_sin, needs_cos = args[-1]
    return 2 * x[0] * math.prod(sin_weight) * (2 * needs_x + needs_sin + needs_cos)


def _check(
    x: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    grid_size: int,
    spline_order: int,
    base_weight: Tensor | None,
    bias: Tensor | None,
    base_activation: str,
    gate: Tensor | None,
    norm_eps: float | None,
) -> None:
    if norm_eps is not None and not (isinstance(norm_eps, (int, float)) and norm_eps >= 0):
        raise ValueError(f"norm_eps is {norm_eps!r}: it must be a number of at least 0, or None for no norm")
    if grid_size < 1 or spline_order not in (1, 2, 3):
        raise ValueError(
            f"kan_linear needs grid_size >= 1 and spline_order 1, 2 or 3, got {grid_size} and {spline_order}"
        )
    if base_activation not in BASE_ACTIVATIONS:
        raise ValueError(f"base_activation is {base_activation!r}; choose one of {', '.join(BASE_ACTIVATIONS)}")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; kan_linear takes floating point inputs")
    inputs = x.shape[-1] if x.dim() else 0
    rows = inputs * splines.num_basis(grid_size, spline_order)
    if spline_weight.dim() != 2 or spline_weight.shape[0] != rows:
        raise ValueError(
            f"x has {inputs} features and grid_size {grid_size} with spline_order {spline_order} gives "
            f"{grid_size + spline_order} splines: spline_weight must be ({rows}, O); it is {tuple(spline_weight.shape)}"
        )
    outputs = spline_weight.shape[1]
    expected = {
        "grid": (grid, ((2,), (inputs, 2))),
        "base_weight": (base_weight, ((outputs, inputs),)),
        "bias": (bias, ((outputs,),)),
        "gate": (gate, (tuple(x.shape),)),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and not any(tuple(tensor.shape) == shape for shape in shapes):
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))} here, got {tuple(tensor.shape)}")


def _check_waves(x: Tensor, sin_weight: Tensor, cos_weight: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; fourier_linear takes floating point inputs")
    inputs = x.shape[-1] if x.dim() else 0
    if sin_weight.dim() != 2 or sin_weight.shape[1] != inputs or sin_weight.shape != cos_weight.shape:
        shapes = f"{tuple(sin_weight.shape)} and {tuple(cos_weight.shape)}"
        raise ValueError(f"x has {inputs} features: sin_weight and cos_weight must be (O, {inputs}); they are {shapes}")
    if sin_weight.dtype != cos_weight.dtype:
        raise TypeError(
            f"sin_weight is {sin_weight.dtype} and cos_weight {cos_weight.dtype}: they must be of one dtype"
        )
