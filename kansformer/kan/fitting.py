"""The fit, its history, and evaluation.

    mean (f(x) - y)^2 + lamb * sum_l ( lamb_l1 * |Phi_l|_1 + lamb_entropy * S(Phi_l) )

    |phi|_1 = mean_n |phi(x_n)|,   |Phi|_1 = sum_edges |phi|_1,   S(Phi) = - sum_edges p log p,   p = |phi|_1 / |Phi|_1

(Liu et al. 2024, arXiv:2404.19756, eq. 2.17 to 2.20). Grids follow the samples in the first steps; they are uniform,
one range for each input: knots at the quantiles of the samples, as the paper's code has them, do not exist here.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kansformer.kan.data import Dataset
from kansformer.layers import check_sizes

if TYPE_CHECKING:
    from kansformer.kan.network import KAN

# Iterations in one L-BFGS step, and remembered curvature pairs: pykan's, so that steps mean the same.
LBFGS_ITERATIONS = 20
LBFGS_MEMORY = 10


def fit(
    model: "KAN",
    dataset: Dataset | Mapping[str, Tensor],
    optimizer: str = "lbfgs",
    steps: int = 50,
    lr: float = 1e-2,
    batch_size: int | None = None,
    lamb: float = 0.0,
    lamb_l1: float = 1.0,
    lamb_entropy: float = 2.0,
    lamb_coef: float = 0.0,
    lamb_coefdiff: float = 0.0,
    update_grid: bool = True,
    grid_updates: int = 10,
    grid_update_until: int = 50,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Fit the network to samples, in place.

    Args:
        dataset: a Dataset, or pykan's dictionary of four tensors. Converted to the network's dtype and device.
        optimizer: "lbfgs" (scipy's L-BFGS-B without bounds; a step is 20 iterations on all samples) or "adam" (a step
            is one batch).
        lr: Adam's learning rate; L-BFGS searches its own.
        batch_size: for Adam; None takes all samples.
        lamb: weight of the regularisation below; 0 leaves it out.
        lamb_l1, lamb_entropy: L1 and entropy of the edge activations (see the head of this file).
        lamb_coef, lamb_coefdiff: sum over edges of mean |W_c| and of mean |W_{c+1} - W_c|.
        update_grid: move every grid to its samples, `grid_updates` times in the first `grid_update_until` steps.
        loss: (prediction, label) to a scalar. None is the mean squared error, or cross-entropy for integer labels.
        seed: of Adam's batches.
        progress: a tqdm bar.
    Returns:
        Lists with one number a step: "train_loss" and "test_loss" (RMSE for the default loss on float labels, else the
        loss itself; Adam's training loss is that of the batch, before its update) and "reg", the regularisation without
        `lamb`. Shorter than `steps` where L-BFGS can lower the loss no further, or the fit was stopped.
    Warns:
        RuntimeWarning: if the loss is not finite; the last good parameters are restored and the fit ends.
        UserWarning: for input columns that are constant, or nearly so for their size.
    Raises:
        ValueError, TypeError: for data that do not fit the network, an unknown optimizer, or nothing left to train.
    """
    if optimizer not in ("lbfgs", "adam"):
        raise ValueError(f"optimizer is {optimizer!r}; choose 'lbfgs' or 'adam'")
    if optimizer == "lbfgs" and batch_size is not None:
        raise ValueError("L-BFGS takes all samples at once; leave batch_size out or use optimizer='adam'")
    counts = {"steps": steps, "grid_updates": grid_updates, "grid_update_until": grid_update_until}
    if batch_size is not None:
        counts["batch_size"] = batch_size
    check_sizes(**counts)
    if not lamb >= 0:
        raise ValueError(f"lamb is {lamb}: it must not be negative, the weight of a penalty")
    if not _trained(model):
        raise ValueError("no parameter requires a gradient: unfreeze some, such as network.requires_grad_(True)")
    data = _dataset(model, dataset)
    low, high = data.train_input.aminmax(dim=0)
    constant = (low == high).nonzero().flatten().tolist()
    if constant and len(data.train_input) > 1:
        warnings.warn(f"input columns {constant} are constant: nothing can be learned from them", stacklevel=2)
    narrow = (high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())) & (low < high)
    if narrow := narrow.nonzero().flatten().tolist():
        remedy = "grids are float32 and cannot follow; subtract the mean"
        warnings.warn(f"input columns {narrow} vary by less than a millionth of their size: {remedy}", stacklevel=2)
    weights = _Regularisation(lamb, lamb_l1, lamb_entropy, lamb_coef, lamb_coefdiff)
    run = _Run(model, data, weights, loss, steps, progress)
    every = max(1, grid_update_until // grid_updates)
    starts = list(range(0, min(steps, grid_update_until), every)) if update_grid else [0]
    with run.bar:
        for start, stop in zip(starts, [*starts[1:], steps]):
            if update_grid:
                model.update_grid(data.train_input)
            good = _lbfgs(run, stop - start) if optimizer == "lbfgs" else _adam(run, stop - start, lr, batch_size, seed)
            if not good:
                break
    model.samples = data.train_input
    if data.test_input is not None:
        warn_outside(model, data.test_input, "test rows")
    return run.history


@torch.no_grad()
def evaluate(model: "KAN", dataset: Dataset | Mapping[str, Tensor]) -> dict[str, float]:
    """RMSE (cross-entropy for integer labels) on the samples: "train_loss" and, with a test set, "test_loss".

    Warns:
        UserWarning: if more than a hundredth of the test rows lie outside the grids of the inputs, with the share.
    """
    data = _dataset(model, dataset)
    measure = _Run(model, data, _Regularisation(), None, 0, False).measure
    found = {"train_loss": measure(data.train_input, data.train_label)}
    if data.test_input is not None:
        warn_outside(model, data.test_input, "test rows")
        found["test_loss"] = measure(data.test_input, data.test_label)
    return found


def warn_outside(model: "KAN", x: Tensor, what: str) -> None:
    """Warn if more than a hundredth of the rows lie outside the first layer's grids by a tenth of an interval or more.

    Nearer, all but a spline below 0.1^k / k! of its coefficient is there; rounding of the grid to float32 is no matter.
    """
    linear = model.layers[0].linear
    lo, hi = linear.grid.unbind(-1)
    margin = (hi - lo) / (10 * linear.grid_size)
    share = ((x < lo - margin) | (x > hi + margin)).any(1).float().mean().item()
    if share > 0.01:
        warnings.warn(
            f"{share:.1%} of the {what} lie outside the grids of the inputs, where the network extrapolates: splines "
            "fall to zero there and only the base term remains",
            stacklevel=3,
        )


class _Regularisation(NamedTuple):
    lamb: float = 0.0
    l1: float = 1.0
    entropy: float = 2.0
    coef: float = 0.0
    coefdiff: float = 0.0

    def __call__(self, model: "KAN", scales: list[Tensor]) -> Tensor:
        total = 0
        for layer, scale in zip(model.layers, scales):
            norm = scale.sum()
            # Pruned edges are 0: clamped, they have no slope, where that of the logarithm would be infinite.
            p = (scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_min(1e-12)
            total = total + self.l1 * norm + self.entropy * torch.special.entr(p).sum()
            if self.coef or self.coefdiff:
                weight = layer.linear.spline_weight.unflatten(0, (layer.linear.in_features, -1))  # (I, C, O)
                weight = weight * layer.edge_mask.mT.unsqueeze(1)
                total = total + self.coef * weight.abs().mean(1).sum()
                total = total + self.coefdiff * weight.diff(dim=1).abs().mean(1).sum()
        return total


class _Run:
    """The objective of one fit, its history and its progress bar."""

    def __init__(self, model, data, weights, loss, steps, progress):
        from tqdm import tqdm

        self.model, self.data, self.weights = model, data, weights
        classes = not data.train_label.is_floating_point()
        self.loss = loss or (F.cross_entropy if classes else F.mse_loss)
        self.rmse = loss is None and not classes
        self.history = {"train_loss": [], "test_loss": [], "reg": []}
        self.bar = tqdm(total=steps, disable=not progress)

    def objective(self, x: Tensor, y: Tensor, features: object = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss with regularisation, without, and the regularisation; `features` are the first layer's of x."""
        scales = []
        for layer in self.model.layers:
            if self.weights.lamb:
                x, scale = layer.scaled(x, features)
                scales.append(scale)
            else:
                x = layer(x, features)
            features = None
        loss = self.loss(x, y)
        if not self.weights.lamb:
            return loss, loss, None
        reg = self.weights(self.model, scales)
        return loss + self.weights.lamb * reg, loss, reg

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor) -> float:
        value = self.loss(self.model(x), y).item()
        return math.sqrt(value) if self.rmse else value

    def record(self, loss: Tensor, reg: Tensor | None) -> None:
        value = loss.item()
        self.history["train_loss"].append(math.sqrt(value) if self.rmse else value)
        self.history["reg"].append(0.0 if reg is None else reg.item())
        shown = {"train": self.history["train_loss"][-1]}
        if self.data.test_input is not None:
            self.history["test_loss"].append(self.measure(self.data.test_input, self.data.test_label))
            shown["test"] = self.history["test_loss"][-1]
        self.bar.set_postfix({name: f"{value:.2e}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def stopped(self) -> bool:
        warnings.warn(
            f"the loss or its gradient is not finite after step {len(self.history['train_loss'])}; the fit ends with "
            "the last good parameters. Scale the data, lower lr, or look at the symbolic functions' domains",
            RuntimeWarning,
            stacklevel=4,
        )
        return False


class _NotFinite(Exception):
    pass


def _lbfgs(run: _Run, steps: int) -> bool:
    """At most steps * LBFGS_ITERATIONS iterations; whether another segment is worth its while.

    Why not torch.optim.LBFGS: it drops every curvature pair with y.s <= 1e-10, which small errors all are, and
    its two loops run in Python.
    """
    try:
        from scipy.optimize import minimize
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('L-BFGS needs scipy: pip install "kansformer[science]", or use optimizer="adam"') from error
    parameters, x, y = _trained(run.model), run.data.train_input, run.data.train_label
    with torch.no_grad():
        features = run.model.layers[0].features(x)
    like, sizes = parameters[0], [p.numel() for p in parameters]

    def put(z) -> None:
        flat = torch.from_numpy(z).to(like)
        with torch.no_grad():
            torch._foreach_copy_(parameters, [part.view_as(p) for part, p in zip(flat.split(sizes), parameters)])

    def value(z):
        put(z)
        objective, _, _ = run.objective(x, y, features)
        gradients = torch.autograd.grad(objective, parameters, materialize_grads=True)
        number, flat = objective.item(), torch.cat([g.flatten() for g in gradients]).double().cpu().numpy()
        if not math.isfinite(number) or not math.isfinite(flat.sum()):
            raise _NotFinite
        return number, flat

    def record() -> None:
        put(good)
        with torch.no_grad():
            run.record(*run.objective(x, y, features)[1:])

    def accept(z) -> None:
        nonlocal good, count
        good, count = z.copy(), count + 1
        if count % LBFGS_ITERATIONS == 0:
            record()

    good, count, finite = torch.cat([p.detach().flatten() for p in parameters]).double().cpu().numpy(), 0, True
    limits = {"maxfun": 10**9, "maxcor": LBFGS_MEMORY, "ftol": 0.0, "gtol": 0.0}
    while count < steps * LBFGS_ITERATIONS:
        before, finite = count, True
        limits["maxiter"] = steps * LBFGS_ITERATIONS - count
        try:
            with threadpool_limits(1, user_api="blas"):  # its threads wait in busy loops on torch's cores: 7x the time
                minimize(value, good, jac=True, method="L-BFGS-B", callback=accept, options=limits)
        except _NotFinite:
            finite = False  # a step too long: again from the last good point, with a short first step
        # A line search fails where differences of the loss are its rounding: worth new memory only while that is used.
        if count - before < (LBFGS_MEMORY if finite else 1):
            break
    if count % LBFGS_ITERATIONS:
        record()
    put(good)
    return finite or run.stopped()


def _adam(run: _Run, steps: int, lr: float, batch_size: int | None, seed: int) -> bool:
    parameters, x, y = _trained(run.model), run.data.train_input, run.data.train_label
    optimizer = torch.optim.Adam(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed + len(run.history["train_loss"]))
    batches = iter(())
    with torch.no_grad():
        features = None if batch_size else run.model.layers[0].features(x)
    good = [p.detach().clone() for p in parameters]
    for _ in range(steps):
        rows = slice(None)
        if batch_size:
            rows = next(batches, None)
            if rows is None:
                batches = iter(torch.randperm(len(x), generator=generator).to(x.device).split(batch_size))
                rows = next(batches)
        objective, loss, reg = run.objective(x[rows], y[rows], features)
        gradients = torch.autograd.grad(objective, parameters, materialize_grads=True)
        if not (objective.isfinite() and sum(g.sum() for g in gradients).isfinite()):
            with torch.no_grad():
                torch._foreach_copy_(parameters, good)
            return run.stopped()
        torch._foreach_copy_(good, [p.detach() for p in parameters])
        for p, g in zip(parameters, gradients):
            p.grad = g
        optimizer.step()
        run.record(loss.detach(), reg if reg is None else reg.detach())
    optimizer.zero_grad()
    return True


def _trained(model: "KAN") -> list[Tensor]:
    """The parameters that train; formulas only where there are some."""
    idle = [id(layer.symbolic.affine) for layer in model.layers if not layer.symbolic.groups()]
    return [p for p in model.parameters() if p.requires_grad and id(p) not in idle]


def _dataset(model: "KAN", dataset: Dataset | Mapping[str, Tensor]) -> Dataset:
    """The dataset in the network's dtype and device, checked against its width."""
    if not isinstance(dataset, Dataset):
        if not isinstance(dataset, Mapping):
            raise TypeError(f"dataset must be a Dataset or a dictionary of tensors, got {type(dataset).__name__}")
        dataset = Dataset(**dataset)
    data = dataset.to(model.device, model.dtype)
    columns, outputs = data.train_input.shape[1], model.out_features
    if columns != model.in_features:
        raise ValueError(f"the data have {columns} input columns, the network takes {model.in_features}")
    if data.train_label.is_floating_point():
        if data.train_label.shape[1] != outputs:
            raise ValueError(f"the data have {data.train_label.shape[1]} label columns, the network gives {outputs}")
    elif not (data.train_label.min() >= 0 and data.train_label.max() < outputs):
        lo, hi = data.train_label.min().item(), data.train_label.max().item()
        raise ValueError(f"classes go from {lo} to {hi}, but the network has {outputs} outputs: classes 0 .. O - 1")
    return data
