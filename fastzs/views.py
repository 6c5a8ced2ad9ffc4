"""Images as a model sees them: resized, covered with windows, and taken together into batches."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastzs.pictures import ImageError
from fastzs.transfers import arrive


class Crop(NamedTuple):
    """What the model sees at once."""

    image: Tensor  # uint8 [3, h, w]
    regions: Tensor | None  # int64 [h, w]


class View(NamedTuple):
    """An image as the model sees it. For a model on a GPU, what it needs of the image is there, or on its way."""

    image: Tensor  # uint8 [3, H, W], as it was read, on the host
    there: Tensor  # the same for the model
    resized: Tensor  # uint8 [3, h, w] for the model
    windows: Tensor  # int64 [W, 4] over the resized image, all of one size, on the host
    regions: Tensor | None = None  # int64 [H, W], of the image as it was read, on the host
    cells: Tensor | None = None  # int64 [h, w], the same for the model
    arrived: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        tensors = {id(tensor): tensor.nbytes for tensor in (self.image, self.there, self.resized)}
        return sum(tensors.values())

    @property
    def size(self) -> tuple[int, int]:
        return (self.resized.shape[1], self.resized.shape[2])

    def arrive(self) -> "View":
        """For the work that is asked of the GPU from here on; the host does not wait."""
        arrive(self.arrived, (self.there, self.resized, self.cells))
        return self

    def crops(self, windows: Tensor) -> Iterator[Crop]:
        """The parts of the resized image under some windows."""
        for top, left, height, width in windows.tolist():
            rows, columns = slice(top, top + height), slice(left, left + width)
            yield Crop(self.resized[:, rows, columns], None if self.cells is None else self.cells[rows, columns])


def batches(views: Iterator[View], size: int) -> Iterator[list[View]]:
    """Images that have about ``size`` windows together, at least one; before an error comes what was before it."""
    batch: list[View] = []
    problem, count = None, 0
    while problem is None:
        try:
            view = next(views)
        except StopIteration:
            break
        except Exception as error:
            problem = error
            break
        if batch and count + len(view.windows) > size:
            yield batch
            batch, count = [], 0
        batch.append(view)
        count += len(view.windows)
        if count >= size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch
    if problem is not None:
        raise problem


def check_crop(crop: int | tuple[int, int], size: tuple[int, int]) -> None:
    """See that a crop, a side or (height, width), fits into an image of (height, width).

    Raises:
        ImageError: it is larger.
    """
    height, width = (crop, crop) if isinstance(crop, int) else crop
    if height > size[0] or width > size[1]:
        raise ImageError(
            f"the crop, {height} x {width} pixels, is larger than the image, {size[0]} x {size[1]} as the model sees "
            "it; give a smaller crop, a larger short side, or crop 0 for the whole image at once"
        )
