"""Cityscapes and COCO-Object, whose label files are converted while they are read.

Cityscapes is read from its own ``labelIds`` files and COCO-Object from the raw ``stuffthingmaps`` of COCO-Stuff; files
that were converted for mmsegmentation are read as well.
"""

from pathlib import Path

from fastzs.data.classes import CITYSCAPES, COCO_OBJECT
from fastzs.data.datasets import coco_pairs, home
from fastzs.data.label_ids import cityscapes_labels, object_labels
from fastzs.data.masks import Meaning
from fastzs.data.pairs import Pair, PairsDataset


class Cityscapes(PairsDataset):
    """Cityscapes with 19 classes.

    Args:
        root: with ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png`` and ``gtFine/{train,val}/CITY/``
            ``*_gtFine_labelIds.png`` (or ``*_gtFine_labelTrainIds.png``, which are preferred).
        split: "train" (2,975) or "val" (500).
    """

    def __init__(self, root: str | Path, split: str = "val"):
        root = home(root, "leftImg8bit", "cityscapes")
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        names = [f"{path.parent.name}/{path.name.removesuffix('_leftImg8bit.png')}" for path in images]
        truth = root / "gtFine" / split
        converted = any((truth / f"{name}_gtFine_labelTrainIds.png").is_file() for name in names)
        suffix = "_gtFine_labelTrainIds.png" if converted else "_gtFine_labelIds.png"
        pairs = [Pair(name, path, truth / f"{name}{suffix}") for name, path in zip(names, images, strict=True)]
        remap: Meaning = {} if converted else cityscapes_labels()
        super().__init__(pairs, CITYSCAPES, remap=remap, what=f"Cityscapes {split}")


class CocoObject(PairsDataset):
    """COCO-Object: the 80 things of COCO and, as class 0, everything else; no pixel is ignored.

    Args:
        root: as for :class:`fastzs.data.datasets.CocoStuff164k`, with the raw files, or with
            ``*_instanceTrainIds.png``, which are preferred.
        split: "train" or "val".
    """

    def __init__(self, root: str | Path, split: str = "val"):
        pairs, converted = coco_pairs(root, split, "coco_object", "_instanceTrainIds")
        super().__init__(pairs, COCO_OBJECT, remap={} if converted else object_labels(), what=f"COCO-Object {split}")
