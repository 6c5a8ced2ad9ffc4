"""timm's plain transformer block as one that can be packed."""

from typing import cast

import torch
from timm.models.vision_transformer import Block as Plain
from torch import nn

from fastzs.clip.blocks import Block
from fastzs.clip.packable import Packable
from fastzs.clip.products import Linear


class TimmBlock(Packable, Plain):
    """What ``VisionTransformer(block_fn=...)`` of timm takes: its own block, under its own names."""

    def as_block(self) -> Block:
        """The same block as one of this package's, around the same parameters."""
        attention, mlp = self.attn, self.mlp
        first = cast(nn.Linear, mlp.fc1)
        with torch.device("meta"):
            made = Block(first.in_features, attention.num_heads, first.out_features, False, self.norm1.eps)
        made.ln_1, made.ln_2 = cast(nn.LayerNorm, self.norm1), cast(nn.LayerNorm, self.norm2)
        made.attn.in_proj_weight, made.attn.in_proj_bias = attention.qkv.weight, attention.qkv.bias
        made.attn.out_proj = cast(Linear, attention.proj)
        cast(nn.Sequential, made.mlp).c_fc, cast(nn.Sequential, made.mlp).c_proj = first, mlp.fc2
        return made
