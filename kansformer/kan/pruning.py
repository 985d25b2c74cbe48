"""What an edge and a node contribute, and the smaller network without those that contribute little.

Attribution scores (KAN 2.0, Liu et al. 2024, arXiv:2408.10205): with E_ji the standard deviation of edge i -> j over
the samples and N_j that of the subnode it ends in, scores flow back from the outputs, where A = 1:

    B_ji = A_j * E_ji / N_j    (edges),    A_i = sum_j B_ji    (nodes)

and both subnodes of a product node carry its score. Unlike the norms of arXiv:2404.19756, section 2.5.1, they know
whether what leaves a node arrives anywhere.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kansformer.kan.network import KAN, KANLayer


class Importance(NamedTuple):
    """`edges`: (O, I) for each layer. `nodes`: (n,) for the inputs and each layer's nodes; outputs have 1."""

    edges: list[Tensor]
    nodes: list[Tensor]


@torch.no_grad()
def importance(model: "KAN", x: Tensor | None = None) -> Importance:
    """Attribution scores of all edges and nodes over samples.

    Args:
        x: (N, n_in) samples; None takes those of the last `fit`.
    """
    x = model.samples_or(x)
    spread = []  # of edges (O, I) and subnodes (O,)
    for layer, edges in zip(model.layers, model.activations(x)):
        spread.append((edges.std(0, correction=0), edges.sum(-1).std(0, correction=0), layer))
    nodes, scores = [torch.ones(model.out_features, dtype=model.dtype, device=model.device)], []
    for edge, subnode, layer in reversed(spread):
        tiny = torch.finfo(edge.dtype).eps * edge.sum(1)  # a subnode whose edges cancel to rounding is constant
        share = torch.where(subnode > tiny, 1 / subnode, 0).unsqueeze(1) * edge
        scores.insert(0, _subnodes(nodes[0], layer).unsqueeze(1) * share)
        nodes.insert(0, scores[0].sum(0))
    return Importance(scores, nodes)


@torch.no_grad()
def prune(
    model: "KAN",
    node_threshold: float = 1e-2,
    edge_threshold: float = 3e-2,
    prune_input: bool = False,
    x: Tensor | None = None,
) -> "KAN":
    """A smaller network without the nodes and edges whose scores lie below the thresholds; this one stays as it is.

    Removed nodes are gone from `width` with all their edges. A removed edge between kept nodes is masked: exactly 0. A
    node that nothing enters or leaves goes too, with the constant it sent on: fit again afterwards.

    Args:
        node_threshold, edge_threshold: smallest scores that stay (`importance`); pykan's defaults.
        prune_input: remove inputs as well; the new network's `inputs` lists the columns of ours that it takes.
        x: (N, n_in) samples; None takes those of the last `fit`.
    Raises:
        ValueError: if an output would be left without any path from an input, with thresholds that would work.
    """
    samples = model.samples_or(x)
    scores = importance(model, samples)
    masks, nodes = _alive(model, scores, node_threshold, edge_threshold)
    if not nodes[-1].all():
        lost = (~nodes[-1]).nonzero().flatten().tolist()
        raise ValueError(
            f"pruning at node_threshold={node_threshold:g} and edge_threshold={edge_threshold:g} would leave nothing "
            f"that reaches output {lost}; {_remedy(model, scores, node_threshold, edge_threshold)}"
        )
    if not prune_input:
        nodes[0].fill_(True)
    smaller = _shrink(model, masks, nodes)
    smaller.samples = samples[:, nodes[0].to(samples.device)]
    return smaller


def _alive(model: "KAN", scores: Importance, node_threshold: float, edge_threshold: float) -> tuple[list, list]:
    """Edge masks (O, I) and node masks (n,), bool: what lies on a path from an input to an output above thresholds."""
    layers = model.layers
    masks = [(b > 0) & (b >= edge_threshold) & (m.edge_mask > 0) for b, m in zip(scores.edges, layers)]
    nodes = [a >= node_threshold for a in scores.nodes]
    nodes[0].fill_(True)  # an input goes with its last edge, not before
    nodes[-1].fill_(True)
    for _ in range(len(layers) + 1):  # what dies at one end of the network reaches the other in as many rounds
        for depth, layer in enumerate(layers):
            masks[depth] &= nodes[depth] & _subnodes(nodes[depth + 1], layer).unsqueeze(1)
            fed = masks[depth].any(1)
            factors = fed[layer.sums :]
            nodes[depth + 1] = nodes[depth + 1] & torch.cat([fed[: layer.sums], factors[::2] & factors[1::2]])
            nodes[depth] = nodes[depth] & masks[depth].any(0)
    return masks, nodes


def _remedy(model: "KAN", scores: Importance, node_threshold: float, edge_threshold: float) -> str:
    for power in range(1, 60):
        node, edge = node_threshold * 0.5**power, edge_threshold * 0.5**power
        if _alive(model, scores, node, edge)[1][-1].all():
            return f"node_threshold={node:.2g} and edge_threshold={edge:.2g} would leave a path to every output"
    return "no threshold above 0 works, for that output is constant on the samples: leave it out, or fit first"


def _shrink(model: "KAN", masks: list[Tensor], nodes: list[Tensor]) -> "KAN":
    """The network of the kept nodes: every tensor of a layer cut to its kept subnodes and inputs."""
    width = [[int(nodes[0].sum()), 0]]
    for layer, alive in zip(model.layers, nodes[1:]):
        width.append([int(alive[: layer.sums].sum()), int(alive[layer.sums :].sum())])
    smaller = type(model)(**{**model.config(), "width": width})
    smaller.inputs = [column for column, kept in zip(model.inputs, nodes[0].tolist()) if kept]
    for depth, (old, new) in enumerate(zip(model.layers, smaller.layers)):
        columns, rows = nodes[depth], _subnodes(nodes[depth + 1], old)
        state = {}
        for name, tensor in old.state_dict().items():
            if name == "linear.spline_weight":
                cut = tensor.unflatten(0, (old.linear.in_features, -1))[columns][:, :, rows].flatten(0, 1)
            elif name == "linear.grid":
                cut = tensor[columns]
            else:  # (O, I) or (O, I, ...)
                cut = (masks[depth].to(tensor) if name == "edge_mask" else tensor)[rows][:, columns]
            state[name] = cut
        new.load_state_dict(state)
        for kept, parameter in zip(old.parameters(), new.parameters()):
            parameter.requires_grad_(kept.requires_grad)
    return smaller.to(model.device)


def _subnodes(nodes: Tensor, layer: "KANLayer") -> Tensor:
    """One value a node (sums + products) to one a subnode (sums + 2 * products)."""
    return torch.cat([nodes[: layer.sums], nodes[layer.sums :].repeat_interleave(2)])
