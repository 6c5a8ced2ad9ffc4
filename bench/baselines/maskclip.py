"""MaskCLIP in the published order of work: the bar for :mod:`bench.test_models`.

The last block projects queries, keys and values of all tokens, all through the output projection, where only the
patches' values are used; class maps are enlarged to the picture, all classes at once, before the argmax.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .prompt_tuned import QuickGELU


class Block(nn.Module):
    def __init__(self, width, heads, mlp_width, quick_gelu, eps):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x):  # [B, L, C]
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))

    def values(self, x):
        y = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        v = x + [self.attn.out_proj(part) for part in y.chunk(3, dim=-1)][2]
        return v + self.mlp(self.ln_2(v))


class Published(nn.Module):
    """From the state dict of a CLIP vision transformer, for pictures of ``grid`` patches (rows, columns)."""

    class_embedding: nn.Parameter
    proj: nn.Parameter
    positions: torch.Tensor

    def __init__(self, state, heads, grid, quick_gelu=True, eps=1e-5):
        super().__init__()
        width = len(state["class_embedding"])
        layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer."))
        mlp_width = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
        patch = state["conv1.weight"].shape[-1]
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        blocks = nn.ModuleList(Block(width, heads, mlp_width, quick_gelu, eps) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        for name in ("class_embedding", "positional_embedding", "proj"):
            self.register_parameter(name, nn.Parameter(torch.empty_like(state[name])))
        self.load_state_dict(state)
        table = state["positional_embedding"]
        side = round((len(table) - 1) ** 0.5)
        patches = table[1:].T.reshape(1, -1, side, side)
        patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False).flatten(2)[0].T
        self.register_buffer("positions", torch.cat([table[:1], patches]))

    def forward(self, images, text):
        """Low-resolution class maps [B, C, h, w]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.ln_pre(x)
        *blocks, last = [block for block in self.transformer["resblocks"].children() if isinstance(block, Block)]
        for block in blocks:
            x = block(x)
        x = self.ln_post(last.values(x))[:, 1:] @ self.proj
        x = x.transpose(1, 2).unflatten(2, self.grid)
        return 100 * F.conv2d(x / x.norm(dim=1, keepdim=True), text[:, :, None, None])


def labels(maps, size):
    """[H, W] of class maps [1, C, h, w]."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False).softmax(dim=1).argmax(dim=1)[0]
