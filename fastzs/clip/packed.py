"""Linear layers of a frozen tower for inference on a CPU: weights packed once, QuickGELU fused.

A tower that no longer changes can keep its weights in the blocked order that the matrix product wants, instead of
having them reordered in every call, and QuickGELU needs no pass of its own: ``x sigmoid(1.702 x)`` is
``silu(1.702 x) / 1.702``, so 1.702 goes into the weights before it and 1 / 1.702 into those behind it. Results differ
from the unpacked tower's by rounding.
"""

import copy
import platform
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.blocks import GatedMlp
from fastzs.clip.frozen import QUICK_GELU
from fastzs.clip.packable import Packable
from fastzs.clip.vision import Attention, QuickGELU, VisionTransformer


def onednn_pays(dtype: torch.dtype) -> bool:
    """Whether packed oneDNN products are taken for ``dtype``; ``bench/test_tower.py`` measures both.

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


class PackedLinear(nn.Module):
    """``x w^T + b``, or its silu.

    Args:
        weight, bias: [out, in], [out].
        silu: apply y sigmoid(y).
        onednn: pack for oneDNN; otherwise torch's own product takes the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, silu: bool = False, onednn: bool):
        super().__init__()
        self.silu, self.onednn = silu, onednn
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach()) if onednn else weight.detach()
        self.bias = bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.onednn:
            activation = "swish" if self.silu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], None)
        y = F.linear(x, self.weight, self.bias)
        return F.silu(y, inplace=True) if self.silu else y


class PackedAttention(Attention):
    """:class:`Attention` with packed projections, one each for queries, keys and values."""

    def __init__(self, attention: Attention, onednn: bool):
        nn.Module.__init__(self)
        self.heads, self.norm = attention.heads, attention.norm
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        pairs = zip("qkv", weights, biases, strict=True)
        self.in_proj = nn.ModuleDict({name: PackedLinear(w, b, onednn=onednn) for name, w, b in pairs})
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias, onednn=onednn)

    def project(self, x: Tensor, which: str = "qkv") -> tuple[Tensor, ...]:
        return tuple(self.in_proj[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in which)

    @property
    def sources(self) -> list[Tensor]:
        return [cast(PackedLinear, projection).bias for projection in self.in_proj.values()]


def packed_mlp(mlp: nn.Sequential | GatedMlp, onednn: bool) -> nn.Module:
    """The MLP of a block with packed products, the first of which computes QuickGELU, or the gate's SiLU, too."""
    if isinstance(mlp, GatedMlp):
        silu = isinstance(mlp.act, nn.SiLU)
        small: Any = copy.copy(mlp)
        small._modules = dict(mlp._modules)  # the given one keeps its own
        small.gate = PackedLinear(mlp.gate.weight, mlp.gate.bias, silu=silu, onednn=onednn)
        small.act = nn.Identity() if silu else mlp.act
        for name in ("c_fc", "c_proj"):
            layer = cast(nn.Linear, mlp.get_submodule(name))
            setattr(small, name, PackedLinear(layer.weight, layer.bias, onednn=onednn))
        return small
    fc, gelu, proj = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(mlp))
    quick = isinstance(gelu, QuickGELU)
    scale = QUICK_GELU if quick else 1.0
    first = PackedLinear(fc.weight * scale, fc.bias * scale, silu=quick, onednn=onednn)
    last = PackedLinear(proj.weight / scale, proj.bias, onednn=onednn)
    return nn.Sequential(first, last) if quick else nn.Sequential(first, gelu, last)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Pack the blocks of the vision transformers inside ``model``, for evaluation on a CPU.

    The packed weights stand beside the plain ones, see :class:`fastzs.clip.packable.Packable`; :func:`unpack` drops
    them. Weights that are written to by hand have to be packed anew.
    """
    for tower in model.modules():
        if isinstance(tower, VisionTransformer):
            onednn = onednn_pays(tower.dtype)
            for block in tower.blocks:
                block.unpack()
                block.stand_in(
                    {"attn": PackedAttention(block.attn, onednn), "mlp": packed_mlp(block.mlp, onednn).eval()}
                )


def unpack(model: nn.Module) -> None:
    """Undo :func:`pack`."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.unpack()
