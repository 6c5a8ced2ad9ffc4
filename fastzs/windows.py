"""Sizes and places: how large an image is made for the model, and which windows cover it."""

import torch

Size = tuple[int, int]


def resize_size(size: Size, short_side: int, long_side: int | None = None) -> Size:
    """The size at which an image of ``size`` (height, width) enters the model, its proportions kept.

    One factor scales both sides: ``short_side / min(size)``, or ``long_side / max(size)`` where that is
    smaller. Sides are rounded as the published test pipelines round them (mmcv's keep-ratio rule),
    ``int(side * factor + 0.5)``, and are at least one pixel.

    Args:
        size: (height, width) of the image in pixels.
        short_side: length of the shorter side after resizing.
        long_side: bound on the longer side; without it a long thin image grows without bound.

    Raises:
        ValueError: a side is not a positive integer.
    """
    height, width = _pair("size", size)
    short_side = _pair("short_side", short_side)[0]
    factor = short_side / min(height, width)
    if long_side is not None:
        factor = min(factor, _pair("long_side", long_side)[0] / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def window_grid(image_size: Size, crop: int | Size, stride: int | Size) -> torch.Tensor:
    """Windows of one size that cover an image, row by row from the top left.

    Along each side they start at 0, ``stride``, ``2 * stride``, ... until one reaches the end; that last one
    is shifted back so that it ends with the image: the published slide inference (ZegCLIP and
    CLIP-RC: crop 512, stride 426). A crop larger than the image shrinks to it.

    Args:
        image_size: (height, width) of the image in pixels.
        crop: side of a window, or (height, width).
        stride: distance of neighbouring windows, or (down, right); at most the crop, so that no pixel is
            missed.

    Returns:
        int64 ``[W, 4]``, each row (top, left, height, width); all windows have one size.

    Raises:
        ValueError: a length is not a positive integer, or ``stride`` exceeds ``crop``.
    """
    size = _pair("image_size", image_size)
    crop = _pair("crop", crop)
    stride = _pair("stride", stride)
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise ValueError(f"stride {stride} is larger than crop {crop}: pixels between the windows would be missed")
    height, width = min(crop[0], size[0]), min(crop[1], size[1])
    tops = _starts(size[0], height, stride[0])
    lefts = _starts(size[1], width, stride[1])
    return torch.tensor([(top, left, height, width) for top in tops for left in lefts], dtype=torch.int64)


def next_multiple(side: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``side``, without negative numbers, which ONNX rounds up."""
    return (side + unit - 1) // unit * unit


def _starts(length: int, crop: int, stride: int) -> list[int]:
    count = -(-(length - crop) // stride) + 1  # ceil, plus the first
    return [min(i * stride, length - crop) for i in range(count)]


def _pair(name: str, value: int | Size) -> Size:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in pair):
        raise ValueError(f"{name}: expected a positive integer or (height, width), got {value!r}")
    return pair
