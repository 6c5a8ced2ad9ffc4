"""What training does to an image and its labels together: the published recipe of ZegCLIP and CLIP-RC.

Resize the shorter side to ``crop`` times a factor of 0.5 to 2, cut a crop that no class fills to more than 75 %, flip,
distort the colours, normalise, pad. Images are ``tv_tensors.Image`` uint8 [3, H, W], labels ``tv_tensors.Mask``
[H, W] with 255 where ignored. All chance comes from torch's global generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from fastzs.data.protocols import IGNORE
from fastzs.windows import resize_size

LONG_SIDE = 4  # the longer side is bounded at this many times the shorter one's goal: published (2048, 512)
TRIES = 10  # crops that are drawn before one that a single class fills is taken all the same


class ScaleJitter(v2.Transform):
    """Resize, proportions kept, so that the shorter side is ``short_side`` times a factor drawn from ``scale``."""

    def __init__(self, short_side: int, scale: tuple[float, float] = (0.5, 2.0)):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: expected two positive factors, the smaller first, got {scale}")
        self.short_side, self.scale = short_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        height, width = _size(flat_inputs)
        short = max(1, int(self.short_side * factor))
        long = max(1, int(LONG_SIDE * self.short_side * factor))
        return {"size": list(resize_size((height, width), short, long))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            # torchvision before 0.29 takes "nearest" for masks whatever it is asked for, half a pixel beside the image
            flat = inpt.as_subclass(Tensor).reshape(1, -1, *inpt.shape[-2:]).double()  # any label is exact
            labels = F.interpolate(flat, params["size"], mode="nearest-exact").to(inpt.dtype)
            return tv_tensors.Mask(labels.reshape(*inpt.shape[:-2], *params["size"]))
        return TF.resize(inpt, params["size"], antialias=True)


class VariedCrop(v2.Transform):
    """A random ``size`` x ``size`` crop in which no class fills more than ``most`` of the labelled pixels.

    After ten tries the last crop is taken. Sides shorter than ``size`` stay as they are.
    """

    def __init__(self, size: int, most: float = 0.75, ignored: int = IGNORE):
        super().__init__()
        if not 0 < most <= 1:
            raise ValueError(f"most: expected a share of the pixels, above 0 and at most 1, got {most}")
        self.size, self.most, self.ignored = size, most, ignored

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        rows, columns = min(self.size, height), min(self.size, width)
        labels = next((item for item in flat_inputs if isinstance(item, tv_tensors.Mask)), None)
        box = {"height": rows, "width": columns, "top": 0, "left": 0}
        for _ in range(TRIES):
            box["top"] = int(torch.randint(height - rows + 1, ()))
            box["left"] = int(torch.randint(width - columns + 1, ()))
            if labels is None or self.most >= 1 or (rows, columns) == (height, width):
                break
            if self._varied(TF.crop(labels, **box)):
                break
        return box

    def _varied(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.flatten().long(), minlength=self.ignored + 1)
        counts[self.ignored] = 0
        return bool((counts > 0).sum() > 1) and bool(counts.max() < self.most * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return TF.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each with probability one half, of a uint8 image.

    The ranges are mmsegmentation's: brightness moved by up to 32 of 255, contrast and saturation multiplied by 0.5 to
    1.5, hue turned by up to a tenth of the circle; contrast comes before or after the colours. Saturation is
    torchvision's (a blend with grey) instead of a factor on HSV's S.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        on = (torch.rand(4) < 0.5).tolist()
        amount = (torch.rand(4) * 2 - 1).tolist()  # -1 to 1
        return {
            "brightness": 32 * amount[0] if on[0] else None,
            "contrast": 1 + amount[1] / 2 if on[1] else None,
            "saturation": 1 + amount[2] / 2 if on[2] else None,
            "hue": amount[3] / 10 if on[3] else None,
            "contrast_first": bool(torch.rand(()) < 0.5),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        image = inpt
        if params["brightness"] is not None:
            image = _scaled(image, 1.0, params["brightness"])
        if params["contrast"] is not None and params["contrast_first"]:
            image = _scaled(image, params["contrast"], 0.0)
        if params["saturation"] is not None:
            image = TF.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = TF.adjust_hue(image, params["hue"])
        if params["contrast"] is not None and not params["contrast_first"]:
            image = _scaled(image, params["contrast"], 0.0)
        return tv_tensors.Image(image)


class PadTo(v2.Transform):
    """Pad below and to the right to at least ``size`` x ``size``: images with 0, labels as ignored."""

    def __init__(self, size: int, ignored: int = IGNORE):
        super().__init__()
        self.size, self.ignored = size, ignored

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        fill = self.ignored if isinstance(inpt, tv_tensors.Mask) else 0
        return TF.pad(inpt, padding, fill=fill) if any(padding) else inpt


def training_transform(
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    short_side: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    most: float = 0.75,
    flip: float = 0.5,
    distortion: bool = True,
    ignored: int = IGNORE,
) -> v2.Compose:
    """The published training pipeline, (uint8 image, labels) -> (fp32 [3, crop, crop], labels [crop, crop]).

    Args:
        crop: side of the result in pixels.
        mean, std: per channel on the 0 to 1 scale, the model's.
        short_side: goal of the shorter side before ``scale``; the crop's if omitted.
        scale: least and greatest factor of the scale jitter.
        most: see :class:`VariedCrop`.
        flip: probability of a horizontal flip.
        distortion: whether colours are distorted.
        ignored: the label of ignored pixels, see :func:`fastzs.data.protocols.ignore_label`.

    Raises:
        ValueError: a side is less than a pixel, or there is none (a model of whole images).
    """
    short_side = crop if short_side is None else short_side
    for name, side in (("crop", crop), ("short_side", short_side)):
        if side is None or side < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {side}")
    return v2.Compose(
        [
            ScaleJitter(short_side, scale),
            VariedCrop(crop, most, ignored),
            v2.RandomHorizontalFlip(flip),
            *([PhotometricDistortion()] if distortion else []),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(list(mean), list(std)),
            PadTo(crop, ignored),
        ]
    )


def _size(flat_inputs: list[Any]) -> tuple[int, int]:
    sizes = {(int(item.shape[-2]), int(item.shape[-1])) for item in flat_inputs}
    if len(sizes) != 1:
        raise ValueError(f"image and labels have different sizes: {sorted(sizes)}")
    return sizes.pop()


def _scaled(image: Tensor, factor: float, shift: float) -> Tensor:
    return (image.float() * factor + shift).round_().clamp_(0, 255).to(torch.uint8)
