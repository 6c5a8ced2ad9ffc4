"""The training-free systems after MaskCLIP: CLIP's last block with another attention, read per patch in windows.

Each class is a published system with all that its paper sets: how the tower is run, the last block's operator, sizes
and windows, templates, and how cosines become labels (:mod:`fastzs.readout`). Every setting can be overridden.

Sources: Wang et al., "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference", ECCV 2024; Lan et al.,
"ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference", ECCV 2024; Hajimiri et al., "Pay
Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic Segmentation" (NACLIP), WACV 2025; Lan et al.,
"ProxyCLIP", ECCV 2024; "PEARL", CVPR 2026. With q, k, v of the last block, d the width of a head, x_i the place of
patch i::

    sclip       softmax(q q' d^-1/2) + softmax(k k' d^-1/2), with the residual connection and the MLP
    clearclip   softmax(q q' d^-1/2)
    naclip      softmax(k k' d^-1/2 + exp(-|x_i - x_j|^2 / 50)), cosines refined by PAMR
    pearl       softmax(q (k R)' d^-1/2 + a k k' d^-1/2), R the rotation that brings k to q; a Laplacian refines
    proxyclip   softmax(3 (S - 1.2 mean S)) where that is not negative, S the similarity of another network's features

    cosines(c, i) = cos(v_i, t_c)       v_i: the block's output for patch i in the text space, t_c: a name's vector
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs import operators
from fastzs.clip import Clip, VisionTransformer
from fastzs.models.base import Activation, SegmentationModel
from fastzs.models.maskclip import DenseFeatures
from fastzs.operators import LastBlock, why_not
from fastzs.ops import dense_attention, pixel_text_logits
from fastzs.readout import Readout, Refinement
from fastzs.regions import at_size
from fastzs.registry import register
from fastzs.stitching import stitched_tokens
from fastzs.trace import traced
from fastzs.windows import Size, next_multiple

CHECKPOINTS = "CLIP weights: open_clip tags, hub ids, files"


@dataclass(frozen=True)
class Settings:
    """What a paper of this line sets, for photographs and benchmarks without settings of their own.

    Attributes:
        dense: the last block's operator, see :func:`fastzs.ops.dense_attention`.
        bare: the last block has neither its residual connection nor its MLP.
        crop, stride: of the windows, in pixels of the resized image.
        short_side: of the resized image.
        multiple: windows are padded with zeros, half of them on each side, until their sides are multiples of this;
            0: the rest of a side that is no multiple of the patch is cut off and the map stretched over it.
        readout: how cosines become labels.
    """

    dense: str
    bare: bool
    short_side: int
    crop: int
    stride: int
    multiple: int
    readout: Readout


def padded(windows: Tensor, multiple: int) -> Tensor:
    """Windows int64 [W, 4] whose sides are padded in the middle to multiples of some pixels; 0: as they are."""
    if not multiple:
        return windows
    more = -windows[:, 2:] % multiple
    return torch.cat([windows[:, :2] - more // 2, windows[:, 2:] + more], dim=1)


class TrainingFree(SegmentationModel):
    """CLIP's last block with another attention; subclasses have the :class:`Settings` of one paper.

    Args:
        clip: weights, see :func:`fastzs.clip.load`.
        dense: the last block's operator: a kind of :func:`fastzs.ops.dense_attention`; "mean", the mean attention of
            blocks 5 to 8, one half of ResCLIP's; the name of an operator that was registered with
            :func:`fastzs.operators.operator`; FILE.py:FUNCTION; or a function, see there.
        gaussian: standard deviation of "kk+gaussian", in patches.
        key_weight: a of "procrustes"; published: 0.08, and 0.3 on Cityscapes and ADE20K.
        residual, ffn: keep the last block's residual connection and its MLP.
        refine: "pamr", "laplacian" or "none", see :class:`fastzs.readout.Readout`.
        scale: of the cosines in the softmax that gives scores.
        guide, working_side, area, cells: see :class:`fastzs.readout.Readout`.
        multiple: see :class:`Settings`.
        positions: how the positional table is brought to other grids: "offset" as published, "bicubic" or "bilinear".

    Raises:
        ValueError: an operator that the tower does not have, or a number out of range.
    """

    published: ClassVar[Settings]
    activation: Activation = "cosine"
    takes_regions = True
    default_templates = "openai80"

    def __init__(
        self,
        clip: Clip,
        *,
        dense: str | Callable[[LastBlock], Tensor] | None = None,
        gaussian: float = 5.0,
        key_weight: float = 0.08,
        residual: bool | None = None,
        ffn: bool | None = None,
        refine: Refinement | None = None,
        scale: float | None = None,
        area: float | None = None,
        cells: int | None = None,
        guide: str | None = None,
        working_side: int | None = None,
        multiple: int | None = None,
        positions: str = "offset",
    ):
        super().__init__()
        ours = self.published
        self._clip, self.text_dim, self.fingerprint = clip, clip.embed_dim, clip.fingerprint
        options: dict[str, Any] = {} if clip.is_resnet else {"position_mode": positions}
        self.visual = clip.vision(**options)
        self.kind = operators.find(ours.dense if dense is None else dense)
        if isinstance(self.visual, VisionTransformer):
            late = [block for block in operators.blocks_of(self.kind) if block >= len(self.visual.blocks) - 1]
            if late:
                raise ValueError(
                    f"the operator wants the attention of block {late[0]}, but only {len(self.visual.blocks) - 1} come "
                    "before the last"
                )
        elif not isinstance(self.kind, str):
            raise ValueError(f"{clip.backbone} has no transformer block at its end, so no operator can replace it")
        elif self.kind not in (*self.visual.operators, "proxy"):  # ProxyCLIP refuses towers itself
            raise ValueError(
                why_not(f"{type(self).__name__}: dense={self.kind!r}", clip.backbone, self.visual.operators)
            )
        self.gaussian, self.key_weight = gaussian, key_weight
        self.residual = not ours.bare if residual is None else residual
        self.ffn = not ours.bare if ffn is None else ffn
        self.multiple = ours.multiple if multiple is None else multiple
        given = {"refine": refine, "scale": scale, "area": area, "cells": cells, "guide": guide}
        given |= {"working_side": working_side}
        self.readout = replace(ours.readout, **{key: value for key, value in given.items() if value is not None})
        self.settings = {  # what decides beside the readout, for the key of a result
            "dense": operators.identity_of(self.kind),
            "gaussian": gaussian,
            "key_weight": key_weight,
            "residual": self.residual,
            "ffn": self.ffn,
            "multiple": self.multiple,
            "positions": positions,
        }
        self.mean, self.std = clip.mean, clip.std
        self.short_side, self.crop, self.stride = ours.short_side, ours.crop, ours.stride

    def text_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def covered(self, windows: Tensor) -> Tensor:
        """What the maps of windows int64 [W, 4] (top, left, height, width) cover, which may reach beyond the image."""
        return padded(windows, self.multiple)

    def fitted(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] whose sides are multiples of the patch: padded in the middle, or cut."""
        height, width = images.shape[2:]
        if self.multiple:
            down, across = (next_multiple(side, self.multiple) - side for side in (height, width))
            return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))
        patch = getattr(self.visual, "patch_size", 1)
        return images[:, :, : max(patch, height // patch * patch), : max(patch, width // patch * patch)]

    @traced("model.tower")
    def encode(self, images: Tensor, regions: Tensor | None = None) -> DenseFeatures:
        """Features of every patch in the text space; the maps are those of :meth:`covered`."""
        tower, fitted = self.visual, self.fitted(images)
        if not isinstance(tower, VisionTransformer):
            assert isinstance(self.kind, str)  # __init__ has seen to it
            tokens, grid = tower.trunk(fitted)
            return DenseFeatures(tower.dense(tokens, grid, self.kind, self.residual, self.ffn))
        maps, watch = watched(operators.blocks_of(self.kind))
        tokens, grid = tower.trunk(fitted, watch)
        return DenseFeatures(self.last_block(tokens, grid, maps, fitted, self._fitted_regions(regions)))

    def why_not_stitched(self) -> str | None:
        if not isinstance(self.visual, VisionTransformer):
            return f"{self.clip.backbone} has no transformer block at its end"
        if operators.blocks_of(self.kind):
            return "its operator wants attention of earlier blocks, which is of single windows"
        return None

    @traced("model.tower")
    def encode_stitched(
        self,
        image: Tensor,
        crop: int | Size,
        stride: int | Size,
        batch_size: int,
        regions: Tensor | None = None,
    ) -> DenseFeatures:
        """Features of the whole image: windows through the blocks before the last, the last one over all patches."""
        assert isinstance(self.visual, VisionTransformer)
        fitted = self.fitted(image)
        tokens, grid = stitched_tokens(self.visual, fitted, crop, stride, batch_size)
        return DenseFeatures(self.last_block(tokens, grid, {}, fitted, self._fitted_regions(regions)))

    def _fitted_regions(self, regions: Tensor | None) -> Tensor | None:
        """Regions [B, H, W] as the images are fitted; what is padded is of no region."""
        if regions is None:
            return None
        return self.fitted(regions[:, None].double())[:, 0].long()  # doubles hold integers up to 2^53

    def last_block(
        self, tokens: Tensor, grid: Size, maps: dict[int, Tensor], fitted: Tensor, regions: Tensor | None
    ) -> Tensor:
        """Features [B, D, h, w] from the tokens that enter the last block, of fitted images [B, 3, H, W].

        Args:
            maps: attention of the earlier blocks that the operator asked for.
            regions: int64 [B, H, W].
        """
        tower = self.visual
        assert isinstance(tower, VisionTransformer)
        if self.kind == "identity":
            return tower.dense(tokens, grid, "identity", self.residual, self.ffn)
        q, k, v = tower.projections(tokens, grid)
        cells = None if regions is None else at_size(regions, grid)
        if isinstance(self.kind, str):
            options = {"std": self.gaussian, "key_weight": self.key_weight, "regions": cells}
            attended = dense_attention(q, k, v, self.kind, grid, **options)
        else:
            attended = self.kind(LastBlock(tokens, q, k, v, grid, maps, regions=cells))
        return tower.read(tower.finish(tokens, attended, self.residual, self.ffn), grid)

    def score(self, features: DenseFeatures, text: Tensor) -> Tensor:
        """Cosines of patches and text vectors, [B, T, h, w]."""
        wide = features.patches.to(torch.promote_types(features.patches.dtype, torch.float32))
        return pixel_text_logits(wide, text)


@register(
    "sclip",
    paper="SCLIP (Wang et al., ECCV 2024)",
    does="windows through CLIP, queries to queries and keys to keys in the last block, cosines averaged",
    trained="",
    needs="any CLIP",
    checkpoints=CHECKPOINTS,
)
class SCLIP(TrainingFree):
    """SCLIP (ECCV 2024): queries attend to queries and keys to keys; windows of 224 pixels at short side 336."""

    published = Settings("qq+kk", False, 336, 224, 112, 0, Readout(scale=40.0, direct=True))


@register(
    "clearclip",
    paper="ClearCLIP (Lan et al., ECCV 2024)",
    does="windows through CLIP, queries to queries in a bare last block, cosines averaged",
    trained="",
    needs="any CLIP",
    checkpoints=CHECKPOINTS,
)
class ClearCLIP(TrainingFree):
    """ClearCLIP (ECCV 2024): queries attend to queries in a bare last block; windows of 448 pixels."""

    published = Settings("qq", True, 448, 448, 224, 16, Readout(scale=50.0, direct=True))


@register(
    "naclip",
    paper="NACLIP (Hajimiri et al., WACV 2025)",
    does="windows through CLIP, keys to keys and neighbours in a bare last block, cosines averaged, refined by PAMR",
    trained="",
    needs="any CLIP",
    checkpoints=CHECKPOINTS,
)
class NACLIP(TrainingFree):
    """NACLIP (WACV 2025): keys attend to keys and to their neighbourhood, in a bare last block; refined by PAMR."""

    published = Settings("kk+gaussian", True, 336, 224, 112, 0, Readout(scale=40.0, refine="pamr"))


def watched(blocks: Sequence[int]) -> tuple[dict[int, Tensor], Callable[..., None] | None]:
    """An empty dict, and what fills it with the attention maps of some blocks as a tower's trunk runs them."""
    maps: dict[int, Tensor] = {}
    if not blocks:
        return maps, None

    def watch(index: int, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        if index in blocks:
            maps[index] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    return maps, watch
