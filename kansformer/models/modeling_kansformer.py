"""The Kansformer: a Llama-family decoder whose feed-forward block is one of `kansformer.layers`.

Attention, RMSNorm and rotary embedding are those of Llama (Touvron et al. 2023, arXiv:2302.13971) and, where the
configuration asks for it, of its relatives Mistral, Qwen and SmolLM, so that models that differ in `ffn_type` differ in
nothing else. A decoder layer is

    x = x + attention(norm(x))
    x = x + mlp(norm(x))

Initialisation keeps the variance of the residual stream bounded: embeddings draw from N(0, 1) (tied ones from
N(0, 1/hidden_size)), linear layers from N(0, 1/fan_in), those that write into the residual stream from
N(0, 1/(2 L fan_in)) for L layers, and layers of splines follow `KANLinear`.
"""

import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from kansformer.layers import KANLinear, feed_forward, observing, refuse_adapters

from .configuration_kansformer import KansformerConfig

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class KansformerRMSNorm(LlamaRMSNorm):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 (arXiv:1910.07467)."""


class KansformerRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines of the rotary position embedding (arXiv:2104.09864), with transformers' scaling variants.

    The frequencies stay float32 under `.to(dtype)`: an error in one grows with the position that it turns.
    """

    def _apply(self, fn, recurse=True):
        frequencies = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, frequency in frequencies.items():
            if (cast := getattr(self, name)).dtype != torch.float32:
                setattr(self, name, frequency.to(cast.device))
        return self


class KansformerAttention(Qwen3Attention):
    """Causal grouped-query attention (arXiv:2305.13245) with rotary positions. Returns (output, weights or None).

    Qwen3's is Llama's with a norm on queries and keys and a window on some layers; without both it is Llama's.
    """

    def __init__(self, config: KansformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()
        if config.attention_output_bias != config.attention_bias:
            shape = self.o_proj.in_features, self.o_proj.out_features
            self.o_proj = nn.Linear(*shape, bias=config.attention_output_bias)
        self.o_proj.init_gain = residual_init_gain(config)


class KansformerDecoderLayer(GradientCheckpointingLayer):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)): (batch, seq, hidden_size) to the same shape."""

    def __init__(self, config: KansformerConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = KansformerRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KansformerAttention(config, layer_idx)
        self.post_attention_layernorm = KansformerRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        kind = config.ffn_types[layer_idx]
        self.mlp = feed_forward(
            kind,
            config.hidden_size,
            config.intermediate_sizes[layer_idx],
            init_gain=residual_init_gain(config),
            **config.ffn_options(kind),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class KansformerPreTrainedModel(PreTrainedModel):
    """What every Kansformer has: initialisation, loading rules, parameter and FLOP counts, and grid care."""

    config: KansformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KansformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["grid"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": KansformerDecoderLayer, "attentions": KansformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only through transformers.initialization: its functions leave alone whatever was loaded from a checkpoint.
        std = self.config.initializer_range
        if isinstance(module, KANLinear):
            module.reset_parameters(copy_=init.copy_)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std or getattr(module, "init_gain", 1.0) * module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # As a head, a tied matrix needs logits of unit variance; else the residual stream starts at unit variance.
            unit = module.embedding_dim**-0.5 if self.config.tie_word_embeddings else 1.0
            init.normal_(module.weight, std=std or unit)
        else:
            super()._init_weights(module)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by purpose: embedding, attention, feed_forward (its inner norms included), norm, head, total.

        A shared parameter counts once, so a tied head counts 0. The total is `num_parameters()`.
        """
        counts = dict.fromkeys(("embedding", "attention", "feed_forward", "norm", "head"), 0)
        for name, parameter in self.named_parameters():
            path = name.split(".")
            if "mlp" in path:
                purpose = "feed_forward"
            elif "self_attn" in path:
                purpose = "attention"
            elif "embed_tokens" in path:
                purpose = "embedding"
            else:
                purpose = "norm" if path[-2].endswith("norm") else "head"
            counts[purpose] += parameter.numel()
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, seq_len: int, training: bool = True) -> int:
        """Matrix-product FLOPs per token of a sequence of `seq_len` tokens.

            forward = 2 * (weights of linear and KAN layers) + 4 * seq_len * num_layers * num_heads * head_dim
            training = 3 * forward    (backward: the gradients of both operands of each product)

        A KAN layer of P weights is a matrix product of P weights, so it costs what a linear layer does. Attention is
        counted over the full square, as `torch.utils.flop_counter` does; recomputation is not counted.

        Args:
            seq_len: tokens in the sequence, all of them processed at once.
            training: count the backward pass too.
        """
        weights = sum(
            weight.numel()
            for module in self.modules()
            if isinstance(module, (nn.Linear, KANLinear))
            for weight in module.parameters(recurse=False)
            if weight.ndim == 2
        )
        config = self.config
        attention = 2 * seq_len * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return (6 if training else 2) * (weights + attention)

    def kan_layers(self) -> Iterator[tuple[str, KANLinear]]:
        """Every `KANLinear`, the layer of splines, of the model with its name."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, KANLinear))

    def extend_grid(self, grid_size: int) -> None:
        """Refine every layer of splines to `grid_size` intervals, the same functions; see `KANLinear.extend_grid`.

        The parameters are replaced: make a new optimizer afterwards. ValueError where an adapter holds coefficients.
        """
        refuse_adapters(self, "spline_weight")
        self._require_grids()
        for _, layer in self.kan_layers():
            layer.extend_grid(grid_size)
        self.config.grid_size = grid_size

    def _require_grids(self) -> None:
        if not any(self.kan_layers()):
            raise ValueError(f"the model has no grids: its blocks are {self.config.ffn_summary}, not of splines")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As everywhere in transformers; ValueError where a layer has not the `grid_size` of the configuration."""
        for name, layer in self.kan_layers():
            if layer.grid_size != self.config.grid_size:
                raise ValueError(
                    f"{name} has {layer.grid_size} intervals and config.grid_size is {self.config.grid_size}: what is "
                    "saved would not load. Extend the grids of all layers: model.extend_grid(grid_size)"
                )
        super().save_pretrained(save_directory, **kwargs)

    def out_of_grid_fraction(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """The share of the inputs of each layer of splines that fall outside its grid, where no spline learns.

        Runs one forward pass without gradient.

        Args:
            *args, **kwargs: passed to the model, such as `input_ids` and `attention_mask`.

        Returns:
            One scalar tensor for each such layer, by the layer's name; empty where the model has none.
        """
        fractions = {}

        def record(name: str, layer: KANLinear, x: torch.Tensor) -> None:
            fractions[name] = layer.out_of_grid_fraction(x)

        self.visit_kan_inputs(record, *args, **kwargs)
        return fractions

    def update_grid(self, *args, spread: float = 4.0, **kwargs) -> None:
        """Fit the grid of every layer of splines to its inputs on one batch; see `KANLinear.update_grid`.

        Runs one forward pass without gradient, in which each layer is refitted before the next one sees its output.
        Across processes all of them must call this; the ranges are reduced, so all get the same.

        Args:
            *args, **kwargs: passed to the model, such as `input_ids`. Padding counts like any other token.
            spread: standard deviations that a grid reaches on either side of the mean.
        Raises:
            ValueError: if the model has no grids, an adapter holds the coefficients of a layer, or for samples that
                make no grid.
        """
        refuse_adapters(self, "spline_weight")
        self._require_grids()
        self.visit_kan_inputs(lambda name, layer, x: layer.update_grid(x, spread), *args, **kwargs)

    @torch.no_grad()
    def visit_kan_inputs(self, visit: Callable[[str, KANLinear, torch.Tensor], None], *args, **kwargs) -> None:
        """Run the model once, without dropout: `visit` gets name, layer and input of every layer of splines."""
        hooks = [
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: visit(name, layer, inputs[0]))
            for name, layer in self.kan_layers()
        ]
        with observing(self, hooks):
            self(*args, **kwargs)


class KansformerModel(KansformerPreTrainedModel):
    """The decoder without a head: token ids (batch, seq) to normalised hidden states (batch, seq, hidden_size)."""

    def __init__(self, config: KansformerConfig):
        config.validate_architecture()  # fields set after construction, as from_pretrained(..., field=value) does
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KansformerDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = KansformerRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = KansformerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch, after the final norm.

        Args:
            input_ids: int64 (batch, seq). Exactly one of this and `inputs_embeds`.
            attention_mask: (batch, past + seq), 1 for tokens and 0 for padding. None: no padding.
            position_ids: int64 (batch, seq). None: counted on from the length of the cache.
            past_key_values: cache to read and extend.
            inputs_embeds: (batch, seq, hidden_size).
            use_cache: make a cache where none is given, and return it.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict` and what the attention function takes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # Looking for packed sequences in positions that are counted on would wait for the device, or, compiled, write
        # out a mask that keeps attention from its causal kernel.
        packed = position_ids
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)

        masks = attention_mask
        if not isinstance(masks, dict):  # generate has made them where it compiles
            shape = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": packed}
            masks = {
                kind: MASKS[kind](config=self.config, past_key_values=past_key_values, **shape)
                for kind in set(self.config.layer_types)
            }
        hidden_states = inputs_embeds
        rotation = self.rotary_emb(hidden_states, position_ids=position_ids)
        rotations = [rotation] * len(self.layers)
        if self.config.no_rope_layers is not None:
            unrotated = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])  # cosine and sine of angle 0
            rotations = [rotation if rotates else unrotated for rotates in self.config.no_rope_layers]
        for index in range(self.config.num_hidden_layers):  # early-exit drafting lowers the number
            # Positional: the hooks that record hidden states and reentrant checkpointing look at the first argument.
            hidden_states = self.layers[index](
                hidden_states,
                attention_mask=masks[self.config.layer_types[index]],
                position_embeddings=rotations[index],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class KansformerForCausalLM(KansformerPreTrainedModel, GenerationMixin):
    """The language model: a Kansformer with a linear head over the vocabulary, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: KansformerConfig):
        super().__init__(config)
        self.model = KansformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given. Other arguments as in `KansformerModel.forward`.

        Args:
            labels: int64 (batch, seq), the tokens themselves (shifted here); -100 is ignored. The loss is their mean
                cross entropy in nats, or their sum over `num_items_in_batch` where that is passed.
            logits_to_keep: the last that many positions, or the positions in a 1-D tensor. 0: all of them.
        """
        if self.training and self.config.tie_word_embeddings and dist.is_available() and dist.is_initialized():
            self._check_sharded_vocabulary()
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_sharded_vocabulary(self) -> None:
        # transformers' loader shards tied embeddings unevenly in a way that FSDP2 then trains wrong, without a word.
        from torch.distributed.fsdp import FSDPModule

        rows, shards = self.config.vocab_size, dist.get_world_size()
        if isinstance(self, FSDPModule) and rows % shards != 0:
            raise ValueError(
                f"vocab_size={rows}: must be a multiple of the {shards} shards that FSDP2 makes of tied embeddings; "
                "pad it with resize_token_embeddings(new_num_tokens, pad_to_multiple_of=64)"
            )


class KansformerForSequenceClassification(GenericForSequenceClassification, KansformerPreTrainedModel):
    """One label for a sequence, from its last token that is not padding."""


class KansformerForTokenClassification(GenericForTokenClassification, KansformerPreTrainedModel):
    """One label for each token."""


class KansformerForQuestionAnswering(GenericForQuestionAnswering, KansformerPreTrainedModel):
    """Start and end of the answer's span."""


def residual_init_gain(config: KansformerConfig) -> float:
    """1 / sqrt(2 L): with L layers adding two terms each, the residual stream's variance grows by one in all."""
    return (2 * config.num_hidden_layers) ** -0.5
