"""SZN: pixels embedded among word vectors, and a second head that says where the unseen classes are.

Source: Doshi, "Zero-Shot Semantic Segmentation" (Princeton thesis), 2018, and its code. An FCN-32s gives each pixel
p a vector v_p in the space of the class vectors s_c, and a score for being of a seen class::

    stage 1, "embedding":   minimise the mean over p of 1 - cos(v_p, s_y(p))   or   |v_p - s_y(p)|^2
    stage 2, "seenmask":    all else frozen: cross-entropy of m_p [2] with "y(p) is seen"
    label of p:             argmax of cos(v_p, s_c) over the seen classes if m_p says seen, else over the unseen ones

Any class vectors will do: an array (word vectors are not shipped) or CLIP's text tower. In the thesis: 20 principal
components of word2vec's vectors, divided by their largest norm.

What the published code gets wrong is right here; a switch brings each slip back:

- ``broadcast_norm``: |v| is [B, H, W] where [B, 1, H, W] was meant, so that the cosine loss is wrong for any batch but
  one (and refused by torch unless there are as many images as channels).
- ``ignored_as_unseen``: ignored pixels are trained as unseen ones in stage 2.
- ``zero_rows``: classes that cannot be chosen stay in the running with a similarity of 0, and win where all others
  are negative.

Left out: stage 1 takes only images without a pixel of other classes; here such pixels are ignored instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastzs import clip as clip_module
from fastzs.clip import WeightsError
from fastzs.decoders.fcn import CONVOLUTIONS, FCN, OFFSET, STRIDE, bilinear_kernel, upscore
from fastzs.losses import pixel_cross_entropy
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, Labels
from fastzs.models.trained import OWN, TrainedModel
from fastzs.ops import pixel_text_logits
from fastzs.registry import register
from fastzs.trace import span, traced

CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)  # RGB; the published code's images are BGR
OUT = 4.0  # taken from the cosines of the classes that cannot be chosen: more than they differ by


@dataclass(frozen=True)
class SZNFeatures(Features):
    """What both heads see, at a 32nd of the image's size."""

    coarse: Tensor  # v before it is enlarged, [B, D, h, w]
    coarse_mask: Tensor  # m before it is enlarged, [B, 2, h, w]
    size: Tensor  # int64 [B, 2], height and width of the images, which all are of one size

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.size[0].tolist()
        return height, width


@register(
    "szn",
    paper="SZN (Doshi, Princeton 2018)",
    does="a VGG-16 once, cosines per pixel, a second head that chooses between seen and unseen classes",
    trained="an FCN-32s (VGG-16), then its seenmask head",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth.tar, {OWN}",
)
class SZN(TrainedModel):
    """SZN for images of any size and class vectors of any number and width.

    Args:
        backbone, weights: the CLIP of the class vectors where names are given and no array, see
            :func:`fastzs.clip.load`.
        text_dim: width D of the class vectors, if it should not be looked up in ``backbone``; published: 20.
        pretrained: start from torchvision's VGG-16. Omitted: unless ``weights="random"``.
        widths, hidden: sizes of the VGG, see :class:`fastzs.decoders.fcn.FCN`.
        seen: the classes whose labels may be used in training.
        train_unseen: those of them that are held out in stage 1, and stand for the unseen classes in stage 2.
        stage: what is trained: all but the second head, "embedding", or nothing but it, "seenmask".
        loss: of stage 1, "cosine" or "mse".
        crop: window side; published, and if omitted: the whole image.
        normalization: what images are normalised with: "imagenet", or "caffe" as published (a mean, no deviation).
        broadcast_norm, ignored_as_unseen, zero_rows: slips of the published code, see the module's text.
        calibration: taken from the seen classes' cosines in testing; published: 0.

    Raises:
        ValueError: an unknown stage, loss or normalization.
    """

    activation = "none"  # the output is made of cosines
    default_templates = "raw"
    opaque = ("numpy",)
    class_options = ("train_unseen",)

    def __init__(
        self,
        backbone: str = "ViT-B-32",
        weights: str = "openai",
        *,
        text_dim: int | None = None,
        pretrained: bool | None = None,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        hidden: int = 4096,
        seen: Sequence[str] | Sequence[int] | None = None,
        train_unseen: Sequence[str] | Sequence[int] = (),
        stage: Literal["embedding", "seenmask"] = "embedding",
        loss: Literal["cosine", "mse"] = "cosine",
        crop: int | None = None,
        normalization: Literal["imagenet", "caffe"] = "imagenet",
        broadcast_norm: bool = False,
        ignored_as_unseen: bool = False,
        zero_rows: bool = False,
        calibration: float = 0.0,
    ):
        for what, value, known in (
            ("stage", stage, ("embedding", "seenmask")),
            ("loss", loss, ("cosine", "mse")),
            ("normalization", normalization, ("imagenet", "caffe")),
        ):
            if value not in known:
                raise ValueError(f"SZN: {what} must be {' or '.join(known)}, got {value!r}")
        clip = None
        if text_dim is None:
            clip = clip_module.load(backbone, weights)
            text_dim = clip.embed_dim
        super().__init__(
            backbone=backbone, weights=weights, clip=clip, text_dim=text_dim, seen=seen, calibration=calibration
        )
        self.fcn = FCN(widths, hidden)
        if str(weights) != "random" if pretrained is None else pretrained:
            self.fcn.start_from(_vgg())
        self.score_fr = nn.Conv2d(hidden, text_dim, 1)
        self.seenmask_score = nn.Conv2d(hidden, 2, 1)
        self.seenmask_upscore = nn.ConvTranspose2d(2, 2, 2 * STRIDE, stride=STRIDE, bias=False)
        with torch.no_grad():
            self.seenmask_upscore.weight.copy_(torch.eye(2)[:, :, None, None] * bilinear_kernel())
        self.train_unseen = list(train_unseen)
        self.loss = loss
        self.broadcast_norm, self.ignored_as_unseen, self.zero_rows = broadcast_norm, ignored_as_unseen, zero_rows
        if normalization == "imagenet":
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        else:
            self.mean, self.std = CAFFE_MEAN, (1 / 255,) * 3
        self.crop = self.short_side = crop
        self.stride = None if crop is None else max(1, crop * 2 // 3)
        self.settings.update(
            text_dim=text_dim,
            pretrained=False,
            widths=list(widths),
            hidden=hidden,
            train_unseen=self.train_unseen,
            loss=loss,
            crop=crop,
            normalization=normalization,
            broadcast_norm=broadcast_norm,
            ignored_as_unseen=ignored_as_unseen,
            zero_rows=zero_rows,
        )
        self.stage = stage

    @property
    def stage(self) -> Literal["embedding", "seenmask"]:
        """What is trained; setting it chooses the parameters that get gradients."""
        return self._stage

    @stage.setter
    def stage(self, stage: Literal["embedding", "seenmask"]) -> None:
        self._stage: Literal["embedding", "seenmask"] = stage
        self.settings["stage"] = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("seenmask_") == (stage == "seenmask"))

    def encode(self, images: Tensor) -> SZNFeatures:
        with span("model.tower"):
            features = self.fcn(images.to(self.score_fr.weight.dtype))
        with span("model.decoder"):
            size = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
            return SZNFeatures(self.score_fr(features), self.seenmask_score(features), size)

    @traced("model.decoder")
    def embedded(self, features: SZNFeatures) -> Tensor:
        """v at the size of the images, [B, D, H, W]."""
        return upscore(features.coarse, features.image_size)

    @traced("model.decoder")
    def seenmask(self, features: SZNFeatures) -> Tensor:
        """The scores of unseen and seen at the size of the images, m [B, 2, H, W]."""
        height, width = features.image_size
        mask = self.seenmask_upscore(features.coarse_mask)
        return mask[:, :, OFFSET : OFFSET + height, OFFSET : OFFSET + width]

    def score(self, features: SZNFeatures, text: Tensor) -> Tensor:
        """Cosines at the size of the images: which classes can be chosen is decided pixel by pixel."""
        return self.cosines(self.embedded(features), text)

    def finish(
        self, features: SZNFeatures, logits: Tensor, seen: Tensor | None = None, *, truth: Tensor | None = None
    ) -> Tensor:
        """Cosines [B, C, H, W] with those of the classes that cannot be chosen lowered below all others.

        Args:
            features: from :meth:`encode`.
            logits: cosines [B, C, H, W].
            seen: bool [C]; all classes can be chosen everywhere if omitted.
            truth: labels [B, H, W] that take the place of the second head: a perfect seenmask (ignored pixels count
                as seen).
        """
        if seen is None:
            return logits
        seen = seen.to(logits.device)
        if truth is None:
            pixels = self.seenmask(features).argmax(1) == 1
        else:
            pixels = ~torch.isin(truth.to(logits.device), (~seen).nonzero().flatten())
        return self.restrict(logits, seen, pixels)

    @staticmethod
    def cosines(embedded: Tensor, text: Tensor) -> Tensor:
        """cos(v_p, s_c): [B, D, H, W], [C, D] -> [B, C, H, W], fp32 at least."""
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        return pixel_text_logits(embedded, F.normalize(text.to(embedded), dim=1))

    def restrict(self, scores: Tensor, is_seen: Tensor, seen_pixels: Tensor) -> Tensor:
        """Put out of the running, at each pixel, the classes of the other kind.

        Args:
            scores: cosines [B, C, H, W].
            is_seen: bool [C].
            seen_pixels: bool [B, H, W].
        """
        out = is_seen[:, None, None] != seen_pixels[:, None]  # [B, C, H, W]
        return scores.masked_fill(out, 0.0) if self.zero_rows else scores - OUT * out

    def loss_parts(
        self, images: Tensor, labels: Labels, text: Tensor, *, train_unseen: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """The loss of the present ``stage``, under its name.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B, H, W].
            text: the classes' vectors [C, D].
            train_unseen: indices of the classes that stage 1 holds out, and that stand for the unseen ones in stage 2.

        Raises:
            ValueError: labels of another size than the images, or in stage 2 no class that stands for the unseen ones.
        """
        target, ignore_index = labels.target.long(), labels.ignore_index
        if target.shape[1:] != images.shape[2:]:
            raise ValueError(
                f"SZN: expected labels and images of one size, got labels {list(target.shape)} and images "
                f"{list(images.shape)}"
            )
        held_out = [row for row, index in enumerate(labels.classes) if index in set(train_unseen)]
        is_held_out = torch.isin(target, torch.tensor(held_out, dtype=torch.int64, device=target.device))
        features = self.encode(images)
        if self.stage == "embedding":
            usable = target.masked_fill(is_held_out, ignore_index)
            embedded = self.embedded(features)
            if self.loss == "cosine":
                loss = cosine_loss(embedded, text, usable, ignore_index, broadcast_norm=self.broadcast_norm)
            else:
                loss = mse_loss(embedded, text, usable, ignore_index)
            return {self.loss: loss}
        if not held_out:
            raise ValueError(
                "SZN: stage 'seenmask' needs labelled classes in place of the unseen ones: pass train_unseen=[...]"
            )
        ignored = target == ignore_index
        is_seen = (~ignored & ~is_held_out).long()
        if not self.ignored_as_unseen:
            is_seen = is_seen.masked_fill(ignored, ignore_index)
        return {"seenmask": pixel_cross_entropy(self.seenmask(features), is_seen, ignore_index)}

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> "SZN":
        """Read a published checkpoint, or a safetensors file of this model.

        Published weights want images as BGR; the first convolution is turned so that here too they are RGB.
        Which classes are seen is not in a checkpoint: give ``seen`` and ``train_unseen``.

        Raises:
            WeightsError: see :meth:`TrainedModel.from_checkpoint`; or an enlargement that was trained, which is fixed
                here.
        """
        return super().from_checkpoint(path, **options)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if not any(name.removeprefix("fcn.") == "conv1_1.weight" for name in state) or "score_fr.weight" not in state:
            some = ", ".join(list(state)[:3])
            raise WeightsError(f"{path}: not an SZN checkpoint (no 'conv1_1' and 'score_fr' in it; it holds {some})")
        kernel = state.get("upscore.weight")
        if kernel is not None:
            wanted = torch.eye(len(kernel))[:, :, None, None] * bilinear_kernel()
            if kernel.shape != wanted.shape or not torch.allclose(kernel.float(), wanted, atol=1e-6):
                raise WeightsError(f"{path}: upscore.weight is not bilinear interpolation, which it is here")

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in state.items():
            if name == "conv1_1.weight":
                tensor = tensor.flip(1)
            if name != "upscore.weight":
                out[f"fcn.{name}" if name.startswith(("conv", "fc")) and not name.startswith("fcn.") else name] = tensor
        return out

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "weights": "openai",
            "backbone": "",
            "text_dim": len(state["score_fr.weight"]),
            "pretrained": False,
            "widths": [len(state[f"fcn.conv{stage}_1.weight"]) for stage in range(1, len(CONVOLUTIONS) + 1)],
            "hidden": len(state["fcn.fc6.weight"]),
            "normalization": "caffe",
        } | options


@traced("train.loss")
def cosine_loss(
    embedded: Tensor, text: Tensor, target: Tensor, ignore_index: int = 255, *, broadcast_norm: bool = False
) -> Tensor:
    """Mean over the labelled pixels of 1 - cos(v_p, s_y(p)); 0 if there are none.

    Args:
        embedded: v [B, D, H, W].
        text: s [C, D].
        target: integer labels [B, H, W], in [0, C) or ``ignore_index``.
        broadcast_norm: divide by |v| as the published code does, see the module's text.

    Raises:
        RuntimeError: ``broadcast_norm`` with other than one image, or as many as channels.
    """
    labelled = target != ignore_index
    wanted = text[target.long().masked_fill(~labelled, 0)].movedim(-1, 1)  # [B, D, H, W]
    if broadcast_norm:
        cosine = (embedded / embedded.norm(dim=1) * F.normalize(wanted, dim=1)).sum(1)
    else:
        cosine = F.cosine_similarity(embedded, wanted, dim=1)
    return _mean(1 - cosine, labelled)


@traced("train.loss")
def mse_loss(embedded: Tensor, text: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the labelled pixels of |v_p - s_y(p)|^2; 0 if there are none. Arguments as of :func:`cosine_loss`."""
    labelled = target != ignore_index
    wanted = text[target.long().masked_fill(~labelled, 0)].movedim(-1, 1)
    return _mean((embedded - wanted).square().sum(1), labelled)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, 0).sum() / where.sum().clamp(min=1)


def _vgg() -> nn.Module:
    try:
        return torchvision.models.vgg16(weights="IMAGENET1K_V1")
    except Exception as error:
        raise WeightsError(
            f"SZN: VGG-16's weights could not be fetched ({type(error).__name__}); give pretrained=False to start at "
            "random"
        ) from error
