"""The model room: everything a transformers user does with a model, done with a Kansformer."""

import copy
import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import kansformer
from kansformer import KansformerConfig, KansformerForCausalLM, KansformerModel
from kansformer.layers import FeedForward, feed_forward

FFN_TYPES = ("mlp", "swiglu", "kan_fourier", "kan", "kan_mix", "kan_gated")
KAN_TYPES = FFN_TYPES[3:]
HEADS = {
    AutoModel: "KansformerModel",
    AutoModelForCausalLM: "KansformerForCausalLM",
    AutoModelForSequenceClassification: "KansformerForSequenceClassification",
    AutoModelForTokenClassification: "KansformerForTokenClassification",
    AutoModelForQuestionAnswering: "KansformerForQuestionAnswering",
}
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_config(**fields) -> KansformerConfig:
    """Splines and waves in turn, unless `ffn_type` says otherwise."""
    layers = fields.get("num_hidden_layers", 2)
    sizes = {
        "ffn_type": (["kan_gated", "kan_fourier"] * layers)[:layers],
        "vocab_size": 128,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return KansformerConfig(**sizes | fields)


def tiny_model(**fields) -> KansformerForCausalLM:
    return KansformerForCausalLM(tiny_config(**fields)).eval()


def tokens(batch: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def odd_grids(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give every KAN layer per-feature grids that bfloat16 and float16 cannot hold; return them by name."""
    for _, layer in model.kan_layers():
        layer.grid += torch.rand(layer.grid.shape) * torch.tensor([-0.1, 0.1]) + 1e-4 / 3
    grids = {name: layer.grid.clone() for name, layer in model.kan_layers()}
    assert grids
    assert all(
        not torch.equal(grid, grid.to(dtype).float())
        for grid in grids.values()
        for dtype in (torch.half, torch.bfloat16)
    )
    return grids


def assert_grids(model: torch.nn.Module, grids: dict[str, torch.Tensor]) -> None:
    found = {name: layer.grid for name, layer in model.kan_layers()}
    assert found.keys() == grids.keys()
    for name, grid in found.items():
        assert grid.dtype == torch.float32, name
        assert torch.equal(grid, grids[name]), name


def text_tokens() -> torch.Tensor:
    """20,000 bytes of real text."""
    path = ROOT / "train" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("the bundled text is absent")
    return torch.tensor(list(path.read_bytes()[:20_000])).clamp(max=127)


# The function


@pytest.mark.parametrize("tied", [False, True])
def test_swiglu_is_llama(tied):
    """The same weights under the same names give the same logits as Llama; so a Llama checkpoint converts by name."""
    model = tiny_model(ffn_type="swiglu", tie_word_embeddings=tied)
    shared = {field: getattr(model.config, field) for field in LlamaConfig().to_dict() if hasattr(model.config, field)}
    for field in ("model_type", "architectures", "transformers_version", "initializer_range", "hidden_act"):
        shared.pop(field, None)
    llama = LlamaForCausalLM(LlamaConfig(**shared)).eval()
    llama.load_state_dict(model.state_dict())
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    inputs = {"input_ids": tokens(), "attention_mask": mask, "labels": tokens()}
    ours, theirs = model(**inputs), llama(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_kan_gated_contains_swiglu():
    """Zero splines, silu base and no norm: a gated KAN block is SwiGLU."""
    swiglu = tiny_model(ffn_type="swiglu")
    size = swiglu.config.intermediate_size
    kan = tiny_model(ffn_type="kan_gated", ffn_norm=False, base_activation="silu", intermediate_size=size)
    state = swiglu.state_dict()
    for name in list(state):
        if name.endswith("mlp.down_proj.weight"):
            state[name.replace("weight", "base_weight")] = state.pop(name)
    missing, unexpected = kan.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.rsplit(".", 1)[1] for name in missing} == {"spline_weight", "grid"}
    with torch.no_grad():
        for _, layer in kan.kan_layers():
            layer.spline_weight.zero_()
    torch.testing.assert_close(kan(tokens()).logits, swiglu(tokens()).logits)


def test_a_block_of_ones_own(monkeypatch):
    class Linear(FeedForward):
        fields = ("gain",)

        def __init__(self, hidden_size, intermediate_size, init_gain=1.0, gain=1.0):
            super().__init__()
            self.proj = torch.nn.Linear(hidden_size, hidden_size)

        def forward(self, x):
            return self.proj(x)

    monkeypatch.setitem(kansformer.FFN_TYPES, "linear", Linear)
    tiny_config(ffn_type="kan_gated")  # its field is none of this model's business
    with pytest.raises(AttributeError, match="gain"):
        tiny_model(ffn_type="linear", intermediate_size=8)
    monkeypatch.setattr(Linear, "fields", ())
    model = tiny_model(ffn_type="linear", intermediate_size=8)
    assert model.flops_per_token(8) > 0
    ids = torch.arange(6).unsqueeze(0)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_every_coefficient_and_every_layer_learns(ffn_type):
    model = tiny_model(ffn_type=ffn_type, num_hidden_layers=3)
    inputs = tokens(16, 64)
    model(inputs, labels=inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        dead = (rows == 0).all(1)
        if "embed_tokens" in name:
            dead = dead[inputs.unique()]
        assert not dead.any(), f"{name}: {int(dead.sum())} of {len(dead)} rows without gradient"


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_each_layer_matters(ffn_type):
    model = tiny_model(ffn_type=ffn_type)
    reference = model(tokens()).logits
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    assert not torch.allclose(model(tokens()).logits, reference, atol=1e-3)


def test_a_kind_of_block_for_each_layer(tmp_path):
    """Each as wide as its parameters allow; saved, loaded, refined and generating like any other."""
    kinds = ["kan_gated", "swiglu"]
    model = tiny_model(ffn_type=kinds)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["KANGated", "SwiGLU"]
    assert model.config.intermediate_size == [tiny_config(ffn_type=kind).intermediate_size for kind in kinds]
    whole = KansformerForCausalLM(tiny_config(ffn_type="swiglu"))
    assert model.num_parameters() == pytest.approx(whole.num_parameters(), rel=0.01)
    assert not any("mlp" in rule for rule in model.config.base_model_tp_plan)
    model.extend_grid(6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.ffn_type == kinds
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    with pytest.raises(ValueError, match=r"ffn_type=\['swiglu'\].*one for each of the 2 layers"):
        tiny_config(ffn_type=["swiglu"])
    with pytest.raises(ValueError, match="ffn_type="):
        tiny_config(ffn_type=["swiglu", "relu"])


def test_a_list_is_good_for_fewer_layers(tmp_path):
    """Its first ones, as in every model of transformers; more must be named."""
    kinds = ["kan_gated"] * 2 + ["swiglu"] * 2
    config = tiny_config(num_hidden_layers=4, ffn_type=kinds)
    assert config.ffn_summary == "2 x kan_gated, 2 x swiglu"
    assert tiny_config(ffn_type="kan").ffn_summary == "kan"
    whole = KansformerForCausalLM(config)
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ffn_type"] == kinds
    lower = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)
    assert [type(layer.mlp).__name__ for layer in lower.model.layers] == ["KANGated", "KANGated", "SwiGLU"]
    assert torch.equal(lower.model.layers[2].mlp.up_proj.weight, whole.model.layers[2].mlp.up_proj.weight)
    config.num_hidden_layers = 1
    assert len(KansformerForCausalLM(config).model.layers) == 1
    with pytest.raises(ValueError, match="each of num_hidden_layers=6, or be None"):
        KansformerForCausalLM(AutoConfig.from_pretrained(tmp_path, num_hidden_layers=6))


def test_every_layer_of_the_default_is_of_waves():
    assert KansformerConfig().ffn_types == ["kan_fourier"] * 12
    model = tiny_model(ffn_type="kan_fourier")
    for change in (lambda: model.update_grid(tokens()), lambda: model.extend_grid(6)):
        with pytest.raises(ValueError, match="no grids: its blocks are kan_fourier, not of splines"):
            change()
    assert model.out_of_grid_fraction(tokens()) == {}
    with pytest.raises(Exception, match="ffn_type"):
        tiny_config(ffn_type=None)


def test_causal():
    model = tiny_model()
    inputs = tokens(1, 16)
    changed = inputs.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 128
    difference = (model(inputs).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:10].max() == 0
    assert (difference[10:] > 1e-4).all()


def test_packed_sequences_do_not_see_each_other():
    model = tiny_model()
    first, second = tokens(1, 7, seed=2), tokens(1, 9, seed=3)
    positions = torch.cat((torch.arange(7), torch.arange(9)))[None]
    packed = model(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :7], model(first).logits)
    torch.testing.assert_close(packed[:, 7:], model(second).logits)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation):
    if implementation == "flex_attention" and shutil.which("g++") is None:
        pytest.skip("flex attention compiles on CPU and needs g++")
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    with torch.no_grad():
        reference = model(tokens(), attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        logits = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], reference[mask.bool()], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ffn_type", ["swiglu", "kan", "kan_gated", "kan_fourier"])
def test_gradient_checkpointing_changes_nothing(ffn_type, reentrant):
    model = tiny_model(ffn_type=ffn_type, attention_dropout=0.1).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    reference = gradients()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, reference[name]), name
    assert len(calls) == 2, "the block was not recomputed"


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_compile_fullgraph(ffn_type):
    check_compiled("aot_eager", ffn_type=ffn_type)


@pytest.mark.parametrize("ffn_type", ["swiglu", "kan_gated"])
def test_without_an_up_projection(ffn_type, tmp_path):
    """Compiled whole with equal gradients; cached and uncached agree; saved, loaded; exported for any length."""
    check_compiled("aot_eager", ffn_type=ffn_type, project_value=False)
    model = tiny_model(ffn_type=ffn_type, project_value=False)
    reference = tiny_model(ffn_type=ffn_type)
    counts = model.parameter_counts()["feed_forward"] / reference.parameter_counts()["feed_forward"]
    assert counts == pytest.approx(1, abs=0.02)
    assert not [name for name, _ in model.named_parameters() if "up_proj" in name]
    ids = tokens()
    logits, cache = model(ids).logits, None
    for t in range(ids.shape[1]):
        step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], logits[:, t], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}, "use_cache": None}
    inputs = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    longer = tokens(batch=3, length=29)
    torch.testing.assert_close(program(input_ids=longer, use_cache=False).logits, model(longer).logits)


@pytest.mark.slow
def test_compile_inductor():
    if shutil.which("g++") is None:
        pytest.skip("inductor on CPU needs g++")
    check_compiled("inductor", ffn_type="kan_gated", num_hidden_layers=1)


def check_compiled(backend: str, **fields) -> None:
    torch._dynamo.reset()
    model = tiny_model(**fields)
    reference = model(tokens(), labels=tokens(), use_cache=False)
    reference.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.logits, reference.logits, atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("ffn_type", "dynamic"), [("kan_gated", False), *((kind, True) for kind in FFN_TYPES)])
def test_export(ffn_type, dynamic):
    """Without a cache: static, and for any batch and length."""
    model = tiny_model(ffn_type=ffn_type).eval()
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}, "use_cache": None}
    inputs = {"input_ids": tokens(), "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes if dynamic else None).module()
    for ids in (tokens(), tokens(batch=3, length=29)) if dynamic else (tokens(),):
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_autocast(ffn_type):
    model = tiny_model(ffn_type=ffn_type)
    reference = model(tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert (output.logits - reference).norm() < 0.02 * reference.norm()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


# Generation


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_cached_decoding_equals_uncached(ffn_type):
    model = tiny_model(ffn_type=ffn_type)
    inputs = tokens()
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(inputs, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        cached = model.generate(inputs, cache_implementation=cache, **options)
        assert torch.equal(cached.sequences, plain.sequences), cache
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-4)


def test_cache_can_be_reused_and_cropped():
    model = tiny_model()
    inputs = tokens(2, 20)
    full = model(inputs).logits
    first = model(inputs[:, :8], use_cache=True)
    second = model(inputs[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), full, atol=1e-5, rtol=1e-4)
    cache = second.past_key_values
    cache.crop(-8)
    torch.testing.assert_close(model(inputs[:, 12:], past_key_values=cache).logits, full[:, 12:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_left_padding(ffn_type):
    model = tiny_model(ffn_type=ffn_type, pad_token_id=0)
    short, long = tokens(1, 9, seed=4), tokens(1, 14, seed=5)
    batch = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1), long))
    mask = (batch != 0).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, alone in ((together[0, 14:], short), (together[1, 14:], long)):
        assert torch.equal(row, model.generate(alone, max_new_tokens=8, do_sample=False)[0, alone.shape[1] :])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_p": 0.9}, {"do_sample": True, "num_beams": 2}]
)
def test_beams_and_sampling_agree_with_and_without_cache(options):
    model = tiny_model()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(tokens(), max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*results)


def test_speculation_and_compiled_decoding_change_nothing():
    model, draft = tiny_model(ffn_type="kan"), tiny_model(ffn_type="mlp", num_hidden_layers=1)
    inputs = tokens(1)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(inputs, **options)
    assert torch.equal(model.generate(inputs, assistant_model=draft, **options), expected)
    assert torch.equal(model.generate(inputs, assistant_early_exit=1, **options), expected)
    assert torch.equal(model.generate(inputs, prompt_lookup_num_tokens=3, **options), expected)
    compiled = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True  # transformers compiles decoding on accelerators only, unless told
    static = model.generate(inputs, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, expected)


def test_logits_processors():
    model = tiny_model()
    options = {"max_new_tokens": 6, "do_sample": False}
    free = model.generate(tokens(1), **options)[0, 16:].unique()

    class Forbid(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert torch.equal(input_ids[:, :16], tokens(1))
            return scores.index_fill(1, free, -torch.inf)

    ours = model.generate(tokens(1), logits_processor=transformers.LogitsProcessorList([Forbid()]), **options)
    assert not torch.isin(ours[0, 16:], free).any()
    assert torch.equal(ours, model.generate(tokens(1), bad_words_ids=free[:, None].tolist(), **options))


def test_eos_stops_generation():
    model = tiny_model()
    free = model.generate(tokens(1), max_new_tokens=8, do_sample=False)[0, 16:]
    stopped = model.generate(tokens(1), max_new_tokens=8, do_sample=False, eos_token_id=int(free[2]), pad_token_id=0)
    first = int((free == free[2]).nonzero()[0])
    assert torch.equal(stopped[0, 16:], free[: first + 1])


def test_pipeline(caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["[UNK]", "to", "be", "or", "not"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    model = tiny_model()
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = generate("to be or", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert text.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    assert "not supported" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_gpu_agrees_with_cpu(ffn_type):
    model = tiny_model(ffn_type=ffn_type)
    expected = model(tokens(), labels=tokens())
    model.cuda()
    inputs = tokens().cuda()
    output = model(inputs, labels=inputs)
    output.loss.backward()
    torch.testing.assert_close(output.logits.cpu(), expected.logits, atol=1e-2, rtol=1e-2)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(inputs, **options), model.generate(inputs, use_cache=False, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ffn_type", ["kan_gated", "kan_fourier"])
def test_gpu_compiled_block_agrees_with_the_eager_one(ffn_type):
    """136 units: inductor pads such rows where it keeps them for backward."""
    block = feed_forward(ffn_type, 64, 136, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs, dy = (x, *block.parameters()), torch.randn_like(x)
    expected, found = ((y, *torch.autograd.grad(y, inputs, dy)) for y in (block(x), compiled(x)))
    for a, b in zip(found, expected):
        assert (a - b).norm() < 1e-2 * b.norm()


# Outputs and losses


def test_outputs():
    model = tiny_model(attn_implementation="eager")
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(tokens()))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert [attention.shape for attention in output.attentions] == [(2, 6, 16, 16)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 6, 16))
    logits, *_ = model(tokens(), return_dict=False)
    assert torch.equal(logits, output.logits)
    embeds = model.get_input_embeddings()(tokens())
    assert torch.equal(model(inputs_embeds=embeds).logits, output.logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens(), inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_logits_to_keep():
    model = tiny_model()
    full = model(tokens()).logits
    torch.testing.assert_close(model(tokens(), logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(tokens(), logits_to_keep=torch.tensor([0, 7])).logits, full[:, [0, 7]])


def test_loss():
    model = tiny_model()
    labels = tokens().clone()
    labels[0, :6] = -100
    output = model(tokens(), labels=labels)
    targets = labels[:, 1:].reshape(-1)
    logits = output.logits[:, :-1].reshape(-1, 128)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, targets))
    summed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(model(tokens(), labels=labels, num_items_in_batch=7).loss, summed / 7)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_loss_falls_on_text(ffn_type):
    text = text_tokens()
    model = tiny_model(ffn_type=ffn_type).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(60):
        starts = torch.randint(0, len(text) - 64, (8,))
        batch = torch.stack([text[start : start + 64] for start in starts])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert sum(losses[-10:]) / 10 < 2.9


def test_trainer(tmp_path):
    inputs = tokens(8, 16)
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in inputs]
    )
    assert trainer.model_accepts_loss_kwargs
    result = trainer.train()
    assert result.global_step == 2
    assert math.isfinite(result.training_loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith("grid"), name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(reloaded.eval()(inputs).logits, model.eval()(inputs).logits)


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_save_and_load(ffn_type, dtype, tmp_path):
    model = tiny_model(ffn_type=ffn_type).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is KansformerForCausalLM
    assert loaded.dtype == dtype
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("placement", [{}, {"device_map": "cpu"}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}}])
def test_sharded_checkpoints(placement, tmp_path):
    model = tiny_model(ffn_type="kan", tie_word_embeddings=True)
    grids = odd_grids(model)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **placement)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert_grids(loaded, grids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placed", ["by name", "auto"])
def test_layers_offloaded_to_disk(placed, dtype, tmp_path):
    model = tiny_model(ffn_type="kan")
    odd_grids(model)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    options = {"device_map": places}
    if placed == "auto":  # room for one layer and a half
        layer = sum(p.numel() for p in model.model.layers[0].parameters()) * dtype.itemsize
        options = {"device_map": "auto", "max_memory": {"cpu": 2 * 128 * 96 * dtype.itemsize + int(1.5 * layer)}}
    options["offload_folder"] = str(tmp_path / "offload")
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options)
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(offloaded(tokens()).logits, whole(tokens()).logits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ffn_type", KAN_TYPES)
def test_grids_survive_loading_in_any_dtype(ffn_type, dtype, tmp_path):
    model = tiny_model(ffn_type=ffn_type)
    grids = odd_grids(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
    assert_grids(loaded, grids)
    assert loaded.dtype == (dtype or torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert_grids(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), grids)


@pytest.mark.parametrize("ffn_type", KAN_TYPES)
def test_grids_survive_casts_copies_and_meta(ffn_type):
    model = tiny_model(ffn_type=ffn_type)
    grids = odd_grids(model)
    state = copy.deepcopy(model.state_dict())
    assert_grids(copy.deepcopy(model).bfloat16(), grids)
    assert_grids(copy.deepcopy(model).half().float(), grids)
    assert_grids(copy.deepcopy(model).to("cpu", torch.bfloat16), grids)
    with torch.device("meta"):
        empty = KansformerForCausalLM(model.config)
    assigned = copy.deepcopy(empty)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert_grids(empty, grids)
    assigned.load_state_dict(state, assign=True)
    assert_grids(assigned, grids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_half_precision(ffn_type, dtype, tmp_path):
    model = tiny_model(ffn_type=ffn_type)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    reference = model(tokens()).logits
    logits = half(tokens()).logits
    assert logits.dtype == dtype
    error = (logits.float() - reference).norm() / reference.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)
    assert torch.equal(logits, copy.deepcopy(model).to(dtype)(tokens()).logits)  # rotary frequencies uncast, too
    half.train()(tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.parameters())

    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert all(layer.grid.dtype == torch.float32 for _, layer in made.kan_layers())
    assert torch.isfinite(made(tokens()).logits).all()


@pytest.mark.parametrize("ffn_type", KAN_TYPES)
def test_missing_kan_keys_are_initialised_and_loaded_ones_kept(ffn_type, tmp_path):
    model = tiny_model(ffn_type=ffn_type, grid_range=(-1.7, 2.3), base_activation="silu", intermediate_size=64)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = {name for name in state if ".layers.0." in name and name.rsplit(".", 1)[1] in ("spline_weight", "grid")}
    lost |= {name for name in state if ".layers.1." in name and name.endswith("base_weight")}
    assert len(lost) >= 3, "the checkpoint has other names than this test thinks"
    kept = {name: value + 1 for name, value in state.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lost
    for name, value in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name]), f"{name} was loaded, then overwritten"
        elif name.endswith("grid"):
            assert torch.equal(value, state[name]), name
        else:
            assert torch.isfinite(value).all(), name
            assert value.std().item() == pytest.approx(state[name].std().item(), rel=0.1), name


def test_a_base_model_checkpoint_loads_into_heads(tmp_path):
    base = KansformerModel(tiny_config(pad_token_id=0)).eval()
    base.save_pretrained(tmp_path)
    for auto, name in HEADS.items():
        model = auto.from_pretrained(tmp_path).eval()
        assert type(model).__name__ == name
        hidden = model.base_model(tokens()).last_hidden_state
        assert torch.equal(hidden, base(tokens()).last_hidden_state)


@pytest.mark.parametrize("auto", HEADS, ids=HEADS.values())
def test_auto_classes(auto, tmp_path):
    fields = tiny_config(pad_token_id=0, num_labels=3).to_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert type(config) is KansformerConfig
    model = auto.from_config(config).eval()
    assert type(model) is getattr(kansformer, HEADS[auto])
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    first, second = model(tokens())[0], loaded(tokens())[0]
    assert torch.equal(first, second)
    expected = {
        "KansformerModel": (2, 16, 96),
        "KansformerForCausalLM": (2, 16, 128),
        "KansformerForSequenceClassification": (2, 3),
        "KansformerForTokenClassification": (2, 16, 3),
        "KansformerForQuestionAnswering": (2, 16),
    }
    assert first.shape == expected[HEADS[auto]]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    expected = {auto.__name__: f"modeling_kansformer.{name}" for auto, name in HEADS.items()}
    assert auto_map == expected | {"AutoConfig": "configuration_kansformer.KansformerConfig"}
    for reference in auto_map.values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").exists()


def test_heads_learn():
    config = tiny_config(pad_token_id=0, num_labels=3)
    classes = torch.tensor([0, 2])
    labels = {
        AutoModelForSequenceClassification: {"labels": classes},
        AutoModelForTokenClassification: {"labels": tokens() % 3},
        AutoModelForQuestionAnswering: {"start_positions": classes, "end_positions": classes + 1},
    }
    for auto, targets in labels.items():
        model = auto.from_config(config)
        model(tokens(), **targets).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


WITHOUT_KANSFORMER = """
import importlib.util, sys, torch
assert importlib.util.find_spec("kansformer") is None
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

folder, again, results = sys.argv[1:]
inputs = torch.arange(1, 17)[None]
model, base = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModelForCausalLM, AutoModel))
assert type(model).__module__.startswith("transformers_modules")
save_file({"logits": model(inputs).logits.detach(), "hidden": base(inputs)[0].detach()}, results)
model.save_pretrained(again)
"""


def test_remote_code_needs_no_kansformer(tmp_path):
    """What a model saves loads where kansformer is not installed, bare or whole, with the same outputs; so does what
    that saves. There: site-packages without its .pth files, so without an editable kansformer."""
    model, inputs = tiny_model(), torch.arange(1, 17)[None]
    model.save_pretrained(tmp_path / "0")
    paths = sysconfig.get_paths()["purelib"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": paths}
    for turn in range(2):
        out = [str(tmp_path / name) for name in (f"{turn}", f"{turn + 1}", "results.safetensors")]
        command = [sys.executable, "-S", "-c", WITHOUT_KANSFORMER, *out]
        run = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found = load_file(tmp_path / "results.safetensors")
        assert torch.equal(found["logits"], model(inputs).logits)
        assert torch.equal(found["hidden"], model.model(inputs).last_hidden_state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)


def test_an_imported_kansformer_wins_over_remote_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model) is KansformerForCausalLM


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, kansformer
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
inputs = torch.arange(1, 65).view(2, 32)

def losses(model):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(inputs, labels=inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()

def load(name, **options):
    return AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", **options)

alone = load("even")
with torch.no_grad():
    expected = alone(inputs).logits
    found = load("even", tp_plan="auto")(inputs).logits
    waves, split = load("waves")(inputs).logits, load("waves", tp_plan="auto")
    for projection in (split.model.layers[0].mlp.up_proj, split.model.layers[0].mlp.down_proj.cos_proj):
        weight = getattr(projection.weight, "to_local", lambda: projection.weight)()
        assert weight.numel() == WAVES // 2, weight.shape
    found_waves = split(inputs).logits
torch.testing.assert_close(getattr(found, "full_tensor", lambda: found)(), expected, atol=1e-5, rtol=1e-4)
torch.testing.assert_close(getattr(found_waves, "full_tensor", lambda: found_waves)(), waves, atol=1e-5, rtol=1e-4)
sharded = load("even", distributed_config=DistributedConfig(fsdp_size=2))
torch.testing.assert_close(list(losses(sharded)), list(losses(alone)), atol=1e-5, rtol=1e-5)
try:
    next(losses(load("odd", distributed_config=DistributedConfig(fsdp_size=2))))
except ValueError as error:
    assert "vocab_size=127: must be a multiple of the 2 shards" in str(error)
    print("REFUSED")
dist.destroy_process_group()
"""


def test_tensor_parallel_and_fully_sharded_on_two_processes(tmp_path):
    """The sharded model computes and learns what the whole one does; tied rows that do not divide are refused."""
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "even")
    tiny_model(tie_word_embeddings=True, vocab_size=127).save_pretrained(tmp_path / "odd")
    waves = tiny_model(ffn_type="kan_fourier")
    waves.save_pretrained(tmp_path / "waves")
    size = waves.model.layers[0].mlp.up_proj.weight.numel()
    (tmp_path / "script.py").write_text(TWO_PROCESSES.replace("WAVES", str(size)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("REFUSED") == 2


def test_tied_head():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_model()
    assert untied.num_parameters() - model.num_parameters() == 128 * 96
    assert "lm_head.weight" in untied.state_dict()


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    before = model(tokens()).logits
    model.resize_token_embeddings(130, pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == 192
    torch.testing.assert_close(model(tokens()).logits[..., :128], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


# Initialisation


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_initialisation(ffn_type):
    model = tiny_model(ffn_type=ffn_type, hidden_size=192, num_hidden_layers=4)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert attention.o_proj.weight.std().item() == pytest.approx(192**-0.5 * 8**-0.5, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    tied = tiny_model(ffn_type=ffn_type, hidden_size=192, tie_word_embeddings=True)
    assert tied.lm_head.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    normalised = torch.randn(512, 192)
    for layer in model.model.layers:
        assert layer.mlp(normalised).std().item() == pytest.approx(8**-0.5, rel=0.2)
    assert 4 < model(tokens(8, 64), labels=tokens(8, 64)).loss.item() < math.log(128) + 1.5


@pytest.mark.parametrize("ffn_type", [*KAN_TYPES, "swiglu"])
def test_blocks_take_the_models_epsilon(ffn_type):
    x, outputs = torch.randn(4, 96), []
    for epsilon in (1e-6, 0.5):
        torch.manual_seed(0)
        model = tiny_model(ffn_type=ffn_type, rms_norm_eps=epsilon, gate_norm=ffn_type == "swiglu")
        outputs.append(model.model.layers[0].mlp(x))
    assert not torch.allclose(*outputs, atol=1e-2)


def test_initializer_range_is_llamas():
    model = tiny_model(ffn_type="swiglu", initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


# Grids


@pytest.mark.parametrize("ffn_type", KAN_TYPES)
def test_extend_grid_keeps_the_function_and_the_checkpoint(ffn_type, tmp_path):
    model = tiny_model(ffn_type=ffn_type, spline_order=2, intermediate_size=64)
    odd_grids(model)
    before = model(tokens()).logits
    parameters = model.parameter_counts()["feed_forward"]
    model.extend_grid(6)
    assert model.config.grid_size == 6
    assert model.parameter_counts()["feed_forward"] > parameters
    torch.testing.assert_close(model(tokens()).logits, before, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_grids_of_several_sizes_are_not_saved(tmp_path):
    model = tiny_model(ffn_type="kan_gated")
    model.model.layers[1].mlp.down_proj.extend_grid(6)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj has 6 intervals and config.grid_size is 3.*extend_grid"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.extend_grid(6)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens()).logits, model(tokens()).logits
    )


def test_out_of_grid_fraction():
    model = tiny_model(ffn_type="kan", grid_range=(-1.0, 1.0))
    fractions = model.out_of_grid_fraction(input_ids=tokens(8, 64))
    assert list(fractions) == [name for name, _ in model.kan_layers()]
    assert len(fractions) == 4
    assert all(0.2 < float(fraction) < 0.45 for fraction in fractions.values())  # 0.32 of N(0, 1) lies outside
    name, layer = next(model.kan_layers())
    layer.grid.copy_(torch.tensor([-100.0, 100.0]).expand_as(layer.grid))
    assert model.out_of_grid_fraction(tokens())[name] == 0
    assert not layer._forward_pre_hooks
    assert tiny_model(ffn_type="mlp").out_of_grid_fraction(tokens()) == {}


def test_update_grid(tmp_path):
    model = tiny_model(ffn_type="kan", grid_range=(-0.5, 0.5))
    assert min(model.out_of_grid_fraction(tokens(8, 64)).values()) > 0.4
    model.update_grid(tokens(8, 64), spread=100.0)
    assert max(model.out_of_grid_fraction(tokens(8, 64)).values()) < 0.01  # later layers see what refitting changed
    grids = {name: layer.grid.clone() for name, layer in model.kan_layers()}
    assert all(len(grid.unique(dim=0)) == len(grid) for grid in grids.values()), "one range for each input"
    model.save_pretrained(tmp_path)
    assert_grids(AutoModelForCausalLM.from_pretrained(tmp_path), grids)


def test_grids_are_fitted_without_dropout():
    model = tiny_model(ffn_type="kan", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    once = copy.deepcopy(model)
    for each in (once, model):
        each.update_grid(tokens(8, 64))
    assert [module.training for module in model.modules()] == modes
    for (_, layer), (_, same) in zip(model.kan_layers(), once.kan_layers()):
        assert torch.equal(layer.grid, same.grid)


def test_out_of_grid_fraction_of_a_compiled_model():
    torch._dynamo.reset()
    model = tiny_model()
    expected = model.out_of_grid_fraction(tokens(), use_cache=False)
    model.compile(backend="aot_eager")
    model(tokens(), use_cache=False)
    assert model.out_of_grid_fraction(tokens(), use_cache=False) == expected


# Counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_parameter_counts(ffn_type, tied):
    model = tiny_model(ffn_type=ffn_type, tie_word_embeddings=tied, gate_norm=ffn_type == "swiglu")
    counts = model.parameter_counts()
    assert counts["embedding"] == 128 * 96
    assert counts["head"] == (0 if tied else 128 * 96)
    assert counts["attention"] == 2 * (2 * 96 * 96 + 2 * 96 * 32)
    assert counts["norm"] == 5 * 96
    assert counts["feed_forward"] == sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    assert counts["total"] == model.num_parameters() == sum(counts.values()) - counts["total"]


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("reference", ["swiglu", "mlp"])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_matched_models_cost_the_same(ffn_type, reference, match):
    def cost(**fields):
        with torch.device("meta"):
            model = tiny_model(hidden_size=192, **fields)
        return model.parameter_counts()["total"] if match == "params" else model.flops_per_token(64)

    ours = cost(ffn_type=ffn_type, match_ffn=match, match_reference=reference)
    assert ours == pytest.approx(cost(ffn_type=reference), rel=0.02)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_flops_agree_with_pytorchs_counter(ffn_type):
    options = {"base_activation": "silu", "intermediate_size": 64} if ffn_type == "kan" else {}
    model = tiny_model(ffn_type=ffn_type, attn_implementation="eager", **options).train()
    inputs = tokens(3, 32)
    with FlopCounterMode(display=False) as counter:
        loss = model(inputs, labels=inputs, use_cache=False).loss
    forward = model.flops_per_token(32, training=False) * inputs.numel()
    assert counter.get_total_flops() == pytest.approx(
        forward, rel=2e-5
    )  # older transformers: a product in the rotation
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == model.flops_per_token(32) * inputs.numel() - forward


# The configuration


def test_config_round_trip(tmp_path):
    config = tiny_config(ffn_type="kan_mix", grid_range=[-1, 3], eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for name in FIELDS:
        assert getattr(loaded, name) == getattr(config, name), name
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["intermediate_size"] == 152
    assert saved["head_dim"] == 16
    again = KansformerConfig(**config.to_dict())
    assert again.to_diff_dict() == config.to_diff_dict()
    overridden = AutoConfig.from_pretrained(tmp_path, num_key_value_heads=5)
    with pytest.raises(ValueError, match="num_key_value_heads=5"):
        KansformerModel(overridden)


IMPOSSIBLE = {
    "vocab_size": [0, -64],
    "hidden_size": [0, -96, 97],
    "intermediate_size": [0, -8, [64, 0], [64], []],
    "match_ffn": ["parameters"],
    "match_reference": ["kan"],
    "match_reference_size": [0],
    "num_hidden_layers": [0],
    "num_attention_heads": [0, 10],
    "num_key_value_heads": [0, 4],
    "head_dim": [0, 15],
    "max_position_embeddings": [0],
    "rms_norm_eps": [0.0, -1e-6],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}],
    "attention_dropout": [-0.1, 1.0],
    "pad_token_id": [-1, 128],
    "bos_token_id": [128],
    "eos_token_id": [128, [3, 128]],
    "initializer_range": [0.0, -0.02],
    "sliding_window": [0],
    "layer_types": [["full_attention", "none"], ["sliding_attention"] * 2],
    "no_rope_layers": [[], [1, 2]],
    "ffn_type": ["KAN", "moe"],
    "grid_size": [0, -3],
    "spline_order": [0, 4],
    "grid_range": [(1.0, 1.0), (1e8, 1e8 + 1), (2.0, -2.0), (-math.inf, 1.0), (math.nan, 1.0), (1.0,), (0.0, 1.0, 2.0)],
    "base_activation": ["swish"],
    "fourier_frequency": [0.0, -1.5, math.inf, math.nan],
    "hidden_act": ["swish"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in IMPOSSIBLE for value in IMPOSSIBLE[field]])
def test_impossible_configurations_are_refused(field, value):
    """Each is refused by a ValueError that names the field (or the one it does not fit), its value and the rule."""
    with pytest.raises(ValueError, match=field) as error:
        tiny_config(**{field: value})
    said = f"={value['partial_rotary_factor']!r}: " if isinstance(value, dict) else f"={value!r}"
    assert said in str(error.value)


def test_more_impossible_configurations():
    with pytest.raises(ValueError, match="intermediate_size=None: must be given"):
        tiny_config(match_ffn=None)
    with pytest.raises(ValueError, match="head_dim=3: must be even"):
        tiny_config(hidden_size=18)
    with pytest.raises(Exception, match=r"grid_size.*\n.*expected int"):
        tiny_config(grid_size="3")
    assert tiny_config(match_ffn=None, intermediate_size=40).intermediate_size == 40
    assert tiny_config(hidden_size=100, head_dim=8, intermediate_size=40).head_dim == 8


def test_options_without_effect_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for options, named in (
        ({"ffn_type": "swiglu", "grid_size": 8, "spline_order": 3}, "'swiglu' does not read grid_size, spline_order"),
        ({"ffn_type": "kan_gated", "gate_norm": True}, "'kan_gated' does not read gate_norm"),
        ({"ffn_type": "kan_mix", "project_value": False}, "'kan_mix' does not read project_value"),
        ({"ffn_type": "mlp", "hidden_act": "relu"}, None),
    ):
        caplog.clear()
        tiny_config(**options)
        assert named in caplog.text if named else not caplog.text


# For every field: a base configuration, and values that must each change the output, the size or generation.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
FIELDS = {
    "vocab_size": ({}, [192]),
    "hidden_size": ({}, [192]),
    "intermediate_size": ({}, [64, [64, 80]]),
    "match_ffn": ({"spline_order": 3, "match_reference_size": 512}, ["flops"]),
    "match_reference": ({"match_reference_size": 256}, ["mlp"]),
    "match_reference_size": ({}, [512]),
    "num_hidden_layers": ({}, [3]),
    "num_attention_heads": ({"head_dim": 16}, [4]),
    "num_key_value_heads": ({}, [6, 1]),
    "head_dim": ({}, [32]),
    "max_position_embeddings": ({"rope_parameters": DYNAMIC, "max_position_embeddings": 8}, [12]),
    "rms_norm_eps": ({}, [0.1]),
    "rope_parameters": ({}, [{"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "linear", "factor": 2.0}]),
    "attention_bias": ({}, [True]),
    "attention_output_bias": ({}, [True]),
    "attention_dropout": ({}, [0.5]),
    "qk_norm": ({}, [True]),
    "sliding_window": ({}, [4]),
    "layer_types": ({"sliding_window": 4}, [["full_attention", "sliding_attention"], ["full_attention"] * 2]),
    "no_rope_layers": ({}, [[1, 0], [0, 1]]),
    "tie_word_embeddings": ({}, [True]),
    "pad_token_id": ({}, [5]),
    "bos_token_id": ({}, [5]),
    "eos_token_id": ({}, [5]),
    "use_cache": ({}, [False]),
    "initializer_range": ({}, [0.02]),
    "ffn_type": ({}, ["mlp", "swiglu", "kan", "kan_mix", "kan_fourier"]),
    "grid_size": ({}, [4]),
    "spline_order": ({}, [2, 3]),
    "grid_range": ({}, [(-1.0, 1.0)]),
    "base_activation": ({"ffn_type": "kan"}, ["silu", "gelu", "relu", "identity"]),
    "ffn_norm": ({}, [False]),
    "fourier_frequency": ({"ffn_type": "kan_fourier"}, [3.0]),
    "hidden_act": ({"ffn_type": "mlp"}, ["relu"]),
    "gate_norm": ({"ffn_type": "swiglu"}, [True]),
    "project_value": ({}, [False]),
}


def test_every_field_is_in_the_table():
    inherited = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    assert {field.name for field in dataclasses.fields(KansformerConfig)} - inherited == FIELDS.keys()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_something(field):
    def results(**fields):
        torch.manual_seed(0)
        model = KansformerForCausalLM(tiny_config(**fields)).train()
        output = model(tokens())
        generation = [getattr(model.generation_config, f"{kind}_token_id") for kind in ("pad", "bos", "eos")]
        return output.logits, model.parameter_counts(), generation, output.past_key_values is None

    base, values = FIELDS[field]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no multiple of 8 is closer", category=UserWarning)
        reference = results(**base)
        for value in values:
            logits, *others = results(**base | {field: value})
            same_logits = logits.shape == reference[0].shape and torch.allclose(logits, reference[0], atol=1e-5)
            assert not (same_logits and others == list(reference[1:])), f"{field}={value!r} changes nothing"
