"""Joint: pixels and words meet in a common space, and a calibration gives unseen classes what is near them.

Source: Baek, Oh, Ham, "Exploiting a Joint Embedding Space for Generalized Zero-Shot Semantic Segmentation" (JoEm),
ICCV 2021, and its code. A DeepLab network f gives pixel features, one linear layer s turns word vectors w_c into
prototypes mu_c = s(w_c). Trained together::

    cross_entropy   of an auxiliary classifier on f, which testing does not use
    regression      mean of |m(p) - f(p)|^2 over labelled pixels; m is s of the words of a reduced label map, enlarged
                    again before s, so that borders mix words
    consistency     alpha KL( softmax_j(-T |w_i - w_j|) || softmax_j(-|mu_i - mu_j|) ), mean over the seen classes i

The published network is trained already when this begins. In one that starts from random weights the cross-entropy
moves the features much more than the regression does, so that they do not come near the prototypes: ``beta`` weighs
the regression, and ``level`` keeps ReLU from silencing features that are drawn to prototypes around 0.

In testing a pixel belongs to the nearest prototype, but for Apollonius calibration: where that is seen, the second
nearest is unseen and sigma d_2 < d_1 (squared distances), to the second.

Distances to prototypes are made of the maps 2 f . mu_c - |mu_c|^2, which may be enlarged after the product; only
|f|^2, which the ratio of distances needs, is taken of the enlarged features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import WeightsError
from fastzs.decoders.deeplab import PlainV3PlusHead, SumHead, from_zs3
from fastzs.decoders.multi_scale import nearest_labels
from fastzs.decoders.resnet import blocks_of, from_caffe
from fastzs.losses import pixel_cross_entropy
from fastzs.models.base import Features, Labels
from fastzs.models.trained import OWN
from fastzs.models.words import WordModel, wide
from fastzs.registry import register
from fastzs.trace import span, traced

ROWS = 64  # of the enlarged features at a time, where their norms are taken


@dataclass(frozen=True)
class JointFeatures(Features):
    """Pixel features and the size of the images they are of."""

    maps: Tensor  # f, [B, D, h, w]
    size: Tensor  # int64 [B, 2], height and width of the images, which all are of one size

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.size[0].tolist()
        return height, width


@register(
    "joint",
    paper="JoEm (Baek et al., ICCV 2021)",
    does="a DeepLabV3+, the nearest prototype of a word, calibrated",
    trained="a DeepLabV3+ (ResNet) and a layer for the words",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published fe_*.pth beside gen_*.pth, {OWN}",
)
class Joint(WordModel):
    """Joint for images of any size and word vectors of any number and width.

    Args:
        backbone, weights, options: see :class:`fastzs.models.words.WordModel`; ``form`` is "torchvision" with the head
            of DeepLabV3+ (published with ZS3's splits), or "caffe" with that of DeepLabV2 and ReLU (with SPNet's).
        features: width of the common space; published: 256, or 600 with "caffe".
        classes: outputs of the auxiliary classifier, at least the number of trained classes.
        background: a class without a part in the consistency; published: the first one, on ZS3's splits.
        sigma: of the calibration, in testing; 1 and above: none. Published: 0.5, or 0.7 with "caffe".
        ratio: of the reduced label map; published: 0.25, or 0.5 with "caffe".
        temperature: T; published: 5, on PASCAL-Context 7.
        level: value around which prototypes lie when training begins; published: 0.01. Features are never negative,
            and a channel that is drawn to negative values everywhere has no gradient any more.
    """

    activation = "none"
    class_options = ("background",)

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        form: Literal["caffe", "torchvision"] = "torchvision",
        features: int = 256,
        fine: int = 48,
        classes: int = 256,
        background: Sequence[str] | Sequence[int] = (),
        sigma: float = 0.5,
        ratio: float = 0.25,
        temperature: float = 5.0,
        dropout: Sequence[float] = (0.5, 0.5, 0.1),
        level: float = 0.01,
        **options: Any,
    ):
        super().__init__(backbone, weights, form=form, **options)
        channels = self.network.channels
        if form == "torchvision":
            self.head: nn.Module = PlainV3PlusHead(channels[-1], channels[0], features, fine, dropout=dropout)
        else:
            self.head = SumHead(channels[-1], features)
        self.classifier = nn.Conv2d(features, classes, 1)
        self.semantic = nn.Linear(self.text_dim, features)
        nn.init.xavier_uniform_(self.semantic.weight)
        nn.init.constant_(self.semantic.bias, level)
        self.background = list(background)
        self.sigma, self.ratio, self.temperature = sigma, ratio, temperature
        self.settings.update(
            features=features, fine=fine, classes=classes, background=self.background, sigma=sigma, ratio=ratio,
            temperature=temperature, dropout=list(dropout),
        )  # fmt: skip

    def features_of(self, images: Tensor) -> Tensor:
        """f, [B, D, h, w]."""
        maps = self.network(self.as_trained(images))
        return self.head(maps[-1], maps[0]) if isinstance(self.head, PlainV3PlusHead) else self.head(maps[-1]).relu()

    def encode(self, images: Tensor) -> JointFeatures:
        with span("model.tower"):
            size = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
            return JointFeatures(self.features_of(images), size)

    def score(self, features: JointFeatures, text: Tensor) -> Tensor:
        """2 f . mu_c - |mu_c|^2: the larger, the nearer."""
        with span("model.decoder"):
            prototypes = wide(self.semantic(text))
            products = torch.einsum("td,bdhw->bthw", prototypes, wide(features.maps))
            return 2 * products - prototypes.square().sum(1)[:, None, None]

    def finish(self, features: JointFeatures, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Where a seen class is nearest and the calibration prefers the second, the two change places, at full size."""
        if seen is None or self.sigma >= 1 or bool(seen.all()) or not bool(seen.any()):
            return logits
        return calibrated(features.maps, logits, seen.to(logits.device), self.sigma, features.image_size)

    def loss_parts(
        self,
        images: Tensor,
        labels: Labels,
        text: Tensor,
        *,
        background: Sequence[int] = (),
        alpha: float = 0.1,
        beta: float = 1.0,
    ) -> dict[str, Tensor]:
        """The losses ``cross_entropy``, ``regression`` and ``consistency``.

        Args:
            alpha: weight of the consistency; published: 0.1, on PASCAL-Context 0.01.
            beta: weight of the regression; published: 1.
        """
        if len(text) > self.classifier.out_channels:
            raise ValueError(
                f"Joint: {len(text)} classes are trained, but its auxiliary classifier has "
                f"{self.classifier.out_channels} outputs; make it with classes={len(text)} or more"
            )
        features = self.features_of(images)
        logits = self.classifier(features)[:, : len(text)]
        kept = [i for i, place in enumerate(labels.classes) if place not in set(background)]
        return {
            "cross_entropy": pixel_cross_entropy(logits, labels.target, labels.ignore_index, align_corners=True),
            "regression": beta
            * regression(features, labels.target, text, self.semantic, self.ratio, labels.ignore_index),
            "consistency": alpha * consistency(text[kept], self.semantic(text[kept]), self.temperature),
        }

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if not any(name in state for name in ("semantic.model.weight", "semantic.weight")):
            raise WeightsError(f"{path}: is no checkpoint of Joint; expected fe_*.pth with gen_*.pth beside it")

    @classmethod
    def _read(cls, path: Path) -> dict[str, Tensor]:
        """The tensors of a published pair: ``fe_*.pth`` (visual) and, beside it, ``gen_*.pth`` (semantic)."""
        state = super()._read(path)
        if path.name.startswith("fe_"):
            beside = path.with_name("gen_" + path.name.removeprefix("fe_"))
            if not beside.is_file():
                raise WeightsError(f"{path}: the semantic encoder's file {beside.name} must lie beside it")
            state |= {f"semantic.{name}": tensor for name, tensor in super()._read(beside).items()}
        return state

    @classmethod
    def _renamed(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "network.conv1.weight" in state:
            return dict(state)
        backbone = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
        caffe = from_caffe(backbone)
        used = {f"network.{name}": tensor for name, tensor in (caffe or backbone).items()}
        used |= {f"head.{name}": tensor for name, tensor in from_zs3(state).items()}
        for name, tensor in state.items():
            if name.startswith("aspp.c") and name[6].isdigit():
                used[f"head.convs.{name.removeprefix('aspp.c')}"] = tensor
            if (kind := name.rpartition("pred_conv.")[2]) in ("weight", "bias") and "pred_conv." in name:
                used[f"classifier.{kind}"] = tensor
            if name.startswith("semantic.model."):
                used[name.replace("semantic.model.", "semantic.")] = tensor
        return used

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        plain = "head.project.conv.weight" in state
        sizes = {
            "backbone": "",
            "text_dim": state["semantic.weight"].shape[1],
            "form": "torchvision" if plain else "caffe",
            "resnet": blocks_of(state, "network."),
            "width": len(state["network.conv1.weight"]),
            "features": len(state["semantic.weight"]),
            "classes": len(state["classifier.weight"]),
        }
        own = {"fine": len(state["head.low.conv.weight"])} if plain else {"sigma": 0.7, "ratio": 0.5}
        return sizes | own | options


def regression(
    features: Tensor, target: Tensor, text: Tensor, semantic: nn.Module, ratio: float, ignore_index: int = 255
) -> Tensor:
    """Mean of |m(p) - f(p)|^2 over the labelled pixels and channels; 0 without any. See the module's text.

    Args:
        features: f [B, D, h, w].
        target: labels [B, H, W].
        text: w [C, E]; ignored pixels have the zero vector.
        semantic: s, [..., E] -> [..., D].
    """
    size = features.shape[2:]
    small = nearest_labels(target, [max(1, int(side * ratio)) for side in size])
    words = F.pad(text, (0, 0, 0, 1))[torch.where(small == ignore_index, len(text), small)]  # [B, h', w', E]
    words = F.interpolate(words.movedim(-1, 1), size, mode="bilinear").movedim(1, -1)
    labelled = nearest_labels(target, size) != ignore_index
    error = (wide(semantic(words)) - wide(features).movedim(1, -1)).square().mean(-1)
    return error.masked_fill(~labelled, 0).sum() / labelled.sum().clamp(min=1)


def consistency(text: Tensor, prototypes: Tensor, temperature: float, eps: float = 0.0) -> Tensor:
    """KL divergence of how the words [C, E] lie to each other from how the prototypes [C, D] do, mean over the words.

    Args:
        temperature: T, of the words' distances.
        eps: added to the prototypes' squared distances, as the published code for PASCAL-Context has it (1e-8).
    """
    words = (-temperature * distances(text.detach())).log_softmax(1)
    found = (-distances(wide(prototypes), eps)).log_softmax(1)
    return F.kl_div(found, words.to(found.dtype), log_target=True, reduction="batchmean")


def distances(x: Tensor, eps: float = 0.0) -> Tensor:
    """|x_i - x_j|, [C, C], of rows [C, D]; the gradient of equal rows is 0."""
    square = (x[:, None] - x[None]).square().sum(-1) + eps
    return torch.where(square > 0, square.clamp(min=torch.finfo(square.dtype).tiny).sqrt(), 0)


@traced("model.decoder")
def calibrated(features: Tensor, scores: Tensor, seen: Tensor, sigma: float, size: tuple[int, int]) -> Tensor:
    """Negative squared distances at full size, [B, C, H, W], the first two exchanged where calibration says so.

    Args:
        features: f [B, D, h, w].
        scores: 2 f . mu_c - |mu_c|^2, [B, C, h, w].
        seen: bool [C].
        size: (H, W); features are enlarged bilinearly.
    """
    scores = F.interpolate(scores, size, mode="bilinear")
    near = scores - enlarged_norm(wide(features), size)[:, None]  # -d_c
    (first, second), (one, two) = (x.unbind(1) for x in near.topk(2, dim=1))
    switched = seen[one] & ~seen[two] & (sigma * second > first)
    out = near.scatter(1, one[:, None], torch.where(switched, second, first)[:, None])
    return out.scatter(1, two[:, None], torch.where(switched, first, second)[:, None])


def enlarged_norm(features: Tensor, size: tuple[int, int]) -> Tensor:
    """|f(p)|^2 of features [B, D, h, w] enlarged to ``size``, [B, H, W], some rows at a time."""
    height, width = size
    h = features.shape[2]
    wide_rows = F.interpolate(features, (h, width), mode="bilinear")  # rows are enlarged below
    out = []
    for start in range(0, height, ROWS):
        row = torch.arange(start, min(start + ROWS, height), device=features.device, dtype=features.dtype)
        place = (row + 0.5) * (h / height) - 0.5
        place = place.clamp(min=0)
        low = place.floor().long().clamp(max=h - 1)
        high, share = (low + 1).clamp(max=h - 1), (place - low)[:, None]
        out.append((wide_rows[:, :, low] * (1 - share) + wide_rows[:, :, high] * share).square().sum(1))
    return torch.cat(out, dim=1)
