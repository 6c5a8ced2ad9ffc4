"""Regions of an image that come from elsewhere: a network such as SAM, superpixels, a person.

A region map holds an integer for every pixel; 0 and below is no region. Patches of a region attend to each other only
(:func:`fastzs.ops.dense_attention`), and its pixels get the label that most of them have. Published systems gain most
where such regions are good: Zhang et al., "CorrCLIP", ICCV 2025, whose merging of regions :func:`merged` is.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from fastzs.errors import FastzsError
from fastzs.needed import check_installed
from fastzs.result import read_labels

SUPERPIXELS = ("slic", "felzenszwalb")
WORKING_SIDE = 672  # superpixels are sought in images whose shorter side is at most this
Find = Callable[[Tensor], "Tensor | np.ndarray"]
Regions = Tensor | np.ndarray | str | Path | Find


class RegionsError(FastzsError, ValueError):
    """Regions that cannot be had or do not fit an image; the message says which and why."""


def find(regions: Regions, image: Tensor, name: str | None = None) -> Tensor:
    """The regions of an image uint8 [3, H, W], int64 [H, W].

    Args:
        regions: integers [H, W]; a PNG of them, or a folder with a NAME.png for each image file NAME.jpg; a function of
            the image; or "slic" or "felzenszwalb", scikit-image's superpixels with its own defaults.
        name: of the image's file without its suffix, for a folder.

    Raises:
        RegionsError: there are none, or they are not integers of the image's size.
    """
    what = "regions"
    if isinstance(regions, str | Path) and str(regions) in SUPERPIXELS:
        return superpixels(str(regions), image)
    if isinstance(regions, str | Path):
        path = Path(os.path.expanduser(regions))
        if path.is_dir():
            if name is None:
                raise RegionsError(
                    f"regions {path}: files of a folder go by the names of image files, but the image has none; give "
                    "integers [H, W] or a function"
                )
            path = path / f"{name}.png"
        what, regions = f"regions {path}", _read(path)
    elif callable(regions):
        regions = regions(image)
    found = regions if isinstance(regions, Tensor) else torch.as_tensor(np.array(regions))  # arrays may be read-only
    if found.shape != image.shape[1:] or found.is_floating_point() or found.is_complex():
        height, width = image.shape[1:]
        raise RegionsError(
            f"{what}: expected integers [{height}, {width}], one for each pixel of the image, got {found.dtype} "
            f"{list(found.shape)}"
        )
    return found.to(image.device, torch.int64)


def check_source(regions: str | Path) -> None:
    """See that there is something to take regions from, before any image is read.

    Raises:
        RegionsError: no such file or folder.
        MissingPackage: scikit-image is needed and not installed.
    """
    if str(regions) in SUPERPIXELS:
        check_installed("skimage", "scikit-image", f"regions {str(regions)!r}", "regions")
    elif not Path(os.path.expanduser(regions)).exists():
        raise RegionsError(
            f"regions {regions}: there is no such file; expected a PNG, a folder of them, or {' or '.join(SUPERPIXELS)}"
        )


def _read(path: Path) -> np.ndarray:
    check_source(path)
    try:
        _, values = read_labels(path)
    except (OSError, ValueError) as error:
        raise RegionsError(f"regions {path}: cannot be read: {error}") from error
    return values.astype(np.int64) if values.dtype.kind in "biu" else values


def superpixels(method: str, image: Tensor) -> Tensor:
    """Superpixels of an image uint8 [3, H, W] by scikit-image, int64 [H, W] from 1.

    Raises:
        MissingPackage: scikit-image is not installed.
    """
    check_source(method)
    from skimage.segmentation import felzenszwalb, slic

    size = (image.shape[1], image.shape[2])
    factor = min(1.0, WORKING_SIDE / min(size))
    working = [max(1, round(side * factor)) for side in size]
    small = image if factor == 1 else TF.resize(image, working, antialias=True)
    pixels = small.permute(1, 2, 0).cpu().numpy()
    found = slic(pixels, start_label=1) if method == "slic" else felzenszwalb(pixels, channel_axis=2) + 1
    return at_size(torch.from_numpy(found.astype(np.int64)), size).to(image.device)


def at_size(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [..., H, W] at another size: the nearest pixel's."""
    if tuple(regions.shape[-2:]) == size:
        return regions
    flat = regions.reshape(1, -1, *regions.shape[-2:]).double()  # holds integers up to 2^53
    return F.interpolate(flat, size, mode="nearest-exact").long().reshape(*regions.shape[:-2], *size)


def merged(regions: Tensor, features: Tensor, within: float) -> Tensor:
    """Regions [B, h, w] of which those that look alike are one.

    CorrCLIP's rule: the mean of a region's features, of unit length, stands for it; with S the cosines between regions,
    two are neighbours if max S - S is at most ``within`` (published: 0.2), and regions that a chain of neighbours
    connects are one. 0 and below stays no region.

    Args:
        features: [B, C, h, w].
    """
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2), dim=1)
    out = []
    for one, vectors in zip(regions, unit, strict=True):
        ids, place = one.flatten().clamp_min(0).unique(return_inverse=True)
        sums = vectors.new_zeros(len(vectors), len(ids)).index_add_(1, place, vectors)
        means = F.normalize(sums[:, ids > 0], dim=0)
        if means.shape[1] == 0:
            out.append(one)
            continue
        alike = means.T @ means
        near = alike.amax() - alike <= within
        near = near | torch.eye(len(near), dtype=torch.bool, device=near.device)
        group = torch.arange(len(near), device=near.device)
        for _ in range(len(near)):  # the smallest index goes from neighbour to neighbour
            least = torch.where(near, group, len(near)).amin(1)
            if torch.equal(least, group):
                break
            group = least
        names = torch.zeros_like(ids)
        names[ids > 0] = ids[ids > 0][group]
        out.append(names[place].reshape(one.shape))
    return torch.stack(out)


def share_labels(labels: Tensor, scores: Tensor | None, regions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels [H, W] where every region has the one that most of its pixels have, of equally many the smallest.

    A pixel whose label changes gets the mean score of the region's pixels that had its new label.
    """
    _, place = regions.flatten().clamp_min(0).unique(return_inverse=True)
    flat = labels.flatten().long()
    classes = int(flat.max()) + 1
    cell = place * classes + flat
    counts = torch.bincount(cell, minlength=(int(place.max()) + 1) * classes).unflatten(0, (-1, classes))
    most, best = counts.max(1)
    chosen = torch.where(regions.flatten() > 0, best[place], flat)
    if scores is not None:
        sums = torch.bincount(cell, scores.flatten().double(), counts.numel()).unflatten(0, (-1, classes))
        mean = (sums.gather(1, best[:, None])[:, 0] / most).to(scores.dtype)
        scores = torch.where(chosen == flat, scores.flatten(), mean[place]).reshape(scores.shape)
    return chosen.reshape(labels.shape).to(labels.dtype), scores


def contents(regions: str | None) -> str | None:
    """What identifies regions of the command line in the key of a result: of files their names, sizes and times."""
    if regions is None or regions in SUPERPIXELS:
        return regions
    path = Path(os.path.expanduser(regions))
    files = sorted(path.rglob("*.png")) if path.is_dir() else [path] if path.is_file() else []
    about = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]
