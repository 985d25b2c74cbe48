"""Samples to learn from: checked once, where they enter."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Dataset:
    """Samples to learn from and, optionally, to test on. Also `dataset["train_input"]`, as in pykan.

    Args:
        train_input: (N, I) tensor, array or nested list.
        train_label: (N, O) or (N,) floats; or (N,) integers, classes.
        test_input, test_label: the same, both or neither.

    Raises:
        ValueError: for shapes that do not fit, no rows, or NaN and infinity, naming the first row and column.
    """

    def __init__(self, train_input, train_label, test_input=None, test_label=None) -> None:
        if (test_input is None) != (test_label is None):
            raise ValueError("a test set needs both test_input and test_label; give both or neither")
        self.train_input, self.train_label = _pair("train", train_input, train_label)
        self.test_input, self.test_label = None, None
        if test_input is not None:
            self.test_input, self.test_label = _pair("test", test_input, test_label)
            if self.test_input.shape[1] != self.train_input.shape[1] or (
                self.test_label.shape[1:] != self.train_label.shape[1:]
            ):
                raise ValueError(
                    f"train and test rows differ: inputs {tuple(self.train_input.shape)} and "
                    f"{tuple(self.test_input.shape)}, labels {tuple(self.train_label.shape)} and "
                    f"{tuple(self.test_label.shape)}"
                )

    def __getitem__(self, name: str) -> Tensor | None:
        return getattr(self, name)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Dataset":
        """Floats in `dtype` and everything on `device`."""
        moved = Dataset.__new__(Dataset)
        for name, tensor in vars(self).items():
            if tensor is not None:
                tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
            setattr(moved, name, tensor)
        return moved


def create_dataset(
    f: Callable[[Tensor], Tensor],
    n_var: int = 2,
    ranges: Sequence = (-1, 1),
    train_num: int = 1000,
    test_num: int = 1000,
    normalize_input: bool = False,
    normalize_label: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Uniform random samples of a function, as pykan's function of this name.

    Args:
        f: (N, n_var) to (N, O) or (N,).
        ranges: (lo, hi) of every variable, or one pair for each.
        normalize_input, normalize_label: subtract the training mean and divide by the training standard deviation.
        seed: of the samples; torch's generator is left as it was.
    """
    bounds = torch.as_tensor(ranges, dtype=torch.float64)
    if bounds.shape not in ((2,), (n_var, 2)) or not (bounds[..., 0] < bounds[..., 1]).all():
        raise ValueError(f"ranges must be (lo, hi) or {n_var} of them, lo < hi, got {ranges!r}")
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(train_num + test_num, n_var, dtype=torch.float64, generator=generator)
    x = (bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * unit).to(device, dtype)
    y = f(x)
    x, y = x.detach(), y.detach().reshape(len(x), -1)
    parts = [x[:train_num], y[:train_num], x[train_num:], y[train_num:]]
    for normalize, k in ((normalize_input, 0), (normalize_label, 1)):
        if normalize:
            std, mean = torch.std_mean(parts[k], 0)
            parts[k], parts[k + 2] = (parts[k] - mean) / std, (parts[k + 2] - mean) / std
    return Dataset(*parts[: 4 if test_num else 2])


def _pair(name: str, x: object, y: object) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name}_input must be (N, I) with at least one row and column, got {tuple(x.shape)}")
    if y.dim() == 1 and y.is_floating_point():
        y = y.unsqueeze(1)
    if y.dim() not in (1, 2) or len(y) != len(x):
        raise ValueError(
            f"{name}_label must be ({len(x)}, O) or ({len(x)},) for {len(x)} input rows, got {tuple(y.shape)}"
        )
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    y = y.long() if y.dim() == 1 else y if y.is_floating_point() else y.to(x.dtype)
    for part, tensor in (("input", x), ("label", y)):
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            at = bad[0].tolist()
            raise ValueError(
                f"{name}_{part} holds {tensor[tuple(at)].item()} in row {at[0]}, column {at[-1]} "
                f"({len(bad)} such values); drop or fill those rows first"
            )
    return x, y
