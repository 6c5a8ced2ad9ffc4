"""Convolutional towers as dense encoders: ConvNeXt, MobileCLIP's FastViTs. The networks are timm's."""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor

from fastzs.clip.packable import Packable
from fastzs.windows import next_multiple


class ConvTower(Packable):
    """A timm network whose last feature map is read position by position.

    A position goes to the text space as the whole map does, through the head's norm and layers, the mean over
    positions left out. Parameters carry open_clip's names, but for ``network.``, which is ``trunk.`` there.

    Args:
        tower: open_clip's tower: ``trunk`` ends in a map [B, C, h, w], ``head`` is what follows the pool.
    """

    operators: ClassVar[tuple[str, ...]] = ("identity",)
    prefix = 0

    def __init__(self, tower: Any, output_dim: int):
        super().__init__()
        self.network, self.head = tower.trunk, tower.head
        self.patch_size: int = tower.trunk.feature_info[-1]["reduction"]
        self.width: int = tower.trunk.num_features
        self.output_dim = output_dim

    def join_branches(self) -> None:
        """Let one convolution stand in for parallel ones and their batch norms, which MobileCLIP's networks have.

        They are joined in fp32, so that weights in low precision are rounded once.
        """
        self.unpack()
        joined = reparameterize_model(copy.deepcopy(self.network).float())
        self.stand_in({"network": joined.to(self.dtype)})

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The last feature map as tokens [B, h * w, C], and the grid (h, w).

        Sides that are not a multiple of the network's stride are padded with zeros at the bottom and right.
        """
        height, width = images.shape[-2:]
        down, across = (next_multiple(side, self.patch_size) - side for side in (height, width))
        images = F.pad(images, (0, across, 0, down))
        x = self.network.forward_features(images.to(self.dtype))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def to_text(self, tokens: Tensor) -> Tensor:
        """The way of one position alone into the text space: [B, N, C] -> [B, N, D]."""
        maps = tokens.flatten(0, 1)[:, :, None, None]  # each position is a map of its own
        return self.head(self.network.forward_head(maps)).unflatten(0, tokens.shape[:2])

    def pooled(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image embedding [B, D] of tokens [B, h * w, C]."""
        return self.head(self.network.forward_head(tokens.transpose(1, 2).unflatten(2, grid)))

    def dense(
        self, tokens: Tensor, grid: tuple[int, int], kind: str = "identity", residual: bool = True, ffn: bool = True
    ) -> Tensor:
        """Features per position in the text space, [B, D, h, w].

        ``residual`` and ``ffn`` are accepted for the common interface.

        Raises:
            ValueError: another operator than "identity": there is no attention to change.
        """
        if kind != "identity":
            raise ValueError(
                f"a convolutional tower has no attention in its last stage, so dense={kind!r} does not apply"
            )
        return self.to_text(tokens).transpose(1, 2).unflatten(2, grid)

    def keys(self, tokens: Tensor) -> Tensor:
        """Raises ValueError: there is no attention, and so there are no keys."""
        raise ValueError("a convolutional tower has no keys, so key smoothing does not apply")

    def forward(self, images: Tensor) -> Tensor:
        """Image embedding: images [B, 3, H, W], normalised -> [B, D], not normalised (CLIP's ``encode_image``)."""
        return self.pooled(*self.trunk(images))
