"""The basis as the operand of a 2:4 sparse product: the pattern holds, and torch's reader of the format finds Phi."""

import sys
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import sparse24

from kansformer import splines

FITS = [(1, 4), (1, 8), (1, 12), (2, 8), (2, 16), (3, 8), (3, 12), (3, 16), (3, 64)]


def inputs(G: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of inputs in and out of the grid, on knots too: (64, 16), and its grids."""
    lo = torch.linspace(-2, -1, 16)
    grid = torch.stack([lo, lo + 3], -1)
    x = 2.5 * torch.randn(64, 16)
    x[0] = lo
    x[1] = lo + 3
    x[2] = lo + 3 / G * torch.arange(16).remainder(G + 1)
    x[3], x[4] = 1e6, -1e6
    return x, grid


@pytest.mark.parametrize(("k", "C"), FITS)
def test_at_most_two_in_four(k, C):
    x, grid = inputs(C - k)
    groups = splines.basis(x, grid, C - k, k)[..., sparse24.order(C)].unflatten(-1, (-1, 4))
    assert (groups != 0).sum(-1).max() <= 2
    assert sparse24.fits(C, k)


@pytest.mark.parametrize(("k", "C"), [(2, 4), (3, 4)])
def test_where_more_than_two_it_says_so(k, C):
    x, grid = inputs(C - k)
    groups = splines.basis(x, grid, C - k, k)[..., sparse24.order(C)].unflatten(-1, (-1, 4))
    assert (groups != 0).sum(-1).max() > 2
    with pytest.raises(ValueError, match=f"C = {C} with spline_order {k}"):
        sparse24.operand(x, grid, C - k, k, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "C"), FITS)
def test_torch_reads_phi_back_bit_for_bit(k, C, dtype):
    x, grid = inputs(C - k)
    values, metadata = sparse24.operand(x, grid, C - k, k, dtype)
    assert values.shape == (64, 16 * C // 2)
    assert set(metadata.unique().tolist()) <= {0b0100, 0b1001, 0b1110}  # ascending neighbours, as the format demands
    phi = sparse_semi_structured_to_dense_cutlass(values, sparse24.cutlass(metadata))
    dense = splines.basis(x, grid, C - k, k).to(dtype)
    assert torch.equal(phi, dense[..., sparse24.order(C)].flatten(1))
    weight = torch.randn(16 * C, 8, dtype=torch.double)
    ordered = weight.view(16, C, 8)[:, sparse24.order(C)].flatten(0, 1)
    torch.testing.assert_close(phi.double() @ ordered, dense.double().flatten(1) @ weight, rtol=0, atol=1e-12)


def test_the_emulation_is_sensitive_to_the_metadata():
    x, grid = inputs(7)
    values, metadata = sparse24.operand(x, grid, 7, 1, torch.bfloat16)
    right = sparse_semi_structured_to_dense_cutlass(values, sparse24.cutlass(metadata))
    metadata[5, 3] = {4: 9, 9: 14, 14: 4}[metadata[5, 3].item()]
    values[5, 6:8] = 1
    wrong = sparse_semi_structured_to_dense_cutlass(values, sparse24.cutlass(metadata))
    assert (right != wrong).any(1).nonzero().flatten().tolist() == [5]
