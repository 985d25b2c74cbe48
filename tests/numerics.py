"""The one way in which tests compare numbers."""

import torch
from torch import Tensor


def error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference|| in float64; infinite where the result holds NaN or the shapes differ."""
    if result.shape != reference.shape:
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    reference = reference.double()
    relative = (
        (result.double() - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.double).tiny)
    ).item()
    return relative if relative == relative else float("inf")


def assert_close(result: Tensor, reference: Tensor, tolerance: float, what: str = "result") -> None:
    """Norm-relative agreement with a reference of higher precision."""
    e = error(result, reference)
    assert e <= tolerance, f"{what} is off by {e:.2e} of its norm, more than {tolerance:.2e}"


def assert_twice(result: Tensor, twin: Tensor, reference: Tensor, epsilon: float, what: str = "result") -> None:
    """The 2x rule: at most twice the error of plain torch at the same dtype, `twin`, plus epsilon."""
    e, allowed = error(result, reference), 2 * error(twin, reference) + epsilon
    assert e <= allowed, f"{what} is off by {e:.2e} of its norm, more than {allowed:.2e}"
