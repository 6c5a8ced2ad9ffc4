"""ZegFormer: mask proposals named by their embeddings and, cut out, by CLIP.

Source: Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022. With x_q the embedding of proposal q
(:mod:`fastzs.decoders.maskformer`), t_c a class's text vector, b a learnt vector, v_q CLIP's of the cut-out::

    p_q = softmax over (c, b) of 100 [W x_q / |W x_q|] . [t_c ; b]          |t_c| = 1, b of any length
    u_q = softmax over c of 100 v_q . t_c
    P_q(c) = p_q(c)^l (mean of u_q over the seen classes)^(1 - l)   c seen
             p_q(c)^(1 - l) u_q(c)^l                                c unseen,  l = 2/3
    S(c) = sum over q of P_q(c) sigmoid(mask_q);  seen classes lose 0.1 where labels are decided

A cut-out is the box of the mask m_q > 1/2, averaged down to CLIP's size, zero (CLIP's mean colour) outside the mask.
Left out: the published list of 32 templates (the vocabulary's are taken), its training in fp16 and its checkpoints,
which are detectron2's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from fastzs.models.trained import OWN
from fastzs.models.two_stage import TwoStage
from fastzs.registry import register


@register(
    "zegformer",
    paper="ZegFormer (Ding et al., CVPR 2022)",
    does="a ResNet and a query decoder propose 100 masks, CLIP sees each cut out, both probabilities are combined",
    trained="a MaskFormer (ResNet, pyramid, query decoder); CLIP is frozen",
    needs="masks of the seen classes; SciPy in training",
    checkpoints=OWN,
)
class ZegFormer(TwoStage):
    """ZegFormer on any CLIP ViT, for images of any size and vocabularies of any length.

    Args:
        backbone, weights: of CLIP, see :func:`fastzs.clip.load`; published: ViT-B-16 of OpenAI.
        sizes: CLIP's vision tower's sizes, to build it without weights, as :meth:`from_pretrained` does.
        size: the shorter side of images in testing; published: 640.
        resnet, pretrained: of the proposals, see :class:`fastzs.decoders.maskformer.MaskFormer`.
        proposals: the MaskFormer's other sizes, by name; the published ones if omitted.
        seen: the training classes, by name or index. All classes count as unseen if omitted.
        calibration: what seen classes lose where labels are decided; published: 0.1.
        ensemble_weight: l, the weight of the more reliable probability of a class: the proposal's own for seen
            classes, CLIP's for unseen ones; published: 2/3.
        expand: sides of the box that is cut out, as a multiple of the mask's; published: 1.
        logit_scale: what the cosines of the proposals' own names are multiplied by; published: 100.
        clip_scale: what CLIP's cosines are multiplied by in testing; ``logit_scale`` if omitted. OpenAI's CLIP was
            trained to 100. Choose the number that the CLIP at hand was trained to, or a smaller one if it knows
            cut-outs less well than whole images.

    Trained: everything but CLIP. Published recipe: AdamW 1e-4 (a tenth for the ResNet), weight decay 1e-4, 60,000
    steps of 32 images of COCO-Stuff or 10,000 of VOC.
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
        calibration: float = 0.1,
        ensemble_weight: float = 2 / 3,
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
            projection=nn.Linear,
        )

    def compare(self, embeddings: Tensor, text: Tensor) -> Tensor:
        x = F.normalize(self.project(embeddings), dim=-1)
        return self.logit_scale * x @ torch.cat([text, self.no_object]).T

    def cut_out(self, image: Tensor, boxes: Tensor, side: int) -> Tensor:
        boxes = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
        return roi_align(image[None], boxes, side, aligned=True)

    def join(self, own: Tensor, of_clip: Tensor, seen: Tensor, full: Tensor) -> Tensor:
        known, other = self.ensemble_weight, 1 - self.ensemble_weight
        if not seen.any():
            return own**other * of_clip**known
        mean = of_clip[..., seen].mean(-1, keepdim=True)
        return torch.where(seen, own**known * mean**other, own**other * of_clip**known)
