"""Reformer models in plain PyTorch."""

from reformer_dist.models.attention import ExactSelfAttention, LocalSelfAttention, LSHSelfAttention
from reformer_dist.models.block import Block
from reformer_dist.models.classification import ReformerForSequenceClassification
from reformer_dist.models.encoder_decoder import ReformerEncoderDecoder
from reformer_dist.models.initialization import init_weights
from reformer_dist.models.inspection import AttentionView, inspect_attention
from reformer_dist.models.language_model import ReformerLM
from reformer_dist.models.question_answering import ReformerForQuestionAnswering
from reformer_dist.models.stack import ReformerStack

__all__ = [
    "AttentionView",
    "Block",
    "ExactSelfAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "ReformerEncoderDecoder",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerLM",
    "ReformerStack",
    "init_weights",
    "inspect_attention",
]
