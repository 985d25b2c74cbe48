"""The Kansformer as transformers models. Importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_kansformer import KansformerConfig
from .modeling_kansformer import (
    KansformerForCausalLM,
    KansformerForQuestionAnswering,
    KansformerForSequenceClassification,
    KansformerForTokenClassification,
    KansformerModel,
    KansformerPreTrainedModel,
)

AutoConfig.register(KansformerConfig.model_type, KansformerConfig, exist_ok=True)
for auto_class, model_class in {
    AutoModel: KansformerModel,
    AutoModelForCausalLM: KansformerForCausalLM,
    AutoModelForSequenceClassification: KansformerForSequenceClassification,
    AutoModelForTokenClassification: KansformerForTokenClassification,
    AutoModelForQuestionAnswering: KansformerForQuestionAnswering,
}.items():
    auto_class.register(KansformerConfig, model_class, exist_ok=True)

__all__ = [
    "KansformerConfig",
    "KansformerForCausalLM",
    "KansformerForQuestionAnswering",
    "KansformerForSequenceClassification",
    "KansformerForTokenClassification",
    "KansformerModel",
    "KansformerPreTrainedModel",
]
