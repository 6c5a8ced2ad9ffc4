"""zsseg (SimSeg): mask proposals named by their embeddings and, cut out, by CLIP.

Source: Xu et al., "A Simple Baseline for Open-Vocabulary Semantic Segmentation with Pre-trained Vision-Language
Model", ECCV 2022. With x_q the embedding of proposal q (:mod:`fastzs.decoders.maskformer`), t_c a class's text vector,
b a learnt vector, v_q CLIP's of the cut-out::

    p_q = softmax over (c, b) of 100 cos(MLP(x_q), [t_c ; b])
    u_q = softmax over c of 100 v_q . t_c
    P_q(c) = p_q(c)^w u_q(c)^(1 - w)    c seen
             p_q(c)^(1 - w) u_q(c)^w    c unseen,  w = 0.8;  u_q = 1 where the mask has no pixel
    S(c) = sum over q of P_q(c) sigmoid(mask_q)

A cut-out is the box of the mask m_q > 1/2, resized bicubically to CLIP's size, CLIP's mean colour outside the mask.
Left out: the learnt prefix of the text (the vocabulary's templates are taken, as in the published variant with fixed
ones), DeepLab's form of the ResNet (101c), training on pseudo labels, and the published checkpoints, which are
detectron2's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.models.trained import OWN
from fastzs.models.two_stage import TwoStage
from fastzs.registry import register


@register(
    "zsseg",
    paper="zsseg / SimSeg (Xu et al., ECCV 2022)",
    does="as ZegFormer, with other cut-outs and another way of joining",
    trained="a MaskFormer (ResNet, pyramid, query decoder); CLIP is frozen",
    needs="masks of the seen classes; SciPy in training",
    checkpoints=OWN,
)
class ZSSeg(TwoStage):
    """zsseg on any CLIP ViT, for images of any size and vocabularies of any length.

    Args:
        backbone, weights: of CLIP, see :func:`fastzs.clip.load`; published: ViT-B-16 of OpenAI.
        sizes: CLIP's vision tower's sizes, to build it without weights, as :meth:`from_pretrained` does.
        size: the shorter side of images in testing.
        resnet, pretrained: of the proposals, see :class:`fastzs.decoders.maskformer.MaskFormer`.
        proposals: the MaskFormer's other sizes, by name; the published ones if omitted.
        seen: the training classes, by name or index. All classes count as unseen if omitted.
        calibration: what seen classes lose where labels are decided; published: nothing.
        ensemble_weight: w, the weight of the more reliable probability of a class: the proposal's own for seen
            classes, CLIP's for unseen ones; published: 0.8.
        expand: sides of the box that is cut out, as a multiple of the mask's; published: 1.
        logit_scale: what the cosines of the proposals' own names are multiplied by; published: 100.
        clip_scale: what CLIP's cosines are multiplied by in testing; ``logit_scale`` if omitted. OpenAI's CLIP was
            trained to 100. Choose the number that the CLIP at hand was trained to, or a smaller one if it knows
            cut-outs less well than whole images.

    Trained: everything but CLIP.
    """

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        sizes: Mapping[str, Any] | None = None,
        size: int = 640,
        resnet: str = "resnet50",
        pretrained: str | None = "IMAGENET1K_V1",
        proposals: Mapping[str, Any] | None = None,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
        ensemble_weight: float = 0.8,
        expand: float = 1.0,
        logit_scale: float = 100.0,
        clip_scale: float | None = None,
    ):
        super().__init__(
            backbone=backbone,
            weights=weights,
            sizes=sizes,
            size=size,
            resnet=resnet,
            pretrained=pretrained,
            proposals=proposals,
            seen=seen,
            calibration=calibration,
            ensemble_weight=ensemble_weight,
            expand=expand,
            logit_scale=logit_scale,
            clip_scale=clip_scale,
            projection=_projection,
        )

    def compare(self, embeddings: Tensor, text: Tensor) -> Tensor:
        rows = F.normalize(torch.cat([text, self.no_object]), dim=-1)
        return self.logit_scale * F.normalize(self.project(embeddings), dim=-1) @ rows.T

    def cut_out(self, image: Tensor, boxes: Tensor, side: int) -> Tensor:
        place = (torch.arange(side, device=boxes.device) + 0.5) / side
        low, high = boxes[:, :2], boxes[:, 2:]  # [K, 2]
        at = low[:, None] + (high - low)[:, None] * place[:, None]  # [K, side, 2], pixels
        at = 2 * at / at.new_tensor([image.shape[2], image.shape[1]]) - 1
        x, y = at[:, None, :, 0].expand(-1, side, -1), at[:, :, None, 1].expand(-1, -1, side)
        whole = image.expand(len(boxes), -1, -1, -1)  # the image itself, not copies
        return F.grid_sample(whole, torch.stack([x, y], -1), "bicubic", "border", align_corners=False)

    def join(self, own: Tensor, of_clip: Tensor, seen: Tensor, full: Tensor) -> Tensor:
        of_clip = torch.where(full, of_clip, 1.0)
        return torch.where(
            seen,
            own**self.ensemble_weight * of_clip ** (1 - self.ensemble_weight),
            own ** (1 - self.ensemble_weight) * of_clip**self.ensemble_weight,
        )


def _projection(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))
