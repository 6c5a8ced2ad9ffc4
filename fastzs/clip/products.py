"""Linear layers in fp32 by oneDNN where torch's default, MKL, is slower: in training, and in inference unpacked.

``bench/test_train_step.py`` measures what it makes of a training step.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


def takes(x: Tensor) -> bool:
    """Whether products of ``x`` [..., in] go through oneDNN."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # an exported graph is for any machine
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.ndim > 1
        and x.numel() > 0
        and onednn_pays(torch.float32)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, add: Tensor | None = None) -> Tensor:
    """``x w^T + b``, or ``add + x w^T``, without a gradient, of an ``x`` that :func:`takes`.

    Args:
        x: [..., in].
        weight: [out, in], perhaps transposed.
        bias: [out].
        add: [..., out].
    """
    x, weight = _dense(x), _dense(weight)
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """Without gaps between its rows, or columns: else oneDNN takes its reference code, a hundred times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


class _Linear(torch.autograd.Function):
    """Of rows x [N, in]."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        ctx.biased = bias is not None and bias.requires_grad
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = None if weight is None else product(grad, weight.t())
        dw = None if x is None else product(grad.t(), x.t())
        return dx, dw, grad.sum(0) if ctx.biased else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if not takes(x) or weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # of rows, since oneDNN would give a view, which must not be changed in place
        return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)
    return product(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
