"""Cosine scores of pixel features against class embeddings."""

from .api import pixel_text_logits

__all__ = ["pixel_text_logits"]
