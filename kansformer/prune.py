"""Structured pruning of a trained model: hidden units leave the feed-forward blocks, and the model is really smaller.

    python -m kansformer.prune MODEL_DIR --text FILE --share 0.3 --output SMALLER_DIR

A unit h of a block adds a vector to the block's output, y = sum_h u_h: a column of weights times an activation in `mlp`
and `swiglu`, a column of learned functions in the KAN blocks. Its importance is measured on a text by one of

    taylor    E |u_h . dL/dy|    the first-order change of the loss without it, a token at a time
                                 (Molchanov et al. 2017, arXiv:1611.06440)
    energy    E |u_h|^2          needs no gradient

`benchmarks/bench_prune.py` compares them, with weights' magnitudes and chance. Removing units from a block without
norm leaves exactly the sum of the others. Where a block normalises over its units, the mean square is now that of those
kept; its expected change is measured, and the functions behind the norm are stretched by it.

Letters: H hidden units of a block, M tokens.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kansformer import splines
from kansformer.inspect.edges import Moments
from kansformer.kernels.torch_kan import activation
from kansformer.layers import EdgeLayer, FeedForward, FourierLinear, KANLinear, SwiGLU, observing, refuse_adapters

CRITERIA = ("taylor", "energy")
SCOPES = ("uniform", "global")


@dataclass
class Units:
    """What the hidden units of one block did on a text.

    Attributes:
        importance: (H,), see the module.
        power: (H,), E[z_h^2] of the block's normalised values, of which the mean is 1; None for a block without norm.
    """

    importance: Tensor
    power: Tensor | None


def measure_units(model: nn.Module, batches: Iterable[Tensor], criterion: str = "taylor") -> list[Units]:
    """The importance of every hidden unit of every feed-forward block on a text.

    Args:
        model: a causal language model with blocks of `kansformer.layers`. Put into eval mode, and back.
        batches: int64 (batch, sequence) each.
        criterion: "taylor" (a backward pass a batch) or "energy".
    Raises:
        ValueError: for an unknown criterion, a model without such blocks or with adapters in them, or no text.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}")
    probes = [_Probe(block, criterion) for block in feed_forward_blocks(model)]
    hooks = [hook for probe in probes for hook in probe.hooks()]
    device, tokens = next(model.parameters()).device, 0
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)  # the only gradients are those of the units
        with observing(model, hooks), torch.set_grad_enabled(criterion == "taylor"):
            for input_ids in batches:
                input_ids = input_ids.to(device)
                tokens += input_ids.numel()
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
                if criterion == "taylor":
                    (loss * (input_ids.shape[1] - 1) * input_ids.shape[0]).backward()  # of the sum over targets
                    for probe in probes:
                        probe.collect()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    if not tokens:
        raise ValueError("measure_units got no text: give batches of tokens")
    return [probe.units(tokens) for probe in probes]


def feed_forward_blocks(model: nn.Module) -> list[FeedForward]:
    """The model's feed-forward blocks, in order.

    Raises:
        ValueError: if it has none, one has no `down_proj`, or an adapter sits on a layer of one.
    """
    blocks = [m for m in model.modules() if isinstance(m, FeedForward)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no feed-forward blocks of kansformer.layers: nothing to prune")
    for block in blocks:
        if not hasattr(block, "down_proj"):
            raise ValueError(
                f"{type(block).__name__} has no down_proj, whose inputs are the units that are pruned: the blocks of "
                "kansformer.layers have one"
            )
        refuse_adapters(block)
    return blocks


class _Probe:
    """Sums over tokens for the units of one block, taken at the input of its `down_proj`."""

    def __init__(self, block: FeedForward, criterion: str) -> None:
        self.block, self.criterion = block, criterion
        layer = block.down_proj
        self.normalised = getattr(block, "ffn_norm", False) or getattr(block, "gate_norm", None) is not None
        self.total, self.power = (torch.zeros(layer.in_features, dtype=torch.float64) for _ in range(2))
        self.moments = Moments("down_proj", layer) if criterion == "energy" and isinstance(layer, EdgeLayer) else None
        self.presence: Tensor | None = None

    def hooks(self) -> list:
        hooks = [self.block.down_proj.register_forward_pre_hook(self.look, with_kwargs=True)]
        if isinstance(self.block, SwiGLU) and self.normalised:
            hooks.append(self.block.gate_norm.register_forward_pre_hook(self.look_at_norm))
        return hooks

    def look_at_norm(self, norm: nn.Module, args: tuple) -> None:
        z = args[0].detach().double().flatten(0, -2)
        self.power += (z / z.square().mean(-1, keepdim=True).sqrt()).square().sum(0).cpu()

    def look(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        (x,) = args
        squares = x.detach().double().square().flatten(0, -2).sum(0).cpu()
        if isinstance(layer, EdgeLayer):
            self.power += squares
        if self.criterion == "energy":
            if self.moments is not None:
                self.moments.add(x, kwargs.get("gate"))
            else:
                self.total += squares
            return None
        # Ones that multiply what each unit adds: their gradient is u . dL/dy.
        self.presence = torch.ones_like(x).requires_grad_()
        if not isinstance(layer, EdgeLayer):
            return (x * self.presence,), kwargs
        gate = kwargs.get("gate")
        return args, kwargs | {"gate": self.presence if gate is None else gate * self.presence}

    def collect(self) -> None:
        self.total += self.presence.grad.double().abs().flatten(0, -2).sum(0).cpu()
        self.presence = None

    def units(self, tokens: int) -> Units:
        layer, importance = self.block.down_proj, self.total / tokens
        if self.moments is not None:
            importance = self.moments.statistics().energy.double().sum(1).cpu()
        elif self.criterion == "energy":
            importance = importance * layer.weight.detach().double().square().sum(0).cpu()
        return Units(importance, self.power / tokens if self.normalised else None)


def choose_units(
    importance: Sequence[Tensor], share: float, scope: str = "uniform", multiple_of: int = 1
) -> list[Tensor]:
    """The units to keep: all but the least important `share`.

    Args:
        importance: (H,) of each block.
        share: of the units to remove, in [0, 1).
        scope: "uniform" removes that share from every block; "global" ranks all units of the model together.
        multiple_of: round the kept number of every block to the nearest multiple (tensor cores like 8); at least one
            multiple stays.
    Returns:
        The kept units of each block, ascending.
    Raises:
        ValueError: for a share outside [0, 1), an unknown scope, or values that are not finite.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}: it must lie in [0, 1), the part of the hidden units that goes")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; choose one of {', '.join(SCOPES)}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}: it must be at least 1")
    if not all(i.isfinite().all() for i in importance):
        raise ValueError("the units' importance is NaN or infinite: the model's loss is, on this text")
    if scope == "uniform" or not importance:
        counts = [(1 - share) * len(i) for i in importance]
    else:
        ranked = torch.cat(list(importance)).argsort(descending=True, stable=True)
        block = torch.cat([torch.full((len(i),), n) for n, i in enumerate(importance)])
        best = block[ranked[: max(1, round((1 - share) * len(ranked)))].cpu()]
        counts = best.bincount(minlength=len(importance)).tolist()
    kept = []
    for i, count in zip(importance, counts):
        count = min(len(i), max(multiple_of, multiple_of * round(count / multiple_of)))
        kept.append(i.argsort(descending=True, stable=True)[:count].sort().values)
    return kept


@torch.no_grad()
def remove_units(model: nn.Module, kept: Sequence[Tensor], units: Sequence[Units] | None = None) -> nn.Module:
    """A copy of a model with only the `kept` hidden units; its configuration says so, so it saves and loads as any.

    Without norm in the blocks its outputs are those of the model with the other units' contributions removed. With a
    norm, `units` of `measure_units` stretch the functions behind it by the expected root mean square of those kept.

    Args:
        model: a Kansformer (its `config.intermediate_size` is set).
        kept: int64 indices for each block, ascending; `choose_units` makes them.
        units: what was measured, for blocks with a norm. None: nothing is stretched.
    Raises:
        ValueError: if the number of blocks differs, an index is missing, out of range or given twice, an adapter sits
            on a layer of a block, or the blocks have no up projection: there a unit's place says which input it
            multiplies.
    """
    blocks = feed_forward_blocks(model)
    if len(kept) != len(blocks):
        raise ValueError(f"kept has {len(kept)} entries, the model {len(blocks)} blocks: give one for each")
    for index, (block, keep) in enumerate(zip(blocks, kept)):
        if getattr(block, "up_proj", block) is None:
            raise ValueError("project_value is False: unit h multiplies x[h mod d], so no unit can leave the block")
        size = block.down_proj.in_features
        if keep.numel() == 0 or keep.min() < 0 or keep.max() >= size or len(keep.unique()) < len(keep):
            raise ValueError(f"kept[{index}] must hold distinct units of 0 .. {size - 1}, at least one")
    smaller = copy.deepcopy(model)
    for index, (block, keep) in enumerate(zip(feed_forward_blocks(smaller), kept)):
        power = units[index].power if units is not None else None
        _shrink(block, keep.to(next(block.parameters()).device), power)
    sizes = [len(keep) for keep in kept]
    smaller.config.intermediate_size = sizes[0] if len(set(sizes)) == 1 else sizes
    return smaller


def _shrink(block: FeedForward, keep: Tensor, power: Tensor | None) -> None:
    stretch = 1.0 if power is None else power.to(keep.device)[keep].mean().sqrt().item()
    block.elementwise_flops = block.elementwise_flops * len(keep) // block.down_proj.in_features
    for name, module in block.named_children():
        if isinstance(module, nn.RMSNorm):
            module.weight = _kept(module.weight, module.weight[keep] * stretch)
            module.normalized_shape = (len(keep),)
        elif name == "down_proj":
            _keep_inputs(module, keep)
            if isinstance(module, KANLinear) and stretch != 1:
                _stretch_inputs(module, stretch)
        else:
            _keep_outputs(module, keep)


def _kept(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad)


def _keep_inputs(layer: nn.Linear | EdgeLayer, keep: Tensor) -> None:
    if isinstance(layer, FourierLinear):
        for waves in layer.children():
            _keep_inputs(waves, keep)
    elif isinstance(layer, KANLinear):
        rows = layer.spline_weight.unflatten(0, (layer.in_features, layer.num_basis))[keep]
        layer.spline_weight = _kept(layer.spline_weight, rows.flatten(0, 1))
        layer.grid = layer.grid[keep]
        if layer.base_weight is not None:
            layer.base_weight = _kept(layer.base_weight, layer.base_weight[:, keep])
    else:
        layer.weight = _kept(layer.weight, layer.weight[:, keep])
    layer.in_features = len(keep)


def _keep_outputs(layer: nn.Linear | KANLinear, keep: Tensor) -> None:
    if isinstance(layer, KANLinear):
        layer.spline_weight = _kept(layer.spline_weight, layer.spline_weight[:, keep])
        if layer.base_weight is not None:
            layer.base_weight = _kept(layer.base_weight, layer.base_weight[keep])
    else:
        layer.weight = _kept(layer.weight, layer.weight[keep])
    if layer.bias is not None:
        layer.bias = _kept(layer.bias, layer.bias[keep])
    layer.out_features = len(keep)


def _stretch_inputs(layer: KANLinear, factor: float, samples: int = 200) -> None:
    """Make the layer a function of x / factor: f(factor * x). Exact for the splines, whose grid shrinks by `factor`.

    The base term becomes factor * base_weight * act(x), and the splines take the rest, act(factor x) - factor act(x):
    nothing for relu and identity, a smooth bump for silu and gelu.
    """
    layer.grid = layer.grid / factor
    if layer.base_weight is None:
        return
    lo, hi = layer.grid.double().unbind(-1)
    x = lo + (hi - lo) * torch.linspace(0, 1, samples, dtype=torch.float64, device=lo.device).unsqueeze(-1)
    rest = activation(factor * x, layer.base_activation) - factor * activation(x, layer.base_activation)
    bump = splines.fit(x, rest.unsqueeze(-1), layer.grid, layer.grid_size, layer.spline_order).unflatten(
        0, (layer.in_features, layer.num_basis)
    )  # (I, C, 1)
    update = bump * layer.base_weight.double().mT.unsqueeze(1)
    layer.spline_weight.copy_((layer.spline_weight.double() + update.flatten(0, 1)).to(layer.spline_weight.dtype))
    layer.base_weight.mul_(factor)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Cross entropy of the next token, in nats, averaged over the targets of all batches."""
    total, count = 0.0, 0
    for input_ids in batches:
        input_ids = input_ids.to(next(model.parameters()).device)
        targets = input_ids.shape[0] * (input_ids.shape[1] - 1)
        total += model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.item() * targets
        count += targets
    return total / count


@torch.no_grad()
def time_ratio(smaller: nn.Module, model: nn.Module, input_ids: Tensor, rounds: int = 15) -> float:
    """Time of a forward pass of the one over the other's on input_ids (B, S): the median ratio of passes in turns."""
    input_ids = input_ids.to(next(model.parameters()).device)
    ratios = []
    for _ in range(rounds + 1):  # the first is a warm-up
        seconds = []
        for network in (model, smaller):
            started = time.perf_counter()
            network(input_ids=input_ids, use_cache=False).logits.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    from kansformer.inspect.loading import load, token_batches

    parser = argparse.ArgumentParser(
        prog="python -m kansformer.prune", description="Remove the least important hidden units of a trained model."
    )
    parser.add_argument("model", help="a folder with a model and its tokenizer")
    parser.add_argument("--text", required=True, help="UTF-8 text: three quarters measure the units, the rest the loss")
    parser.add_argument("--share", type=float, required=True, help="of the hidden units to remove, in [0, 1)")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the smaller model")
    parser.add_argument("--scope", choices=SCOPES, default="uniform", help="%(default)s: see choose_units")
    parser.add_argument("--criterion", choices=CRITERIA, default="taylor", help="default %(default)s")
    parser.add_argument("--multiple_of", type=int, default=8, help="of which widths are; default %(default)s")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text to use, at most; default %(default)s")
    parser.add_argument("--sequence_length", type=int, default=256, help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        if options.output.exists():
            raise ValueError(f"{options.output} exists: name a new folder")
        choose_units([], options.share, options.scope, options.multiple_of)
        model, tokenizer = load(options.model)
        batches = token_batches(
            tokenizer,
            options.text,
            vocab_size=model.config.vocab_size,
            sequence_length=min(options.sequence_length, model.config.max_position_embeddings),
            max_tokens=options.tokens,
        )
        cut = max(1, 3 * len(batches) // 4)
        units = measure_units(model, batches[:cut], options.criterion)
        kept = choose_units([u.importance for u in units], options.share, options.scope, options.multiple_of)
        smaller = remove_units(model, kept, units)
    except ValueError as error:
        sys.exit(f"error: {error}")
    part = options.output.with_name(f"{options.output.name}.part")
    smaller.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(options.output)
    held_out = batches[cut:] or batches
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    print(f"hidden units: {model.config.intermediate_size} -> {smaller.config.intermediate_size}")
    print(f"parameters: {before:,} -> {after:,} ({after / before - 1:+.1%})")
    print(f"time of a forward pass: {time_ratio(smaller, model, batches[0]):.2f}x")
    print(f"loss on {'the rest of ' if batches[cut:] else ''}the text: {mean_loss(model, held_out):.4f} -> ", end="")
    print(f"{mean_loss(smaller, held_out):.4f} nats a token\nsaved in {options.output}")


if __name__ == "__main__":
    main()
