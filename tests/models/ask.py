"""A model asked by names, as the segmenter asks it."""

from torch import Tensor

from fastzs.models.base import SegmentationModel
from fastzs.question import Names
from fastzs.segmenter import Segmenter


def ask(model: SegmentationModel, images: Tensor, names: Names) -> Tensor:
    """Logits [B, C, h, w] of normalised images [B, 3, H, W]."""
    question = Segmenter(model).question(names)
    return model(images, question.text, groups=question.groups, seen=question.seen)
