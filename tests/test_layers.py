import copy
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numerics import assert_close

from kansformer.layers import MLP, FourierLinear, KANGated, KANLinear, SwiGLU, feed_forward, match_intermediate_size

GRIDS = [(1, 1), (3, 1), (64, 1), (2, 2), (20, 2), (5, 3), (64, 3)]
KAN_TYPES = ("kan", "kan_mix", "kan_gated")

BLOCKS = ("mlp", "swiglu", "kan_fourier", "kan", "kan_mix", "kan_gated")


@pytest.mark.parametrize(("grid_size", "spline_order"), GRIDS)
@pytest.mark.parametrize("base_activation", [None, "silu", "gelu", "relu", "identity"])
@pytest.mark.parametrize("init_gain", [1.0, 0.3])
def test_initial_output_variance_is_the_gain_squared(grid_size, spline_order, base_activation, init_gain):
    layer = KANLinear(200, 300, grid_size, spline_order, (-2, 2), base_activation, init_gain=init_gain)
    deviation = layer(torch.randn(2000, 200)).std().item()
    assert deviation == pytest.approx(init_gain, rel=0.05)


@pytest.mark.parametrize("base_activation", [None, "silu", "gelu", "relu", "identity"])
def test_initial_gradient_variance_does_not_depend_on_the_grid(base_activation):
    """Var(dx) / Var(dy) = (O / I) gain^2 E[psi'^2] / E[psi^2], whatever the grid (two intervals or more)."""
    ratios = []
    for grid_size, spline_order in GRIDS[1:]:
        layer = KANLinear(200, 300, grid_size, spline_order, (-2, 2), base_activation)
        x = torch.randn(2000, 200, requires_grad=True)
        dy = torch.randn(2000, 300)
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        ratios.append((dx.var() / (300 / 200)).item())
    z = torch.randn(10**6, dtype=torch.float64, requires_grad=True)
    z.data.clamp_(-2, 2) if base_activation is None else None
    psi = z if base_activation == "identity" else getattr(F, base_activation or "silu")(z)
    (slope,) = torch.autograd.grad(psi.sum(), z)
    if base_activation is None:
        slope = slope * (z.abs() < 2)
    expected = (slope.square().mean() / psi.square().mean()).item()
    assert ratios == pytest.approx([expected] * len(ratios), rel=0.12)


@pytest.mark.parametrize("ffn_type", BLOCKS)
@pytest.mark.parametrize("init_gain", [1.0, 0.25])
def test_blocks_start_at_the_same_scale(ffn_type, init_gain):
    block = feed_forward(ffn_type, 128, 256, init_gain=init_gain)
    assert block(torch.randn(2000, 128)).std().item() == pytest.approx(init_gain, rel=0.08)


@pytest.mark.parametrize("grid_range", [(-100, -99), (50, 60)])
def test_a_grid_far_from_the_inputs_starts_finite(grid_range):
    layer = KANLinear(4, 3, grid_range=grid_range, base_activation=None)
    assert layer(torch.randn(5, 4)).isfinite().all()
    assert layer.spline_weight.abs().max() > 0


def test_initial_weights_are_written_through_copy():
    """What transformers passes as `copy_` leaves loaded tensors alone; nothing may be written around it."""
    layer = KANLinear(3, 4, bias=True)
    before, written = copy.deepcopy(layer.state_dict()), []
    layer.reset_parameters(copy_=lambda tensor, value: written.append(tensor))
    assert {id(t) for t in written} == {id(t) for t in layer.state_dict(keep_vars=True).values()}
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_meta_device():
    with torch.device("meta"):
        layer = KANLinear(3, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(5, 3)).isfinite().all()
    assert torch.equal(layer.grid, torch.tensor([-2.0, 2.0]).expand(3, 2))


def with_odd_grid(**kwargs):
    layer = KANLinear(6, 4, **kwargs)
    layer.grid.copy_(torch.stack([-1 - torch.rand(6) / 3, 1 + torch.rand(6) / 3], 1))
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_grid_stays_float32(dtype):
    layer = with_odd_grid()
    grid, there_and_back = layer.grid.clone(), copy.deepcopy(layer).to(dtype)
    assert there_and_back.spline_weight.dtype == dtype
    for moved in (there_and_back, copy.deepcopy(there_and_back), there_and_back.float(), layer.cpu()):
        assert moved.grid.dtype == torch.float32
        assert torch.equal(moved.grid, grid)


def test_state_dict_round_trip_and_deepcopy():
    layer, other = with_odd_grid(bias=True), KANLinear(6, 4, bias=True)
    assert set(layer.state_dict()) == {"spline_weight", "base_weight", "bias", "grid"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 2, 6)
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.spline_weight.data.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_without_base_the_functions_go_on_as_constants():
    layer = with_odd_grid(base_activation=None)
    edge = layer.grid[:, 1]
    assert torch.allclose(layer(edge + 100), layer(edge), atol=1e-6)
    assert torch.allclose(layer(-100 * torch.ones(6)), layer(layer.grid[:, 0]), atol=1e-6)


def test_with_base_only_the_base_acts_far_outside():
    layer = with_odd_grid()
    x = torch.full((6,), 50.0)
    assert torch.allclose(layer(x), F.linear(F.silu(x), layer.base_weight))


@pytest.mark.parametrize("base_activation", [None, "silu"])
@pytest.mark.parametrize("factor", [2, 5])
@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_extend_grid_keeps_the_function(base_activation, factor, spline_order):
    layer = with_odd_grid(base_activation=base_activation, spline_order=spline_order).double()
    lo, hi = layer.grid.double().unbind(-1)
    x = lo + (hi - lo) * torch.rand(200, 6, dtype=torch.float64)
    before = layer(x)
    layer.extend_grid(layer.grid_size * factor)
    assert layer.num_basis == 5 * factor + spline_order
    assert layer.spline_weight.shape == (6 * layer.num_basis, 4)
    assert_close(layer(x), before, 1e-10)


@pytest.mark.parametrize("base_activation", [None, "silu"])
def test_update_grid_follows_the_samples_and_keeps_the_function(base_activation):
    layer = KANLinear(6, 4, grid_size=30, base_activation=base_activation).double()
    layer.spline_weight.data.copy_(  # smooth functions, so that a coarser knot spacing can carry them
        torch.sin(torch.linspace(0, 3, 33, dtype=torch.float64)).repeat(6).unsqueeze(1) * torch.randn(1, 4)
    )
    x = torch.randn(5000, 6, dtype=torch.float64) * torch.linspace(0.1, 0.4, 6) + 0.2
    before = layer(x)
    layer.update_grid(x, spread=10)
    assert torch.allclose(layer.grid, torch.stack([x.amin(0), x.amax(0)], 1).float())
    assert layer.out_of_grid_fraction(x.clamp(*layer.grid.double().unbind(-1))) == 0
    assert_close(layer(x), before, 1e-5)
    layer.update_grid(x, spread=1.0)
    assert torch.allclose(layer.grid[:, 1].double(), x.mean(0) + x.std(0, correction=0))


def test_update_grid_keeps_the_range_of_a_constant_input():
    layer = KANLinear(2, 3)
    layer.update_grid(torch.stack([torch.full((10,), 0.7), torch.randn(10)], 1))
    assert layer.grid[0].tolist() == [-2, 2]
    assert layer.grid[1].tolist() != [-2, 2]


def test_update_grid_comes_back_from_an_outlier():
    layer = KANLinear(2, 3)
    small = torch.stack([torch.linspace(-0.4, 0.4, 100), torch.linspace(-1e-7, 1e-7, 100)], 1)
    for x in (torch.linspace(-1e6, 1e6, 100).unsqueeze(1).expand(-1, 2), small):
        layer.update_grid(x)
        assert torch.allclose(layer.grid, torch.stack([x.amin(0), x.amax(0)], 1))
        assert layer(x).isfinite().all()
    before = layer.grid.clone()
    layer.update_grid(small.double() + 1e8)  # 0.8 at 1e8 is nothing in float32
    assert torch.equal(layer.grid, before)
    with pytest.raises(ValueError, match="spread is -1"):
        layer.update_grid(small, spread=-1)


@pytest.mark.parametrize("bad", [torch.zeros(0, 6), torch.zeros(4, 5), torch.full((4, 6), float("nan"))])
def test_update_grid_refuses(bad):
    with pytest.raises(ValueError, match="update_grid needs"):
        KANLinear(6, 4).update_grid(bad)


RANKS = """
import sys, torch, torch.distributed as dist
from kansformer.layers import KANLinear
dist.init_process_group("gloo")
rank = dist.get_rank()
assert dist.get_world_size() == 2
torch.manual_seed(0)
layer = KANLinear(5, 3)
samples = torch.randn(2, 400, 5) * torch.tensor([0.5, 2.0]).view(2, 1, 1)
layer.update_grid(samples[rank])
torch.save({"grid": layer.grid, "spline_weight": layer.spline_weight.data}, f"{sys.argv[1]}/{rank}.pt")
torch.manual_seed(0)
alone = KANLinear(5, 3)
dist.destroy_process_group()
alone.update_grid(samples)
torch.testing.assert_close(alone.grid, layer.grid)
"""


def test_update_grid_agrees_on_all_ranks_to_the_bit(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, str(tmp_path / "ranks.py"), str(tmp_path)], check=True, capture_output=True, timeout=60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["grid"], second["grid"])
    assert torch.equal(first["spline_weight"], second["spline_weight"])
    assert not dist.is_initialized()


def test_out_of_grid_fraction():
    layer = KANLinear(2, 3, grid_range=(-1, 1))
    x = torch.tensor([[0.0, 1.0], [-1.0, 1.1], [2.0, float("nan")], [0.5, -0.5]])
    assert layer.out_of_grid_fraction(x).item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("rows", [1, 2, 7, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kan_gated_without_splines_is_swiglu_bit_for_bit(rows, dtype):
    gated = KANGated(64, 128, base_activation="silu", ffn_norm=False)
    swiglu = SwiGLU(64, 128)
    with torch.no_grad():
        gated.down_proj.spline_weight.zero_()
        swiglu.gate_proj.weight.copy_(gated.gate_proj.weight)
        swiglu.up_proj.weight.copy_(gated.up_proj.weight)
        swiglu.down_proj.weight.copy_(gated.down_proj.base_weight)
    x = torch.randn(rows, 64, dtype=dtype)
    assert torch.equal(gated.to(dtype)(x), swiglu.to(dtype)(x))


@pytest.mark.parametrize("width", [20, 32, 64, 72])
def test_without_an_up_projection_the_gates_multiply_the_input(width):
    gated = KANGated(32, width, base_activation="silu", ffn_norm=False, project_value=False)
    swiglu = SwiGLU(32, width, project_value=False)
    with torch.no_grad():
        gated.down_proj.spline_weight.zero_()
        swiglu.gate_proj.weight.copy_(gated.gate_proj.weight)
        swiglu.down_proj.weight.copy_(gated.down_proj.base_weight)
    x = torch.randn(3, 7, 32)
    value = torch.stack([x[..., h % 32] for h in range(width)], -1)
    assert_close(swiglu(x), swiglu.down_proj(F.silu(swiglu.gate_proj(x)) * value), 1e-6)
    assert torch.equal(gated(x), swiglu(x))
    projected = SwiGLU(32, width)
    assert sum(p.numel() for p in swiglu.parameters()) * 3 == sum(p.numel() for p in projected.parameters()) * 2
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(KANGated(6, 8, project_value=False, dtype=torch.float64), x)


def test_gate_norm_normalises_the_gate():
    block = SwiGLU(32, 64, gate_norm=True)
    with torch.no_grad():
        block.gate_norm.weight.copy_(torch.randn(64))
    x = torch.randn(5, 32)
    gate = F.rms_norm(block.gate_proj(x), (64,), block.gate_norm.weight, 1e-6)
    assert_close(block(x), block.down_proj(F.silu(gate) * block.up_proj(x)), 1e-6)


def test_every_edge_of_kan_fourier_is_a_wave():
    block = feed_forward("kan_fourier", 3, 4, fourier_frequency=2.0).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    a, b = block.down_proj.sin_proj.weight, block.down_proj.cos_proj.weight
    height, phase = torch.hypot(a, b), torch.atan2(b, a)
    z = 2 * (x @ block.up_proj.weight.T)
    assert_close(block(x), (height * torch.sin(z.unsqueeze(-2) + phase)).sum(-1), 1e-12)
    assert block.flops_per_token() == 2 * 3 * 3 * 4 + 3 * 4
    gate = torch.randn(5, 4, dtype=torch.float64)
    waves = height * torch.sin(z.unsqueeze(-2) + phase)
    assert_close(block.down_proj(z / 2, gate), (gate.unsqueeze(-2) * waves).sum(-1), 1e-12)
    for frequency in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="frequency must be positive and finite, got"):
            FourierLinear(3, 4, frequency)


@pytest.mark.parametrize("ffn_type", BLOCKS)
@pytest.mark.parametrize("reference", ["swiglu", "mlp"])
@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("hidden_size", [256, 2048])
def test_matched_sizes_are_within_two_percent(ffn_type, reference, match, hidden_size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        size = match_intermediate_size(ffn_type, hidden_size, reference=reference, match=match)
    usual = math.ceil(8 * hidden_size / 3 / 8) * 8 if reference == "swiglu" else 4 * hidden_size
    with torch.device("meta"):
        block, target = feed_forward(ffn_type, hidden_size, size), feed_forward(reference, hidden_size, usual)
    costs = [
        b.flops_per_token() if match == "flops" else sum(p.numel() for p in b.parameters()) for b in (block, target)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)


def test_a_bad_match_is_said():
    with pytest.warns(UserWarning, match=r"kan with intermediate_size=64 has .*% of the params of mlp with 64"):
        match_intermediate_size("kan", 8, reference="mlp", reference_size=64, multiple_of=64)


@pytest.mark.parametrize("ffn_type", BLOCKS)
def test_flops_per_token_agree_with_the_counter(ffn_type):
    from torch.utils.flop_counter import FlopCounterMode

    block = feed_forward(ffn_type, 64, 128)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(300, 64))
    products = counter.get_total_flops() / 300
    elementwise = block.flops_per_token() - products
    assert 0 < elementwise < 0.2 * products


@pytest.mark.parametrize("ffn_type", BLOCKS)
def test_every_parameter_and_every_unit_learns(ffn_type):
    block = feed_forward(ffn_type, 16, 24)
    block(torch.randn(400, 16)).square().mean().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("ffn_type", KAN_TYPES)
@pytest.mark.parametrize(
    "option",
    [
        {"grid_size": 4},
        {"spline_order": 2},
        {"grid_range": (-3.0, 3.0)},
        {"base_activation": "silu"},
        {"ffn_norm": False},
        {"norm_eps": 1.0},
    ],
)
def test_every_option_changes_the_output(ffn_type, option):
    x = torch.randn(10, 16)
    outputs = []
    for options in ({}, option):
        torch.manual_seed(1)
        outputs.append(feed_forward(ffn_type, 16, 24, **options)(x))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("base", [None, "silu"])
@pytest.mark.parametrize("ffn_type", KAN_TYPES)
def test_the_norm_inside_the_operator(ffn_type, base):
    """Training and evaluation compute the same, with the same gradients; training keeps no normalised copy."""
    block = feed_forward(ffn_type, 16, 24, base_activation=base, norm_eps=1e-2, dtype=torch.float64)
    results, kept, seen = [], [], []
    block.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        x = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        storages = set()
        keep = lambda tensor, found=storages: found.add(tensor.untyped_storage().data_ptr()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = block.train(training)(x)
        results.append([y, *torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))])
        kept.append(len(storages))
    for trained, evaluated in zip(*results):
        assert_close(trained, evaluated, 1e-13)
    assert kept[0] < kept[1]
    raw, normalised = seen
    assert_close(normalised, raw / (raw.square().mean(-1, keepdim=True) + 1e-2).sqrt(), 1e-13)


def test_functions_are_per_edge():
    """A KAN layer is no linear layer on shared features: two outputs may bend the same input differently."""
    layer = KANLinear(1, 2, grid_size=8, base_activation=None)
    x = torch.linspace(-2, 2, 200).unsqueeze(1)
    y = torch.cat([x.sin(), (3 * x).cos()], 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (layer(x) - y).square().mean() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be a whole number of at least 1, got 0"),
        ({"out_features": 2.5}, "out_features .* got 2.5"),
        ({"grid_size": 0}, "grid_size .* got 0"),
        ({"spline_order": 4}, "spline_order must be 1, 2 or 3, got 4"),
        ({"grid_range": (1.0, 1.0)}, r"lo < hi, got \(1.0, 1.0\)"),
        ({"grid_range": (0.0, float("inf"))}, "finite"),
        ({"grid_range": (1e8, 1e8 + 1)}, "differ in float32"),
        ({"grid_range": (-1e39, 1e39)}, "finite"),
        ({"base_activation": "swish"}, "'swish'; choose None or one of silu"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        KANLinear(**({"in_features": 3, "out_features": 4} | arguments))


@pytest.mark.parametrize("base_activation", [None, "silu"])
def test_a_wrong_input_is_named(base_activation):
    layer = KANLinear(8, 3, base_activation=base_activation)
    for shape in ((5, 1), (5, 7), ()):
        with pytest.raises(ValueError, match=r"takes \(\.\.\., 8\), got " + re.escape(str(shape))):
            layer(torch.randn(shape))


def test_sizes_may_be_of_numpy():
    layer = KANLinear(np.int64(4), np.int64(3), np.int32(5))
    layer.extend_grid(np.int64(10))
    assert [type(size) for size in (layer.in_features, layer.out_features, layer.grid_size)] == [int] * 3


def test_bad_blocks_are_named():
    with pytest.raises(ValueError, match="'kan_mlp'; choose one of mlp, swiglu, kan, kan_mix, kan_gated"):
        feed_forward("kan_mlp", 8, 8)
    with pytest.raises(ValueError, match="intermediate_size"):
        feed_forward("kan", 8, -1)
    with pytest.raises(ValueError, match="hidden_act is 'swish'"):
        MLP(8, 8, hidden_act="swish")
    with pytest.raises(ValueError, match="'memory'; choose 'params' or 'flops'"):
        match_intermediate_size("kan", 8, match="memory")


def test_extra_repr():
    assert "in_features=3, out_features=4, grid_size=5, spline_order=3" in repr(KANLinear(3, 4))
