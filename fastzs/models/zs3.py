"""ZS3: a generator makes pixel features of unseen classes from their words, and a classifier is trained on them.

Source: Bucher et al., "Zero-Shot Semantic Segmentation", NeurIPS 2019, and its code. The network is DeepLabV3+; its
classes are fixed by training. Two stages:

- "seen": network and classifier are trained on the labels of the seen classes;
- "generate": the network is frozen. A generator G([w_c, z]), z uniform in [0, 1), learns to give features like the
  real ones of each seen class (:func:`fastzs.decoders.generator.mmd` of 128 of each, drawn at random), and a new
  classifier is trained on real features of seen classes and made ones of all, with a weight on unseen classes.

What is told about unseen pixels (``layout``): as published, images that show unseen classes are made whole from
*their true label maps*, so that layout and frequencies of unseen classes are known, though not their looks. The
default, "permuted", is not told: a copy of each image's seen label map, in which seen classes are exchanged for
unseen ones at random, is made whole, and labels of unseen classes are never read.

Unlike the published code, generator and classifier take one common step a batch instead of one for each class, and the
norms of the frozen network keep their statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastzs.clip import WeightsError
from fastzs.decoders.deeplab import PlainV3PlusHead, from_zs3
from fastzs.decoders.generator import PixelMLP, grouped_mmd
from fastzs.decoders.multi_scale import nearest_labels
from fastzs.decoders.resnet import blocks_of
from fastzs.losses import pixel_cross_entropy
from fastzs.models.base import Features
from fastzs.models.trained import OWN
from fastzs.models.words import FixedClasses, scale_loss, wide
from fastzs.registry import register
from fastzs.trace import span

SAMPLES = 128  # features of a class that are compared

Stage = Literal["seen", "generate"]
Layout = Literal["permuted", "as published"]


@dataclass(frozen=True)
class PixelFeatures(Features):
    """What the classifier sees."""

    maps: Tensor  # [B, D, h, w]


@register(
    "zs3",
    paper="ZS3Net (Bucher et al., NeurIPS 2019)",
    does="a DeepLabV3+ with a classifier of fixed classes",
    trained="a DeepLabV3+ (ResNet), a generator, a classifier",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth.tar, {OWN}",
)
class ZS3(FixedClasses):
    """ZS3 for images of any size; the classes are those it was trained for.

    Args:
        classes: their names, or how many.
        backbone, weights, options: see :class:`fastzs.models.words.WordModel`.
        features: width of the pixel features; published: 256.
        fine: channels that the fine map is brought to; published: 48.
        hidden, noise: of the generator; published: 256 and as wide as the words.
        stage: what is trained, see the module's text.
        layout: what unseen classes' labels are used for, see the module's text.
        unseen_weight: of unseen classes in the classifier's loss; published: 100, for the few pixels that unseen
            classes have in the layout "as published". With "permuted" they fill a quarter of all maps.
    """

    settled = ("form",)

    def __init__(
        self,
        classes: Sequence[str] | int,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        features: int = 256,
        fine: int = 48,
        hidden: int = 256,
        noise: int = 300,
        dropout: Sequence[float] = (0.5, 0.5, 0.1),
        stage: Stage = "seen",
        layout: Layout = "permuted",
        unseen_weight: float = 100.0,
        **options: Any,
    ):
        if stage not in ("seen", "generate") or layout not in ("permuted", "as published"):
            raise ValueError(
                f"ZS3: stage must be 'seen' or 'generate' and layout 'permuted' or 'as published', got {stage!r} and "
                f"{layout!r}"
            )
        super().__init__(classes, backbone, weights, form="torchvision", **options)
        channels = self.network.channels
        self.head = PlainV3PlusHead(channels[-1], channels[0], features, fine, dropout=dropout)
        self.classifier = nn.Conv2d(features, self.classes, 1)
        self.generator = PixelMLP((self.text_dim + noise, hidden, features), (dropout[0],))
        self.noise, self.layout, self.unseen_weight = noise, layout, unseen_weight
        del self.settings["form"]
        self.settings.update(
            features=features, fine=fine, hidden=hidden, noise=noise, dropout=list(dropout), layout=layout,
            unseen_weight=unseen_weight,
        )  # fmt: skip
        self.stage: Stage = stage
        self.settings["stage"] = stage
        for name, parameter in self.named_parameters():
            made = name.startswith(("generator", "classifier"))
            if name.startswith("generator") or stage == "generate":
                parameter.requires_grad_(made and stage == "generate")

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.stage == "generate":
            self.network.eval()
            self.head.eval()
        return self

    def encode(self, images: Tensor) -> PixelFeatures:
        with span("model.tower"):
            maps = self.network(self.as_trained(images))
            return PixelFeatures(self.head(maps[-1], maps[0]))

    def score(self, features: PixelFeatures, text: Tensor) -> Tensor:
        self.check_classes(text)
        return wide(self.classifier(features.maps))

    def parts(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        seen: Sequence[int],
        ignore_index: int,
        *,
        self_labelled: bool = False,
    ) -> dict[str, Tensor]:
        """``cross_entropy``, in the second stage with ``mmd``; see the base."""
        known = torch.isin(target, torch.tensor(list(seen), device=target.device))
        labels = target if self_labelled else target.masked_fill(~known, ignore_index)
        if self.stage == "seen":
            loss = pixel_cross_entropy(
                self.classifier(self.encode(images).maps), labels, ignore_index, align_corners=True
            )
            return {"cross_entropy": loss / len(images)}
        with torch.no_grad():
            real = self.encode(images).maps
        size = real.shape[2:]
        small = nearest_labels(labels, size)
        if self.layout == "as published":
            whole = nearest_labels(target, size)
            unseen_there = ((whole != small) & (whole != ignore_index)).flatten(1).any(1)
            features, given = real, whole
            made = self.generate(whole, text, ignore_index)
            features = torch.where(unseen_there[:, None, None, None], made.detach(), real)
            learnt = small.masked_fill(unseen_there[:, None, None], ignore_index)
        else:
            wanted = permuted(small, seen, len(text), ignore_index)
            made, features, given = self.generate(small, text, ignore_index), real, small
            dreamt = self.generate(wanted, text, ignore_index).detach()
            features, given, learnt = torch.cat([real, dreamt]), torch.cat([small, wanted]), small
        weights = text.new_ones(len(text))
        weights[[i for i in range(len(text)) if i not in set(seen)]] = self.unseen_weight
        loss = scale_loss(self.classifier(features), given, ignore_index, class_weights=weights)
        return {
            "cross_entropy": loss / len(images),
            "mmd": class_mmd(made, real, learnt, ignore_index),
        }

    def generate(self, labels: Tensor, text: Tensor, ignore_index: int) -> Tensor:
        """Made features [B, D, h, w] for labels [B, h, w], zero where these are ignored."""
        kept = labels != ignore_index
        words = text[labels[kept]]
        made = self.generator(torch.cat([words, torch.rand(len(words), self.noise).to(words)], dim=1))
        out = made.new_zeros(*labels.shape, made.shape[1]).index_put((kept,), made)
        return out.movedim(-1, 1)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if "decoder.pred_conv.weight" not in state and "classifier.weight" not in state:
            raise WeightsError(f"{path}: is no checkpoint of ZS3; the files of its generators are not read")

    @classmethod
    def _renamed(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "network.conv1.weight" in state:
            return dict(state)
        used = {f"network.{n.removeprefix('backbone.')}": t for n, t in state.items() if n.startswith("backbone.")}
        used |= {f"head.{name}": tensor for name, tensor in from_zs3(state).items()}
        for name in ("decoder.pred_conv.weight", "decoder.pred_conv.bias"):
            if name in state:
                used[name.replace("decoder.pred_conv.", "classifier.")] = state[name]
        return used

    def _load(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """The published files are of the network alone: the generator then starts anew."""
        first, last = self.generator.linears
        fresh = PixelMLP((first.in_features, first.out_features, last.out_features), self.generator.dropout)
        super()._load(path, {f"generator.{name}": tensor for name, tensor in fresh.state_dict().items()} | dict(state))

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "classes": len(state["classifier.weight"]),
            "backbone": "",
            "text_dim": 300,
            "resnet": blocks_of(state, "network."),
            "width": len(state["network.conv1.weight"]),
            "features": len(state["head.project.conv.weight"]),
            "fine": len(state["head.low.conv.weight"]),
        } | options


def permuted(labels: Tensor, seen: Sequence[int], classes: int, ignore_index: int) -> Tensor:
    """Labels [B, h, w] in which, for each image, about half of the seen classes are exchanged for unseen ones."""
    unseen = [i for i in range(classes) if i not in set(seen)]
    if not unseen:
        raise ValueError("ZS3: every class is seen, so there is nothing to generate; train stage 'seen' alone")
    table = torch.arange(classes).expand(len(labels), -1).clone()  # [B, C]
    drawn = torch.tensor(unseen)[torch.randint(len(unseen), table.shape)]
    table = torch.where(torch.rand(table.shape) < 0.5, drawn, table).to(labels.device)
    kept = labels != ignore_index
    picture = torch.arange(len(labels), device=labels.device)[:, None, None].expand_as(labels)
    return torch.where(kept, table[picture, labels.masked_fill(~kept, 0)], ignore_index)


def class_mmd(made: Tensor, real: Tensor, labels: Tensor, ignore_index: int, samples: int = SAMPLES) -> Tensor:
    """Mean over images' classes of the MMD of ``samples`` made and real features of each, drawn with replacement.

    Args:
        made, real: [B, D, h, w].
        labels: [B, h, w]; a class without a pixel in an image has no part there.

    Returns:
        A scalar; 0, with a gradient, where no pixel is labelled.
    """
    number = torch.arange(len(labels), device=labels.device)[:, None, None]
    kept = labels != ignore_index
    group = (number * (ignore_index + 1) + labels)[kept]
    if len(group) == 0:
        return made.sum() * 0
    _, group, counts = group.unique(return_inverse=True, return_counts=True)
    order, starts = group.argsort(stable=True), counts.cumsum(0) - counts
    drawn = (torch.rand(len(counts), samples).to(starts.device) * counts[:, None]).long()  # [G, n]
    rows = order[starts[:, None] + drawn].flatten()
    x, y = (maps.movedim(1, -1)[kept][rows] for maps in (made, real))
    return grouped_mmd(wide(x), wide(y), torch.arange(len(counts), device=x.device).repeat_interleave(samples)).mean()
