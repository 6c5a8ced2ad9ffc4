"""CLIP's ResNets as dense encoders: open_clip's network, any image size, and the attention pool opened.

Source: Radford et al., 2021; the value path of the attention pool and the dilated form: Zhou et al., "Extract Free
Dense Labels from CLIP" (MaskCLIP), 2022.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from fastzs.clip.vision import OPERATORS
from fastzs.ops import dense_attention
from fastzs.windows import next_multiple


class ResNet(ModifiedResNet):
    """CLIP ResNet with the tower interface of :class:`fastzs.clip.vision.VisionTransformer`.

    Args:
        layers, output_dim, heads, image_size, width: as open_clip's ``ModifiedResNet``.
        output_stride: pixels per feature: 32 as trained, 16 or 8 with the last stages dilated (the first block of
            a stage keeps half the dilation of the others, MaskCLIP's ``contract_dilation``).
    """

    operators = OPERATORS
    prefix = 1  # the mean comes before the positions

    def __init__(
        self,
        layers: Sequence[int],
        output_dim: int,
        heads: int,
        image_size: int = 224,
        width: int = 64,
        output_stride: Literal[8, 16, 32] = 32,
    ):
        super().__init__(list(layers), output_dim, heads, image_size, width)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        self.patch_size = output_stride
        stages = {32: [], 16: [(self.layer4, 2)], 8: [(self.layer3, 2), (self.layer4, 4)]}[output_stride]
        for stage, dilation in stages:
            for i, block in enumerate(stage):
                rate = dilation // 2 if i == 0 else dilation
                block.conv2.dilation = block.conv2.padding = (rate, rate)
            stage[0].avgpool = nn.Identity()
            stage[0].downsample[0] = nn.Identity()

    @property
    def width(self) -> int:
        return self.attnpool.c_proj.in_features

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, 1 + h * w, C] of the last stage, their mean first, and the grid (h, w).

        Sides that are not a multiple of the output stride are padded with zeros at the bottom and right.
        """
        height, width = images.shape[-2:]
        down, across = (next_multiple(side, self.patch_size) - side for side in (height, width))
        images = F.pad(images, (0, across, 0, down))
        x = self.stem(images.to(self.conv1.weight.dtype))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        return torch.cat([x.mean(1, keepdim=True), x], dim=1), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positional table of the attention pool, resized (bilinear) to ``grid``, [1 + h * w, C]."""
        table = self.attnpool.positional_embedding
        side = math.isqrt(table.shape[0] - 1)
        if grid == (side, side):
            return table
        patches = table[1:].T.reshape(1, -1, side, side)
        patches = patches.to(torch.promote_types(table.dtype, torch.float32))
        patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.attnpool.num_heads, -1)).transpose(1, 2)  # [B, H, L, d]

    def pooled(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image embedding [B, D] by the attention pool."""
        pool = self.attnpool
        tokens = tokens + self.positions(grid)
        q, k, v = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
        pooled = F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v))
        return pool.c_proj(pooled.transpose(1, 2).flatten(2))[:, 0]

    def dense(
        self, tokens: Tensor, grid: tuple[int, int], kind: str = "identity", residual: bool = True, ffn: bool = True
    ) -> Tensor:
        """Features per position in the text space, [B, D, h, w], without positional embedding.

        ``residual`` and ``ffn`` are accepted for the common interface: an attention pool has neither.
        """
        pool = self.attnpool
        if kind == "identity":
            attended = pool.v_proj(tokens[:, 1:])
        else:
            q, k, v = (self._heads(proj(tokens)) for proj in (pool.q_proj, pool.k_proj, pool.v_proj))
            attended = dense_attention(q, k, v, kind, grid).transpose(1, 2).flatten(2)
        return pool.c_proj(attended).transpose(1, 2).unflatten(2, grid)

    def keys(self, tokens: Tensor) -> Tensor:
        """Key vectors of the attention pool, [B, h * w, C] (MaskCLIP's key smoothing)."""
        return self.attnpool.k_proj(tokens[:, 1:])

    def forward(self, images: Tensor) -> Tensor:
        """Image embedding: images [B, 3, H, W], normalised -> [B, D], not normalised (CLIP's ``encode_image``)."""
        return self.pooled(*self.trunk(images))
