"""Specification of dropout in plain PyTorch: which elements stay follows from a seed."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def dropout_reference(x: Tensor, relu: bool, rate: float, seed: Tensor) -> Tensor:
    """See :func:`fastzs.kernels.dropout.api.dropout`; seed is an int64 of no dimension."""
    keep = kept(x.shape, rate, seed.to(x.device))
    return (x.relu() if relu else x) * keep / (1 - rate)


def kept(shape: tuple[int, ...], rate: float, seed: Tensor) -> Tensor:
    """Which elements are kept, bool.

    A row, all elements that differ in the last dimension's place only, has 64 bits from splitmix64 of the seed and its
    number; with those, the last step of murmur3 makes 31 random bits of an element's place in it. The element is kept
    if they, as a number, are at least ``rate * 2^31``.
    """
    *rows, length = shape
    row = torch.arange(1, torch.Size(rows).numel() + 1, device=seed.device)
    x = seed + row * _signed(0x9E3779B97F4A7C15)  # int64 wraps around, as the unsigned numbers of the C++ code do
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = (x ^ _shift(x, 31)).view(*rows, 1)
    y = (torch.arange(length, device=seed.device) + x) & LOW  # [..., length], 32 bits of each
    y = (y ^ (y >> 16)) * 0x85EBCA6B & LOW
    y = (y ^ (y >> 13) ^ _shift(x, 32)) * 0xC2B2AE35 & LOW
    y = y ^ (y >> 16)
    return y >> 1 >= round(rate * 2**31)


def _signed(x: int) -> int:
    """The int64 with the bits of a 64-bit number."""
    return x - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 taken as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
