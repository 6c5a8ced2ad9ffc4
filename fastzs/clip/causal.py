"""Vectors of texts from open_clip's causal transformer, by the tokens up to the end of the longest text alone.

A token sees those before it, and the vector is read at the token that ends the text: what pads a text to the tower's
context, 77 tokens for CLIP, changes nothing. Names in prompts have 5 to 20 tokens. Products go through
:func:`fastzs.clip.products.linear`.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from fastzs.clip.plain import plain
from fastzs.clip.products import linear


class TextPart(nn.Module):
    """A model of open_clip as its text tower: token ids [n, context] -> vectors [n, D]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=False)


def _transformer(tower: nn.Module) -> Any:
    """What has the tower's parts: itself; of a whole model its text tower, or the plain class CLIP itself."""
    return getattr(tower.model, "text", tower.model) if isinstance(tower, TextPart) else tower


def _pool(of: Any) -> tuple[str, int | None]:
    """How the tower finds the end of a text, and the id of its token."""
    if isinstance(of, CLIP):
        return cast(str, of.text_pool_type), getattr(of, "text_eos_id", None)
    return of.pool_type, of.eos_id


def takes(tower: nn.Module) -> bool:
    """Whether :func:`vectors` computes what the tower does: it is CLIP's own, causal and read at one token."""
    of = _transformer(tower)
    return (
        type(of) in (TextTransformer, CLIP)
        and _pool(of)[0] in ("argmax", "eos")
        and of.attn_mask is not None
        and getattr(of, "cls_emb", None) is None
        and all(
            type(block) is ResidualAttentionBlock
            and isinstance(block.ls_1, nn.Identity)
            and isinstance(block.ls_2, nn.Identity)
            and plain(block)
            for block in of.transformer.resblocks
        )
    )


def vectors(tower: nn.Module, tokens: Tensor) -> Tensor:
    """Token ids [n, context] -> vectors [n, D], of a tower that :func:`takes`."""
    of = _transformer(tower)
    pool, end = _pool(of)
    ends = tokens.argmax(1) if pool == "argmax" else (tokens == end).int().argmax(1)
    tokens = tokens[:, : int(ends.max()) + 1]
    x = of.token_embedding(tokens) + of.positional_embedding[: tokens.shape[1]]
    for block in of.transformer.resblocks:
        x = _through(cast(ResidualAttentionBlock, block), x)
    ended = of.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection: Any = of.text_projection
    if projection is None:
        return ended
    return projection(ended) if isinstance(projection, nn.Linear) else ended @ projection


def _through(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """Tokens [n, L, C] -> [n, L, C]."""
    attn, mlp = block.attn, cast(Any, block.mlp)
    qkv = linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, H, L, d]
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + linear(heads, attn.out_proj.weight, attn.out_proj.bias)
    hidden = mlp.gelu(linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias))
    return x + linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)
