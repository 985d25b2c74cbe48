"""Grids fitted to what the layers see, during training, on however many processes."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

SAMPLES = 1 << 14  # tokens of a global batch whose values fit the grids: a standard deviation to half a percent


@torch.no_grad()
def update_grids(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Iterable[torch.Tensor],
    tokens: int,
    spread: float,
) -> None:
    """Fit every grid to the layer's inputs on one global batch, keep every edge function, forget the moments.

    All processes call this with their shares. The samples of a layer are every n-th token's inputs in one pass of the
    model as it is, whatever the number of processes and accumulated shares; `KANLinear.update_grid` reduces their
    statistics over the processes, so that all get the same grids and coefficients, to the bit. AdamW's moments of
    `spline_weight` are dropped with its step count: they belong to the coefficients on the old grid, and squares do not
    go through a linear map, so the layer starts over as at the first step.

    Args:
        model: a Kansformer, unwrapped but for FSDP2.
        inputs: input ids (b, T), one share after the other.
        tokens: B * T of the global batch, over all processes and shares.
        spread: standard deviations on either side of the mean.
    """
    stride = -(-tokens // SAMPLES)
    layers = dict(model.kan_layers())
    samples: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def collect(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        every = min(stride, x.shape[1])
        samples[name].append(x[:, every // 2 :: every].flatten(0, 1).clone())

    for input_ids in inputs:
        model.visit_kan_inputs(collect, input_ids=input_ids, logits_to_keep=1, use_cache=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, layer in layers.items():
        weight = layer.spline_weight
        if isinstance(weight, DTensor):  # a refit needs all coefficients of an edge: the whole for a moment
            layer.spline_weight = nn.Parameter(weight.full_tensor())
            layer.update_grid(torch.cat(samples.pop(name)), spread)
            weight.copy_(distribute_tensor(layer.spline_weight.detach(), weight.device_mesh, weight.placements))
            layer.spline_weight = weight
        else:
            layer.update_grid(torch.cat(samples.pop(name)), spread)
        optimizer.state.pop(weight, None)
