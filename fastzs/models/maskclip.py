"""MaskCLIP and its training-free successors: CLIP's last block read per patch.

Sources: Zhou, Loy, Dai, "Extract Free Dense Labels from CLIP", ECCV 2022 (MaskCLIP: the value path, key smoothing,
prompt denoising); Wang et al., "SCLIP", ECCV 2024 (qq+kk); Lan et al., "ClearCLIP", ECCV 2024 (qq, neither residual
nor MLP); Hajimiri et al., "Pay Attention to Your Neighbours" (NACLIP), WACV 2025 (kk+gaussian).

    logits(c, i) = 100 cos(v_i, t_c)                                       v_i: dense feature of patch i
    denoising:   classes whose probability nowhere reaches a threshold are left out
    smoothing:   p_i <- sum_j cos(k_i, k_j) p_j,  p = softmax(logits)      k_i: key vector of patch i

Left out: the published code's 'whole' test with argmax over raw logits can be had with
``label_map(..., activation="none")``; :class:`fastzs.Segmenter` averages probabilities instead.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip import Clip, VisionTransformer
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, SegmentationModel
from fastzs.operators import why_not
from fastzs.ops import key_smoothing, pixel_text_logits, prompt_denoising
from fastzs.registry import register
from fastzs.stitching import stitched_tokens
from fastzs.trace import traced
from fastzs.windows import Size

LOGIT_SCALE = 100.0
ABSENT = -100.0 * LOGIT_SCALE  # what the published code sets the logits of absent classes to


@dataclass(frozen=True)
class DenseFeatures(Features):
    """CLIP's features of every patch."""

    patches: Tensor  # [B, D, h, w] in the text space
    keys: Tensor | None = None  # [B, h * w, C], for key smoothing

    @property
    def dense(self) -> Tensor:
        """[B, D, h, w], unit length, fp32 at least."""
        return F.normalize(self.patches.to(torch.promote_types(self.patches.dtype, torch.float32)), dim=1)


@register(
    "maskclip",
    paper="MaskCLIP (Zhou et al., ECCV 2022)",
    does="CLIP once over the image, its last block read per patch, cosines with the text",
    trained="",
    needs="any CLIP",
    checkpoints="CLIP weights: open_clip tags, hub ids, files; MaskCLIP's converted .pth",
)
class MaskCLIP(SegmentationModel):
    """Training-free dense CLIP.

    ============  =================================================================
    published as  settings
    ============  =================================================================
    MaskCLIP      the defaults
    SCLIP         ``dense="qq+kk"``
    ClearCLIP     ``dense="qq", residual=False, ffn=False``
    NACLIP        ``dense="kk+gaussian", residual=False, ffn=False``
    ============  =================================================================

    Args:
        clip: weights, see :func:`fastzs.clip.load`.
        dense: the last block's operator, see :func:`fastzs.ops.dense_attention`.
        residual, ffn: keep the last block's residual connection and MLP (vision transformers).
        smoothing: key smoothing, off, as in the paper, or as in the published code, which normalises keys along the
            wrong axis (:func:`fastzs.ops.key_smoothing`).
        smoothing_threshold: with ``"official"``, only positions less certain than this are smoothed.
        denoising: prompt denoising threshold in 0..1 (published: 0.5), off if ``None``.
        output_stride: of a ResNet, see :class:`fastzs.clip.ResNet`; published: 8.
        exact_gelu, norm_eps, bicubic_positions, imagenet_normalization: the published configuration runs OpenAI's
            weights with the exact GELU instead of QuickGELU, LayerNorm eps 1e-6 instead of 1e-5, positions resized
            bicubically, and images normalised with ImageNet's mean and deviation. ``None`` follows it for OpenAI's
            weights and the weights' own way for all others (bicubic for all).
    """

    default_templates = "maskclip85"

    def __init__(
        self,
        clip: Clip,
        *,
        dense: str = "identity",
        residual: bool = True,
        ffn: bool = True,
        smoothing: Literal["paper", "official"] | None = None,
        smoothing_threshold: float = 1.0,
        denoising: float | None = None,
        output_stride: Literal[8, 16, 32] = 8,
        exact_gelu: bool | None = None,
        norm_eps: float | None = None,
        bicubic_positions: bool = True,
        imagenet_normalization: bool | None = None,
    ):
        super().__init__()
        if smoothing not in (None, "paper", "official"):
            raise ValueError(f"MaskCLIP: smoothing must be None, 'paper' or 'official', got {smoothing!r}")
        if denoising is not None and not 0 <= denoising <= 1:
            raise ValueError(f"MaskCLIP: denoising is a probability, got {denoising}")
        if not 0 < smoothing_threshold <= 1:
            raise ValueError(f"MaskCLIP: smoothing_threshold is a probability above 0, got {smoothing_threshold}")
        self.weights = clip.source
        self._clip, self.text_dim, self.fingerprint = clip, clip.embed_dim, clip.fingerprint
        self.kind, self.residual, self.ffn = dense, residual, ffn
        self.smoothing, self.smoothing_threshold, self.denoising = smoothing, smoothing_threshold, denoising
        if clip.is_resnet:
            options = {"output_stride": output_stride}
        else:
            exact = clip.published if exact_gelu is None else exact_gelu
            options: dict[str, Any] = {"position_mode": "bicubic" if bicubic_positions else "bilinear"}
            if exact:
                options["quick_gelu"] = False
            if norm_eps or clip.published:
                options["norm_eps"] = norm_eps or 1e-6
        self.visual = clip.vision(**options)
        wanted = ((dense, f"dense={dense!r}"), ("kk" if smoothing else dense, f"smoothing={smoothing!r}"))
        for operator, setting in wanted:
            if operator not in self.visual.operators:
                raise ValueError(why_not(f"MaskCLIP: {setting}", clip.backbone, self.visual.operators))
        self.activation = "none" if smoothing else "softmax"  # smoothed output is made of probabilities
        imagenet = clip.published if imagenet_normalization is None else imagenet_normalization
        self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (clip.mean, clip.std)
        # whole images, short side 512, as published; the shapes weights read images as they were trained
        own_size = clip.config["vision_cfg"].get("image_size", 224)
        self.short_side = None if clip.source == "shapes" else 512
        self.crop = own_size if clip.source == "shapes" else None
        self.stride = own_size * 3 // 4 if clip.source == "shapes" else None

    def text_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    @traced("model.tower")
    def encode(self, images: Tensor) -> DenseFeatures:
        """Dense features in the text space, and key vectors if smoothing needs them."""
        return self._features(*self.visual.trunk(images))

    def why_not_stitched(self) -> str | None:
        if isinstance(self.visual, VisionTransformer):
            return None
        return f"{self.clip.backbone} has no transformer block at its end"

    @traced("model.tower")
    def encode_stitched(self, image: Tensor, crop: int | Size, stride: int | Size, batch_size: int) -> DenseFeatures:
        """Features of the whole image: windows through the blocks before the last, the last one over all patches."""
        assert isinstance(self.visual, VisionTransformer)
        return self._features(*stitched_tokens(self.visual, image, crop, stride, batch_size))

    def _features(self, tokens: Tensor, grid: Size) -> DenseFeatures:
        patches = self.visual.dense(tokens, grid, self.kind, self.residual, self.ffn)
        return DenseFeatures(patches, self.visual.keys(tokens) if self.smoothing else None)

    def score(self, features: DenseFeatures, text: Tensor) -> Tensor:
        """100 cos of patches and text vectors."""
        wide = features.patches.to(torch.promote_types(features.patches.dtype, torch.float32))
        return pixel_text_logits(wide, text, LOGIT_SCALE)

    def finish(self, features: DenseFeatures, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Prompt denoising, then key smoothing, as configured; smoothed maps are probabilities."""
        grid = logits.shape[2:]
        logits = logits.flatten(2)  # [B, C, N]
        if self.denoising is not None:
            present = prompt_denoising(F.softmax(logits, dim=1), self.denoising)  # [B, C]
            logits = logits.masked_fill(~present[:, :, None], ABSENT)
        if self.smoothing is not None:
            assert features.keys is not None
            probabilities = F.softmax(logits, dim=1)
            threshold = self.smoothing_threshold if self.smoothing == "official" else 1.0
            logits = key_smoothing(features.keys.to(logits), probabilities, mode=self.smoothing, threshold=threshold)
        return logits.unflatten(2, tuple(grid))
