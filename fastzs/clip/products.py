"""Linear layers by ``packed_linear`` where torch's own products are slower: in training, and in inference unpacked.

Weights are packed anew in each call. ``bench/test_train_step.py`` measures what it makes of a training step.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.kernels.packed_linear.training import pack_now
from fastzs.ops import packed_linear

LEAST_ROWS = 128  # packing the weights costs as much as multiplying some fifty rows


@functools.cache
def onednn_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products are taken where ``packed_linear`` is not; ``bench/test_tower.py`` measures.

    bf16: where the CPU has instructions for it torch multiplies through oneDNN anyway, and packing saves reordering
    the weights in every call. fp32: not on Intel's CPUs, where torch's default, MKL, is as fast (oneDNN took 1.05
    times as long for a ViT-B/16's products on an Ice Lake Xeon), but on AMD's, where MKL avoids the wide instructions.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    can = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return dtype == torch.float32 and platform.machine() in ("x86_64", "AMD64") and "AMD" in can.get("cpu_name", "")


@functools.cache
def packed_pays(dtype: torch.dtype) -> bool:
    """Whether ``packed_linear`` takes products in ``dtype``; ``bench/test_packed_linear.py`` measures.

    bf16: with AVX512-BF16, but not with AMX, whose tiles oneDNN uses. fp32: not on Intel's processors, where torch's
    default, MKL, multiplies as fast, but on AMD's, where MKL avoids the wide instructions.
    """
    if MISSING is not None or platform.machine() not in ("x86_64", "AMD64"):
        return False
    can = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return bool(can.get("avx512_bf16") and not can.get("amx_bf16"))
    return dtype == torch.float32 and "AMD" in can.get("cpu_name", "") and bool(can.get("avx2"))


def precision(x: Tensor) -> torch.dtype:
    """What matrix products of ``x`` are computed in: its dtype, or under autocast that of autocast."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def takes(x: Tensor) -> bool:
    """Whether products of ``x`` [..., in] go through ``packed_linear``, in the precision that :func:`precision` says.

    Those of models in bf16 do not: they are for inference, packed once. Nor do those of a graph that is traced or
    exported, which is for any machine, nor those under torch.func and forward-mode derivatives, which it has not.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # pyright: ignore[reportPrivateImportUsage]
        and not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
        and x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")))
        and x.ndim > 1
        and x.shape[:-1].numel() >= LEAST_ROWS
        and x.shape[-1] > 0
        and packed_pays(precision(x))
    )


class _Linear(torch.autograd.Function):
    """Of rows x [N, in]."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        ctx.of_x, ctx.of_weight, ctx.dtype = x.dtype, weight.dtype, dtype
        ctx.biased = bias is not None and bias.requires_grad
        return product(x, weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = None if weight is None else turned(grad, weight, ctx.dtype, ctx.of_x)
        dw = None if x is None else turned(grad.t(), x, ctx.dtype, ctx.of_weight)
        return dx, dw, grad.sum(0, dtype=ctx.of_weight) if ctx.biased else None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x w^T + b`` in ``dtype``, without a gradient, of an ``x`` that :func:`takes`."""
    return packed_linear(x, pack_now(weight, bias, dtype), dtype=dtype, impl="cpu")


def turned(x: Tensor, weight: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
    """``x w`` of x [..., n] and weight [n, m], multiplied in ``dtype`` and given in ``result``."""
    return packed_linear(x, pack_now(weight, None, dtype, turned=True), dtype=result, impl="cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if not takes(x) or weight.dtype != torch.float32 or not weight.numel():
        return F.linear(x, weight, bias)
    dtype = precision(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x.flatten(0, -2), weight, bias, dtype).view(*x.shape[:-1], -1)
    return product(x, weight, bias, dtype)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
