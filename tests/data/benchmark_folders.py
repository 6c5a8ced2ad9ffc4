"""Tiny synthetic copies of the eight benchmarks' folders, with label files as they are published.

python -m tests.data.benchmark_folders DIR
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (30, 40)  # rows and columns


def make(root: Path, images: int = 2, seed: int = 0) -> None:
    """Write all folders under ``root``; every label of every file is one that the published files may hold."""
    rng = np.random.default_rng(seed)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path)

    def mask(path: Path, values: list[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.choice(np.array(values, np.uint8), (SIZE[0] // 10, SIZE[1] // 10))
        Image.fromarray(blocks.repeat(10, 0).repeat(10, 1)).save(path)

    def listed(path: Path, names: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")

    names = [f"2007_{i:06}" for i in range(images)]
    voc, context = root / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2010"
    listed(voc / "ImageSets/Segmentation/val.txt", names)
    listed(context / "ImageSets/SegmentationContext/val.txt", names)
    coco, city = root / "coco_stuff164k", root / "cityscapes"
    ade = root / "ade/ADEChallengeData2016"
    raw = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
    for i, name in enumerate(names):
        picture(voc / f"JPEGImages/{name}.jpg")
        mask(voc / f"SegmentationClass/{name}.png", [*range(21), 255])
        picture(context / f"JPEGImages/{name}.jpg")
        mask(context / f"SegmentationClassContext/{name}.png", list(range(60)))
        picture(coco / f"images/val2017/{i:012}.jpg")
        mask(coco / f"annotations/val2017/{i:012}.png", [*raw, 255])
        picture(city / f"leftImg8bit/val/town/town_{i:06}_leftImg8bit.png")
        mask(city / f"gtFine/val/town/town_{i:06}_gtFine_labelIds.png", list(range(34)))
        picture(ade / f"images/validation/ADE_val_{i:08}.jpg")
        mask(ade / f"annotations/validation/ADE_val_{i:08}.png", list(range(151)))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
