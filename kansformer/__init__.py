"""Kansformer: Kolmogorov-Arnold (KAN) feed-forward blocks for transformers.

Importing it registers the models with transformers' Auto classes.
"""

from .models import (
    KansformerConfig,
    KansformerForCausalLM,
    KansformerForQuestionAnswering,
    KansformerForSequenceClassification,
    KansformerForTokenClassification,
    KansformerModel,
    KansformerPreTrainedModel,
)

__version__ = "0.1.0"
__all__ = [
    "KansformerConfig",
    "KansformerForCausalLM",
    "KansformerForQuestionAnswering",
    "KansformerForSequenceClassification",
    "KansformerForTokenClassification",
    "KansformerModel",
    "KansformerPreTrainedModel",
]
