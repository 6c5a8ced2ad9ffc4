"""Focal and dice loss of class masks, from low-resolution logits."""

from .api import MaskLoss, mask_loss, pixel_text_mask_loss

__all__ = ["MaskLoss", "mask_loss", "pixel_text_mask_loss"]
