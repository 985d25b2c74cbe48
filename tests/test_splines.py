import numpy as np
import pytest
import torch
from numerics import assert_close, assert_twice, error
from scipy.interpolate import BSpline

from kansformer import splines

GRIDS = [(-1.0, 1.0), (-2.7, 0.4), (3.0, 3.5)]


def scipy_basis(x, grid, grid_size, spline_order):
    knots = splines.knots(grid, grid_size, spline_order).numpy()
    columns = [
        BSpline.basis_element(knots[c : c + spline_order + 2], extrapolate=False)(x.numpy())
        for c in range(grid_size + spline_order)
    ]
    return torch.from_numpy(np.nan_to_num(np.stack(columns, -1)))


def off_knots(grid, grid_size, margin=2.0, count=400):
    """Points in and around the grid, none of them a knot."""
    lo, hi = grid.tolist()
    width = hi - lo
    x = torch.linspace(lo - margin * width, hi + margin * width, count, dtype=torch.float64)
    t = (x - lo) * grid_size / width
    return x[(2 * t - (2 * t).round()).abs() > 1e-3]


@pytest.mark.parametrize("spline_order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid_size", [1, 2, 5, 40])
@pytest.mark.parametrize("bounds", GRIDS)
def test_basis_agrees_with_scipy(spline_order, grid_size, bounds):
    grid = torch.tensor(bounds, dtype=torch.float64)
    x = off_knots(grid, grid_size)
    oracle = scipy_basis(x, grid, grid_size, spline_order)
    for basis in (splines.basis, splines.cox_de_boor):
        value = basis(x.unsqueeze(-1), grid, grid_size, spline_order).squeeze(-2)
        assert (value - oracle).abs().max() <= 1e-12


@pytest.mark.parametrize("spline_order", [1, 2, 3])
@pytest.mark.parametrize("grid_size", [1, 4, 200])
def test_partition_of_unity_and_local_support(spline_order, grid_size):
    grid = torch.tensor([-1.5, 2.0], dtype=torch.float64)
    x = torch.cat([torch.linspace(-1.5, 2.0, 999, dtype=torch.float64), grid]).unsqueeze(-1)
    value = splines.basis(x, grid, grid_size, spline_order)
    assert (value.sum(-1) - 1).abs().max() <= 1e-12  # both ends included: the right one is closed
    inside = off_knots(grid, grid_size, margin=0).unsqueeze(-1)
    value = splines.basis(inside, grid, grid_size, spline_order).squeeze(-2)
    assert ((value > 0).sum(-1) == spline_order + 1).all()
    first, _ = splines.live_basis(inside, grid, grid_size, spline_order)
    assert torch.equal(first.squeeze(-1), (value > 0).double().argmax(-1))


@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_live_splines_are_the_basis(spline_order):
    grid = torch.tensor([[-1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    x = torch.linspace(-8, 8, 321, dtype=torch.float64).unsqueeze(-1).expand(-1, 2)  # knots and far outside too
    first, s = splines.live_basis(x, grid, 4, spline_order)
    dense = torch.zeros(*x.shape, splines.num_basis(4, spline_order), dtype=torch.float64)
    for r in range(spline_order + 1):
        dense.scatter_(-1, (first + r).unsqueeze(-1), splines.cardinal(s - r, spline_order).unsqueeze(-1))
    assert_close(dense, splines.basis(x, grid, 4, spline_order), 1e-14)


def test_one_grid_per_feature():
    grids = torch.tensor(GRIDS, dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64) * 2
    each = [splines.basis(x[:, i : i + 1], grids[i], 5, 3) for i in range(3)]
    assert torch.equal(splines.basis(x, grids, 5, 3), torch.cat(each, 1))


@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_derivatives(spline_order):
    grid = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x = off_knots(grid, 5).unsqueeze(-1).requires_grad_()

    def value(x):
        return splines.basis(x, grid, 5, spline_order)

    few = off_knots(grid, 5, margin=0.5, count=60).unsqueeze(-1).requires_grad_()  # the Jacobian of n points is n x n
    assert torch.autograd.gradcheck(value, few)
    assert torch.autograd.gradgradcheck(value, few)
    closed = splines.basis(x, grid, 5, spline_order, derivative=True)
    cotangent = torch.randn_like(closed)
    assert_close((closed * cotangent).sum(-1), torch.autograd.grad(value(x), x, cotangent)[0], 1e-12)


@pytest.mark.parametrize("spline_order", [2, 3])
def test_second_derivative_at_knots(spline_order):
    """A sample on a knot is common in physics-informed losses: a kink of |s| must not leak into the curvature."""
    grid = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x = splines.knots(grid, 4, 0).unsqueeze(-1).requires_grad_()
    weight = torch.randn(4 + spline_order, dtype=torch.float64)

    def curvature(x):
        (first,) = torch.autograd.grad((splines.basis(x, grid, 4, spline_order) @ weight).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    # M_2'' jumps at the knots and takes its value from the right; M_3'' is continuous.
    nearby = (x + 1e-9).detach().requires_grad_()
    assert_close(curvature(x)[:-1], curvature(nearby)[:-1], 1e-6)


@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_derivative_at_knots_comes_from_the_right(spline_order):
    grid = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    knots = splines.knots(grid, 4, 0).unsqueeze(-1)
    at, right = (splines.basis(x, grid, 4, spline_order, derivative=True) for x in (knots, knots + 1e-12))
    assert (at - right).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_at_least(dtype):
    grid = torch.tensor([-1.0, 1.0])
    x = torch.randn(500, 1).to(dtype)
    value = splines.basis(x, grid, 200, 3)
    assert value.dtype == torch.float32
    assert_close(value, splines.basis(x.double(), grid.double(), 200, 3), 1e-4)


@pytest.mark.parametrize("spline_order", [1, 2, 3, 4])
def test_nan_and_infinity(spline_order):
    x = torch.tensor([[float("nan")], [float("inf")], [float("-inf")], [1e38], [0.1]], requires_grad=True)
    value = splines.basis(x, torch.tensor([-1.0, 1.0]), 4, spline_order)
    assert value[0].isnan().all()
    assert (value[1:4] == 0).all()
    assert value[4].isfinite().all()
    if spline_order <= 3:
        value[1:].sum().backward()
        assert x.grad[1:].isfinite().all()


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="spline_order 1, 2 and 3, not 4"):
        splines.cardinal(torch.zeros(1), 4)


@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_fit_recovers_a_spline(spline_order):
    grid = torch.tensor([[-1.0, 1.0], [-2.0, 5.0]], dtype=torch.float64)
    weight = torch.randn(2 * (6 + spline_order), 4, dtype=torch.float64)
    x = torch.stack([torch.linspace(*g.tolist(), 100, dtype=torch.float64) for g in grid], 1)
    y = torch.einsum("nic,ico->nio", splines.basis(x, grid, 6, spline_order), weight.unflatten(0, (2, -1)))
    assert_close(splines.fit(x, y, grid, 6, spline_order), weight, 1e-10)


def test_fit_where_samples_do_not_reach():
    grid = torch.tensor([-1.0, 1.0])
    x = torch.full((3, 1), 0.32)
    weight = splines.fit(x, torch.ones(3, 1, 2), grid, 20, 3)
    assert weight.isfinite().all()
    assert (weight.abs() > 1e-12).sum() == 2 * 4
    assert_close(splines.basis(x, grid, 20, 3).squeeze(1) @ weight, torch.ones(3, 2), 1e-6)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, 2, 1), "N >= 1"),
        (torch.zeros(3, 2), torch.zeros(3, 1), "needs x"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2, 1), "finite"),
    ],
)
def test_fit_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        splines.fit(x, y, torch.tensor([-1.0, 1.0]), 3, 3)


@pytest.mark.parametrize("spline_order", [1, 2, 3])
@pytest.mark.parametrize("factor", [2, 3, 7])
def test_refit_to_a_finer_grid_keeps_the_function(spline_order, factor):
    grid = torch.tensor([[-1.0, 1.0], [-2.0, 5.0]], dtype=torch.float64)
    weight = torch.randn(2 * (5 + spline_order), 3, dtype=torch.float64)
    refined = splines.refit(weight, grid, 5, spline_order, new_grid_size=5 * factor)
    x = torch.rand(200, 2, dtype=torch.float64) * (grid[:, 1] - grid[:, 0]) + grid[:, 0]
    before = splines.basis(x, grid, 5, spline_order).flatten(1) @ weight
    after = splines.basis(x, grid, 5 * factor, spline_order).flatten(1) @ refined
    assert_close(after, before, 1e-10)


def test_refit_to_a_narrower_range_with_the_same_knots_keeps_the_function():
    grid, part = (torch.tensor(g, dtype=torch.float64) for g in ([-2.0, 2.0], [-1.0, 1.0]))
    weight = torch.randn(4 + 3, 2, dtype=torch.float64)
    moved = splines.refit(weight, grid, 4, 3, part, 2)
    x = torch.linspace(-1, 1, 77, dtype=torch.float64).unsqueeze(-1)
    before, after = splines.basis(x, grid, 4, 3).flatten(1) @ weight, splines.basis(x, part, 2, 3).flatten(1) @ moved
    assert_close(after, before, 1e-10)


def test_refit_beyond_the_old_range():
    """Where the old functions went on as constants, so do the new ones on the wider grid."""
    grid, wide = (torch.tensor(g, dtype=torch.float64) for g in ([-1.0, 1.0], [-3.0, 3.0]))
    weight = torch.randn(2 + 1, 2, dtype=torch.float64)
    x = torch.linspace(-3, 3, 99, dtype=torch.float64).unsqueeze(-1)
    before = splines.basis(x.clamp(-1, 1), grid, 2, 1).flatten(1) @ weight
    moved = splines.refit(weight, grid, 2, 1, wide, 6, constant_outside=True)
    assert_close(splines.basis(x, wide, 6, 1).flatten(1) @ moved, before, 1e-10)


def test_the_comparison_can_fail():
    reference = torch.randn(50, 7, dtype=torch.float64)
    perturbed = reference.clone()
    perturbed[3, 4] += 0.1
    unwritten = reference.clone()
    unwritten[0, 0] = float("nan")
    for wrong in (torch.zeros_like(reference), perturbed, unwritten, reference[:-1]):
        with pytest.raises(AssertionError):
            assert_close(wrong, reference, 1e-3)
        with pytest.raises(AssertionError):
            assert_twice(wrong, reference.float(), reference, 1e-6)
    assert error(reference, reference) == 0
