"""Transformer blocks and decoder layers for inference on a CPU, everything around a product fused with it.

A block whose weights no longer change keeps them in the order that the products want, in int8 if so asked, and needs
no passes of its own for layer norms, activations and residuals: see :func:`fastzs.ops.packed_linear`. Results differ
from those of the block it was made of by rounding.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.blocks import Attention, Block, GatedMlp, QuickGELU, Rotation
from fastzs.clip.pools import AttentionPool
from fastzs.decoders.blocks import CrossAttention, DecoderLayer
from fastzs.kernels.packed_linear.weights import PANEL, PackedNorm, PackedWeight, pack_norm, pack_weight
from fastzs.ops import dropout_attention, packed_linear
from fastzs.trace import traced

INT8_NOISE = 0.03  # of a product's result by rounding its operands, relative; beyond it a product keeps 16 or 32 bits


def activation_of(block: Block) -> str | None:
    """The name that ``packed_linear`` has for the activation of a block's MLP; None for blocks of another form."""
    if block.norm_last or block.attn.norm is not None or not isinstance(block.mlp, nn.Sequential):
        return None
    gelu = block.mlp[1]
    if isinstance(gelu, QuickGELU):
        return "quick_gelu"
    return "gelu" if cast(nn.GELU, gelu).approximate == "none" else "gelu_tanh"


def int8_noise(weight: Tensor, norm: nn.LayerNorm | None = None) -> float:
    """The relative error, root mean square, that rounding to int8 gives ``x w^T``: the median over its outputs.

    Rounding to steps of s errs by s / sqrt(12). A step of an output's weights is a 127th of the largest. A step of a
    token is a 127th of its largest magnitude, which is known beforehand behind a layer norm only: channel k has the
    mean b_k and the deviation g_k, and the largest of many is taken to be the largest of |b_k| + 3 |g_k|. So channels
    that stand out, in the weights or in the norm, show here. Computed once, when a model is packed.
    """
    w = weight.detach().double()
    total = w.square().sum(1).clamp_min(1e-60)
    of_weights = (w.abs().amax(1) / 127).square() / 12 * w.shape[1] / total
    if norm is None:
        return of_weights.median().sqrt().item()
    gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
    signal = w.square() @ (gain.square() + bias.square())
    step = (bias.abs() + 3 * gain.abs()).max() / 127
    of_tokens = step.square() / 12 * total / signal.clamp_min(1e-60)
    return (of_weights + of_tokens).median().sqrt().item()


def _packed(weight: Tensor, bias: Tensor, int8: bool) -> PackedWeight:
    return pack_weight(weight, bias, torch.int8 if int8 else weight.dtype)


def _join(parts: list[PackedWeight]) -> PackedWeight:
    """Layers of one input, one after the other, each of whole panels of outputs."""
    panels, columns = torch.cat([p.panels for p in parts]), torch.cat([p.columns for p in parts], 1)
    return PackedWeight(panels, columns, parts[0].inputs, columns.shape[1])


class FusedProjections:
    """Projections of one width from the same tokens, side by side, so that any run of them is one product.

    Args:
        linears: weights [width, in] and biases [width].
        heads: of each.
    """

    def __init__(self, linears: list[tuple[Tensor, Tensor]], heads: int, int8: bool):
        self.heads, self.width = heads, len(linears[0][0])
        self.padded = -(-self.width // PANEL) * PANEL
        self.packed = _join([_packed(w, b, int8) for w, b in linears])

    def __call__(self, x: Tensor, first: int, stop: int, before: PackedNorm | None = None) -> tuple[Tensor, ...]:
        """Tokens [B, L, C], a layer norm before them -> those from ``first`` to ``stop``, each [B, H, L, width / H]."""
        panels, columns = self.packed.panels, self.packed.columns
        rows, per = self.padded // PANEL, self.padded
        if stop - first < len(panels) // rows:
            panels, columns = panels[first * rows : stop * rows], columns[:, first * per : stop * per].contiguous()
        y = packed_linear(x, PackedWeight(panels, columns, self.packed.inputs, columns.shape[1]), before=before)
        parts = y.unflatten(-1, (stop - first, per))[..., : self.width].unflatten(-1, (self.heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)


class FusedAttention(Attention):
    """:class:`Attention` with its weights packed."""

    def __init__(self, attention: Attention, int8: bool):
        nn.Module.__init__(self)
        self.heads, self.norm = attention.heads, None
        self.before_out = None if attention.norm is None else pack_norm(attention.norm)
        pairs = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        self.in_proj = FusedProjections(list(pairs), self.heads, int8)
        self.out = _packed(attention.out_proj.weight, attention.out_proj.bias, int8)

    def project(self, x: Tensor, which: str = "qkv", before: PackedNorm | None = None) -> tuple[Tensor, ...]:
        return self.in_proj(x, "qkv".index(which[0]), "qkv".index(which[-1]) + 1, before)

    @property
    def sources(self) -> list[Tensor]:
        return [self.in_proj.packed.columns]

    def merge(self, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        return packed_linear(heads.transpose(1, 2).flatten(2), self.out, before=self.before_out, residual=residual)


class FusedMLP(nn.Module):
    """The MLP of a block: two linear layers and what lies between."""

    def __init__(self, first: nn.Linear, last: nn.Linear, activation: str, int8: bool):
        super().__init__()
        self.first, self.last = (_packed(linear.weight, linear.bias, int8) for linear in (first, last))
        self.activation = activation

    def forward(self, x: Tensor, before: PackedNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return packed_linear(x, self.first, self.last, activation=self.activation, before=before, residual=residual)


class FusedGatedMLP(nn.Module):
    """:class:`GatedMlp` with the norm of the block before it, packed.

    Args:
        ln: the block's norm; where the MLP has one of its input, that one comes second and is fused with the products.
    """

    def __init__(self, mlp: GatedMlp, ln: nn.LayerNorm):
        super().__init__()
        linears = (cast(nn.Linear, mlp.get_submodule(name)) for name in ("gate", "c_fc", "c_proj"))
        self.gate, self.first, self.last = (_packed(linear.weight, linear.bias, False) for linear in linears)
        self.silu = isinstance(mlp.act, nn.SiLU)
        self.hidden_norm = pack_norm(mlp.norm) if mlp.norm is not None and mlp.norm_of == "hidden" else None
        self.input_norm = pack_norm(mlp.norm) if mlp.norm is not None and mlp.norm_of == "input" else None
        self.ln = (ln.normalized_shape, ln.weight.detach(), ln.bias.detach(), ln.eps)

    def forward(self, x: Tensor, before: PackedNorm, residual: Tensor) -> Tensor:
        if self.input_norm is not None:
            x, before = F.layer_norm(x, *self.ln), self.input_norm
        gate = packed_linear(x, self.gate, before=before)
        gate = F.silu(gate, inplace=True) if self.silu else F.gelu(gate)
        hidden = gate.mul_(packed_linear(x, self.first, before=before))
        return packed_linear(hidden, self.last, before=self.hidden_norm, residual=residual)


class FusedBlock:
    """:class:`Block` with its products packed, and attention by the blocked kernel.

    Args:
        block: one with norms before attention and MLP; for int8 one that :func:`activation_of` has a name for.
        int8: round products to int8, but not those of attention, or of the MLP, if a weight of theirs says so.
    """

    STAND_INS = ("attn", "mlp", "project", "add_attended", "add_mlp", "forward")

    def __init__(self, block: Block, int8: bool):
        self.norms = [pack_norm(block.ln_1), pack_norm(block.ln_2)]
        noise = int8_noise(block.attn.in_proj_weight, block.ln_1), int8_noise(block.attn.out_proj.weight)
        self.attn = FusedAttention(block.attn, int8 and max(noise) <= INT8_NOISE)
        mlp: Any = block.mlp
        if isinstance(mlp, GatedMlp):
            self.mlp = FusedGatedMLP(mlp, block.ln_2)
        else:
            noise = int8_noise(mlp.c_fc.weight, block.ln_2), int8_noise(mlp.c_proj.weight)
            activation = cast(str, activation_of(block))
            self.mlp = FusedMLP(mlp.c_fc, mlp.c_proj, activation, int8 and max(noise) <= INT8_NOISE)
        self.attn.eval()
        self.mlp.eval()

    def project(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, ...]:
        q, k, v = self.attn.project(x, "qkv", self.norms[0])
        return (q, k, v) if rotation is None else (rotation(q), rotation(k), v)

    def add_attended(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.attn.merge(heads, x)

    def add_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.norms[1], x)

    @traced("model.tower.block")
    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.project(x, rotation)
        return self.add_mlp(self.add_attended(x, dropout_attention(q, k, v, 0.0)))


class FusedPool:
    """The way of single tokens through an :class:`AttentionPool`, packed.

    Between the value projection and the output projection nothing happens to one token, so they are one product.
    """

    def __init__(self, pool: AttentionPool):
        value, out = pool.value, pool.out
        weight = out.weight.double() @ value.weight.double()
        bias = out.weight.double() @ value.bias.double() + out.bias.double()
        dtype = value.weight.dtype
        self.joined = _packed(weight.to(dtype), bias.to(dtype), False)
        self.norm_in = pack_norm(pool.norm_in) if isinstance(pool.norm_in, nn.LayerNorm) else None
        self.norm = self.mlp = None
        if pool.mlp is not None and pool.norm is not None:
            first, gelu, last = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(pool.mlp))
            self.norm = pack_norm(pool.norm)
            self.mlp = FusedMLP(first, last, "gelu" if gelu.approximate == "none" else "gelu_tanh", False)

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] -> [B, L, D]."""
        y = packed_linear(tokens, self.joined, before=self.norm_in)
        return y if self.mlp is None else self.mlp(y, self.norm, y)


class FusedDecoderLayer:
    """:class:`DecoderLayer` with its products packed, and attention by the blocked kernel."""

    STAND_INS = ("multihead_attn", "linear1", "linear2", "forward")

    def __init__(self, layer: DecoderLayer, int8: bool):
        attention = cast(CrossAttention, layer.multihead_attn)
        self.multihead_attn = self.linear1 = self.linear2 = None  # their part is in forward
        linears = [attention.q, attention.k, attention.v, attention.proj, layer.linear1, layer.linear2]
        int8 = int8 and max(int8_noise(linear.weight) for linear in linears) <= INT8_NOISE
        self.q, self.kv = (
            FusedProjections([(linear.weight, linear.bias) for linear in some], attention.heads, int8)
            for some in ([attention.q], [attention.k, attention.v])
        )
        self.proj, self.first, self.last = (_packed(linear.weight, linear.bias, int8) for linear in linears[3:])
        self.norms = [pack_norm(layer.norm2), pack_norm(layer.norm3)]

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B, Q, D], memory [B, N, D] -> [B, Q, D]."""
        (q,) = self.q(x, 0, 1)
        k, v = self.kv(memory, 0, 2)
        heads = dropout_attention(q, k, v, 0.0).transpose(1, 2).flatten(2)
        x = packed_linear(heads, self.proj, residual=x, after=self.norms[0])
        return packed_linear(x, self.first, self.last, activation="relu", residual=x, after=self.norms[1])
