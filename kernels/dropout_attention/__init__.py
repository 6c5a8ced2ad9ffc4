"""Attention with dropout on its weights, as decoders are trained."""

from .api import dropout_attention

__all__ = ["dropout_attention"]
