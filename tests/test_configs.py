"""The configurations in the repository: models of equal size, runs that parse, topologies that accelerate reads."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kansformer import KansformerConfig, KansformerForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

import settings as settings_module  # noqa: E402
from settings import Settings  # noqa: E402
from tokenizer import byte_tokenizer  # noqa: E402

# The size that a name promises, in millions of parameters.
SIZES = {"tiny": 0.82, "small_5m": 5, "small_30m": 30, "125m": 125, "350m": 350, "1b": 1000}


def counts(name: str) -> tuple[dict[str, int], dict]:
    fields = json.loads((ROOT / f"configs/models/{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    return model.parameter_counts(), fields


@pytest.mark.parametrize("size", SIZES)
def test_models_of_a_size_have_equal_parameters_and_differ_only_in_the_feed_forward(size):
    swiglu, swiglu_fields = counts(f"{size}_swiglu")
    block = {"ffn_type", "intermediate_size", "gate_norm", "ffn_norm"}
    block |= {"grid_size", "spline_order", "grid_range", "base_activation", "fourier_frequency"}
    for name in ("kan_gated", "kan_fourier"):
        kan, kan_fields = counts(f"{size}_{name}")
        assert kan["total"] == pytest.approx(swiglu["total"], rel=0.01)
        assert kan["feed_forward"] == pytest.approx(swiglu["feed_forward"], rel=0.02)
        assert kan["total"] == pytest.approx(SIZES[size] * 1e6, rel=0.1)
        shared = [{k: v for k, v in fields.items() if k not in block} for fields in (kan_fields, swiglu_fields)]
        assert shared[0] == shared[1]
        assert kan_fields["intermediate_size"]  # explicit, in all
        assert kan_fields["vocab_size"] % 64 == 0
    assert swiglu_fields["intermediate_size"] > 0


def test_every_model_file_is_one_of_a_size():
    names = {path.stem for path in (ROOT / "configs/models").glob("*.json")}
    assert names == {f"{size}_{block}" for size in SIZES for block in ("kan_gated", "kan_fourier", "swiglu")}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda path: path.stem)
def test_runs_parse_and_their_models_hold_their_sequences(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = settings_module.parse([str(path)])
    config = settings_module.model_config(settings, byte_tokenizer())
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (320, 256, 257)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_topologies_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    topology = load_config_from_file(str(path))
    assert topology.num_processes % topology.num_machines == 0
    assert topology.use_cpu == path.stem.endswith("cpu")
    assert (topology.distributed_type == "FSDP") == ("fsdp2" in path.stem)
    if "fsdp2" in path.stem:
        assert topology.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_topologies_start_what_their_names_promise(path):
    """What `accelerate launch --config_file` makes of them: the launcher's flags, and the processes' environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train/train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    several, sharded, nodes = "one" not in path.stem, "fsdp2" in path.stem, 2 if "multi_node" in path.stem else 1
    assert (arguments.multi_gpu or arguments.use_fsdp) == several
    assert arguments.use_fsdp == sharded
    assert arguments.num_machines == nodes
    assert arguments.num_processes == (8 * nodes if several else 1)
    assert arguments.mixed_precision == "no"  # the run's own setting decides
    if several:
        environment = prepare_multi_gpu_env(arguments)
        assert (environment.get("ACCELERATE_USE_FSDP") == "true") == sharded
        assert (environment.get("FSDP_VERSION") == "2") == sharded


def test_the_torchrun_line_of_the_readme_has_settings_that_exist(monkeypatch):
    """As the line in the README above it does, which is run."""
    lines = (ROOT / "train/README.md").read_text().splitlines()
    words = next(line for line in lines if line.strip().startswith("torchrun")).split()
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "2", "train/train.py"]
    monkeypatch.chdir(ROOT)
    assert settings_module.parse(words[5:]).device == "cpu"


# Settings


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 200\nlearning_rate: 1e-3\nmodel_overrides:\n  hidden_size: 64\n")
    return str(path)


def test_command_line_overrides_the_file(yaml_file):
    settings = settings_module.parse([yaml_file, "--learning_rate", "3e-4", "--batch_size=8", "--compile", "true"])
    assert (settings.steps, settings.learning_rate, settings.batch_size, settings.compile) == (200, 3e-4, 8, True)
    assert settings_module.parse([yaml_file]).learning_rate == 1e-3  # YAML 1.1 would read text
    assert settings_module.parse([yaml_file, "--max_grad_norm", "null"]).max_grad_norm is None
    overrides = settings_module.parse([yaml_file, "--model.ffn_type", "swiglu"]).model_overrides
    assert overrides == {"hidden_size": 64, "ffn_type": "swiglu"}
    assert settings_module.parse([yaml_file, "--output_dir", "2024_11"]).output_dir == "2024_11"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rte", "1"], "unknown setting 'learning_rte': did you mean 'learning_rate'"),
        (["--steps", "many"], "steps = 'many' must be of type int, not str"),
        (["--steps", "1.5"], "steps = 1.5 must be of type int"),
        (["--steps", "true"], "steps = True must be of type int"),
        (["--steps", "0"], "steps = 0 must be positive"),
        (["--compile", "1"], "compile = 1 must be of type bool"),
        (["--learning_rate", "-1"], "learning_rate = -1.0 must be positive"),
        (["--learning_rate", "nan"], "learning_rate = nan must be positive"),
        (["--val_fraction", "1"], r"val_fraction = 1.0 must lie strictly between 0 and 1"),
        (["--warmup_steps", "-1"], "warmup_steps = -1 must not be negative"),
        (["--precision", "fp16"], "precision fp16 is not supported: .* use bf16"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--compile"], "--steps needs a value"),
        (["a.yaml", "b.yaml"], "does not exist"),
        (["--lr", "1"], "unknown setting 'lr': did you mean 'learning_rate'"),
        (["--qqq", "1"], "unknown setting 'qqq'$"),
    ],
)
def test_bad_settings_are_refused_with_value_and_remedy(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        settings_module.parse(arguments)


def test_unknown_key_in_the_file_names_the_nearest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("bacth_size: 4\n")
    with pytest.raises(ValueError, match="unknown setting 'bacth_size': did you mean 'batch_size'"):
        settings_module.parse([str(path)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fnn_type": "kan"}, "unknown model field 'fnn_type': did you mean 'ffn_type'"),
        ({"vocab_size": 64}, "model.vocab_size 64 is smaller than the tokenizer's 258 tokens"),
        ({"max_position_embeddings": 8}, "sequence_length 256 exceeds"),
        ({"ffn_type": "relu"}, "ffn_type"),
    ],
)
def test_bad_model_fields_are_refused(overrides, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        settings_module.model_config(Settings(model_overrides=overrides), byte_tokenizer())


def test_a_block_that_changes_takes_its_own_width(monkeypatch, tmp_path):
    """Else an override of the block would train one of another size."""
    monkeypatch.chdir(ROOT)

    def config(**overrides):
        return settings_module.model_config(Settings(model_overrides=overrides), byte_tokenizer())

    sizes = {}
    splines = {"ffn_type": "kan_gated", "grid_size": 2}
    for overrides in ({}, {"ffn_type": "swiglu"}, {"ffn_type": "mlp"}, splines, {"hidden_size": 64}):
        model = KansformerForCausalLM(config(**overrides))
        sizes[str(overrides)] = model.parameter_counts()["feed_forward"]
    *same, small = sizes.values()
    assert same == pytest.approx([same[0]] * len(same), rel=0.01)
    assert small == pytest.approx(same[0] / 4, rel=0.05)
    assert config(ffn_type="mlp", match_reference="mlp").intermediate_size == 4 * 128
    assert config(ffn_type="swiglu", intermediate_size=40).intermediate_size == 40
    path, text = tmp_path / "model.json", Path(Settings().model).read_text()
    path.write_text(text.replace('"fourier_frequency"', '"fourier_frequenzy"'))
    message = r"unknown model field 'fourier_frequenzy' in .*model.json: did you mean 'fourier_frequency'"
    with pytest.raises(ValueError, match=message):
        settings_module.model_config(Settings(model=str(path)), byte_tokenizer())
    path.write_text(json.dumps(json.loads(text) | {"ffn_type": ["kan_gated"] * 2 + ["swiglu"] * 2}))
    few = Settings(model=str(path), model_overrides={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"num_hidden_layers = 2 is not the 4 layers .* give --model.ffn_type too"):
        settings_module.model_config(few, byte_tokenizer())


def test_models_of_others_and_of_saved_folders(monkeypatch, tmp_path):
    """A published file holds fields that its class lacks; a saved one lists what every layer is."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "config.json"

    def config(fields: dict | str, **overrides):
        path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return settings_module.model_config(Settings(model=str(path), model_overrides=overrides), byte_tokenizer())

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert config({"model_type": "llama", "is_llama_config": True} | sizes).hidden_size == 32
    assert config({"model_type": "gpt2", "n_ctx": 1024, "n_embd": 32}, n_layer=1).n_layer == 1
    assert config({"model_type": "bloom", "hidden_size": 32}).hidden_size == 32
    with pytest.raises(ValueError, match="unknown model field 'n_layers': did you mean 'n_layer'"):
        config({"model_type": "gpt2", "n_ctx": 1024}, n_layers=1)
    for broken in ("{", "[]", "{}"):
        with pytest.raises(ValueError, match=r"config.json' is not the config.json of a model"):
            config(broken)
    saved = KansformerConfig(**sizes, vocab_size=320, no_rope_layers=[1, 1], ffn_type="kan_gated").to_dict()
    for layers in (1, 4):
        made = config(saved, num_hidden_layers=layers)
        assert made.layer_types == ["full_attention"] * layers
        assert made.no_rope_layers == [1] * layers
        KansformerForCausalLM(made)
    made.num_hidden_layers = 2
    assert len(KansformerForCausalLM(made).model.layers) == 2
    assert config(saved, match_reference_size=1000).intermediate_size == 496
    assert config(saved, match_reference_size=1000, match_ffn="flops").intermediate_size == 496
    with pytest.warns(UserWarning, match="91.4% of the flops"):
        assert config(saved, match_ffn="flops").intermediate_size == 40


def test_precision_no_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("precision: no\n")  # yaml's false
    assert settings_module.parse([str(path)]).precision == "no"


def test_vocabulary_follows_the_tokenizer_in_multiples_of_64(monkeypatch):
    monkeypatch.chdir(ROOT)
    for num_tokens, vocab_size in ((258, 320), (320, 320), (321, 384), (1000, 1024)):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([f"<extra {i}>" for i in range(num_tokens - 258)])
        assert settings_module.model_config(Settings(), tokenizer).vocab_size == vocab_size


def test_every_free_key_is_a_setting():
    assert {field.name for field in dataclasses.fields(Settings)} >= settings_module.FREE_KEYS
