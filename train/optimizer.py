"""The learning rate of every step, and what the optimizer does to which parameters."""

import math
from collections.abc import Callable

import torch
from settings import Settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kansformer.layers import KANLinear

# Newton-Schulz coefficients of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): five of these steps
# bring singular values between 0.003 and 1 to between 0.68 and 1.27.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def learning_rate(settings: Settings, step: int) -> float:
    """Of the update after `step` updates: linear warm-up, then a cosine from learning_rate to its min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    floor = settings.min_lr_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Matrices decay; norms, biases and embeddings do not; spline coefficients have a rate and a decay of their own.

    `functions` is how many matrices a parameter of the group holds, for `Muon`: the coefficients (I*C, O) of a KAN
    layer are C of them, one a basis function; 0 where it leaves the parameter to AdamW, as it does the output head.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = set() if head is None else {id(p) for p in head.parameters()}
    counts = {id(m.spline_weight): m.num_basis for m in model.modules() if isinstance(m, KANLinear)}
    groups: dict[tuple, list] = {}
    for parameter in model.parameters():
        if id(parameter) in counts:
            key = settings.spline_weight_decay, settings.spline_lr_ratio, counts[id(parameter)]
        elif parameter.ndim < 2 or id(parameter) in embeddings:
            key = 0.0, 1.0, 0
        else:
            key = settings.weight_decay, 1.0, int(parameter.ndim == 2 and id(parameter) not in heads)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_ratio": ratio, "functions": functions}
        for (decay, ratio, functions), parameters in groups.items()
    ]


def optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, or Muon with AdamW for what is no matrix, as `settings.optimizer` says."""
    kind = Muon if settings.optimizer == "muon" else torch.optim.AdamW
    betas = settings.beta1, settings.beta2
    return kind(parameter_groups(model, settings), lr=settings.learning_rate, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for matrices (Jordan et al. 2024), AdamW for the other parameters.

    A matrix (A, B) moves by lr * 0.2 * sqrt(max(A, B)) times its orthogonalised momentum, so that an entry moves by as
    much as under AdamW and both take the same rate and decay (Liu et al. 2025, arXiv:2502.16982, eq. 4).

    The coefficients (I*C, O) of a KAN layer are orthogonalised as C matrices (I, O), one a basis function, because only
    k + 1 of them act on a token: each then moves as a linear layer's matrix would. torch.optim.Muon sees one matrix,
    and adds nothing else here. Under FSDP2 every process orthogonalises the whole matrix and keeps its shard.

    Where `found_inf`, AdamW's flag on the device, is set, nothing moves.

    Args:
        params: groups with the key `functions` of `parameter_groups`; where it is 0, AdamW.
        momentum: of Nesterov's kind.
    """

    def __init__(self, params: list[dict], momentum: float = 0.95, **options: object) -> None:
        super().__init__(params, **options)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One update; gradients of what Muon moved are dropped."""
        assert closure is None
        flag = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"] if group["functions"] else ():
                if parameter.grad is None:
                    continue
                keep = flag if flag is not None else parameter.new_zeros(())
                self._update(parameter, group, keep.to(parameter.device))
                parameter.grad = None
        return super().step()

    def _update(self, parameter: Tensor, group: dict, keep: Tensor) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weight, momentum, gradient = map(_local, (parameter, state["momentum_buffer"], parameter.grad))
        momentum.lerp_(torch.where(keep > 0, momentum, gradient), 1 - self.momentum)
        direction = torch.where(keep > 0, momentum, gradient).lerp(momentum, self.momentum)
        if isinstance(parameter, DTensor):
            placed = parameter.device_mesh, parameter.placements
            whole = DTensor.from_local(direction, *placed, shape=parameter.shape, stride=parameter.stride())
            update = orthogonalise(whole.full_tensor(), group["functions"])
            update = distribute_tensor(update, *placed, src_data_rank=None).to_local()
        else:
            update = orthogonalise(direction, group["functions"])
        moves = 1 - keep
        rows, columns = parameter.shape[0] // group["functions"], parameter.shape[1]
        weight.mul_(1 - group["lr"] * group["weight_decay"] * moves)
        weight.sub_(update * (group["lr"] * 0.2 * math.sqrt(max(rows, columns)) * moves))


def orthogonalise(matrix: Tensor, functions: int = 1, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values between 0.68 and 1.27.

    Args:
        matrix: (A*C, B), row a*C + c.
        functions: C, each of whose matrices (A, B) is orthogonalised by itself.
    Returns:
        (A*C, B) in matrix's dtype; zeros where a matrix is all zeros.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.unflatten(0, (-1, functions)).transpose(0, 1)  # (C, A, B)
    x = x.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    x = x.mT if tall else x
    return x.transpose(0, 1).flatten(0, 1).to(matrix.dtype)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
