"""Attention over CLS, prompts, patches and region tokens under CLIP-RC's mask."""

from .api import TokenLayout, bridged_attention

__all__ = ["TokenLayout", "bridged_attention"]
