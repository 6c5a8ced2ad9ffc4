"""What a model has computed of one image, to be labelled with any names: see :meth:`fastzs.Segmenter.encode`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastzs.models.base import Features


@dataclass(frozen=True)
class ImageFeatures:
    """An encoded image.

    Attributes:
        windows: the model's features, one row for each window.
        places: int64 [W, 4], the windows (top, left, height, width) over the image as the model saw it.
        size: (height, width) of the image as the model saw it, in pixels.
        image: uint8 RGB [3, H, W], as it was read.
    """

    windows: Features = field(repr=False)
    places: Tensor = field(repr=False)
    size: tuple[int, int]
    image: Tensor = field(repr=False)

    def to(self, device: torch.device | str) -> "ImageFeatures":
        """With the model's features on another device."""
        return ImageFeatures(self.windows.to(device), self.places, self.size, self.image)
