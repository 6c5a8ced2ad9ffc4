"""What ZegFormer and zsseg share: mask proposals of a MaskFormer, each cut out and shown to a frozen CLIP.

Both name a proposal twice: by its embedding, trained on the seen classes, and by CLIP's embedding of the cut-out. They
differ in how the former is compared with the text, in how cut-outs are sampled, and in how the two
probabilities are combined. The score of a pixel for class c is then the sum over the proposals of p_q(c) m_q(pixel).

All of it stays at the resolution of the proposals, a quarter of the image's, and no masked copy of the image is
made. Proposals without a pixel are not cut out, and of CLIP's last block only the row of CLS is computed, which changes
no result. Unlike in the published code the sigmoid of the masks is taken before they are enlarged, and boxes
are made of whole cells of 4 x 4 pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from fastzs import clip as clip_module
from fastzs.clip import VisionTransformer, WeightsError
from fastzs.clip.memo import Memo
from fastzs.clip.vision import vit_sizes
from fastzs.clip.weights import OPENAI_MEAN, OPENAI_STD
from fastzs.decoders.maskformer import MaskFormer
from fastzs.losses import inductive_target
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, Labels, join
from fastzs.models.matching import matched_losses
from fastzs.models.trained import TrainedModel
from fastzs.trace import traced

CUT_OUTS = 32  # that CLIP is shown at a time


def clip_vit(
    model: str, backbone: str, weights: str, sizes: Mapping[str, Any] | None
) -> tuple[clip_module.Clip | None, VisionTransformer | None, Mapping[str, Any]]:
    """A CLIP, its vision tower and the tower's sizes; given sizes alone, whose weights come later.

    Args:
        model: name of the class that asks, for messages.

    Raises:
        ValueError: the tower is not a vision transformer.
    """
    if sizes is not None:
        return None, None, sizes
    clip = clip_module.load(backbone, weights)
    tower = clip.vision()
    if not isinstance(tower, VisionTransformer):
        raise ValueError(f"{model}: {backbone} is not a vision transformer, which it needs")
    return clip, tower, vit_sizes(tower)


@dataclass(frozen=True)
class Proposals(Features):
    """Mask proposals, with their own embeddings and CLIP's."""

    masks: Tensor  # [B, Q, h, w] logits, fp32 at least
    embeddings: Tensor  # [B, Q, width]
    cut_outs: Tensor  # CLIP's unit vectors, fp32 [B, Q, D]
    full: Tensor  # bool [B, Q, 1], which have a pixel


class TwoStage(TrainedModel):
    """Mask proposals named by their embeddings and by CLIP.

    Subclasses have :meth:`compare`, :meth:`cut_out` and :meth:`join`, and say what projects embeddings to the text's
    width.
    """

    activation = "none"
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    crop = stride = None  # whole images

    def __init__(
        self,
        *,
        backbone: str,
        weights: str,
        sizes: Mapping[str, Any] | None,
        size: int,
        resnet: str,
        pretrained: str | None,
        proposals: Mapping[str, Any] | None,
        seen: Sequence[str] | Sequence[int] | None,
        calibration: float,
        ensemble_weight: float,
        expand: float,
        logit_scale: float,
        clip_scale: float | None,
        projection: Callable[[int, int], nn.Module],
    ):
        if not expand >= 1:
            raise ValueError(f"{type(self).__name__}: expand: expected at least 1, got {expand}")
        clip_scale = logit_scale if clip_scale is None else clip_scale
        for name, scale in (("logit_scale", logit_scale), ("clip_scale", clip_scale)):
            if not scale > 0:
                raise ValueError(f"{type(self).__name__}: {name}: expected more than 0, got {scale}")
        clip, tower, sizes = clip_vit(type(self).__name__, backbone, weights, sizes)
        super().__init__(
            backbone=backbone,
            weights=weights,
            clip=clip,
            text_dim=sizes["output_dim"],
            seen=seen,
            calibration=calibration,
        )
        self.maskformer = MaskFormer(resnet, pretrained, **(proposals or {}))
        self.tower = (tower or VisionTransformer(**sizes)).requires_grad_(False)
        self.project = projection(self.maskformer.width, self.text_dim)
        self.no_object = nn.Parameter(torch.randn(1, self.text_dim) * self.text_dim**-0.5)
        self.short_side, self.ensemble_weight, self.expand = size, ensemble_weight, expand
        self.logit_scale, self.clip_scale = logit_scale, clip_scale
        self._blank: Memo[Tensor] = Memo()
        if self.weights in ("openai", "random"):
            self.clip_mean, self.clip_std = OPENAI_MEAN, OPENAI_STD
        else:
            self.clip_mean, self.clip_std = self.clip.mean, self.clip.std
        self.settings.update(
            sizes=dict(sizes),
            size=size,
            resnet=resnet,
            proposals=dict(proposals or {}),
            ensemble_weight=ensemble_weight,
            expand=expand,
            logit_scale=logit_scale,
            clip_scale=clip_scale,
        )
        self.settings.update(pretrained=None)  # a saved model has weights of its own

    def compare(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Logits [..., rows + 1], the last for "no object", of embeddings [..., width] and text vectors [rows, D]."""
        raise NotImplementedError

    def cut_out(self, image: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Parts [K, 3, side, side] of an image [3, H, W]; boxes [K, 4] are x0, y0, x1, y1 in pixels."""
        raise NotImplementedError

    def join(self, own: Tensor, of_clip: Tensor, seen: Tensor, full: Tensor) -> Tensor:
        """One probability from both, [B, Q, C].

        Args:
            own: [B, Q, C] by the embeddings, "no object" left out.
            of_clip: [B, Q, C] by CLIP, whose sum over C is 1.
            seen: bool [C], the classes of the training.
            full: bool [B, Q, 1], the proposals that have a pixel.
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> Proposals:
        found = self.maskformer(images.to(next(self.parameters()).dtype))
        masks = found.masks[-1]
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # [B, Q, h, w]
        return Proposals(masks, found.embeddings[-1], *self.ask_clip(images, masks.detach()))

    @classmethod
    def why_not_exported(cls) -> str | None:
        return "which proposals are cut out and shown to CLIP, and how large, depends on the image"

    def decode(
        self, features: Proposals, text: Tensor, *, groups: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Scores [B, C, ceil(H / 4), ceil(W / 4)], fp32 at least, not negative; see the base."""
        text, masks = self.prepare_text(text), features.masks
        logits = self.compare(features.embeddings, text).to(masks.dtype)  # [B, Q, T + 1]
        of_clip = self.clip_scale * features.cut_outs.to(masks.dtype) @ text.to(masks.dtype).T  # [B, Q, T]
        own, nothing = logits[..., :-1], logits[..., -1:]
        own, of_clip = (join(x.transpose(1, 2)[..., None], groups)[..., 0].mT for x in (own, of_clip))
        if seen is None:
            seen = torch.zeros(own.shape[-1], dtype=torch.bool)
        own = torch.cat([own, nothing], dim=-1).softmax(-1)[..., :-1]
        joined = self.join(own, of_clip.softmax(-1), seen.to(own.device), features.full)
        return torch.einsum("bqc,bqhw->bchw", joined, masks.sigmoid())

    @torch.no_grad()
    @traced("model.tower")
    def ask_clip(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's unit vectors of the cut-out proposals, fp32 [B, Q, D], and which have a pixel, bool [B, Q, 1].

        Args:
            images: [B, 3, H, W], normalised.
            masks: [B, Q, h, w] logits.
        """
        side = self.settings["sizes"]["grid"] * self.settings["sizes"]["patch_size"]
        inside = masks > 0
        full = inside.flatten(2).any(2)  # [B, Q]
        weight = self.tower.blocks[0].ln_1.weight
        blank = self._blank((weight,), lambda: self.tower(weight.new_zeros(1, 3, side, side)).float())
        out = F.normalize(blank, dim=-1).expand(*masks.shape[:2], -1).clone()  # [B, Q, D]
        images = self.for_clip(images)
        cell = images.new_tensor([images.shape[3] / masks.shape[3], images.shape[2] / masks.shape[2]]).repeat(2)
        for image, mask, where, kept, vectors in zip(images, masks, inside, full, out, strict=True):
            if not kept.any():
                continue
            boxes = expanded(_boxes(where[kept]), self.expand)  # [K, 4] in cells
            chunks = zip(boxes.split(CUT_OUTS), mask[kept].split(CUT_OUTS), strict=True)
            found = [self.tower(self._cut(image, some, logits, cell, side)).float() for some, logits in chunks]
            vectors[kept] = F.normalize(torch.cat(found), dim=-1)
        return out, full[..., None]

    def for_clip(self, images: Tensor) -> Tensor:
        """Images as CLIP wants them normalised, fp32, from our own normalisation."""
        ours, theirs = (
            (torch.tensor(mean, device=images.device), torch.tensor(std, device=images.device))
            for mean, std in ((self.mean, self.std), (self.clip_mean, self.clip_std))
        )
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        return images.float() * scale[:, None, None] + shift[:, None, None]

    def _cut(self, image: Tensor, boxes: Tensor, masks: Tensor, cell: Tensor, side: int) -> Tensor:
        """Cut-outs [K, 3, side, side] of an image, CLIP's mean colour (zero) outside the masks [K, h, w]."""
        number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
        # one sample in the middle of each pixel: the logits as bilinear enlargement gives them there
        inside = roi_align(masks.float()[:, None], torch.cat([number, boxes], 1), side, sampling_ratio=1, aligned=True)
        return self.cut_out(image, boxes * cell, side) * (inside > 0)

    def loss_parts(
        self, images: Tensor, labels: Labels, text: Tensor, *, focal: float = 20.0, dice: float = 1.0
    ) -> dict[str, Tensor]:
        """Weighted losses ``class``, ``focal`` and ``dice``, in which CLIP has no part; published weights: 20 and 1."""
        classes, ignore_index = len(text), labels.ignore_index
        target = inductive_target(labels.target, range(classes), classes, ignore_index)  # refuses what is out of range
        found = self.maskformer(images.to(text.dtype))
        logits = self.compare(found.embeddings, text)
        return matched_losses(logits, found.masks, target, ignore_index=ignore_index, focal=focal, dice=dice)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        raise WeightsError(
            f"{path}: {cls.__name__} reads only what save_pretrained wrote, by its folder or hub id; the published "
            "checkpoints, of detectron2, are not read"
        )


def expanded(boxes: Tensor, ratio: float) -> Tensor:
    """Boxes [K, 4] with the same middles and ``ratio`` times the sides; they may reach beyond the image."""
    if ratio == 1:
        return boxes
    low, high = boxes.chunk(2, dim=1)
    middle, half = (low + high) / 2, (high - low) * (ratio / 2)
    return torch.cat([middle - half, middle + half], dim=1)


def _boxes(inside: Tensor) -> Tensor:
    """The smallest boxes around bool [K, h, w], each with a cell in it: x0, y0, x1, y1 [K, 4] in cells, fp32."""
    ends = []
    for along in (inside.any(1), inside.any(2)):  # columns [K, w], rows [K, h]
        along = along.int()
        ends.append((along.argmax(1), along.shape[1] - along.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float()
