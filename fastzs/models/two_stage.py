"""What ZegFormer and zsseg share: mask proposals of a MaskFormer, each cut out and shown to a frozen CLIP.

Both name a proposal twice: by its embedding, trained on the seen classes, and by CLIP's embedding of the cut-out. They
differ in how the former is compared with the text, in how cut-outs are sampled, and in how the two opinions are
joined. The score of a pixel for class c is then the sum over the proposals of p_q(c) m_q(pixel).

All of it stays at the resolution of the proposals, a quarter of the picture's, and no masked copy of the picture is
made. Proposals without a pixel are not cut out, and of CLIP's last block only the row of CLS is computed, which changes
no result. Otherwise than in the published code the sigmoid of the masks is taken before they are enlarged, and boxes
are made of whole cells of 4 x 4 pixels.
"""

from collections.abc import Callable, Mapping, Sequence
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
from fastzs.models.matching import matched_losses
from fastzs.models.trained import IMAGENET_MEAN, IMAGENET_STD, TrainedModel, class_indices
from fastzs.trace import traced
from fastzs.vocabulary import Vocabulary

LOGIT_SCALE = 100.0
CUT_OUTS = 32  # that CLIP is shown at a time


class TwoStage(TrainedModel):
    """Mask proposals named by their embeddings and by CLIP.

    Subclasses have :meth:`compare`, :meth:`cut_out` and :meth:`join`, and say what projects embeddings to the text's
    width.
    """

    activation = "none"
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    crop = stride = None  # whole pictures

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
        share: float,
        projection: Callable[[int, int], nn.Module],
    ):
        clip = tower = None
        if sizes is None:
            clip = clip_module.load(backbone, weights)
            tower = clip.vision()
            if not isinstance(tower, VisionTransformer):
                raise ValueError(f"{type(self).__name__}: {backbone} is not a vision transformer, which it needs")
            sizes = vit_sizes(tower)
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
        self.short_side, self.share = size, share
        self._blank: Memo[Tensor] = Memo()
        if self.weights in ("openai", "random"):
            self.clip_mean, self.clip_std = OPENAI_MEAN, OPENAI_STD
        else:
            self.clip_mean, self.clip_std = self.clip.mean, self.clip.std
        self.settings.update(sizes=dict(sizes), size=size, resnet=resnet, proposals=dict(proposals or {}), share=share)
        self.settings.update(pretrained=None)  # a saved model has weights of its own

    def compare(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Logits [..., rows + 1], the last for "no object", of embeddings [..., width] and text vectors [rows, D]."""
        raise NotImplementedError

    def cut_out(self, image: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Parts [K, 3, side, side] of a picture [3, H, W]; boxes [K, 4] are x0, y0, x1, y1 in pixels."""
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

    def forward(self, images: Tensor, vocabulary: Vocabulary | Tensor) -> Tensor:
        """Low-resolution scores [B, C, ceil(H / 4), ceil(W / 4)], fp32 at least, not negative.

        Args:
            images: [B, 3, H, W] of any size, normalised with ``mean`` and ``std``.
            vocabulary: the classes, or their text vectors [C, D].

        Raises:
            ValueError: vectors of another width; vectors without names while ``seen`` has names.
        """
        text = self.text(vocabulary)
        found = self.maskformer(images.to(text.dtype))
        masks = found.masks[-1]
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # [B, Q, h, w]
        logits = self.compare(found.embeddings[-1], text).to(masks.dtype)  # [B, Q, rows + 1]
        embeddings, full = self.ask_clip(images, masks.detach())
        of_clip = LOGIT_SCALE * embeddings.to(masks.dtype) @ text.to(masks.dtype).T  # [B, Q, rows]
        own, nothing = logits[..., :-1], logits[..., -1:]
        names: Sequence[str] = [str(i) for i in range(len(text))]
        if isinstance(vocabulary, Vocabulary):
            names = vocabulary.names
            own, of_clip = (vocabulary.reduce(x.transpose(1, 2)[..., None])[..., 0].mT for x in (own, of_clip))
        elif self.seen and isinstance(self.seen[0], str):
            raise ValueError(f"{type(self).__name__}: seen classes have names, so give a vocabulary that has them, too")
        seen = torch.zeros(own.shape[-1], dtype=torch.bool, device=own.device)
        seen[self.seen_indices(names) or []] = True
        own = torch.cat([own, nothing], dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", self.join(own, of_clip.softmax(-1), seen, full), masks.sigmoid())

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
        blank = self._blank((self.tower.proj,), lambda: self.tower(self.tower.proj.new_zeros(1, 3, side, side)).float())
        out = F.normalize(blank, dim=-1).expand(*masks.shape[:2], -1).clone()  # [B, Q, D]
        images = self.for_clip(images)
        cell = images.new_tensor([images.shape[3] / masks.shape[3], images.shape[2] / masks.shape[2]]).repeat(2)
        for image, mask, where, kept, vectors in zip(images, masks, inside, full, out, strict=True):
            if not kept.any():
                continue
            boxes = _boxes(where[kept])  # [K, 4] in cells
            chunks = zip(boxes.split(CUT_OUTS), mask[kept].split(CUT_OUTS), strict=True)
            found = [self.tower(self._cut(image, some, logits, cell, side)).float() for some, logits in chunks]
            vectors[kept] = F.normalize(torch.cat(found), dim=-1)
        return out, full[..., None]

    def for_clip(self, images: Tensor) -> Tensor:
        """Pictures as CLIP wants them normalised, fp32, from our own normalisation."""
        ours, theirs = (
            (torch.tensor(mean, device=images.device), torch.tensor(std, device=images.device))
            for mean, std in ((self.mean, self.std), (self.clip_mean, self.clip_std))
        )
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        return images.float() * scale[:, None, None] + shift[:, None, None]

    def _cut(self, image: Tensor, boxes: Tensor, masks: Tensor, cell: Tensor, side: int) -> Tensor:
        """Cut-outs [K, 3, side, side] of a picture, CLIP's mean colour (zero) outside the masks [K, h, w]."""
        number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
        # one sample in the middle of each pixel: the logits as bilinear enlargement gives them there
        inside = roi_align(masks.float()[:, None], torch.cat([number, boxes], 1), side, sampling_ratio=1, aligned=True)
        return self.cut_out(image, boxes * cell, side) * (inside > 0)

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        vocabulary: Vocabulary | Tensor,
        *,
        seen: Sequence[str] | Sequence[int] | None = None,
        transductive: bool | str = False,
        ignore_index: int = 255,
        focal: float = 20.0,
        dice: float = 1.0,
    ) -> dict[str, Tensor]:
        """Weighted training losses ``class``, ``focal``, ``dice`` and their sum ``total``, scalars; CLIP has no part.

        Args:
            images: [B, 3, H, W], normalised.
            target: integer labels [B, H, W] of the whole vocabulary, or ``ignore_index``.
            vocabulary: all classes, or their text vectors [C, D].
            seen: the classes whose labels may be used; all (fully supervised) if omitted.
            transductive: not here.
            focal, dice: weights; published: 20 and 1.

        Raises:
            ValueError: seen classes that are not in the vocabulary, labels out of range, a transductive setting.
        """
        if transductive:
            raise ValueError(f"{type(self).__name__} has no transductive training here; train it inductively")
        text, names = self.training_text(vocabulary)
        indices = list(range(len(text))) if seen is None else class_indices(seen, names)
        target = inductive_target(target, indices, len(text), ignore_index)
        found = self.maskformer(images.to(text.dtype))
        logits = self.compare(found.embeddings, text[indices])
        return matched_losses(logits, found.masks, target, ignore_index=ignore_index, focal=focal, dice=dice)

    def seen_indices(self, names: Sequence[str]) -> list[int] | None:
        """Where the seen classes are among ``names``; None if the model was not told any.

        Seen names that are not among them are left out: a vocabulary need not hold the classes of the training.

        Raises:
            ValueError: an index is too large, a class is given twice.
        """
        if self.seen is None:
            return None
        here = {" ".join(str(name).casefold().split()) for name in names}
        seen = [s for s in self.seen if not isinstance(s, str) or " ".join(s.casefold().split()) in here]
        return class_indices(seen, names) if seen else []

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        raise WeightsError(
            f"{path}: {cls.__name__} reads only what save_pretrained wrote, by its folder or hub id; the published "
            "checkpoints, of detectron2, are not read"
        )


def _boxes(inside: Tensor) -> Tensor:
    """The smallest boxes around bool [K, h, w], each with a cell in it: x0, y0, x1, y1 [K, 4] in cells, fp32."""
    ends = []
    for along in (inside.any(1), inside.any(2)):  # columns [K, w], rows [K, h]
        along = along.int()
        ends.append((along.argmax(1), along.shape[1] - along.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float()
