"""timm's plain transformer block as one that can be packed."""

from typing import Any, cast

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
        attention: Any = self.attn
        first, second = cast(nn.Linear, self.mlp.fc1), cast(nn.Linear, self.mlp.fc2)
        norms = cast(nn.LayerNorm, self.norm1), cast(nn.LayerNorm, self.norm2)
        with torch.device("meta"):
            made = Block(first.in_features, attention.num_heads, first.out_features, False, norms[0].eps)
        made.ln_1, made.ln_2 = norms
        made.attn.in_proj_weight, made.attn.in_proj_bias = attention.qkv.weight, attention.qkv.bias
        made.attn.out_proj = cast(Linear, attention.proj)
        cast(nn.Sequential, made.mlp).c_fc, cast(nn.Sequential, made.mlp).c_proj = first, second
        return made
