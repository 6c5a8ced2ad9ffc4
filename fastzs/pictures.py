"""Pictures from files and memory, as one thing: uint8 RGB ``[3, H, W]``."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

Picture: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor

SUFFIXES = frozenset(
    f".{kind}"
    for kind in "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp".split()  # noqa: SIM905
)


class PictureError(ValueError):
    """A picture that cannot be read; the message names it."""


def read_picture(picture: Picture) -> torch.Tensor:
    """Bring a picture into the one form the package works on.

    Args:
        picture: a path; a PIL image; a uint8 array ``[H, W, 3]``; or a uint8 tensor ``[3, H, W]``, which
            stays on its device.

    Returns:
        uint8 ``[3, H, W]``, RGB. Of an animation the first frame (of a PIL image its current one). The EXIF
        orientation is applied. What is transparent shows white behind it. Grey, palette and CMYK pictures are
        converted without colour management; 16-bit grey keeps its 8 high bits, rounded.

    Raises:
        PictureError: the file is missing, unreadable, truncated or empty, or larger than Pillow's guard
            against decompression bombs allows (an error above twice ``PIL.Image.MAX_IMAGE_PIXELS``, a warning
            above it); the array or tensor has another shape or dtype.
    """
    if isinstance(picture, (str, os.PathLike)):
        return _read_file(Path(picture))
    if isinstance(picture, Image.Image):
        return _from_pil(picture, "the PIL image")
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
            raise PictureError(
                f"picture array has shape {list(picture.shape)} and dtype {picture.dtype}; want uint8 [H, W, 3]"
            )
        return torch.from_numpy(picture.transpose(2, 0, 1).copy())
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8 or picture.numel() == 0:
            raise PictureError(
                f"picture tensor has shape {list(picture.shape)} and dtype {picture.dtype}; want uint8 [3, H, W]"
            )
        return picture.contiguous()
    raise PictureError(
        f"a picture cannot be a {type(picture).__name__}; want a path, a PIL image, a uint8 array [H, W, 3] "
        "or a uint8 tensor [3, H, W]"
    )


def find_pictures(paths: Iterable[str | os.PathLike], skip: str | os.PathLike | None = None) -> list[Path]:
    """The picture files that ``paths`` stand for, sorted, each once.

    Args:
        paths: files (of any suffix); folders, searched with their subfolders (not the hidden ones); globs
            (``**`` goes through folders). From folders and globs come only files with a suffix in
            :data:`SUFFIXES`.
        skip: a folder whose files are never taken, for results that lie inside a folder of pictures.

    Raises:
        PictureError: one of ``paths`` matches nothing (named), or no path is given.
    """
    found: dict[str, Path] = {}
    for given in paths:
        here = _expand(given)
        kept = here
        if skip is not None:
            kept = [path for path in here if not path.resolve().is_relative_to(Path(skip).resolve())]
        if not kept:
            where = f" outside of {skip}" if here else ""
            raise PictureError(f"{os.fspath(given)!r}: no such picture, or no picture in it{where}")
        for path in kept:
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise PictureError("no pictures given")
    return sorted(found.values())


def _expand(given: str | os.PathLike) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():  # before globbing: a file may be called a[1].jpg
        return [path]
    files = []
    for match in map(Path, glob.glob(os.fspath(given), recursive=True)):
        if match.is_dir():
            files += _in_folder(match)
        elif match.suffix.lower() in SUFFIXES:
            files.append(match)
    return files


def _in_folder(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(parent, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return files


def _read_file(path: Path) -> torch.Tensor:
    if path.is_dir():
        raise PictureError(f"{path}: is a folder, not a picture")
    try:
        with Image.open(path) as image:
            return _from_pil(image, str(path))
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise PictureError(f"{path}: not a picture that Pillow can read") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read: {error}") from error


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    if 0 in image.size:
        raise PictureError(f"{name}: has no pixels (size {image.width} x {image.height})")
    try:
        image.load()
        return _to_tensor(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        # On broken files decoders raise whatever comes to them: OSError, SyntaxError, struct.error ...
        raise PictureError(f"{name}: cannot be read: {error}") from error


def _to_tensor(image: Image.Image) -> torch.Tensor:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose range is not defined")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (Pillow's modes I;16* and, from some files, I) to mode L."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels ({values.min()} to {values.max()}) do not fit 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
