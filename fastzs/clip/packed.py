"""Linear layers of a frozen tower for inference on a CPU: weights packed once, QuickGELU fused.

A tower that no longer changes can keep its weights in the blocked order that the matrix product wants, instead of
having them reordered in every call, and QuickGELU needs no pass of its own: ``x sigmoid(1.702 x)`` is
``silu(1.702 x) / 1.702``, so 1.702 goes into the weights before it and 1 / 1.702 into those behind it. Results differ
from the unpacked tower's by rounding.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.blocks import GatedMlp
from fastzs.clip.conv import ConvTower
from fastzs.clip.frozen import QUICK_GELU
from fastzs.clip.fused import FusedBlock, FusedDecoderLayer, FusedPool, activation_of
from fastzs.clip.of_timm import TimmBlock
from fastzs.clip.packable import Packable, unpack_if_trained
from fastzs.clip.plain import plain
from fastzs.clip.pools import AttentionPool
from fastzs.clip.products import onednn_pays, packed_pays
from fastzs.clip.vision import Attention, QuickGELU, VisionTransformer
from fastzs.decoders.blocks import DecoderLayer


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
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "no gradient goes through packed weights, but one of the input is wanted; unpack the model first "
                    "(Segmenter.unoptimize, or load it with optimize=False), or use torch.no_grad()"
                )
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
def pack(model: nn.Module, int8: bool = False) -> None:
    """Pack the transformer blocks, timm's plain ones too, and decoder layers inside ``model``, for a CPU.

    Branches of convolutional towers are joined, see :meth:`fastzs.clip.conv.ConvTower.join_branches`.

    The packed weights stand beside the plain ones, see :class:`fastzs.clip.packable.Packable`; :func:`unpack` drops
    them. Weights that are written to by hand have to be packed anew. Blocks with something in them that is not
    :func:`plain` stay as they are.

    Args:
        int8: products in int8, but for those with channels that stand out (:func:`fastzs.clip.fused.int8_noise`) and
            blocks of another form than CLIP's. The plain weights are dropped: the model stays as it is.

    Raises:
        ValueError: with ``int8``: weights that are not finite, or nothing to compute in int8.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    fused = int8 or packed_pays(dtype)
    found = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, TimmBlock | AttentionPool | DecoderLayer):
            module.unpack()
            if not plain(module):
                continue
        if isinstance(module, VisionTransformer):
            onednn = onednn_pays(dtype)
            for i, block in enumerate(module.blocks):
                block.unpack()
                if not plain(block):
                    continue
                if fused and not block.norm_last and not (int8 and activation_of(block) is None):
                    found += _stand_in(f"{name}, block {i}", block, functools.partial(FusedBlock, block, int8), int8)
                else:
                    block.stand_in(
                        {"attn": PackedAttention(block.attn, onednn), "mlp": packed_mlp(block.mlp, onednn).eval()}
                    )
        elif fused and isinstance(module, TimmBlock):
            found += _stand_in(name, module, functools.partial(FusedBlock, module.as_block(), int8), int8)
        elif isinstance(module, AttentionPool):
            module.stand_in(_of_pool(module, fused, onednn_pays(dtype)))
        elif isinstance(module, ConvTower) and not int8:
            module.join_branches()
        elif fused and isinstance(module, DecoderLayer):
            found += _stand_in(name, module, functools.partial(FusedDecoderLayer, module, int8), int8)
    if int8 and not found:
        unpack(model)
        raise ValueError("precision int8 needs transformer blocks of CLIP's form, got none; use auto, fp32 or bf16")


def _of_pool(pool: AttentionPool, fused: bool, onednn: bool) -> dict[str, Any]:
    """Stand-ins for the parts of a pool that see every token."""
    if fused:
        return {"read": FusedPool(pool).read}
    linears = {name: cast(nn.Linear, pool.get_submodule(name)) for name in ("value", "out")}
    parts: dict[str, Any] = {n: PackedLinear(one.weight, one.bias, onednn=onednn) for n, one in linears.items()}
    return parts if pool.mlp is None else parts | {"mlp": packed_mlp(pool.mlp, onednn).eval()}


def computes_int8(model: nn.Module) -> bool:
    """Whether a model was packed in int8."""
    return any(isinstance(module, Packable) and module._gone is not None for module in model.modules())


def _stand_in(name: str, module: Packable, make: Callable[[], FusedBlock | FusedDecoderLayer], int8: bool) -> int:
    try:
        fused = make()
    except ValueError as error:
        raise ValueError(f"{name} cannot be packed: {error}") from error
    parts = {part: getattr(fused, part) for part in fused.STAND_INS}
    module.stand_in(parts | {"forward": functools.partial(_forward, module, fused.forward)})
    if int8:
        module.let_go("this model computes in int8 on the CPU")
    return 1


def _forward(module: Packable, fused: Callable[..., Tensor], *args: Any) -> Tensor:
    unpack_if_trained(module, [module])
    return fused(*args) if module._stand_ins else module.forward(*args)


def unpack(model: nn.Module) -> None:
    """Undo :func:`pack`."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.unpack()
