"""MaskCLIP+: a segmentation network taught by MaskCLIP's labels, then by its own, with the text as its classifier.

Source: Zhou, Loy, Dai, "Extract Free Dense Labels from CLIP", ECCV 2022, section 3.3, and its code. A network that
knows nothing of CLIP (DeepLabV2 or V3+ on a ResNet, or any other; here also a copy of the teacher's tower with a DPT)
gives features f_p [B, D, h, w]; their products with the text vectors are the logits, and cross-entropy trains the
network::

    logits(c, p) = f_p . t_c                                            [B, C, h, w]
    unlabelled pixels:  y(p) = argmax over the unlabelled classes c of
        the first steps ("guided"):  MaskCLIP's cos(v_p, t_c), refined as it is set
        then (self-training):        f_p . t_c

Zero-shot (transductive): the pixels of unseen classes are the unlabelled ones; as published, the labels tell which
pixels these are ("honest" training does not look: there, ignored pixels count as unlabelled, too). Annotation-free: all
pixels are, and guidance lasts. A background class, which has no name CLIP knows, can have a vector that is learnt.

What the published code gets wrong is right here: a confidence threshold also struck labelled pixels
(``threshold_on_all`` brings that back); which classes CLIP is trusted on where both phases overlap was never defined
(``trust_clip``); distillation, an L1 distance to CLIP's unit features, reached no weights, as the network's features
were detached.

Left out: the published ResNet's deep stem (v1c), and so the published checkpoints; SyncBN (torchrun's conversion can
be applied to any model); distillation at the labels' resolution (it is at the features').
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs import clip as clip_module
from fastzs.clip import Clip, WeightsError
from fastzs.decoders import scores
from fastzs.decoders.deeplab import DeepLab
from fastzs.losses import inductive_target, pixel_cross_entropy
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, Labels
from fastzs.models.clip_student import ClipStudent
from fastzs.models.maskclip import LOGIT_SCALE, MaskCLIP
from fastzs.models.trained import OWN, TrainedModel
from fastzs.ops import label_map
from fastzs.registry import register
from fastzs.trace import traced

UNLABELLED = -1


class PseudoLabels(NamedTuple):
    """Labels to train on, before those still unlabelled are ignored."""

    own: Tensor | None  # int64 [B, H, W], by the network itself
    clip: Tensor | None  # by MaskCLIP
    merged: Tensor


@dataclass(frozen=True)
class NetworkFeatures(Features):
    """The network's features in the text space."""

    maps: Tensor  # [B, D, h, w], not normalised

    @property
    def dense(self) -> Tensor:
        """[B, D, h, w], unit length, fp32 at least."""
        return F.normalize(self.maps.to(torch.promote_types(self.maps.dtype, torch.float32)), dim=1)


@register(
    "maskclip_plus",
    paper="MaskCLIP+ (Zhou et al., ECCV 2022)",
    does="a ResNet or another network once, products with the text; no CLIP beside it",
    trained="a DeepLabV2 or V3+ (ResNet), a DPT on CLIP's tower, or any network",
    needs="masks of the seen classes and where the unseen are, or no masks; MaskCLIP as its teacher",
    checkpoints=OWN,
)
class MaskCLIPPlus(TrainedModel):
    """MaskCLIP+ for images of any size and any vocabulary.

    Args:
        backbone, weights: the CLIP that teaches and whose text vectors are the classifier; see
            :func:`fastzs.clip.load`. Published: RN50 and ViT-B-16.
        network: "deeplabv2", "deeplabv3+", "dpt" (a copy of the teacher's vision transformer, which is trained, with a
            DPT decoder) or a module of your own, [B, 3, H, W] -> features [B, D, h, w] (give it again to
            :meth:`from_pretrained`).
        resnet: of the first two: resnet50, resnet101 (published) or resnet152.
        pretrained: start from torchvision's ImageNet weights, "dpt" from the teacher's. Omitted: unless
            ``weights="random"``.
        dpt: of "dpt", its decoder's sizes by name, ``reassemble`` and ``features``; see
            :class:`fastzs.models.clip_student.ClipStudent`.
        sizes: of "dpt", its tower's sizes, to build it without weights, as :meth:`from_pretrained` does.
        text_dim: width D of the text vectors, if it should not be looked up in ``backbone``.
        normalization: mean and deviation that images are normalised with; the teacher's if omitted.
        annotation_free: take no pixel's label.
        guided_steps: training steps in which MaskCLIP labels; ``None``: all. Published: 1999 (VOC), 3999 (Context) or
            7999 (COCO-Stuff), a tenth of the training.
        own_from: training step from which the network's own labels are taken; when guidance ends if omitted.
        trust_clip: classes on which MaskCLIP is believed against the network where both label.
        background: name of a class whose text vector is learnt. Pixels
            that the network calls so are not MaskCLIP's to label.
        confidence: labels whose score (cosine, smoothed probability or logit) is below it are ignored; 0: none.
        threshold_on_all: let it strike labelled pixels, too, see the module's text.
        smoothing, smoothing_threshold, denoising: of the teacher, see :class:`fastzs.models.MaskCLIP`.
        distill: weight of the distillation of CLIP's features; then pseudo labels are not used, as published.
        crop: window side in training; images are tested whole, with a shorter side of ``crop``.
        seen, calibration: the training classes, and what is taken from their probabilities in testing; published: 0.
    """

    activation = "softmax"
    default_templates = "maskclip85"
    class_options = ("trust_clip", "background")
    transductive = True
    _iter_counter: Tensor

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        network: str | nn.Module | None = "deeplabv2",
        resnet: str = "resnet101",
        pretrained: bool | None = None,
        dpt: Mapping[str, Any] | None = None,
        sizes: Mapping[str, Any] | None = None,
        text_dim: int | None = None,
        normalization: Sequence[Sequence[float]] | None = None,
        annotation_free: bool = False,
        guided_steps: int | None = 1999,
        own_from: int | None = None,
        trust_clip: Sequence[str] | Sequence[int] = (),
        background: str | None = None,
        confidence: float = 0.0,
        threshold_on_all: bool = False,
        smoothing: Literal["paper", "official"] | None = None,
        smoothing_threshold: float = 1.0,
        denoising: float | None = None,
        distill: float = 0.0,
        crop: int = 512,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
    ):
        clip = None
        if text_dim is None or normalization is None or (network == "dpt" and sizes is None):
            clip = clip_module.load(backbone, weights)
            text_dim = text_dim or clip.embed_dim
            normalization = normalization or _normalization(clip)
        if network is None:
            raise ValueError("MaskCLIP+: this one was saved with a network of its own; give it: network=...")
        if confidence < 0 or distill < 0:
            raise ValueError(f"MaskCLIP+: confidence={confidence} and distill={distill} must not be negative")
        super().__init__(
            backbone=backbone, weights=weights, clip=clip, text_dim=text_dim, seen=seen, calibration=calibration
        )
        start = str(weights) != "random" if pretrained is None else pretrained
        self.network: nn.Module
        if network == "dpt":
            self.network = ClipStudent("MaskCLIP+", clip, sizes, start, text_dim, **(dpt or {}))
            sizes = dict(self.network.sizes)
        elif isinstance(network, str):
            self.network = _deeplab(text_dim, resnet, network, start)
        else:
            self.network = network
        self.background = self.learned_class = background
        self.bg_embeddings = nn.Parameter(torch.randn(1, text_dim)) if background is not None else None
        self.register_buffer("_iter_counter", torch.zeros((), dtype=torch.int64))
        self.annotation_free, self.guided_steps, self.own_from = annotation_free, guided_steps, own_from
        self.trust_clip, self.confidence, self.threshold_on_all = list(trust_clip), confidence, threshold_on_all
        self.teaching: dict[str, Any] = {
            "smoothing": smoothing,
            "smoothing_threshold": smoothing_threshold,
            "denoising": denoising,
        }
        self.distill = distill
        self._teacher: list[MaskCLIP] = []  # in a list, since it is no part of the network
        self.mean, self.std = (tuple(values) for values in normalization)
        self.short_side, self.crop, self.stride = crop, crop, None
        self.settings.update(
            network=network if isinstance(network, str) else None,
            resnet=resnet,
            pretrained=False,
            dpt=dict(dpt or {}),
            sizes=sizes,
            text_dim=text_dim,
            normalization=[list(self.mean), list(self.std)],
            annotation_free=annotation_free,
            guided_steps=guided_steps,
            own_from=own_from,
            trust_clip=self.trust_clip,
            background=background,
            confidence=confidence,
            threshold_on_all=threshold_on_all,
            distill=distill,
            crop=crop,
            **self.teaching,
        )

    @property
    def teacher(self) -> MaskCLIP:
        """The frozen MaskCLIP, on the network's device; built when it is first needed."""
        if not self._teacher:
            self._teacher.append(MaskCLIP(self.clip, **self.teaching).eval())
        return self._teacher[0].to(next(self.parameters()))

    @traced("model.tower")
    def encode(self, images: Tensor) -> NetworkFeatures:
        return NetworkFeatures(self.network(images.to(next(self.parameters()).dtype)))

    def learned_vector(self) -> Tensor:
        assert self.bg_embeddings is not None
        return F.normalize(self.bg_embeddings, dim=1)

    def classifier(self, text: Tensor, background: int | None) -> Tensor:
        """Text vectors [C, D] with the learned one in the row of the background."""
        if background is None or self.bg_embeddings is None:
            return text
        row = torch.arange(len(text), device=text.device)[:, None] == background
        return torch.where(row, self.learned_vector().to(text), text)

    def score(self, features: NetworkFeatures, text: Tensor) -> Tensor:
        return self.logits(features.maps, text)

    @staticmethod
    def logits(features: Tensor, text: Tensor) -> Tensor:
        """Products [B, C, h, w], fp32 at least, of features [B, D, h, w], not normalised, and text vectors [C, D]."""
        patches = features.flatten(2).transpose(1, 2)  # [B, h * w, D]
        return scores(text[None], patches).unflatten(2, (features.shape[2], features.shape[3]))

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        *,
        seen: Sequence[int] | None = None,
        transductive: bool | Literal["honest"] = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        """As of every system; ``annotation_free`` training takes no label, so nothing is seen."""
        if self.annotation_free:
            seen, transductive = None, False
        return super().losses(images, target, text, seen=seen, transductive=transductive, **options)

    def loss_parts(
        self,
        images: Tensor,
        labels: Labels,
        text: Tensor,
        *,
        trust_clip: Sequence[int] = (),
        background: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """``cross_entropy``, and with distillation ``distillation``. Counts the training steps.

        The cross-entropy is the mean over all pixels, ignored ones included, as published.

        Args:
            images: [B, 3, H, W], normalised.
            labels: in the transductive settings, the teacher or the network labels pixels without a seen label.
            text: text vectors [C, D].
            trust_clip: indices of the classes on which MaskCLIP is believed against the network where both label.
            background: index of the class whose vector is learned, if the vocabulary has it.
        """
        row = next((row for row, index in enumerate(labels.classes) if index in background), None)
        text = self.classifier(text, row)
        target, unlabelled = self._unlabelled(labels)
        features = self.encode(images)
        logits = self.logits(features.maps, text)
        if unlabelled and not self.distill:
            target = self.label(target, images, features.maps, text, unlabelled, row, trust_clip).merged
        if self.training:
            self._iter_counter += 1
        kept = (target != labels.ignore_index) if self.distill else None
        target = target.masked_fill(target == UNLABELLED, labels.ignore_index)
        out = {"cross_entropy": pixel_cross_entropy(logits, target, labels.ignore_index, over_all=True)}
        if kept is not None:
            out["distillation"] = self.distill * self.distillation(features.maps, images, kept)
        return out

    def _unlabelled(self, labels: Labels) -> tuple[Tensor, list[int]]:
        """Labels to train on, some UNLABELLED, and the classes these may be of."""
        target, ignore_index = labels.target.long(), labels.ignore_index
        ignored = target == ignore_index
        if self.annotation_free:
            return target.masked_fill(~ignored, UNLABELLED), list(labels.classes)
        if labels.seen is None:
            return target, []
        unlabelled = sorted(set(labels.classes) - set(labels.seen))
        if not unlabelled:
            raise ValueError("MaskCLIP+: every class is seen; leave out `seen` to train on all labels")
        hidden = inductive_target(target, labels.seen, len(labels.classes), ignore_index) == ignore_index
        return target.masked_fill(hidden if labels.honest else hidden & ~ignored, UNLABELLED), unlabelled

    @torch.no_grad()
    def label(
        self,
        labels: Tensor,
        images: Tensor,
        features: Tensor,
        text: Tensor,
        unlabelled: Sequence[int],
        background: int | None,
        trust_clip: Sequence[int] = (),
    ) -> PseudoLabels:
        """Label what is UNLABELLED, by whom the present step has it.

        Args:
            labels: int64 [B, H, W].
            images: [B, 3, H, W], for the teacher.
            features: the network's, [B, D, h, w].
            text: [C, D].
            unlabelled: the classes to choose from; the teacher does not choose ``background``.
            trust_clip: classes on which the teacher is believed where both label.
        """
        step = int(self._iter_counter)
        guided = self.guided_steps is None or step < self.guided_steps
        begin = self.guided_steps if self.own_from is None else self.own_from
        own = clip = None
        if not unlabelled or not (labels < 0).any():
            return PseudoLabels(own, clip, labels)
        if begin is not None and step >= begin:
            choices = list(unlabelled)
            own = self.assign(labels, self.logits(features, text[choices]), choices)
        if guided:
            choices = [c for c in unlabelled if c != background]
            left = labels if own is None or background is None else labels.masked_fill(own == background, background)
            clip = self.assign(left, self.taught(images, text[choices]), choices) if choices else left
        if own is None or clip is None:
            found = clip if own is None else own
            return PseudoLabels(own, clip, labels if found is None else found)
        trusted = torch.tensor(list(trust_clip), dtype=torch.int64, device=labels.device)
        return PseudoLabels(own, clip, torch.where(torch.isin(clip, trusted), clip, own))

    def taught(self, images: Tensor, text: Tensor) -> Tensor:
        """The teacher's cosines, or with smoothing its probabilities, [B, C, h, w]."""
        teacher = self.teacher
        refined = teacher(images, text)
        return refined if teacher.smoothing else refined / LOGIT_SCALE

    def assign(self, labels: Tensor, scores: Tensor, classes: Sequence[int]) -> Tensor:
        """Unlabelled pixels get the best of ``classes``, whose scores are [B, len(classes), h, w]; int64 [B, H, W].

        Those less sure than ``confidence`` stay UNLABELLED (with ``threshold_on_all`` labelled ones become so).
        """
        size = (labels.shape[1], labels.shape[2])
        mapped = [
            label_map(picture[None], [[0, 0, *size]], size, activation="none", return_scores=self.confidence > 0)
            for picture in scores
        ]
        best = torch.tensor(list(classes), device=labels.device)[torch.stack([m.labels for m in mapped]).long()]
        out = torch.where(labels < 0, best, labels)
        if self.confidence > 0:
            unsure = torch.stack([m.scores for m in mapped if m.scores is not None]) < self.confidence
            out = out.masked_fill(unsure if self.threshold_on_all else unsure & (labels < 0), UNLABELLED)
        return out

    def distillation(self, features: Tensor, images: Tensor, kept: Tensor) -> Tensor:
        """Mean L1 distance to CLIP's unit features over the pixels ``kept``, bool [B, H, W]; 0 if there are none."""
        with torch.no_grad():
            wanted = F.interpolate(self.teacher.encode(images).dense, features.shape[2:], mode="bilinear")
            where = F.interpolate(kept[:, None].to(wanted), features.shape[2:], mode="nearest")  # [B, 1, h, w]
        return (where * (features - wanted).abs()).sum() / (where.sum() * features.shape[1]).clamp(min=1)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        raise WeightsError(
            f"{path}: MaskCLIP+ is not read from single files: the published ResNet has a deep stem, which "
            "torchvision's lack; give a folder or hub id that save_pretrained or push_to_hub wrote"
        )


def _normalization(clip: Clip) -> tuple[Sequence[float], Sequence[float]]:
    """As the teacher has it, see :class:`fastzs.models.MaskCLIP`."""
    return (IMAGENET_MEAN, IMAGENET_STD) if clip.published else (clip.mean, clip.std)


def _deeplab(output_dim: int, resnet: str, head: Any, pretrained: bool) -> DeepLab:
    try:
        return DeepLab(output_dim, resnet, head, pretrained=pretrained)
    except OSError as error:
        raise WeightsError(
            f"MaskCLIP+: {resnet}'s weights could not be fetched ({type(error).__name__}); give pretrained=False to "
            "start at random"
        ) from error
