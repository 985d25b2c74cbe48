"""Pretrained Llama-family decoders as `kansformer.convert` reads them: what they compute, and weights one by one."""

import functools
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kansformer.models import KansformerConfig

# Fields that mean the same in every family.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "initializer_range",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)

# What each family adds to them; read from the models of transformers, since configurations do not say it.
_FAMILIES: dict[str, Callable[[PreTrainedConfig], dict]] = {
    "llama": lambda c: {"attention_bias": c.attention_bias},
    "mistral": lambda c: {"sliding_window": c.sliding_window},
    "qwen2": lambda c: {"attention_bias": True, "attention_output_bias": False} | _windows(c),
    "qwen3": lambda c: {"attention_bias": c.attention_bias, "qk_norm": True} | _windows(c),
    "smollm3": lambda c: {"attention_bias": c.attention_bias, "no_rope_layers": _rotated(c)} | _windows(c),
}

# Fields of other configurations, and what they stand for unless they are None, False, 0 or 1.
_FOREIGN = {
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"): "a mixture of experts",
    ("kv_lora_rank", "q_lora_rank"): "multi-head latent attention",
    ("attn_logit_softcapping", "final_logit_softcapping"): "logit softcapping",
    ("logit_scale", "logits_scaling"): "logit scaling",
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier"): "scaled activations",
    ("parallel_attn", "use_parallel_residual"): "attention and feed-forward blocks in parallel",
    ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"): "LayerNorm",
    ("mlp_bias",): "biases in the feed-forward block",
    ("quantization_config",): "quantized weights (load them with dequantization, and pass the model)",
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

# What is fetched of a model on the hub: nothing that would have to be unpickled.
_DOWNLOAD = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]


def kansformer_config(source: PreTrainedConfig, **splines: object) -> KansformerConfig:
    """The configuration of the Kansformer that computes what a model with the configuration `source` does.

    Raises:
        ValueError: naming everything that has no counterpart.
    """
    unsupported = [
        f"{meaning} ({field}={value!r})"
        for fields, meaning in _FOREIGN.items()
        for field in fields
        if (value := getattr(source, field, None)) is True or value not in (None, 0, 1)
    ]
    if (act := getattr(source, "hidden_act", "silu")) not in ("silu", "swish"):
        unsupported.append(f"hidden_act={act!r}, where SwiGLU has 'silu'")
    rope = getattr(source, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type", "default")) not in _ROPE_TYPES:
        unsupported.append(f"rope_type={kind!r}, which is none of {', '.join(_ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        unsupported.append(f"partial rotary embeddings (partial_rotary_factor={rope['partial_rotary_factor']!r})")
    if source.model_type not in _FAMILIES:
        unsupported.append(f"model_type={source.model_type!r}, which is none of {', '.join(_FAMILIES)}")
    if unsupported:
        remedy = (
            "kansformer.kanify adds splines to blocks down(act(up x)), like GPT-2's, in place; gated blocks, such as "
            "Phi3's or Gemma's, it can only replace by new ones (kanify(model, '*.mlp', reinitialize=True)), which "
            "loses their function"
        )
        raise ValueError(f"this model cannot be converted exactly: it has {'; '.join(unsupported)}. {remedy}")
    fields = {field: getattr(source, field, None) for field in _SHARED}
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(fields[field], int) and not 0 <= fields[field] < source.vocab_size:
            fields[field] = None  # old Llama configurations say -1 for no token
    block = {"ffn_type": "kan_gated", "base_activation": "silu", "ffn_norm": False}
    return KansformerConfig(**fields | _FAMILIES[source.model_type](source) | block | splines)


def _windows(config: PreTrainedConfig) -> dict:
    slides = "sliding_attention" in config.layer_types
    return {"sliding_window": config.sliding_window, "layer_types": list(config.layer_types)} if slides else {}


def _rotated(config: PreTrainedConfig) -> list[int]:
    return [int(rotates) for rotates in config.no_rope_layers[: config.num_hidden_layers]]


class Source(NamedTuple):
    """A model to convert."""

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    shapes: Mapping[str, Sequence[int]]
    weight: Callable[[str], Tensor]  # read when asked for
    model: Callable[[], PreTrainedModel]  # to run; its layers on disk where they come from there
    generation_config: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    license: str | None = None


def open_source(source: PreTrainedModel | str | os.PathLike) -> Source:
    """A model, a folder or hub name with safetensors weights, or a .gguf file; refused if it cannot be converted."""
    if isinstance(source, nn.Module):
        return _open_model(source, getattr(source, "name_or_path", ""), None)
    if str(source).endswith(".gguf"):
        return _open_gguf(Path(source))
    folder = Path(source)
    if not folder.is_dir():
        if len(folder.parts) > 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):  # no name of a hub
            raise FileNotFoundError(f"folder {str(source)!r} does not exist (looked from {Path.cwd()})")
        folder = Path(snapshot_download(str(source), allow_patterns=_DOWNLOAD))
    config = AutoConfig.from_pretrained(folder)
    kansformer_config(config)  # refuses before anything is read
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not (index.exists() or whole.exists()):
        raise ValueError(f"{source} has no safetensors weights: load the model, save_pretrained it, and convert that")
    names = set(_weight_map(index).values()) if index.exists() else {whole.name}
    files = [safe_open(folder / name, "pt") for name in sorted(names)]
    place = {name: file for file in files for name in file.keys()}  # noqa: SIM118, no dictionary
    shapes = {name: file.get_slice(name).get_shape() for name, file in place.items()}
    dtype = config.dtype or files[0].get_tensor(next(iter(files[0].keys()))).dtype
    return Source(
        name=str(source) if not Path(source).exists() else folder.resolve().name,
        config=config,
        dtype=dtype,
        shapes=shapes,
        weight=lambda name: place[name].get_tensor(name),
        model=functools.cache(lambda: offloaded(folder, dtype)),
        generation_config=_if_any(folder / "generation_config.json", lambda: GenerationConfig.from_pretrained(folder)),
        tokenizer=_if_any(folder / "tokenizer_config.json", lambda: AutoTokenizer.from_pretrained(folder)),
        license=_if_any(folder / "README.md", lambda: ModelCard.load(folder / "README.md").data.license),
    )


def _open_model(model: nn.Module, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    if isinstance(model, PreTrainedModel):
        kansformer_config(model.config)
    if not isinstance(model, PreTrainedModel) or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"{type(model).__name__} is no causal language model of transformers; "
            "pass the model with its language-model head, its adapters merged (merge_and_unload)"
        )
    state = model.state_dict()
    if len(dtypes := {tensor.dtype for tensor in state.values()}) > 1:
        raise ValueError(
            f"the weights have several dtypes, {sorted(map(str, dtypes))}: cast them to one with .to(dtype)"
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("some weights are offloaded: pass the path of the checkpoint, which is read bit by bit")
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return Source(
        name=name or type(model).__name__,
        config=model.config,
        dtype=model.dtype,
        shapes=shapes,
        weight=lambda name: state[name].clone(),
        model=lambda: model,
        generation_config=model.generation_config,
        tokenizer=tokenizer,
    )


def _open_gguf(file: Path) -> Source:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    with file.open("rb") as opened:
        if (magic := opened.read(4)) != b"GGUF":
            raise ValueError(f"{file} is no .gguf file: it begins with {magic!r}, not b'GGUF'")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)  # reads where every tensor should be
    except (ValueError, struct.error) as error:
        raise ValueError(f"{file} cannot be read: {error} (one that is cut short must be downloaded again)") from error
    kansformer_config(config)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return _open_model(model, file.name, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every weight, as an index of shards has it."""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files, it has no weight_map: {error!r}") from error


def _if_any(file: Path, read: Callable[[], object]) -> object | None:
    return read() if file.exists() else None


def offloaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its layers left on disk: each is read when it runs."""
    resident = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(resident, "cpu") | {"model.layers": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, dtype=dtype).eval()
