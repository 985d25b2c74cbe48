"""The training script: its figures, its errors, its demonstration."""

import json
import math
import shutil
import subprocess
import sys

import checkpoint
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from settings import Settings
from training import ROOT, SMALL, command, lines, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

import train


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a short text and, soon, its token files."""
    folder = tmp_path_factory.mktemp("train")
    text = (ROOT / "train/tinyshakespeare.txt").read_text()
    (folder / "text.txt").write_text(text[:12_000])
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def straight(workplace):
    """A run of 60 steps that nothing disturbed, with every checkpoint kept."""
    output = workplace / "straight"
    results = train.main(command(workplace, output, steps=60, keep_checkpoints=9))
    AcceleratorState._reset_state(reset_partial_state=True)
    return output, results


# What a run writes


def test_metrics_results_and_falling_loss(straight):
    output, results = straight
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert [r["step"] for r in evaluations] == [10, 20, 30, 40, 50, 60]
    for record in steps:
        assert set(record) == {
            *("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"),
            "model_flops_per_second",
        }
        assert record["peak_memory_bytes"] > 50e6
    for record in evaluations:
        assert set(record) == {"step", "tokens", "val_loss", "val_bits_per_byte", "out_of_grid", "out_of_grid_worst"}
        assert 0 < record["out_of_grid"] <= record["out_of_grid_worst"] < 0.2
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.2)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < math.log(320)
    # 60 steps of 8 x 32 targets, but for the shorter window that ends each of the 1.4 epochs
    assert 60 * 8 * 32 - 2 * 31 <= steps[-1]["tokens"] <= 60 * 8 * 32
    assert results == json.loads((output / "results.json").read_text())
    assert results["val_loss"] == evaluations[-1]["val_loss"]
    assert 0 < results["feed_forward_parameters"] < results["parameters"]


def test_the_saved_model_loads_and_generates(straight):
    folder = straight[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("First", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 13)
    assert tokenizer.decode(tokens[0]).startswith("First")
    card = (folder / "README.md").read_text()
    assert "from_pretrained" in card
    assert "learning_rate: 0.003" in card
    assert not list(folder.rglob("*.bin"))  # nothing that would be unpickled


def test_a_stock_model_trains_too(workplace, tmp_path):
    fields = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 64, **SMALL}
    (tmp_path / "llama.json").write_text(json.dumps(fields))
    arguments = command(workplace, tmp_path / "run", model="tiny_swiglu", steps=10)
    results = train.main([*arguments, f"--model={tmp_path / 'llama.json'}"])
    assert results["val_loss"] < math.log(320)
    assert "out_of_grid" not in results


def test_gradient_checkpointing_changes_nothing(workplace, straight, tmp_path):
    train.main(command(workplace, tmp_path, steps=60, gradient_checkpointing="true", max_minutes=10, save_every=60))
    assert lines(tmp_path, "loss") == pytest.approx(lines(straight[0], "loss"), abs=1e-5)


def test_bf16_autocast_trains(workplace, tmp_path):
    results = train.main(command(workplace, tmp_path, precision="bf16"))
    assert results["val_loss"] < math.log(320)
    assert tensors(tmp_path)["model.embed_tokens.weight"].dtype == torch.float32


def test_a_compiled_model_is_saved_and_resumed_under_its_own_names(workplace, straight, tmp_path, monkeypatch):
    accelerator = train.Accelerator
    monkeypatch.setattr(train, "Accelerator", lambda **kwargs: accelerator(**kwargs | {"dynamo_backend": "eager"}))
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(straight[0] / "checkpoints/step-00000050", tmp_path / "checkpoints/step-00000050")
    train.main(command(workplace, tmp_path, steps=60, compile="true"))
    assert tensors(tmp_path).keys() == tensors(straight[0]).keys()
    late = {step: loss for step, loss in lines(straight[0], "loss").items() if step > 50}
    assert lines(tmp_path, "loss") == pytest.approx(late, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, tensors(tmp_path)["model.embed_tokens.weight"])


# Figures checked by hand


def test_bits_per_byte_of_a_known_distribution(workplace, tmp_path, monkeypatch):
    """A model whose embeddings are zero (and tied) gives every one of its 320 tokens the same probability."""
    from_config = AutoModelForCausalLM.from_config

    def uniform(config):
        model = from_config(config)
        torch.nn.init.zeros_(model.get_input_embeddings().weight)
        return model

    monkeypatch.setattr(train.AutoModelForCausalLM, "from_config", uniform)
    results = train.main(command(workplace, tmp_path, steps=1, warmup_steps=0, learning_rate=1e-30))
    # A byte is a token, and each byte of the text, the first too, is a target: bits per byte are bits per token.
    assert results["val_loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert results["val_bits_per_byte"] == pytest.approx(math.log2(320), rel=1e-6)
    # "é" is one character and two bytes: three equally likely choices for it cost log2(3)/2 bits a byte.
    assert train.bits_per_byte(math.log(3), len("é".encode())) == pytest.approx(math.log2(3) / 2)


def test_evaluation_equals_the_mean_over_the_held_out_text(straight):
    """The reported loss against one computed window by window from the text itself."""
    folder = straight[0] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (straight[0].parent / "text.txt").read_text()
    held_out = text[text.index("\n", round(0.9 * len(text))) + 1 :]
    tokens = torch.tensor([tokenizer.eos_token_id, *tokenizer(held_out)["input_ids"]])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        logits = model(input_ids=window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert straight[1]["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert straight[1]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(held_out.encode()), rel=1e-5)


def test_learning_rate_schedule():
    settings = Settings(steps=100, warmup_steps=10, learning_rate=2.0, min_lr_ratio=0.1)
    rates = [train.learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.2)


def test_parameter_groups_by_name(straight):
    model = AutoModelForCausalLM.from_pretrained(straight[0] / "model")
    names = {id(p): name for name, p in model.named_parameters()}
    settings = Settings(weight_decay=0.2, spline_weight_decay=0.3, spline_lr_ratio=0.5)
    groups = train.parameter_groups(model, settings)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    matrices, vectors, splines = ([names[id(p)] for p in group["params"]] for group in groups)
    assert [(g["weight_decay"], g["lr_ratio"]) for g in groups] == [(0.2, 1.0), (0.0, 1.0), (0.3, 0.5)]
    assert all(name.endswith("_proj.weight") for name in matrices)
    assert all("norm" in name or name == "model.embed_tokens.weight" for name in vectors)
    assert splines == [f"model.layers.{layer}.mlp.down_proj.spline_weight" for layer in (0, 1)]


# Health


def test_nonfinite_loss_stops_before_the_step(workplace, tmp_path):
    """A huge rate breaks the gradients of the second step (the norms keep its loss finite): nothing is applied."""
    arguments = command(workplace, tmp_path, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step 2: .*norm nan; nothing was applied.*rank 0: gradient of model\."
    ):
        train.main(arguments)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name == "step-00000001"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_the_first_nonfinite_value_is_named(straight):
    model = AutoModelForCausalLM.from_pretrained(straight[0] / "model")
    batch = [(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))]
    assert train.first_nonfinite(model, model, batch) == "none here"
    layer = model.model.layers[1].mlp.gate_proj
    hook = layer.register_forward_hook(lambda _, __, output: output / 0)
    assert train.first_nonfinite(model, model, batch) == "output of model.layers.1.mlp.gate_proj"
    hook.remove()
    layer.weight.grad = torch.full_like(layer.weight, math.inf)
    assert train.first_nonfinite(model, model, batch) == "gradient of model.layers.1.mlp.gate_proj.weight"
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert train.first_nonfinite(model, model, batch) == "parameter model.norm.weight"


def test_too_long_a_sequence_and_an_uneven_batch_are_refused(workplace, tmp_path):
    with pytest.raises(ValueError, match="sequence_length 1024 exceeds"):
        train.main(command(workplace, tmp_path, sequence_length=1024))
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of micro_batch_size 3 x 1"):
        train.main(command(workplace, tmp_path, micro_batch_size=3))
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    with pytest.raises(ValueError, match="tokens, fewer than"):
        train.main(command(workplace, tmp_path, data=tmp_path / "short.txt"))


# The demonstration


@pytest.mark.slow
def test_demo(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "train/demo.py"), "--steps", "3", "--output_dir", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}")
    results = json.loads((tmp_path / "demo/table.json").read_text())
    assert results["kan_gated"]["parameters"] == pytest.approx(results["swiglu"]["parameters"], rel=0.01)
    for column in ("feed-forward parameters", "bits per byte", "tokens/s", "peak memory (MB)"):
        assert column in run.stdout
    for picture in ("loss.png", "edges.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 20_000
