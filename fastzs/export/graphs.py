"""What is exported of a model, as modules of tensors, and their torch.export programs.

Graphs hold PyTorch's own operators only: while they are made, every op of this package takes its reference.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastzs.errors import FastzsError
from fastzs.models.base import Features, SegmentationModel
from fastzs.windows import Size, next_multiple

SAMPLE_ROWS = 5  # text vectors a graph is made with, where it takes any number


class ExportError(FastzsError, ValueError):
    """A model that cannot be exported, or a graph that does not agree with its model; the message says why."""


class Encoder(nn.Module):
    """An image [1, 3, H, W] -> the fields of its features."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(images).tensors().values())


class Decoder(nn.Module):
    """Text vectors [T, D] and the fields of an image's features -> logits [1, T, h, w]."""

    def __init__(self, model: SegmentationModel, kind: type[Features], fields: Sequence[str]):
        super().__init__()
        self.model, self.kind, self.fields = model, kind, tuple(fields)

    def forward(self, text: Tensor, *values: Tensor) -> Tensor:
        return self.model.decode(self.kind(**dict(zip(self.fields, values, strict=True))), text)


class Whole(nn.Module):
    """An image [1, 3, H, W] and text vectors [T, D] -> logits [1, T, h, w]."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        return self.model(images, text)


class Labels(nn.Module):
    """An image [1, 3, H, W] and text vectors [T, D] -> labels int64 [1, H, W]: the whole with its epilogue.

    The logits are enlarged to the image (bilinear), turned into scores, lowered by the calibration, and the best class
    wins. This is what :class:`fastzs.Segmenter` does with an image that is one window; a training-free system's
    refinement is left out.

    Args:
        seen: indices of the classes whose scores lose the model's calibration.
    """

    def __init__(self, model: SegmentationModel, seen: Sequence[int]):
        super().__init__()
        self.model, self.seen = model, list(seen)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        return self.scores(images, text).argmax(1)

    def scores(self, images: Tensor, text: Tensor) -> Tensor:
        """[1, T, H, W]; of equal order as the scores of a class, and no more than that where nothing is calibrated."""
        height, width = images.shape[2:]
        multiple = getattr(self.model, "multiple", 0)  # the maps of training-free systems reach beyond the image
        down, across = (next_multiple(side, multiple) - side if multiple else 0 for side in (height, width))
        maps = self.model(images, text)
        maps = F.interpolate(maps, (height + down, width + across), mode="bilinear", align_corners=False)
        maps = maps[:, :, down // 2 : down // 2 + height, across // 2 : across // 2 + width]
        if not self.seen:
            return maps
        activation = self.model.activation
        scores = maps.sigmoid() if activation == "sigmoid" else maps.softmax(1) if activation == "softmax" else maps
        penalty = torch.zeros(text.shape[0], dtype=maps.dtype)
        penalty[self.seen] = self.model.calibration
        return scores - penalty[:, None, None]


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Every op takes its reference, in plain PyTorch."""
    before = os.environ.get("FASTZS_IMPL")
    os.environ["FASTZS_IMPL"] = "reference"
    try:
        with torch.no_grad():
            yield
    finally:
        if before is None:
            del os.environ["FASTZS_IMPL"]
        else:
            os.environ["FASTZS_IMPL"] = before


def program(module: nn.Module, arguments: tuple[Tensor, ...], dynamic: Any, what: str) -> ExportedProgram:
    """The torch.export program of a module.

    Args:
        arguments: a sample.
        dynamic: for each argument the set of its dimensions that vary.
        what: is exported, for the message.

    Raises:
        ExportError: it cannot be exported, or a dimension cannot vary.
    """
    shapes: list[Any] = [{axis: Dim.DYNAMIC for axis in axes} for axes in dynamic]
    if isinstance(module, Decoder):  # torch.export wants the shapes of *values together
        shapes = [shapes[0], tuple(shapes[1:])]
    try:
        with references():
            return torch.export.export(module.eval(), arguments, dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:  # torch.export raises whatever comes to it
        raise ExportError(f"{what} cannot be exported: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first line of what an exporter's error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def sample(model: SegmentationModel, size: Size, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """A drawn scene [1, 3, H, W], normalised for the model, and random unit text vectors [T, D]."""
    from fastzs.data.shapes import draw

    like = next(model.parameters())
    image = draw(1, size, seed=0).images / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    count = rows or fixed_rows(model) or SAMPLE_ROWS
    text = torch.randn(count, model.text_dim, generator=torch.Generator().manual_seed(0))
    return ((image - mean) / std).to(like.dtype), F.normalize(text, dim=1).to(like.dtype)


def odd(size: Size) -> Size:
    """A size that is no multiple of patches, so that padding is part of a graph that is made with it."""
    return size[0] + 5, size[1] + 3


def fixed_rows(model: SegmentationModel) -> int | None:
    """How many text vectors a model with a fixed list of classes takes; None: any number."""
    return len(model.fixed_classes) if model.fixed_classes else getattr(model, "classes", None)


def foreign_ops(exported: ExportedProgram) -> list[str]:
    """Names of this package's own operators in a program; there should be none."""
    return sorted({str(node.target) for node in exported.graph.nodes if "fastzs" in str(node.target)})
