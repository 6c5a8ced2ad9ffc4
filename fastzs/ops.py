"""The public functional API: every op of :mod:`fastzs.kernels`, by name."""

from fastzs.kernels.bridged_attention.api import TokenLayout, bridged_attention
from fastzs.kernels.dense_attention.api import dense_attention
from fastzs.kernels.dropout.api import dropout
from fastzs.kernels.dropout_attention.api import dropout_attention
from fastzs.kernels.key_smoothing.api import key_smoothing, prompt_denoising
from fastzs.kernels.label_map.api import LabelMap, label_map
from fastzs.kernels.mask_loss.api import MaskLoss, mask_loss, pixel_text_mask_loss
from fastzs.kernels.packed_linear.api import packed_linear
from fastzs.kernels.pixel_text_logits.api import pixel_text_logits
from fastzs.kernels.refine.api import Refined, refine

__all__ = [
    "LabelMap",
    "MaskLoss",
    "Refined",
    "TokenLayout",
    "bridged_attention",
    "dense_attention",
    "dropout",
    "dropout_attention",
    "key_smoothing",
    "label_map",
    "mask_loss",
    "packed_linear",
    "pixel_text_logits",
    "pixel_text_mask_loss",
    "prompt_denoising",
    "refine",
]
