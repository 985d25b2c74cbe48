"""Configuration of the Kansformer: a Llama-family decoder whose feed-forward block may be a KAN block."""

import math
import os
from itertools import groupby
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from kansformer.functional import BASE_ACTIVATIONS
from kansformer.layers import FFN_TYPES, is_range, match_intermediate_size

from .remote_code import AUTO_MAP, MODULES, write_remote_code

logger = logging.get_logger(__name__)


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: {rule}")


@strict
class KansformerConfig(PreTrainedConfig):
    r"""Everything that defines a Kansformer. The attention, norm and embedding fields are those of `LlamaConfig`.

    Args:
        vocab_size: number of tokens. Keep it a multiple of 64: tied embeddings whose rows do not divide over the
            shards train wrong under FSDP2, and the model refuses to.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward block, or a list of one width a layer (`kansformer.prune` makes
            such models). None: chosen by `match_ffn`. The chosen size is written back, so a saved configuration is
            explicit; an explicit size always wins over `match_ffn`.
        match_ffn: "params" or "flops": what to keep equal to the reference block when `intermediate_size` is None.
        match_reference: the reference block, "swiglu" or "mlp".
        match_reference_size: its width. None: 8/3 * hidden_size for "swiglu", 4 * hidden_size for "mlp".
        num_hidden_layers, num_attention_heads: depth, and query heads per layer.
        num_key_value_heads: key and value heads, a divisor of `num_attention_heads`. None: the same number.
        head_dim: width of a head, even. None: hidden_size / num_attention_heads.
        max_position_embeddings: the longest sequence the model is meant for.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_parameters: as in transformers; None: theta 10000.
        attention_bias, attention_dropout: as in Llama.
        attention_output_bias: a bias on the attention's output projection. None: the same as `attention_bias` (Qwen2
            has biases on queries, keys and values alone).
        qk_norm: an RMSNorm on every query and key head before it is rotated, as in Qwen3.
        sliding_window: tokens that a sliding layer sees, its own included. None: no layer slides.
        layer_types: "full_attention" or "sliding_attention" for every layer. None: all slide if there is a window.
        no_rope_layers: as in SmolLM3, 1 for a layer with rotary positions, 0 for one without. None: all have them.
        tie_word_embeddings: use the embedding matrix as the output head.
        pad_token_id, bos_token_id, eos_token_id: token ids, None where the tokenizer has none.
        use_cache: return the key-value cache.
        initializer_range: standard deviation of every linear layer and embedding, as in Llama. None (the default):
            1/sqrt(fan_in) for linear layers, divided by sqrt(2 * num_hidden_layers) where they write into the
            residual stream; 1 for embeddings, or 1/sqrt(hidden_size) where they are tied. Layers of splines have their
            own in either case, derived in `kansformer.layers.KANLinear`.
        ffn_type: "mlp", "swiglu", "kan", "kan_mix", "kan_gated" or "kan_fourier"; `kansformer.layers` has their
            formulas. Or a list of one for each layer; it is good for fewer layers than it names, the first ones, as
            a saved model's first layers are.
        grid_size: G, intervals of the spline grid (blocks of splines).
        spline_order: k, degree of the splines, 1 to 3 (blocks of splines).
        grid_range: (lo, hi) that the grid covers, in units of the normalised input (blocks of splines).
        base_activation: activation of the base term of each edge, or None for no base term (blocks of splines); one of
            `kansformer.functional.BASE_ACTIVATIONS`.
        ffn_norm: an RMSNorm without gain on what enters the block's last KAN layer (blocks of splines).
        fourier_frequency: angular frequency of the waves of "kan_fourier", for inputs of unit variance at the start.
        hidden_act: the activation of "mlp", of the same list.
        gate_norm: an RMSNorm on the gate of "swiglu".
        project_value: an up projection in the gated blocks, "swiglu" and "kan_gated". False: the gates multiply the
            block's own input, repeated to the width.

    Raises:
        ValueError: naming the field, its value and the rule it breaks.

    Example:

    ```python
    >>> from kansformer import KansformerConfig, KansformerForCausalLM
    >>> config = KansformerConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    >>> config.ffn_type
    'kan_fourier'
    >>> model = KansformerForCausalLM(config)
    ```
    """

    model_type = "kansformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | list[int] | None = None
    match_ffn: str | None = "params"
    match_reference: str = "swiglu"
    match_reference_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float | int = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    initializer_range: float | int | None = None
    ffn_type: str | list[str] = "kan_fourier"
    grid_size: int = 3
    spline_order: int = 1
    grid_range: list[float | int] | tuple[float | int, ...] = (-2.0, 2.0)
    base_activation: str | None = None
    ffn_norm: bool = True
    fourier_frequency: float | int = 1.5
    hidden_act: str = "gelu"
    gate_norm: bool = False
    project_value: bool = True

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            attention = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [attention] * self.num_hidden_layers
        for field in ("layer_types", "no_rope_layers"):  # a saved list, where another number of layers is asked for
            values = getattr(self, field)
            if values:
                more = values[:1] * (self.num_hidden_layers - len(values)) if len(set(values)) == 1 else []
                setattr(self, field, [*values[: self.num_hidden_layers], *more])
        for field in ("ffn_type", "intermediate_size"):  # the first layers of a saved model are as they were
            if isinstance(values := getattr(self, field), list):
                setattr(self, field, values[: self.num_hidden_layers])
        self.grid_range = tuple(float(bound) for bound in self.grid_range)
        # Before anything is derived from the fields, and as plain ValueErrors: @strict wraps those it raises itself.
        self.validate_architecture()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            sizes = {kind: self._matched_size(kind) for kind in set(self.ffn_types)}
            several = isinstance(self.ffn_type, list)
            self.intermediate_size = [sizes[kind] for kind in self.ffn_type] if several else sizes[self.ffn_type]
        self.base_model_tp_plan = self._tensor_parallel_plan()
        self._report_inert_fields()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As everywhere in transformers, and with the code that `trust_remote_code` loads without kansformer.

        A model's `save_pretrained` calls this before it uploads. The `auto_map` has every class, so that each head and
        the bare model load from any checkpoint.
        """
        if len(write_remote_code(save_directory)) == len(MODULES):  # else transformers copies what it loaded itself
            self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    @property
    def intermediate_sizes(self) -> list[int]:
        """The width of the feed-forward block of every layer."""
        size, layers = self.intermediate_size, self.num_hidden_layers  # which may be fewer than when it was made
        return size[:layers] if isinstance(size, list) else [size] * layers

    @property
    def ffn_types(self) -> list[str]:
        """The kind of the feed-forward block of every layer."""
        kind, layers = self.ffn_type, self.num_hidden_layers
        return kind[:layers] if isinstance(kind, list) else [kind] * layers

    @property
    def ffn_summary(self) -> str:
        """The kinds of the feed-forward blocks for people: "kan_gated", or "2 x kan_gated, 2 x swiglu" from below."""
        runs = [(kind, len(list(same))) for kind, same in groupby(self.ffn_types)]
        return runs[0][0] if len(runs) == 1 else ", ".join(f"{count} x {kind}" for kind, count in runs)

    def ffn_options(self, kind: str) -> dict[str, Any]:
        """The keyword options of `kansformer.layers.feed_forward` for blocks of this kind."""
        names = {field: field for field in FFN_TYPES[kind].fields} | {"norm_eps": "rms_norm_eps"}
        return {field: getattr(self, names[field]) for field in FFN_TYPES[kind].fields}

    def _matched_size(self, kind: str) -> int:
        return match_intermediate_size(
            kind,
            self.hidden_size,
            reference=self.match_reference,
            reference_size=self.match_reference_size,
            match=self.match_ffn,
            **self.ffn_options(kind),
        )

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Attention, and the feed-forward block where no norm and no copies of its input run across its split width.

        Blocks of splines stay whole: the rows of `spline_weight` split by input feature, which no stock style does.
        """
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        plan["layers.*.self_attn.o_proj"] = "rowwise"
        if self.qk_norm:  # whole on every rank, each seeing its own heads
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        whole, kinds = self.gate_norm or not self.project_value, set(self.ffn_types)
        if len(kinds) == 1 and not (whole and kinds == {"swiglu"}):
            split = {  # projections whose outputs are split, then those whose inputs are
                "mlp": (["up_proj"], ["down_proj"]),
                "swiglu": (["gate_proj", "up_proj"], ["down_proj"]),
                "kan_fourier": (["up_proj"], ["down_proj.sin_proj", "down_proj.cos_proj"]),
            }
            outward, inward = split.get(*kinds, ([], []))
            plan |= {f"layers.*.mlp.{name}": "colwise" for name in outward}
            plan |= {f"layers.*.mlp.{name}": "rowwise" for name in inward}
        return plan

    def validate_architecture(self):
        """Raise ValueError for the first impossible combination. Also called by the model, as fields may be reset."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for field in (*sizes, "max_position_embeddings", "grid_size"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        for field in ("intermediate_size", "match_reference_size", "head_dim"):
            value = getattr(self, field)
            smallest = min(value, default=0) if isinstance(value, list) else value
            _require(value is None or smallest >= 1, field, value, "must be at least 1, or None to have it chosen")
        _require(
            not isinstance(self.intermediate_size, list) or len(self.intermediate_size) >= self.num_hidden_layers,
            "intermediate_size",
            self.intermediate_size,
            f"a list must have one width for each of num_hidden_layers={self.num_hidden_layers}, or be None",
        )

        layers, window = self.num_hidden_layers, self.sliding_window
        _require(window is None or window >= 1, "sliding_window", window, "must be at least 1, or None for no window")
        kinds = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
        for field, allowed in (("layer_types", kinds), ("no_rope_layers", {0, 1})):
            value = getattr(self, field)
            known = value is None or (len(value) >= layers and set(value) <= allowed)
            rule = f"must hold one of {sorted(allowed)} for each of the {layers} layers (sliding_window={window})"
            _require(known, field, value, rule)

        heads = self.num_attention_heads
        _require(
            heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_attention_heads={heads}",
        )
        _require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            "num_attention_heads",
            heads,
            f"must divide hidden_size={self.hidden_size}, unless head_dim is given",
        )
        head_dim = self.head_dim or self.hidden_size // heads
        _require(head_dim % 2 == 0, "head_dim", head_dim, "must be even: rotary embeddings turn pairs of channels")
        partial = (self.rope_parameters or {}).get("partial_rotary_factor")
        _require(partial in (None, 1), "rope_parameters['partial_rotary_factor']", partial, "every channel is rotated")

        _require(0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "must lie in [0, 1)")
        _require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "must be positive")
        std = self.initializer_range
        _require(std is None or std > 0, "initializer_range", std, "must be positive, or None for 1/sqrt(fan_in)")
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                in_range = token is None or 0 <= token < self.vocab_size
                _require(in_range, field, value, f"must lie in [0, vocab_size={self.vocab_size})")

        known = set(self.ffn_types) <= set(FFN_TYPES) and len(self.ffn_types) == layers
        rule = f"must be one of {sorted(FFN_TYPES)}, or a list of one for each of the {layers} layers"
        _require(known, "ffn_type", self.ffn_type, rule)
        _require(
            self.match_ffn in ("params", "flops", None),
            "match_ffn",
            self.match_ffn,
            "must be 'params', 'flops' or None",
        )
        _require(
            self.intermediate_size is not None or self.match_ffn is not None,
            "intermediate_size",
            self.intermediate_size,
            "must be given where match_ffn=None",
        )
        _require(
            self.match_reference in ("swiglu", "mlp"),
            "match_reference",
            self.match_reference,
            "must be 'swiglu' or 'mlp'",
        )
        for field in ("hidden_act", "base_activation"):
            value = getattr(self, field)
            known = value in BASE_ACTIVATIONS or (field, value) == ("base_activation", None)
            _require(known, field, value, f"must be one of {BASE_ACTIVATIONS}")
        frequency = self.fourier_frequency
        _require(0 < frequency < math.inf, "fourier_frequency", frequency, "must be positive and finite")
        _require(
            1 <= self.spline_order <= 3, "spline_order", self.spline_order, "must be 1, 2 or 3, the closed-form orders"
        )
        _require(
            len(self.grid_range) == 2 and is_range(*self.grid_range),
            "grid_range",
            self.grid_range,
            "must be two finite numbers (lo, hi) with lo < hi, apart in float32",
        )

    def _report_inert_fields(self) -> None:
        """Warn of feed-forward options that were set but that this `ffn_type` does not read."""
        read = {field for kind in self.ffn_types for field in FFN_TYPES[kind].fields}
        inert = {field for block in FFN_TYPES.values() for field in block.fields if hasattr(type(self), field)} - read
        changed = [field for field in sorted(inert) if getattr(self, field) != getattr(type(self), field)]
        if changed:
            logger.warning_once(f"ffn_type={self.ffn_type!r} does not read {', '.join(changed)}: no effect.")
