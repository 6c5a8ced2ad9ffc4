"""What the systems before CLIP share: a dilated ResNet, and classes that are known by word vectors of any width."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs import clip as clip_module
from fastzs.clip.state import read_state
from fastzs.decoders.multi_scale import nearest_labels
from fastzs.decoders.resnet import DilatedResNet, Form
from fastzs.losses import inductive_target
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD
from fastzs.models.trained import TrainedModel

# RGB, on the 0 to 1 scale; the published images are BGR from 0 to 255 minus this mean
CAFFE_MEAN, CAFFE_STD = (122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255,) * 3


class WordModel(TrainedModel):
    """A network over a dilated ResNet.

    Args:
        backbone, weights: the CLIP of the word vectors where names are given and no array, see
            :func:`fastzs.clip.load`.
        text_dim: width D of the word vectors, if it should not be looked up in ``backbone``.
        resnet, width, form, frozen: see :class:`fastzs.decoders.resnet.DilatedResNet`. Frozen norms are right for
            pretrained weights, not for a network that starts at random.
        pretrained: file of a ResNet that was trained for classification, whose weights the network starts from: with
            torchvision's names, or with Caffe's as SPNet's code has them. Images are normalised as ``form`` says.
        crop: side of training images, and the shorter side of those in testing, which are taken whole.
        seen, calibration: the training classes, and what is taken from their scores in testing.
    """

    default_templates = "raw"
    opaque = ("numpy",)
    settled: ClassVar[tuple[str, ...]] = ()  # options of the base that a subclass gives itself

    def __init_subclass__(cls, **options: Any):
        """Subclasses hand options on; the class's signature lists them all, for those who check names against it."""
        super().__init_subclass__(**options)
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        names = {p.name for p in own} | set(cls.settled)
        base = [p for p in inspect.signature(cls.__base__).parameters.values() if p.name not in names]  # type: ignore[arg-type]
        cls.__signature__ = inspect.Signature([*own, *(p for p in base if p.kind is p.KEYWORD_ONLY)])  # type: ignore[attr-defined]

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        text_dim: int | None = None,
        resnet: str | Sequence[int] = "resnet101",
        width: int = 64,
        form: Form = "caffe",
        frozen: bool = True,
        pretrained: str | Path | None = None,
        crop: int = 321,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
    ):
        clip = None
        if text_dim is None:
            clip = clip_module.load(backbone, weights)
            text_dim = clip.embed_dim
        super().__init__(
            backbone=backbone,
            weights=weights,
            clip=clip,
            text_dim=text_dim,
            seen=seen,
            calibration=calibration,
        )
        caffe = form == "caffe"
        self.network = DilatedResNet(
            resnet,
            width,
            form=form,
            frozen=frozen,
            output_stride=8 if caffe else 16,
            multi_grid=(1,) if caffe else (1, 2, 4),
        )
        if pretrained is not None:
            place = Path(pretrained).expanduser()
            self.network.start_from(read_state(place), str(place))
        self.form: Form = form
        self.mean, self.std = (CAFFE_MEAN, CAFFE_STD) if caffe else (IMAGENET_MEAN, IMAGENET_STD)
        self.short_side, self.crop, self.stride = crop, None, None
        self.settings.update(
            text_dim=self.text_dim,
            resnet=resnet if isinstance(resnet, str) else list(resnet),
            width=width,
            form=form,
            frozen=frozen,
            pretrained=None,  # a saved model has weights of its own
            crop=crop,
        )

    def as_trained(self, images: Tensor) -> Tensor:
        """Normalised images in the network's dtype and order of colours."""
        images = images.to(self.network.conv1.weight.dtype)
        return images.flip(1) if self.form == "caffe" else images

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors by the names here; files of old versions do not count batches."""
        used = cls._renamed(state)
        for name in [name for name in used if name.endswith("running_mean")]:
            used.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
        return used

    @classmethod
    def _renamed(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class FixedClasses(WordModel):
    """A :class:`WordModel` with a classifier: its classes are those it was trained for, unseen ones among them.

    Args:
        classes: their names, or how many.
        backbone, weights, options: see :class:`WordModel`.
    """

    def __init__(self, classes: Sequence[str] | int, backbone: str, weights: str, **options: Any):
        super().__init__(backbone, weights, **options)
        named = not isinstance(classes, int)
        self.classes = len(classes) if named else classes
        self.fixed_classes = list(classes) if named else None
        self.settings.update(classes=self.fixed_classes or self.classes)

    def check_classes(self, text: Tensor) -> None:
        """See that there are as many text vectors as classes.

        Raises:
            ValueError: there are not.
        """
        if len(text) != self.classes:
            raise ValueError(
                f"{type(self).__name__}: its {self.classes} classes were fixed in training, got {len(text)} text "
                "vectors; give one for each, in the order of the training"
            )

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        *,
        seen: Sequence[int] | None = None,
        transductive: bool | Literal["honest"] = False,
        ignore_index: int = 255,
        **options: Any,
    ) -> dict[str, Tensor]:
        text = self.prepare_text(text)
        self.check_classes(text)
        if transductive:
            raise ValueError(
                f"{type(self).__name__} has no transductive training; use the trainer's self-training with 'inductive'"
            )
        everything = range(len(text))
        target = inductive_target(target, everything, len(text), ignore_index)  # refuses what is out of range
        out = self.parts(images, target, text, list(everything if seen is None else seen), ignore_index, **options)
        return out | {"total": torch.stack(list(out.values())).sum()}

    def parts(
        self, images: Tensor, target: Tensor, text: Tensor, seen: Sequence[int], ignore_index: int, **options: Any
    ) -> dict[str, Tensor]:
        """The weighted losses by name.

        Args:
            target: int64 [B, H, W] of all classes.
            text: word vectors [C, E] of all classes.
            seen: indices of the classes whose labels may be used.
            options: ``self_labelled``: labels of other classes in the target were given by a teacher and are used.
        """
        raise NotImplementedError


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_loss(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits [B, C, h, w] and the nearest of the labels [B, H, W]; 0 without a labelled pixel.

    Args:
        pixel_weights: [B, H, W]; the mean is the weighted one.
        class_weights: [C], likewise.
        eps: added to the sum of weights.
    """
    logits, target = wide(logits), nearest_labels(target, logits.shape[2:])
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    labelled = target != ignore_index
    weights = labelled.to(losses.dtype)
    if pixel_weights is not None:
        weights = weights * nearest_labels(pixel_weights, logits.shape[2:])
    if class_weights is not None:
        weights = weights * class_weights.to(weights)[target.masked_fill(~labelled, 0)]
    total = weights.sum() + eps
    return (losses * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
