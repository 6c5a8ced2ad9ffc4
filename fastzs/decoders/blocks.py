"""Blocks of ZegCLIP's and CLIP-RC's decoders. Parameters carry the published checkpoints' names.

Source: Zhou et al., "ZegCLIP", CVPR 2023, section 3.3; the layer is DETR's decoder layer without self-attention.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs import ops
from fastzs.clip.memo import Memo
from fastzs.clip.packable import Packable
from fastzs.clip.products import Linear, linear


class CrossAttention(nn.Module):
    """Multi-head attention of ``x`` over ``memory``; every projection has a bias."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"decoder width {dim} is not a multiple of its {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B, Q, D], memory [B, N, D] -> [B, Q, D]."""
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, ., D / H]
            for linear, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        dropout = self.dropout if self.training else 0.0
        out = ops.dropout_attention(q, k, v, dropout) if dropout else F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(Packable):
    """Cross-attention and MLP, normalised after each (post-norm)::

    x <- norm2(x + drop(attention(x, memory)));  x <- norm3(x + drop(linear2(drop(relu(linear1 x)))))
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.multihead_attn = CrossAttention(dim, heads, dropout)
        self.linear1, self.linear2 = Linear(dim, hidden), Linear(hidden, dim)
        self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B, Q, D], memory [B, N, D] -> [B, Q, D]."""
        x = self.norm2(x + self._drop(self.multihead_attn(x, memory)))
        return self.norm3(x + self._drop(self.linear2(self._drop(self.linear1(x), relu=True))))

    def _drop(self, x: Tensor, relu: bool = False) -> Tensor:
        rate = self.dropout if self.training else 0.0
        if rate:
            return ops.dropout(x, rate, relu=relu)
        return F.relu(x) if relu else x


class Layers(nn.Module):
    """``count`` copies of a layer, under the name ``layers``; equal at first, as the published decoders start."""

    def __init__(self, layer: DecoderLayer, count: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


class HeadMeanScores(nn.Module):
    """Attention scores before the softmax, averaged over the heads: what is left of ZegCLIP's last layer.

    The mean over H heads of q_h . k_h / sqrt(D / H) is one dot product of all D channels, times
    (D / H)^-1/2 / H. Values, output projection, MLP and norms of that layer influence nothing, so there are none.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale = (dim / heads) ** -0.5 / heads
        self.multihead_attn = nn.ModuleDict({"q": Linear(dim, dim), "k": Linear(dim, dim)})

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B, C, D], memory [B, N, D] -> scores [B, C, N], fp32 at least."""
        q, k = self.multihead_attn["q"](x), self.multihead_attn["k"](memory)
        return scores(q, k) * self.scale


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q . k in fp32 at least: [B, C, D], [B, N, D] -> [B, C, N]. They become logits, which bf16 rounds too coarsely."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return q.to(wide) @ k.to(wide).transpose(1, 2)


class RelationDescriptor(Linear):
    """Queries of the classes from how they relate to the picture: W [v * t; t] + b (ZegCLIP, equation 4).

    The half of W that meets the text alone gives the same for every picture: it is computed once for a vocabulary.
    """

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)
        self._text_half: Memo[Tensor] = Memo()

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """visual [B, V, D] (V vectors that stand for the picture), text [C, D] -> [B, V * C, D], classes inner."""
        dim = text.shape[-1]
        constant = self._text_half(
            (self.weight, self.bias, text), lambda: linear(text, self.weight[:, dim:], self.bias)
        )
        relation = visual[:, :, None] * text  # [B, V, C, D]
        return (linear(relation, self.weight[:, :dim]) + constant).flatten(1, 2)
