"""Kansformer: Kolmogorov-Arnold (KAN) feed-forward blocks for transformers.

Importing it registers the models with transformers' Auto classes.
"""

from .functional import choose_backend, decompositions, fourier_linear, kan_linear
from .layers import FFN_TYPES, FourierLinear, KANLinear, feed_forward, match_intermediate_size
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
    "FFN_TYPES",
    "FourierLinear",
    "KANLinear",
    "KansformerConfig",
    "KansformerForCausalLM",
    "KansformerForQuestionAnswering",
    "KansformerForSequenceClassification",
    "KansformerForTokenClassification",
    "KansformerModel",
    "KansformerPreTrainedModel",
    "choose_backend",
    "decompositions",
    "feed_forward",
    "fourier_linear",
    "kan_linear",
    "match_intermediate_size",
]
