"""Images from files and memory, as one thing: uint8 RGB ``[3, H, W]``."""

import glob
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from fastzs.errors import FastzsError
from fastzs.files import check_file, is_web_address, open_file
from fastzs.needed import MissingPackage, needed

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | BinaryIO | bytes

SUFFIXES = frozenset(
    f".{kind}"
    for kind in "avif bmp gif heic heif hif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp".split()  # noqa: SIM905
)
HEIF = frozenset((".heic", ".heif", ".hif"))
# Images, too, but of kinds that are not read here.
UNREADABLE = frozenset(
    f".{kind}"
    for kind in "arw cr2 cr3 dng exr fit fits hdr jxl nef nrrd orf psd raf raw rw2 svg xcf".split()  # noqa: SIM905
)
# Text in the files of results, by which they are told from images.
NAMES_KEY = "fastzs.names"
OVERLAY_MARK = "fastzs.overlay"
log = logging.getLogger(__name__)


class ImageError(FastzsError, ValueError):
    """An image that cannot be read or segmented; the message names it."""


PictureError = ImageError  # its old name


def read_picture(picture: ImageLike, name: str | None = None) -> torch.Tensor:
    """Bring an image into the one form the package works on.

    Args:
        picture: a path; the bytes of a file or an open binary file; a PIL image; an array ``[H, W, 3]``, ``[H, W, 1]``
            or ``[H, W]`` (grey); or a tensor ``[3, H, W]``, ``[1, H, W]`` or ``[H, W]``, which stays on its device.
            Arrays and tensors are uint8, bool, or floating point from 0 to 1.
        name: the file name of what is given as bytes, for messages; HEIC is known by its suffix.

    Returns:
        uint8 ``[3, H, W]``, RGB, its own memory. Of an animation the first frame (of a PIL image its current one). The
        EXIF orientation is applied. What is transparent shows white behind it. Grey, palette and CMYK images are
        converted without colour management; 16-bit grey keeps its 8 high bits, rounded, unless no value needs more
        than 8 bits.

    Raises:
        ImageError: the file is missing, unreadable, truncated or empty, no file (a FIFO, a device), or larger than
            Pillow's guard against decompression bombs allows (an error above twice ``PIL.Image.MAX_IMAGE_PIXELS``, a
            warning above it); the array or tensor has another shape, dtype or range.
    """
    if isinstance(picture, (str, os.PathLike)):
        if is_web_address(picture):
            raise ImageError(f"{picture}: this is a web address; download the image and give its path")
        return _read_file(Path(os.path.expanduser(picture)))
    if isinstance(picture, Image.Image):
        return _from_pil(picture, "the PIL image")
    if isinstance(picture, bytes | bytearray | memoryview):
        return _read_stream(io.BytesIO(picture), name or "the image in memory")
    if isinstance(picture, np.ndarray):
        wanted = "[H, W, 3] or [H, W], uint8 or floating point from 0 to 1"
        if picture.ndim == 2:
            picture = picture[..., None]
        if picture.ndim != 3 or picture.shape[2] not in (1, 3) or picture.size == 0:
            raise ImageError(f"image array: expected {wanted}, got shape {list(picture.shape)}")
        # a copy, also of what torch cannot share: negative strides, foreign byte order
        native = np.array(picture, picture.dtype.newbyteorder("="), order="C")
        if native.dtype.kind not in "bf" and native.dtype != np.uint8:
            raise ImageError(f"image array: expected {wanted}, got dtype {picture.dtype}")
        return _levels(torch.from_numpy(native).permute(2, 0, 1), "image array")
    if isinstance(picture, torch.Tensor):
        wanted = "[3, H, W] or [H, W], uint8 or floating point from 0 to 1"
        if picture.ndim == 2:
            picture = picture[None]
        if picture.ndim != 3 or picture.shape[0] not in (1, 3) or picture.numel() == 0:
            raise ImageError(f"image tensor: expected {wanted}, got shape {list(picture.shape)}")
        if picture.dtype not in (torch.uint8, torch.bool) and not picture.is_floating_point():
            raise ImageError(f"image tensor: expected {wanted}, got dtype {picture.dtype}")
        return _levels(picture.detach(), "image tensor")
    if hasattr(picture, "read"):
        return _read_stream(picture, "the open image file")
    raise ImageError(
        f"an image cannot be a {type(picture).__name__}; expected a path, bytes, an open file, a PIL image, an array "
        "[H, W, 3] or a tensor [3, H, W]"
    )


def split_batch(pictures: object) -> Sequence[ImageLike] | None:
    """The images of a batch, ``[B, H, W, 3]`` as an array or ``[B, 3, H, W]`` as a tensor; None if it is no batch."""
    if isinstance(pictures, np.ndarray | torch.Tensor) and pictures.ndim == 4:
        return [pictures[i] for i in range(len(pictures))]
    return None


def is_result(path: Path) -> bool:
    """Whether a file is a label map or an overlay that :class:`fastzs.Segmentation` wrote."""
    if path.suffix.lower() != ".png" and not path.stem.endswith("_overlay"):
        return False
    try:
        with open_file(path) as stream, Image.open(stream) as image:
            comment = image.info.get("comment", b"")
            return NAMES_KEY in image.info or OVERLAY_MARK in image.info or comment == OVERLAY_MARK.encode()
    except Exception:  # whatever a broken file makes a decoder raise
        return False


def find_pictures(paths: Iterable[str | os.PathLike], skip: str | os.PathLike | None = None) -> list[Path]:
    """The image files that ``paths`` stand for, sorted, each once.

    Label maps and overlays of earlier results are left out wherever they lie, and so are images of kinds that are
    not read here; a line in the log counts both.

    Args:
        paths: files (of any suffix); folders, searched with their subfolders (not the hidden ones); globs
            (``**`` goes through folders). From folders and globs come only files with a suffix in
            :data:`SUFFIXES`. A folder that may not be read is given as if it were an image, which then fails by name.
        skip: a folder whose files are never taken, for results that lie inside a folder of images.

    Raises:
        ImageError: one of ``paths`` matches nothing (named), or no path is given.
    """
    found: dict[str, Path] = {}
    for given in paths:
        if is_web_address(given):
            raise ImageError(f"{given}: this is a web address; download the image and give its path")
        here = _expand(os.path.expanduser(given))
        kept = here
        if skip is not None:
            outside = Path(os.path.realpath(os.path.expanduser(skip)))  # unlike resolve(), copes with links in circles
            kept = [path for path in here if not Path(os.path.realpath(path)).is_relative_to(outside)]
        pictures = [path for path in kept if not is_result(path)]
        if not pictures:
            where = f" outside of {skip}" if here and not kept else " but results of fastzs" if kept else ""
            raise ImageError(f"{os.fspath(given)!r}: no such image, or no image in it{where}")
        if len(pictures) < len(kept):
            log.warning("%s: %d label maps and overlays of fastzs are left out", given, len(kept) - len(pictures))
        for path in pictures:
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise ImageError("no images given")
    return sorted(found.values())


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        return _in_folder(path)
    if os.path.lexists(path):  # before globbing: a file may be called a[1].jpg
        return [path]
    files = []
    for match in map(Path, glob.glob(given, recursive=True)):
        if match.is_dir():
            files += _in_folder(match)
        elif match.suffix.lower() in SUFFIXES:
            files.append(match)
    return files


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones and those in hidden folders left out; links are followed, but none in circles.

    A folder that may not be read is given as if it were a file.
    """
    been: set[str] = set()
    closed: list[OSError] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        place = os.path.realpath(parent)
        if place in been:  # a link to a folder above, or to one that was searched already
            folders.clear()
            continue
        been.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names if not name.startswith("."))
    yield from (Path(error.filename) for error in closed)


def _in_folder(folder: Path) -> list[Path]:
    shown = list(visible_files(folder))
    files = [path for path in shown if path.suffix.lower() in SUFFIXES or path.is_dir()]
    others = [path for path in shown if path.suffix.lower() in UNREADABLE]
    if others:
        log.warning(
            "%s: %d images of kinds that cannot be read (%s) are left out; convert them to PNG or JPEG",
            folder,
            len(others),
            ", ".join(sorted({path.suffix.lower() for path in others})),
        )
    return files


def _read_file(path: Path) -> torch.Tensor:
    try:
        if path.is_dir():
            with os.scandir(path):
                raise ImageError(f"{path}: is a folder, not an image")
        check_file(path)
        return _read_stream(path, str(path))  # by its name: of open files Pillow cannot read every TIFF
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ImageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_stream(stream: BinaryIO | Path, name: str) -> torch.Tensor:
    if Path(name).suffix.lower() in HEIF:
        know_heif(name)
    try:
        with Image.open(stream) as image:
            return _from_pil(image, name)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that Pillow can read") from None
    except ImageError:
        raise
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow warns from half of that on
        raise ImageError(
            f"{name}: has more than {most:,} pixels, the most that is read; if you trust it, allow more with "
            "--max-pixels (in Python PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except Exception as error:  # of broken headers; see _from_pil
        raise ImageError(f"{name}: cannot be read: {error}") from error


def limit_pixels(most: int) -> None:
    """Read images of at most ``most`` pixels in this process, without a word about large ones among them.

    Raises:
        ValueError: it is not positive.
    """
    if most < 1:
        raise ValueError(f"max_pixels must be at least 1, got {most}")
    Image.MAX_IMAGE_PIXELS = (most + 1) // 2  # Pillow's error comes at twice its warning
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def know_heif(name: str) -> None:
    """Teach Pillow to read HEIC.

    Raises:
        ImageError: pillow-heif is not installed; the message names the image.
    """
    try:
        needed("pillow_heif", "pillow-heif", "HEIC images", "heif").register_heif_opener()
    except MissingPackage as error:
        raise ImageError(f"{name}: {error}") from error


def _levels(pixels: torch.Tensor, what: str) -> torch.Tensor:
    """uint8 ``[3, H, W]`` in memory of its own from ``[1 or 3, H, W]`` of uint8, bool or fractions."""
    if pixels.is_floating_point():
        pixels = pixels.float()
        lowest, highest = pixels.min().item(), pixels.max().item()
        if not (lowest >= 0 and highest <= 1):  # NaN is neither
            raise ImageError(f"{what}: floating point pixels are expected from 0 to 1, got {lowest:g} to {highest:g}")
        pixels = (pixels * 255).round()
    elif pixels.dtype == torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    return pixels.to(torch.uint8).expand(3, -1, -1).clone(memory_format=torch.contiguous_format)


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    if 0 in image.size:
        raise ImageError(f"{name}: has no pixels (size {image.width} x {image.height})")
    try:
        image.load()
        return _to_tensor(ImageOps.exif_transpose(image), name)
    except MemoryError:
        raise
    except Exception as error:
        # On broken files decoders raise whatever comes to them: OSError, SyntaxError, struct.error ...
        raise ImageError(f"{name}: cannot be read: {error}") from error


def _to_tensor(image: Image.Image, name: str) -> torch.Tensor:
    if image.mode.startswith("I"):
        image = _eight_bits(image, name)
    elif image.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose range is not defined")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits (Pillow's modes I;16* and, from some files, I) to mode L."""
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > 65535:
        raise ValueError(f"its pixels ({lowest} to {highest}) do not fit 16 bits")
    if highest <= 255:  # of a 16-bit scene nothing would be left; what is meant is 8 bits in wider numbers
        return Image.fromarray(values.astype(np.uint8))
    if highest < 4096:
        log.warning(
            "%s: its 16-bit pixels reach %d of 65535, so it comes out nearly black; "
            "if it has fewer bits, scale it first",
            name,
            highest,
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
