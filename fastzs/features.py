"""What a model has computed of one image, to be labelled with any names: see :meth:`fastzs.Segmenter.encode`."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastzs.errors import FastzsError
from fastzs.files import output_path, write_atomically
from fastzs.models.base import Features

VERSION = "1"  # of the file's layout
KEY = "fastzs.features"  # of the metadata


class FeaturesError(FastzsError, ValueError):
    """Features that a model cannot label, or a file that holds none; the message says why."""


@dataclass(frozen=True)
class ImageFeatures:
    """An encoded image. It can be moved, pickled, saved, and labelled by the model that made it.

    Attributes:
        windows: the model's features, one row for each window.
        places: int64 [W, 4], the windows (top, left, height, width) over the image as the model saw it.
        size: (height, width) of the image as the model saw it, in pixels.
        image: uint8 RGB [3, H, W], as it was read.
        model: identifies the model that made them, with its weights and settings.
    """

    windows: Features = field(repr=False)
    places: Tensor = field(repr=False)
    size: tuple[int, int]
    image: Tensor = field(repr=False)
    model: str

    def to(self, device: torch.device | str) -> "ImageFeatures":
        """With the model's features on another device."""
        return ImageFeatures(self.windows.to(device), self.places, self.size, self.image, self.model)

    @property
    def dense(self) -> Tensor:
        """Features in the text space, [D, h, w], of unit length; those of overlapping windows are averaged.

        Raises:
            AttributeError: the system's features do not lie in the text space.
        """
        if not hasattr(type(self.windows), "dense"):
            raise AttributeError(f"{type(self.windows).__name__} do not lie in the text space, so there is no `dense`")
        maps: Tensor = self.windows.dense  # type: ignore[attr-defined]  # [W, D, h, w]
        if len(maps) == 1:
            return maps[0]
        height, width = maps.shape[2:]
        down, across = height / int(self.places[0, 2]), width / int(self.places[0, 3])  # cells to a pixel
        rows, columns = max(height, round(self.size[0] * down)), max(width, round(self.size[1] * across))
        total = maps.new_zeros(maps.shape[1], rows, columns)
        for (top, left, _, _), one in zip(self.places.tolist(), maps, strict=True):
            row, column = min(round(top * down), rows - height), min(round(left * across), columns - width)
            total[:, row : row + height, column : column + width] += one
        return F.normalize(total, dim=0)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that :meth:`load` reads.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {f"windows.{name}": tensor for name, tensor in self.windows.tensors().items()}
        tensors |= {"places": self.places, "image": self.image}
        about = {"version": VERSION, "model": self.model, "size": list(self.size), "kind": _name(type(self.windows))}
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(output_path(path), safetensors.torch.save(kept, {KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> "ImageFeatures":
        """Read what :meth:`save` wrote.

        Raises:
            FeaturesError: no file of features, damaged, of another version of fastzs, or of an unknown system.
        """
        try:
            with safe_open(os.path.expanduser(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get(KEY, "{}"))
                # Copies: in a file tensors begin anywhere, and sums over memory off its boundaries round differently.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
        except (SafetensorError, OSError, ValueError) as error:
            raise FeaturesError(f"{path}: cannot be read as features: {error}") from error
        if about.get("version") != VERSION:
            found = about.get("version", "a file of something else")
            raise FeaturesError(f"{path}: expected features of version {VERSION}, got {found}; encode the image again")
        try:
            kind = features_kind(about["kind"])
        except FeaturesError as error:
            raise FeaturesError(f"{path}: {error}") from error
        fields = {name.removeprefix("windows."): t for name, t in tensors.items() if name.startswith("windows.")}
        try:
            return cls(kind(**fields), tensors["places"], tuple(about["size"]), tensors["image"], about["model"])
        except (TypeError, KeyError) as error:
            raise FeaturesError(f"{path}: tensors are missing or unexpected: {error}") from error


def features_kind(name: str) -> type[Features]:
    """The class of a system's features by its full name.

    Raises:
        FeaturesError: there is none.
    """
    import fastzs.models  # noqa: F401 - which have them

    for kind in _kinds(Features):
        if _name(kind) == name:
            return kind
    raise FeaturesError(f"holds {name}, which this version of fastzs does not have")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds(kind: type[Features]) -> list[type[Features]]:
    return [found for child in kind.__subclasses__() for found in (child, *_kinds(child))]
