"""SPNet: every pixel is embedded among word vectors, and the closest word of the classes names it; and STRICT.

Source: Xian et al., "Semantic Projection Network for Zero- and Few-Label Semantic Segmentation", CVPR 2019, and its
code. A DeepLabV2 network phi gives each pixel p a vector as wide as the words w_c, which are of unit length::

    logit_c(p) = phi(p) . w_c           maximum over the image and its reductions to 1/2 and 3/4
    loss       = cross-entropy over the seen classes only, of each scale and of the maximum, summed
    score      = softmax over all classes, minus gamma for seen ones (0.6 on VOC, 0.4 on COCO-Stuff)

STRICT (Pastore et al., "A Closer Look at Self-training for Zero-Label Semantic Segmentation", CVPR workshops 2021) is
the same network at one scale, trained on with the labels of a frozen copy, see :mod:`fastzs.pseudo`.

Nothing non-linear lies between the last convolutions and the classes, so that for fewer classes than the words are
wide only the class maps are computed, see :class:`fastzs.decoders.deeplab.SumHead`.

Left out, so that scores differ from the published ones: images are not warped to squares, and there is no
dense CRF.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastzs.clip import WeightsError
from fastzs.decoders.deeplab import SumHead
from fastzs.decoders.multi_scale import greatest, reductions
from fastzs.decoders.resnet import blocks_of, from_caffe
from fastzs.models.base import Features, Labels
from fastzs.models.trained import OWN
from fastzs.models.words import WordModel, scale_loss, wide
from fastzs.registry import register
from fastzs.trace import span

REDUCTIONS = (0.5, 0.75)


@dataclass(frozen=True)
class ScaleFeatures(Features):
    """The network's last maps of an image, and of its reductions where there are any."""

    whole: Tensor  # [B, C, h, w]
    half: Tensor | None = None
    most: Tensor | None = None

    @property
    def scales(self) -> list[Tensor]:
        return list(self.tensors().values())


@register(
    "spnet",
    paper="SPNet (Xian et al., CVPR 2019)",
    does="a DeepLabV2 at three scales, products with the word vectors",
    trained="a DeepLabV2 (ResNet)",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth, {OWN}",
)
class SPNet(WordModel):
    """SPNet for images of any size and word vectors of any number and width.

    Args:
        backbone, weights, options: see :class:`fastzs.models.words.WordModel`.
        multi_scale: train and test with the reductions to 1/2 and 3/4.
    """

    def __init__(
        self, backbone: str = "ViT-B-16", weights: str = "openai", *, multi_scale: bool = True, **options: Any
    ):
        super().__init__(backbone, weights, **options)
        self.head = SumHead(self.network.channels[-1], self.text_dim)
        self.multi_scale = multi_scale
        self.settings.update(multi_scale=multi_scale)

    def encode(self, images: Tensor) -> ScaleFeatures:
        with span("model.tower"):
            scales = reductions(self.as_trained(images), REDUCTIONS if self.multi_scale else ())
            return ScaleFeatures(*(self.network(image)[-1] for image in scales))

    def score(self, features: ScaleFeatures, text: Tensor) -> Tensor:
        with span("model.decoder"):
            return greatest([wide(self.head.scores(x, text)) for x in features.scales])

    def embedded(self, features: ScaleFeatures) -> Tensor:
        """phi of the image itself, [B, D, h, w]."""
        return self.head(features.whole)

    def loss_parts(
        self, images: Tensor, labels: Labels, text: Tensor, *, pixel_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of each scale and, with several, of their maximum; labels are taken at the outputs' sizes."""
        features = self.encode(images)
        outputs = [self.head.scores(x, text) for x in features.scales]
        if len(outputs) > 1:
            outputs.append(greatest(outputs))
        names = ["cross_entropy", *(f"cross_entropy_{s}" for s in (*REDUCTIONS, "max"))]
        return {
            name: scale_loss(x, labels.target, labels.ignore_index, pixel_weights=pixel_weights)
            for name, x in zip(names, outputs, strict=False)
        }

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if not any(re.match(r"((scale|base)\.)?(layer1\.conv1\.conv|network\.conv1)\.", name) for name in state):
            raise WeightsError(f"{path}: is no checkpoint of SPNet or STRICT")

    @classmethod
    def _renamed(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "network.conv1.weight" in state:
            return dict(state)
        bare = {re.sub(r"^(scale|base)\.", "", name): tensor for name, tensor in state.items()}
        used = {f"network.{name}": tensor for name, tensor in from_caffe(bare).items()}
        for name, tensor in bare.items():
            if found := re.fullmatch(r"aspp\.(?:stages\.)?c(\d)\.(weight|bias)", name):
                used[f"head.convs.{found[1]}.{found[2]}"] = tensor
        return used

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "backbone": "",
            "text_dim": len(state["head.convs.0.weight"]),
            "resnet": blocks_of(state, "network."),
            "width": len(state["network.conv1.weight"]),
        } | options


@register(
    "strict",
    paper="STRICT (Pastore et al., CVPRW 2021)",
    does="as SPNet",
    trained="a DeepLabV2 (ResNet), then again on its own labels",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth, {OWN}",
)
class STRICT(SPNet):
    """SPNet at one scale, to be trained on with labels on which several views of an image agree.

    Args: as :class:`SPNet`. Use the trainer's self-training with the rule "consistent", a frozen teacher and an SPNet
    as the start.
    """

    def __init__(
        self, backbone: str = "ViT-B-16", weights: str = "openai", *, multi_scale: bool = False, **options: Any
    ):
        super().__init__(backbone, weights, multi_scale=multi_scale, **options)
