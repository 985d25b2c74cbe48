"""Decoding: live rows alone or all of them, and coefficients in int8, one scale a row, as torchao keeps them."""

import copy

import pytest
import torch
from numerics import assert_twice

from kansformer import KansformerConfig, KansformerForCausalLM
from kansformer.kernels import torch_kan
from kansformer.layers import KANLinear


def quantize(weight):
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [None, "silu"])
@pytest.mark.parametrize(("G", "k"), [(3, 1), (7, 1), (6, 2), (5, 3)])
@pytest.mark.parametrize("rows", [0, 1, 3, 200])
def test_operator_is_the_dequantised_layer(rows, G, k, base, dtype):
    layer = KANLinear(40, 24, G, k, base_activation=base)
    quantized, scale = quantize(layer.spline_weight.detach())
    x, gate = (2 * torch.randn(2, rows, 40)).to(dtype)
    base_weight = None if base is None else layer.base_weight.detach().to(dtype)
    settings = layer.grid, base_weight, G, k, base or "identity"
    y = torch.ops.kansformer.kan_linear_int8(x, gate, quantized, scale.to(dtype), *settings, "torch")
    weight = quantized * scale.to(dtype)[:, None]
    twin = torch_kan.forward(x, gate, weight, *settings)
    exact = [t.double() for t in (x, gate, quantized.double() * scale.to(dtype).double()[:, None], layer.grid)]
    reference = torch_kan.forward(*exact, None if base is None else base_weight.double(), *settings[2:])
    assert y.dtype == dtype
    assert y.shape == (rows, 24)
    if rows:
        assert_twice(y, twin, reference, 4e-3 if dtype == torch.bfloat16 else 1e-6, "y")


def test_opcheck():
    quantized, scale = quantize(torch.randn(30 * 4, 20))
    grid = torch.tensor([[-2.0, 2.0]]).expand(30, 2).contiguous()
    inputs = torch.randn(1, 30), None, quantized, scale, grid, None, 3, 1, "identity", "torch"
    torch.library.opcheck(torch.ops.kansformer.kan_linear_int8, inputs)


def model():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return KansformerForCausalLM(KansformerConfig(**sizes, ffn_type="kan_gated", grid_size=7)).eval()


def int8():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra int8)")
    config = quantization.Int8WeightOnlyConfig()
    return quantization.FqnToConfig({r"re:.*_proj\.(weight|spline_weight)": config})


@torch.no_grad()
def test_a_model_by_transformers_config(tmp_path):
    config = int8()
    from transformers import AutoModelForCausalLM, TorchAoConfig

    whole = model()
    whole.save_pretrained(tmp_path / "float")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(config))
    small.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    weight = again.model.layers[0].mlp.down_proj.spline_weight
    assert (weight.qdata.dtype, weight.scale.numel()) == (torch.int8, len(weight))
    tokens = torch.randint(64, (2, 20))
    logits, expected = again(tokens).logits, whole(tokens).logits
    torch.testing.assert_close(logits, small(tokens).logits, rtol=0, atol=0)
    assert (logits - expected).norm() < 0.03 * expected.norm()
    assert not torch.equal(logits, expected)
    # One token behind a cache reads live int8 rows, all at once are dequantised: the same words.
    words = again.generate(tokens[:1], max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(words, again.generate(tokens[:1], max_new_tokens=12, do_sample=False, use_cache=False))
    stored = sum(p.stat().st_size for p in (tmp_path / "int8").glob("*.safetensors"))
    assert stored < 0.45 * sum(p.stat().st_size for p in (tmp_path / "float").glob("*.safetensors"))


def test_compiles_whole_and_passes_gradients_of_x():
    config = int8()
    from torchao.quantization import quantize_

    layer = model().model.layers[0].mlp.down_proj
    holder = torch.nn.ModuleDict({"a_proj": copy.deepcopy(layer)})
    quantize_(holder, config, filter_fn=None)
    layer.spline_weight.data = holder["a_proj"].spline_weight.dequantize()
    small = holder["a_proj"]
    x, v = torch.randn(2, 1, layer.in_features)
    with torch.no_grad():
        expected = layer(x, v)
        torch.testing.assert_close(small(x, v), expected)
        torch.testing.assert_close(torch.compile(small, fullgraph=True)(x, v), expected)
    x.requires_grad_()
    [gradient] = torch.autograd.grad(small(x, v).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x, v).sum(), x)[0])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_with_live_rows_and_without(monkeypatch, batch, cache):
    """The decode op changes the order of sums, and no word."""
    network, tokens = model(), torch.randint(64, (batch, 9))
    settings = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    calls = []
    decode = torch_kan._decode
    monkeypatch.setattr(torch_kan, "_decode", lambda *a: calls.append(1) or decode(*a))
    with_it = network.generate(tokens, disable_compile=True, **settings)
    assert len(calls) >= 19 * 2
    monkeypatch.setattr(torch_kan, "use_decode", lambda *a: False)
    calls.clear()
    assert torch.equal(with_it, network.generate(tokens, disable_compile=True, **settings))
    assert not calls
