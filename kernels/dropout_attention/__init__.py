"""Attention with dropout on its weights, for training decoders on CPUs."""

from .api import dropout_attention

__all__ = ["dropout_attention"]
