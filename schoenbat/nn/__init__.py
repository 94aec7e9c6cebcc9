"""Modules: attention in the shape of torch's, self-attention with SchoenbAt's normalisation, and the encoder."""

from schoenbat.nn.encoder import Classifier, ModelConfig, build_model
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.nn.multihead import FormerConfig, SelfAttention

__all__ = ["Classifier", "FormerConfig", "ModelConfig", "MultiheadKernelAttention", "SelfAttention", "build_model"]
