"""Tools around transformers, unpatched: PEFT, lm-eval, ONNX; the command line, and what an import costs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import scripts
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kansformer
from kansformer.__main__ import COMMANDS
from kansformer.convert import convert
from kansformer.prune import measure_units, remove_units

LM_EVAL = Path(sysconfig.get_paths()["scripts"]) / "lm-eval"


def small(ffn_type: str = "kan_gated", **fields) -> kansformer.KansformerForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24}
    return kansformer.KansformerForCausalLM(kansformer.KansformerConfig(**sizes | fields, ffn_type=ffn_type)).eval()


# PEFT asks transformers for names that 5.2x renames
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
@pytest.mark.parametrize("weights", ["base_weight", "spline_weight"])
def test_lora_on_attention_and_on_a_kan_layer(weights, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    convert(LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))).save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()  # noqa: E731
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": [f"mlp.down_proj.{weights}"]}
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    for place in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        assert sum(place in name for name in trained) == 4  # two layers, A and B
    ids = torch.arange(24)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    expected = model(ids).logits
    assert torch.equal(again(ids).logits, expected)
    assert not torch.allclose(base()(ids).logits, expected, atol=1e-3)
    merged = again.merge_and_unload()
    assert type(merged).__name__ == "KansformerForCausalLM"
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)


# PEFT asks transformers for names that 5.2x renames
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
def test_grids_and_units_do_not_change_under_an_adapter():
    """It would keep the old shape, or the old coefficients on a grid that moved; once merged, all is as ever."""
    ids = torch.arange(24)[None]
    targets = {"target_modules": ["q_proj", "up_proj"], "target_parameters": ["mlp.down_proj.spline_weight"]}
    config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **targets)
    adapted = get_peft_model(small(), config).eval()
    model = adapted.base_model.model
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    visited = []

    def update(name, layer, x):  # what a loop of one's own does
        visited.append(name)
        layer.update_grid(x)

    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has an adapter on spline_weight.*merge_and_unload"):
        model.update_grid(ids)
    with pytest.raises(ValueError, match="KANLinear has an adapter on spline_weight"):
        model.visit_kan_inputs(update, ids)
    assert len(visited) == 1
    with pytest.raises(ValueError, match="has an adapter on spline_weight"):
        model.extend_grid(6)
    for call in (lambda: measure_units(adapted, [ids]), lambda: remove_units(adapted, [torch.arange(8)] * 2)):
        with pytest.raises(ValueError, match=r"(up|down)_proj has an adapter, which"):
            call()
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    merged.extend_grid(6)
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    merged.update_grid(ids)
    assert remove_units(merged, [torch.arange(8)] * 2)(ids).logits.isfinite().all()


# PEFT asks transformers for names that 5.2x renames
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
def test_grids_follow_under_adapters_elsewhere():
    """Those of attention and of base weights leave splines alone."""
    ids = torch.arange(24)[None]
    model = small(base_activation="silu", grid_range=(-8, 8))
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.base_weight"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **targets)).eval()
    expected = adapted(ids).logits
    model.extend_grid(6)
    torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=1e-4)
    splines = [layer.spline_weight.clone() for _, layer in model.kan_layers()]
    model.update_grid(ids)
    for old, (_, layer) in zip(splines, model.kan_layers()):
        assert (layer.grid.abs() < 7).all()
        assert not torch.equal(layer.spline_weight, old)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")  # torch's own
@pytest.mark.parametrize("ffn_type", ["kan", "kan_gated"])
def test_decompositions_leave_no_operator_of_ours(ffn_type):
    """What an exporter that knows aten alone gets, for any batch and length."""
    model = small(ffn_type, base_activation="silu" if ffn_type == "kan" else None, num_hidden_layers=1)
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}, "use_cache": None}
    inputs = {"input_ids": torch.arange(20).view(2, 10), "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    assert "kansformer.kan_linear" in str(program.graph)
    program = program.run_decompositions(kansformer.decompositions())
    assert "kansformer" not in str(program.graph)
    ids = torch.arange(51).view(3, 17)
    found = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript (pip install kansformer[onnx])")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX export is checked by onnxruntime")
    model = small()
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}, "use_cache": None}
    inputs = {"input_ids": torch.arange(20).view(2, 10), "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    torch.onnx.export(program.run_decompositions(kansformer.decompositions()), dynamo=True).save(tmp_path / "m.onnx")
    ids = torch.arange(51).view(3, 17)
    found = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input_ids": ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(ids).logits.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not LM_EVAL.exists(), reason='lm-eval is not installed: pip install "kansformer[eval]"')
def test_lm_eval_from_its_own_command_line(tmp_path):
    """The README's command, on a model of random weights: the figure is the model's bits per byte."""
    from tokenizer import byte_tokenizer

    small().save_pretrained(tmp_path / "model")
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "lm-eval run" in line)
    command = shlex.split(line.replace("MODEL_DIR", str(tmp_path / "model")))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [str(LM_EVAL), *command[1:], "--limit", "8", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["shakespeare_bytes"]["bits_per_byte,none"]
    assert 8 < found < 12  # log2(320) = 8.3 and the spread of random logits


IMPORT = """
import os, random, sys, time, torch
from transformers import LlamaForCausalLM
llama, modules = time.process_time(), set(sys.modules)
before = set(os.listdir(".")), torch.get_rng_state().tolist(), random.getstate()
import kansformer
assert before == (set(os.listdir(".")), torch.get_rng_state().tolist(), random.getstate())
print((time.process_time() - llama) / llama, *sorted(set(sys.modules) - modules), file=sys.stderr)
"""


def test_import_is_quiet_and_brings_little_beside_llama():
    """Nothing printed or warned, no seed touched, no folder made, few modules, a fifth of the CPU time at most."""
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1, run.stderr
    ratio, *more = run.stderr.split()
    assert float(ratio) < 0.2
    assert len(more) < 25
    assert {name for name in more if not name.startswith("kansformer")} <= {
        *("torch.utils.flop_counter", "torch.utils.module_tracker"),
        *("transformers.models.qwen3", "transformers.models.qwen3.configuration_qwen3"),
        "transformers.models.qwen3.modeling_qwen3",
    }, "an import that Llama's does not need: is it worth its time?"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    words = [word for word in shlex.split(command) if re.search(r"^-m$|^kansformer|\.py$", word)]
    run = scripts.run(*words, "--help")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 5


def test_every_module_that_runs_is_listed():
    modules = {path.stem for path in (ROOT / "kansformer").glob("*.py") if "__main__" in path.read_text()}
    listed = {match for command in COMMANDS for match in re.findall(r"kansformer\.(\w+)", command)}
    assert modules - {"__main__"} <= listed


def test_saved_folder_is_ready_for_a_hub(tmp_path):
    """Safetensors, configuration, code and nothing that is unpickled."""
    small().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_kansformer.py", "configuration_kansformer.py"} <= names
    assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".py"}
    for path in tmp_path.glob("*.py"):
        assert not re.search(r"^\s*(from|import) kansformer", path.read_text(), flags=re.MULTILINE), path.name
    shutil.rmtree(tmp_path)
