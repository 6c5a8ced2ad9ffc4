"""CLIP's vision transformer as a dense encoder: any picture size, and the last block opened for segmentation.

Parameters carry OpenAI's names, so the ``visual.`` part of a CLIP state dict loads as it is.
Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021;
the dense readings of the last block: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), 2022,
and its successors (see :mod:`fastzs.kernels.dense_attention`).
"""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import frozen
from fastzs.clip.frozen import QUICK_GELU
from fastzs.ops import dense_attention
from fastzs.trace import traced


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI trained CLIP with.

    Written as silu(1.702 x) / 1.702, it keeps one tensor for backward instead of two.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(QUICK_GELU * x).mul_(1 / QUICK_GELU)


class Attention(nn.Module):
    """Multi-head self-attention with separate access to queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def project(self, x: Tensor, which: Literal["q", "k", "v", "kv", "qkv"] = "qkv") -> tuple[Tensor, ...]:
        """Queries, keys and values of ``x`` [B, L, C], as asked, each [B, heads, L, C / heads]."""
        width = x.shape[-1]
        first, last = "qkv".index(which[0]), "qkv".index(which[-1]) + 1
        rows = slice(first * width, last * width)
        y = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        y = y.unflatten(-1, (len(which), self.heads, width // self.heads))  # [B, L, n, H, d]
        return y.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def sources(self) -> list[Tensor]:
        """What :meth:`project` computes with, for those who keep what it gave."""
        return [self.in_proj_weight, self.in_proj_bias]

    def merge(self, heads: Tensor) -> Tensor:
        """Output projection of per-head results [B, heads, L, d] -> [B, L, C]."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, quick_gelu: bool, norm_eps: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of tokens [B, L, C] before their norm, each [B, heads, L, C / heads]."""
        if self.training and frozen.passes_through(x, self.ln_1, self.attn):
            qkv = frozen.projections(x, self.ln_1, self.attn.in_proj_weight, self.attn.in_proj_bias)
            return tuple(y.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for y in qkv)
        return self.attn.project(self.ln_1(x))

    def add_attended(self, x: Tensor, heads: Tensor) -> Tensor:
        """Tokens [B, L, C] plus what attention gave them, per head [B, heads, L, C / heads]."""
        attended = self.attn.merge(heads)
        return attended.add_(x) if attended.dtype == x.dtype else x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] plus what the MLP makes of them."""
        if self.training and frozen.passes_through(x, self.ln_2, self.mlp):
            first, gelu, last = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.mlp))
            return frozen.mlp(x, self.ln_2, first, last, isinstance(gelu, QuickGELU))
        return x + self.mlp(self.ln_2(x))

    @traced("model.tower.block")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        x = self.add_attended(x, F.scaled_dot_product_attention(q, k, v))
        return self.add_mlp(x)


class Transformer(nn.Module):
    """The blocks, under the name the published state dicts give them."""

    def __init__(self, layers: int, *block):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*block) for _ in range(layers))


class VisionTransformer(nn.Module):
    """CLIP ViT of any size; see :meth:`forward` for the picture embedding and :meth:`dense` for features per patch.

    Args:
        width, layers, heads, mlp_ratio, patch_size, output_dim: as in open_clip's configurations.
        grid: rows and columns of the stored positional table (image_size / patch_size).
        quick_gelu: OpenAI's activation; LAION weights use the exact GELU.
        norm_eps: of every LayerNorm; 1e-5 in CLIP, 1e-6 in MaskCLIP's published configuration.
        position_mode: how the positional table is resized to other grids (align_corners=False, no antialias);
            "bilinear" in DenseCLIP, ZegCLIP and CLIP-RC, "bicubic" in MaskCLIP.
        double_class_embedding: add the class embedding twice, as DenseCLIP's code and after it ZegCLIP's and
            CLIP-RC's do (raoyongming/DenseCLIP#20).
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        patch_size: int,
        grid: int,
        output_dim: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = True,
        norm_eps: float = 1e-5,
        position_mode: Literal["bilinear", "bicubic"] = "bilinear",
        double_class_embedding: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.patch_size = patch_size
        self.position_mode = position_mode
        self.double_class_embedding = double_class_embedding
        std = width**-0.5
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + grid * grid, width))
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=norm_eps)
        self.transformer = Transformer(layers, width, heads, int(width * mlp_ratio), quick_gelu, norm_eps)
        self.ln_post = nn.LayerNorm(width, eps=norm_eps)
        self.proj = nn.Parameter(std * torch.randn(width, output_dim))
        self._position_cache: dict[tuple, Tensor] = {}

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return [block for block in self.transformer.resblocks if isinstance(block, Block)]

    @property
    def width(self) -> int:
        return self.proj.shape[0]

    @property
    def output_dim(self) -> int:
        return self.proj.shape[1]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional table resized to ``grid``, [1 + h * w, C], kept per grid while it is not being trained."""
        table = self.positional_embedding
        side = math.isqrt(table.shape[0] - 1)
        if grid == (side, side):
            return table
        # writes to tensors made in inference mode are not counted, so nothing is kept of them
        kept = not (table.requires_grad and torch.is_grad_enabled()) and not table.is_inference()
        key = (grid, table.dtype, table.device, table.data_ptr(), table._version) if kept else None
        if key in self._position_cache:
            return self._position_cache[key]
        patches = table[1:].T.reshape(1, -1, side, side)
        patches = patches.to(torch.promote_types(table.dtype, torch.float32))
        patches = F.interpolate(patches, grid, mode=self.position_mode, align_corners=False)
        resized = torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])
        if key:
            self._position_cache[key] = resized = resized.detach()
        return resized

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch embedding and positions: images [B, 3, H, W] -> tokens [B, 1 + h * w, C] before ``ln_pre``, (h, w).

        Sides that are not a multiple of the patch size are padded with zeros at the bottom and right.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        patches = self.conv1(images.to(self.conv1.weight.dtype))  # [B, C, h, w]
        grid = (patches.shape[2], patches.shape[3])
        cls = self.class_embedding * (2 if self.double_class_embedding else 1)
        tokens = torch.cat([cls.expand(images.shape[0], 1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.positions(grid), grid

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, 1 + h * w, C] that enter the last block, and the grid (h, w)."""
        tokens, grid = self.embed(images)
        tokens = self.ln_pre(tokens)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        return tokens, grid

    def pooled(self, tokens: Tensor) -> Tensor:
        """Picture embedding [B, D] from the tokens entering the last block: only the CLS row is computed."""
        last = self.blocks[-1]
        y = last.ln_1(tokens)
        (q,) = last.attn.project(y[:, :1], "q")
        k, v = last.attn.project(y, "kv")
        cls = tokens[:, :1] + last.attn.merge(F.scaled_dot_product_attention(q, k, v))
        cls = cls + last.mlp(last.ln_2(cls))
        return self.ln_post(cls[:, 0]) @ self.proj

    def dense(
        self, tokens: Tensor, grid: tuple[int, int], kind: str = "identity", residual: bool = True, ffn: bool = True
    ) -> Tensor:
        """Features per patch in the text space, [B, D, h, w], from the tokens entering the last block.

        Args:
            kind: the last block's attention operator, see :func:`fastzs.ops.dense_attention`.
            residual, ffn: keep the last block's residual connection and its MLP.
        """
        features = self.ln_post(self.last_values(tokens, grid, kind, residual, ffn)) @ self.proj
        return features.transpose(1, 2).unflatten(2, grid)

    def last_values(self, tokens: Tensor, grid: tuple[int, int], kind: str, residual: bool, ffn: bool) -> Tensor:
        """Patch rows of the last block under the operator ``kind``, [B, h * w, C], before ``ln_post``."""
        last = self.blocks[-1]
        y = last.ln_1(tokens)
        patches = tokens[:, 1:]
        if kind == "identity":
            (v,) = last.attn.project(y[:, 1:], "v")
            attended = last.attn.merge(v)
        else:
            q, k, v = last.attn.project(y)
            attended = last.attn.merge(dense_attention(q, k, v, kind, grid))
        z = patches + attended if residual else attended
        return z + last.mlp(last.ln_2(z)) if ffn else z

    def keys(self, tokens: Tensor) -> Tensor:
        """Key vectors of the last block after its output projection, [B, h * w, C] (MaskCLIP's key smoothing)."""
        last = self.blocks[-1]
        (k,) = last.attn.project(last.ln_1(tokens[:, 1:]), "k")
        return last.attn.merge(k)

    def forward(self, images: Tensor) -> Tensor:
        """Picture embedding: images [B, 3, H, W], normalised -> [B, D], not normalised (CLIP's ``encode_image``)."""
        return self.pooled(self.trunk(images)[0])


def vit_sizes(tower: VisionTransformer) -> dict[str, Any]:
    """The arguments that build a tower of the same sizes again."""
    block = tower.blocks[0]
    return {
        "width": tower.width,
        "layers": len(tower.blocks),
        "heads": block.attn.heads,
        "patch_size": tower.patch_size,
        "grid": math.isqrt(len(tower.positional_embedding) - 1),
        "output_dim": tower.output_dim,
        "mlp_ratio": mlp_ratio(cast(nn.Linear, block.mlp.c_fc).out_features, tower.width),
        "quick_gelu": not isinstance(block.mlp.gelu, nn.GELU),
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio that gives ``hidden`` again when multiplied by ``width`` and cut to an integer."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
