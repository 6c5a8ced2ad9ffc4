"""Tiny data sets on disk, drawn for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def put_picture(path: Path, size: tuple[int, int] = (6, 8), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def put_mask(path: Path, values: list[int], size: tuple[int, int] = (6, 8), indexed: bool = True) -> None:
    """A mask with all of ``values``, in turn along its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.array(values, np.uint8), size)
    image = Image.fromarray(labels)
    if indexed:
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def put_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def voc(root: Path) -> Path:
    """VOC 2012 with train a, b, val c, and the augmented d."""
    for name in "abcd":
        put_picture(root / "JPEGImages" / f"{name}.jpg")
    for name in "abc":
        put_mask(root / "SegmentationClass" / f"{name}.png", [0, 1, 20, 255])
    for name in "ad":
        put_mask(root / "SegmentationClassAug" / f"{name}.png", [0, 2])
    lists = root / "ImageSets" / "Segmentation"
    for split, names in (("train", "ab"), ("val", "c"), ("aug", "d")):
        put_list(lists / f"{split}.txt", list(names))
    return root


def camvid(root: Path, pictures: int = 3, size: tuple[int, int] = (24, 32)) -> Path:
    """CamVid with a few images in each split."""
    for split in ("train", "val", "test"):
        for i in range(pictures):
            put_picture(root / split / f"{split}{i}.png", size, i)
            put_mask(root / f"{split}annot" / f"{split}{i}.png", [*range(12)], size, indexed=False)
    return root
