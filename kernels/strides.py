"""Strides of heads [B, H, L, d] as the attention kernels take them."""

from collections.abc import Sequence

from torch import Tensor

BYTES = 16  # that a thread can load at once


def in_units(tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
    """Of each tensor the strides of images, heads and tokens, in units of that many numbers, the first of the two.

    A unit is 16 bytes of the first tensor's numbers if rows begin at multiples of it, else one number. Of an argument
    Triton asks only whether it is a multiple of 16. Heads of 72 (SigLIP's largest), 88 or 104 channels (ViT-g,
    ViT-bigG) are not, so every number would be loaded by itself, for which registers do not suffice. A constant factor
    is known to it.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = BYTES // tensors[0].element_size()
    if any(number % unit for number in (*strides, tensors[0].shape[3])):
        unit = 1
    return unit, [stride // unit for stride in strides]
