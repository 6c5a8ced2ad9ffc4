"""Specification of attention with dropout on its weights, in plain PyTorch: which weights stay follows from a seed."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def dropout_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, seed: Tensor) -> Tensor:
    """See :func:`fastzs.kernels.dropout_attention.api.dropout_attention`; seed is an int64 of no dimension."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax((q @ k.transpose(-1, -2)).to(wide) * scale, -1)  # [B, H, Q, N]
    keep = kept((*q.shape[:3], k.shape[2]), dropout, seed.to(q.device))
    return (weights * keep / (1 - dropout)).to(v.dtype) @ v


def kept(shape: tuple[int, ...], dropout: float, seed: Tensor) -> Tensor:
    """Which weights of maps ``[B, H, Q, N]`` are kept, bool.

    A row of the maps has 64 bits from splitmix64 of the seed and its number; with those, the last step of murmur3
    makes 31 random bits of a key's number. A weight is kept if they, as a number, are at least ``dropout * 2^31``.
    """
    *rows, keys = shape
    row = torch.arange(1, torch.Size(rows).numel() + 1, device=seed.device)
    x = seed + row * _signed(0x9E3779B97F4A7C15)  # int64 wraps around, as the unsigned numbers of the C++ code do
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = (x ^ _shift(x, 31)).view(*rows, 1)
    y = (torch.arange(keys, device=seed.device) + x) & LOW  # [B, H, Q, N], 32 bits of each
    y = (y ^ (y >> 16)) * 0x85EBCA6B & LOW
    y = (y ^ (y >> 13) ^ _shift(x, 32)) * 0xC2B2AE35 & LOW
    y = y ^ (y >> 16)
    return y >> 1 >= round(dropout * 2**31)


def _signed(x: int) -> int:
    """The int64 with the bits of a 64-bit number."""
    return x - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 taken as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
