"""CLIP's vision transformer as a dense encoder: any image size, and the last block opened for segmentation.

Parameters carry OpenAI's names, so the ``visual.`` part of a CLIP state dict loads as it is. Later towers (SigLIP,
EVA-02, PE-Core, CoCa, CLIPA, MobileCLIP-B, ViTamin) are the same class with a :class:`fastzs.clip.variants.Variant`;
:mod:`fastzs.clip.towers` translates their weights.
Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021;
the dense readings of the last block: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), 2022,
and its successors (see :mod:`fastzs.kernels.dense_attention`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm import create_model
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import Tensor, nn

from fastzs.clip.blocks import Attention as Attention
from fastzs.clip.blocks import Block, GatedMlp, Rotation, Transformer
from fastzs.clip.blocks import QuickGELU as QuickGELU
from fastzs.clip.memo import Recent
from fastzs.clip.packable import unpack_if_trained
from fastzs.clip.pools import AttentionPool
from fastzs.clip.variants import Variant
from fastzs.kernels.dense_attention.api import KINDS
from fastzs.ops import dense_attention
from fastzs.windows import next_multiple

OPERATORS = tuple(kind for kind in KINDS if kind != "proxy")  # those that need no other network
GRIDS_KEPT = 16  # positional tables of that many image sizes are kept


class VisionTransformer(nn.Module):
    """CLIP ViT of any size; see :meth:`forward` for the image embedding and :meth:`dense` for features per patch.

    Where an attention pool makes the embedding, a patch goes to the text space by the pool's value and output
    projections, its norms and its MLP, as if the pool saw this patch alone.

    Args:
        width, layers, heads, mlp_ratio, patch_size, output_dim: as in open_clip's configurations.
        grid: rows and columns of the stored positional table (image_size / patch_size).
        quick_gelu: OpenAI's activation; LAION weights use the exact GELU.
        norm_eps: of every LayerNorm; 1e-5 in CLIP, 1e-6 in MaskCLIP's published configuration.
        position_mode: how the positional table is resized to other grids (align_corners=False, no antialias);
            "bilinear" in DenseCLIP, ZegCLIP and CLIP-RC, "bicubic" in MaskCLIP; "offset" is bicubic with the factors
            (h + 0.1) / grid, as in DINO's code and after it SCLIP's and its successors'.
        double_class_embedding: add the class embedding twice, as DenseCLIP's code and after it ZegCLIP's and
            CLIP-RC's do (raoyongming/DenseCLIP#20).
        variant: what differs from CLIP's own ViT, as a :class:`Variant` or what its ``differences`` gave.
    """

    operators = OPERATORS  # what :meth:`dense` takes as ``kind``

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
        position_mode: Literal["bilinear", "bicubic", "offset"] = "bilinear",
        double_class_embedding: bool = False,
        variant: Variant | Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        variant = Variant.of(variant)
        self.variant = variant
        self.width, self.output_dim, self.patch_size, self.grid = width, output_dim, patch_size, grid
        self.prefix = variant.prefix
        self.position_mode = position_mode
        self.double_class_embedding = double_class_embedding
        std = width**-0.5
        if self.prefix:
            self.class_embedding = nn.Parameter(std * torch.randn(width))
        if variant.positions:
            self._own_rows = self.prefix if variant.prefix_position else 0  # of the table, for what is no patch
            self.positional_embedding = nn.Parameter(std * torch.randn(self._own_rows + grid * grid, width))
        if variant.stem:
            self.conv1 = cast(Any, create_model(variant.stem, num_classes=0)).patch_embed
            self.conv1.flatten, self.conv1.strict_img_size = False, False
        else:
            self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=variant.stem_bias)
        self.ln_pre = nn.LayerNorm(width, eps=norm_eps) if variant.norm_input else nn.Identity()
        options = {key: getattr(variant, key) for key in _OF_BLOCKS}
        self.transformer = Transformer(layers, width, heads, int(width * mlp_ratio), quick_gelu, norm_eps, **options)
        pooled_width = width
        if variant.pool == "attention":
            pooled_width = variant.pool_width
            sizes = (variant.pool_heads, variant.pool_mlp, variant.pool_tanh_gelu, variant.pool_norm)
            self.pool = AttentionPool(width, pooled_width, *sizes, norm_eps)
        self.ln_post = nn.LayerNorm(pooled_width if variant.norm_after_pool else width, eps=norm_eps)
        if variant.projection:
            self.proj = nn.Parameter(std * torch.randn(pooled_width, output_dim))
        if variant.projection_bias:
            self.proj_bias = nn.Parameter(torch.zeros(output_dim))
        self._tables: Recent[Tensor] = Recent(GRIDS_KEPT)
        self._rotations: Recent[tuple[Tensor, Tensor]] = Recent(GRIDS_KEPT)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last, as they can be used now."""
        found = [block for block in self.transformer.resblocks if isinstance(block, Block)]
        unpack_if_trained(self, found)
        return found

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].ln_1.weight.dtype

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional table resized to ``grid``, [1 + h * w, C], kept per grid while it is not being trained.

        Without a row for CLS it is [h * w, C].
        """
        table = self.positional_embedding
        varying = any(isinstance(side, torch.SymInt) for side in grid)  # in torch.export, where both ways become one
        if not varying and grid == (self.grid, self.grid):
            return table
        # writes to tensors made in inference mode are not counted, so nothing is kept of them
        if (table.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or table.is_inference():
            return self._resized(grid)
        key = (grid, table.dtype, table.device, table.data_ptr(), table._version)
        return self._tables(key, lambda: self._resized(grid).detach())

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        table, own = self.positional_embedding, self._own_rows
        patches = table[own:].T.reshape(1, -1, self.grid, self.grid)
        patches = patches.to(torch.promote_types(table.dtype, torch.float32))
        if self.position_mode == "offset":
            if any(isinstance(side, torch.SymInt) for side in grid):
                raise ValueError(
                    "positions='offset' are resized by a factor that a graph holds for one size of the images; use "
                    "positions='bicubic', or one size"
                )
            factors = [(side + 0.1) / self.grid for side in grid]
            patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False)
        else:
            patches = F.interpolate(patches, grid, mode=self.position_mode, align_corners=False)
        return torch.cat([table[:own], patches.flatten(2)[0].T.to(table.dtype)])

    def rotation(self, grid: tuple[int, int]) -> Rotation | None:
        """What the blocks turn queries and keys by, where positions are rotary."""
        if self.variant.rotary is None:
            return None
        table = self.blocks[0].ln_1.weight

        def compute() -> tuple[Tensor, Tensor]:
            heads = self.blocks[0].attn.heads
            options = dict(self.variant.rotary or {})
            made = RotaryEmbeddingCat(self.width // heads, in_pixels=False, **options)
            sin, cos = made.get_embed(list(grid)).to(table.device, table.dtype).chunk(2, dim=-1)
            return sin.contiguous(), cos.contiguous()

        if torch.compiler.is_compiling():
            return Rotation(*compute(), self.prefix)
        return Rotation(*self._rotations((grid, table.dtype, table.device), compute), self.prefix)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch embedding and positions: images [B, 3, H, W] -> tokens [B, 1 + h * w, C] before ``ln_pre``, (h, w).

        Sides that are not a multiple of the patch size are padded with zeros at the bottom and right.
        """
        height, width = images.shape[-2:]
        down, across = (next_multiple(side, self.patch_size) - side for side in (height, width))
        images = F.pad(images, (0, across, 0, down))
        patches = self.conv1(images.to(self.dtype))  # [B, C, h, w]
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)
        before = not self.variant.prefix_position
        if self.variant.positions and before:
            tokens = tokens + self.positions(grid)
        if self.prefix:
            cls = self.class_embedding * (2 if self.double_class_embedding else 1)
            tokens = torch.cat([cls.expand(images.shape[0], 1, -1), tokens], dim=1)
        if self.variant.positions and not before:
            tokens = tokens + self.positions(grid)
        return tokens, grid

    def trunk(self, images: Tensor, watch: Callable[..., None] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, prefix + h * w, C] that enter the last block, and the grid (h, w).

        Args:
            watch: is called with (index of the block, tokens that enter it, q, k, v) for each block before the last;
                q, k and v are [B, heads, L, d], as its attention takes them.
        """
        tokens, grid = self.embed(images)
        tokens, rotation = self.ln_pre(tokens), self.rotation(grid)
        for index, block in enumerate(self.blocks[:-1]):
            if watch is not None:
                watch(index, tokens, *block.project(tokens, rotation))
            tokens = block(tokens, rotation)
        return tokens, grid

    def pooled(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image embedding [B, D] from the tokens entering the last block; of CLS alone where nothing else is read."""
        last, rotation = self.blocks[-1], self.rotation(grid)
        if self.variant.pool != "token":
            return self.embedding(last(tokens, rotation))
        y = last.seen(tokens)
        (q,) = last.attn.project(y[:, :1], "q")
        k, v = last.attn.project(y, "kv")
        k = k if rotation is None else rotation(k)  # CLS is not turned
        cls = tokens[:, :1] + last.given(F.scaled_dot_product_attention(q, k, v))
        return self.to_text(last.add_mlp(cls))[:, 0]

    def embedding(self, tokens: Tensor) -> Tensor:
        """Image embedding [B, D] from what the last block gives, [B, prefix + h * w, C]."""
        variant = self.variant
        if variant.pool == "token":
            return self.to_text(tokens[:, 0])
        tokens = tokens if variant.norm_after_pool else self.ln_post(tokens)
        if variant.pool == "mean":
            pooled = tokens[:, self.prefix :].mean(1)
        else:
            pooled = self.pool(tokens if variant.pool_prefix else tokens[:, self.prefix :])
        return self.project(self.ln_post(pooled) if variant.norm_after_pool else pooled)

    def to_text(self, tokens: Tensor) -> Tensor:
        """The way of one token alone into the text space: what the last block gives [..., C] -> [..., D]."""
        x = tokens if self.variant.norm_after_pool and self.variant.pool == "attention" else self.ln_post(tokens)
        if self.variant.pool == "attention":
            x = self.pool.read(x)
            x = self.ln_post(x) if self.variant.norm_after_pool else x
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """The linear layer into the text space, where there is one."""
        if self.variant.projection_bias:
            return torch.addmm(self.proj_bias, x.flatten(0, -2), self.proj).unflatten(0, x.shape[:-1])
        return x @ self.proj if self.variant.projection else x

    def dense(
        self, tokens: Tensor, grid: tuple[int, int], kind: str = "identity", residual: bool = True, ffn: bool = True
    ) -> Tensor:
        """Features per patch in the text space, [B, D, h, w], from the tokens entering the last block.

        Args:
            kind: the last block's attention operator, see :func:`fastzs.ops.dense_attention`.
            residual, ffn: keep the last block's residual connection and its MLP.
        """
        return self.read(self.last_values(tokens, grid, kind, residual, ffn), grid)

    def read(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches as the last block gives them, [B, h * w, C], in the text space, [B, D, h, w]."""
        return self.to_text(patches).transpose(1, 2).unflatten(2, grid)

    def last_values(self, tokens: Tensor, grid: tuple[int, int], kind: str, residual: bool, ffn: bool) -> Tensor:
        """Patch rows of the last block under the operator ``kind``, [B, h * w, C], before ``ln_post``."""
        if kind == "identity":
            last = self.blocks[-1]
            (attended,) = last.attn.project(last.seen(tokens[:, self.prefix :]), "v")
        else:
            q, k, v = self.projections(tokens, grid)
            attended = dense_attention(q, k, v, kind, grid)
        return self.finish(tokens, attended, residual, ffn)

    def projections(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Queries, keys and values of the last block, each [B, heads, prefix + h * w, d]; rotary positions are in."""
        return self.blocks[-1].project(tokens, self.rotation(grid))

    def finish(self, tokens: Tensor, attended: Tensor, residual: bool, ffn: bool) -> Tensor:
        """The rest of the last block, [B, h * w, C], after an attention [B, heads, h * w, d] of the caller's own."""
        last = self.blocks[-1]
        z = last.given(attended)
        z = tokens[:, self.prefix :] + z if residual else z
        return last.add_mlp(z) if ffn else z

    def keys(self, tokens: Tensor) -> Tensor:
        """Key vectors of the last block after its output projection, [B, h * w, C] (MaskCLIP's key smoothing).

        Rotary positions are left out, since the smoothing compares what patches show and not where they are.
        """
        last = self.blocks[-1]
        (k,) = last.attn.project(last.seen(tokens[:, self.prefix :]), "k")
        return last.attn.merge(k)

    def forward(self, images: Tensor) -> Tensor:
        """Image embedding: images [B, 3, H, W], normalised -> [B, D], not normalised (CLIP's ``encode_image``)."""
        return self.pooled(*self.trunk(images))


_OF_BLOCKS = ("tanh_gelu", "gate", "mlp_norm", "attention_norm", "norm_last")


def vit_sizes(tower: VisionTransformer) -> dict[str, Any]:
    """The arguments that build a tower of the same sizes again."""
    block = tower.blocks[0]
    gelu = None if isinstance(block.mlp, GatedMlp) else block.mlp.gelu
    sizes: dict[str, Any] = {
        "width": tower.width,
        "layers": len(tower.blocks),
        "heads": block.attn.heads,
        "patch_size": tower.patch_size,
        "grid": tower.grid,
        "output_dim": tower.output_dim,
        "mlp_ratio": mlp_ratio(cast(nn.Linear, block.mlp.c_fc).out_features, tower.width),
        "quick_gelu": gelu is not None and not isinstance(gelu, nn.GELU),
    }
    if differences := tower.variant.differences():
        sizes |= {"variant": differences, "norm_eps": tower.ln_post.eps}
    return sizes


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio that gives ``hidden`` again when multiplied by ``width`` and cut to an integer."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
