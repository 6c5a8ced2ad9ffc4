"""Images with label maps: the benchmark data sets in their usual folders, anybody's own, and drawn shapes.

Every data set gives ``dataset[i] -> (image, labels)``, a ``tv_tensors.Image`` uint8 [3, H, W] and a
``tv_tensors.Mask`` uint8 [H, W] whose values are indices into ``dataset.classes`` or 255 (ignored); above 255 classes
int32 and 65535, see :func:`fastzs.data.protocols.ignore_label`. The folders are laid out as mmsegmentation's
documentation of its data sets has them. A data set checks all its files when it is made; that they were found good is
kept in the cache, so that large ones are read once.
"""

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastzs.data import shapes
from fastzs.data.classes import ADE20K, CAMVID, COCO_STUFF, CONTEXT, VOC
from fastzs.data.label_ids import stuff_labels
from fastzs.data.masks import SUFFIXES as MASKS
from fastzs.data.masks import DataError, Meaning
from fastzs.data.pairs import Pair, PairsDataset, Sample, report
from fastzs.data.protocols import Protocol
from fastzs.files import read_text
from fastzs.pictures import SUFFIXES, visible_files


class FolderDataset(PairsDataset):
    """A folder of images and a folder of masks with the same names but for the ending (``a/b.jpg``, ``a/b.png``).

    Hidden files and folders are passed over, and links are followed.

    Args:
        images: folder, searched with its subfolders.
        masks: folder of masks (PNG, TIFF, BMP), laid out alike.
        classes: names, in the order of the labels.
        suffix: what stands between the image's name and ``.png`` in the mask's.
        reduce_zero_label, remap: see :class:`PairsDataset`.

    Raises:
        DataError: as :class:`PairsDataset`, and masks without an image.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        classes: Sequence[str],
        *,
        suffix: str = "",
        reduce_zero_label: bool = False,
        remap: Meaning | None = None,
    ):
        pairs = _folder_pairs(_path(images), _path(masks), suffix)
        super().__init__(pairs, classes, reduce_zero_label=reduce_zero_label, remap=remap, what=f"folder {images}")


class PairsFile(PairsDataset):
    """A text file with an image and its mask on each line, separated by a tab or, without tabs, by white space.

    Relative paths start at the file's folder. Empty lines and lines that begin with # are skipped.

    Raises:
        DataError: as :class:`PairsDataset`; the file cannot be read, a line does not hold two paths (named).
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        *,
        reduce_zero_label: bool = False,
        remap: Meaning | None = None,
    ):
        path = _path(path)
        pairs = []
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) != 2:
                raise DataError(f"pairs file {path}, line {number}: expected an image and a mask, got {line!r}")
            image, mask = (Path(part.strip()) for part in parts)
            # the name is part of the paths of results, which stay in their folder
            inside = not image.is_absolute() and ".." not in image.parts
            name = _stem(image.as_posix() if inside else image.name)
            pairs.append(Pair(name, path.parent / image, path.parent / mask))
        super().__init__(pairs, classes, reduce_zero_label=reduce_zero_label, remap=remap, what=f"pairs file {path}")


class VOC2012(PairsDataset):
    """PASCAL VOC 2012: 20 classes with the background ignored, or 21 with the background as class 0.

    Args:
        root: ``VOCdevkit/VOC2012`` or a folder that holds it; with ``JPEGImages``, ``SegmentationClass`` and
            ``ImageSets/Segmentation``. Masks of the augmented list (SBD) lie in ``SegmentationClassAug``.
        split: "train" (1,464), "val" (1,449), "trainval", or "trainaug" (10,582): the list ``trainaug.txt``, or
            ``train.txt`` and ``aug.txt``. An image's own VOC mask is preferred to the one from SBD.
        background: make the background a class.
    """

    def __init__(self, root: str | Path, split: str = "val", *, background: bool = False):
        root = home(root, "JPEGImages", "VOCdevkit/VOC2012", "VOC2012")
        lists = root / "ImageSets" / "Segmentation"
        files = [lists / f"{split}.txt"]
        if split == "trainaug" and not files[0].is_file():
            files = [lists / "train.txt", lists / "aug.txt"]
        ids = _ids(files)
        folders = [root / "SegmentationClass", root / "SegmentationClassAug"]
        own, sbd = ({path.stem for path in folder.glob("*.png")} for folder in folders)
        only_sbd = sbd - own
        pairs = [
            Pair(name, root / "JPEGImages" / f"{name}.jpg", folders[name in only_sbd] / f"{name}.png") for name in ids
        ]
        classes = ("background", *VOC) if background else VOC
        super().__init__(pairs, classes, reduce_zero_label=not background, what=f"VOC 2012 {split}")


class CocoStuff164k(PairsDataset):
    """COCO-Stuff 164k: 171 classes.

    Args:
        root: with ``images/{train,val}2017`` and ``annotations/{train,val}2017``, which holds the raw ``*.png`` of
            stuffthingmaps or ``*_labelTrainIds.png``, which are preferred.
        split: "train" (118,287) or "val" (5,000).
    """

    def __init__(self, root: str | Path, split: str = "val"):
        pairs, converted = coco_pairs(root, split, "coco_stuff164k", "_labelTrainIds")
        super().__init__(pairs, COCO_STUFF, remap={} if converted else stuff_labels(), what=f"COCO-Stuff 164k {split}")


class PascalContext(PairsDataset):
    """PASCAL-Context: 59 classes with the background ignored, or 60 with the background as class 0.

    Args:
        root: ``VOCdevkit/VOC2010`` or a folder that holds it; with ``JPEGImages``, ``SegmentationClassContext`` (masks
            converted to the labels 0 to 59 by mmsegmentation's script) and ``ImageSets/SegmentationContext``.
        split: "train" (4,996) or "val" (5,104).
        background: make the background a class.
        classes: some of the 59, in the order of the labels wanted; all other pixels are then ignored.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        background: bool = False,
        classes: Sequence[str] = CONTEXT,
    ):
        root = home(root, "JPEGImages", "VOCdevkit/VOC2010", "VOC2010")
        folder = root / "SegmentationClassContext"
        pairs = [
            Pair(name, root / "JPEGImages" / f"{name}.jpg", folder / f"{name}.png")
            for name in _ids([root / "ImageSets" / "SegmentationContext" / f"{split}.txt"])
        ]
        if background:
            super().__init__(pairs, ("background", *CONTEXT), what=f"PASCAL-Context {split}")
            return
        place = {name: label for label, name in enumerate(classes)}
        remap: Meaning = {value: place.get(name) for value, name in enumerate(CONTEXT, start=1)}
        super().__init__(pairs, classes, reduce_zero_label=True, remap=remap, what=f"PASCAL-Context {split}")


class ADE20K150(PairsDataset):
    """ADE20K with the 150 classes of the scene parsing challenge.

    Args:
        root: ``ADEChallengeData2016`` or a folder that holds it; with ``images`` and ``annotations``, each with
            ``training`` and ``validation``.
        split: "train" (20,210) or "val" (2,000).
    """

    def __init__(self, root: str | Path, split: str = "val"):
        root = home(root, "annotations", "ADEChallengeData2016", "ade/ADEChallengeData2016")
        folder = {"train": "training", "val": "validation"}.get(split, split)
        pairs = _folder_pairs(root / "images" / folder, root / "annotations" / folder, "")
        super().__init__(pairs, ADE20K, reduce_zero_label=True, what=f"ADE20K {split}")


class CamVid(PairsDataset):
    """CamVid with 11 classes, as distributed with SegNet.

    Args:
        root: with ``train``, ``val``, ``test`` and the masks in ``trainannot``, ``valannot``, ``testannot``.
        split: "train" (367), "val" (101) or "test" (233).
    """

    def __init__(self, root: str | Path, split: str = "val"):
        root = home(root, "trainannot", "camvid", "CamVid")
        pairs = _folder_pairs(root / split, root / f"{split}annot", "")
        super().__init__(pairs, CAMVID, also_ignored=(len(CAMVID),), what=f"CamVid {split}")


class ShapesDataset(Dataset[Sample]):
    """Scenes that the package draws (:mod:`fastzs.data.shapes`), with the 64 pairs and the 4 grounds as classes.

    An image follows from ``seed``, ``split`` and its index alone. The scenes of every split hold the unseen pairs as
    well; the training settings hide their labels, as in the published protocols.

    Args:
        split: any word; different ones give different images.
        length: number of images.
        size: side of the square images in pixels.
        seed: of the whole data set.
        objects: least and greatest number of objects of a scene.
        radius: least and greatest half-extent of an object in pixels; 10 to 30 of 128 if omitted.

    Raises:
        DataError: ``length`` or ``size`` is below 1.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 2000,
        size: int = 128,
        seed: int = 0,
        *,
        objects: tuple[int, int] = (2, 4),
        radius: tuple[float, float] | None = None,
    ):
        if length < 1 or size < 1:
            raise DataError(f"shapes: cannot draw {length} images of {size} x {size} pixels")
        self.classes = (*shapes.PAIRS, *shapes.GROUNDS)
        self.split, self.length, self.size, self.seed = split, length, size, seed
        self.objects, self.radius = objects, radius or (10 * size / 128, 30 * size / 128)
        self.what = f"shapes {split}"

    def __len__(self) -> int:
        return self.length

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Ids of the images, no two the same."""
        return tuple(f"{self.split}-{i:06}" for i in range(self.length))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"shapes: image {index} of {self.length}")
        seed = seed_of(self.seed, self.split, index)
        side = (self.size, self.size)
        scene = shapes.draw(1, side, seed=seed, objects=self.objects, radius=self.radius)
        return tv_tensors.Image(scene.images[0]), tv_tensors.Mask(scene.labels(self.classes)[0])


def open_dataset(protocol: Protocol, root: str | Path | None, split: str) -> PairsDataset | ShapesDataset:
    """The data set that a named protocol is about.

    Args:
        root: its folder; not needed for shapes.
        split: as the data set calls it; under a protocol with ``drop_unseen``, "train" and "trainaug" are without
            the images that show unseen classes.

    Raises:
        ValueError: the protocol is not about one of the data sets here, or ``root`` is missing.
        DataError: from the data set.
    """
    if protocol.dataset == "shapes":
        sizes = {"train": 2000, "val": 200}
        return ShapesDataset(split, sizes.get(split, 200))
    from fastzs.data import benchmark_sets  # which builds on this module

    background = protocol.background == "class"
    kinds: dict[str, Callable[..., PairsDataset]] = {
        "voc2012": partial(VOC2012, background=background),
        "coco_stuff164k": CocoStuff164k,
        "coco_object": benchmark_sets.CocoObject,
        "cityscapes": benchmark_sets.Cityscapes,
        "pascal_context": partial(
            PascalContext, background=background, classes=CONTEXT if background else protocol.classes
        ),
        "ade20k": ADE20K150,
        "camvid": CamVid,
    }
    if protocol.dataset not in kinds:
        raise ValueError(
            f"protocol {protocol.name} is not about a data set known here; tell its folders of images and masks, or a "
            "file of pairs"
        )
    if root is None:
        raise ValueError(f"protocol {protocol.name} needs the folder of its data set")
    found = kinds[protocol.dataset](root, split)
    return found.without(protocol.unseen) if protocol.drop_unseen and split.startswith("train") else found


def seed_of(*parts: int | str) -> int:
    """A seed for what ``parts`` name, 0 to 2 ** 32 - 1 (torch's CPU generator reads no more than 32 bits)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")


def home(root: str | Path, mark: str, *below: str) -> Path:
    """``root``, or the one of the folders ``below`` it, that holds ``mark``."""
    root = _path(root)
    places = [root, *(root / part for part in below)]
    for place in places:
        if (place / mark).is_dir():
            return place
    raise DataError(f"{root}: there is no folder {mark} in it, nor in {', '.join(below)} below it")


def coco_pairs(root: str | Path, split: str, below: str, suffix: str) -> tuple[list[Pair], bool]:
    """Images with their label files, and whether these are converted ones."""
    root = home(root, "annotations", below, "coco_stuff164k")
    images, masks = root / "images" / f"{split}2017", root / "annotations" / f"{split}2017"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder")
    pictures = sorted(path for path in images.iterdir() if re.fullmatch(r"\d{12}\.jpg", path.name))
    converted = any((masks / f"{path.stem}{suffix}.png").is_file() for path in pictures)
    ending = suffix if converted else ""
    return [Pair(path.stem, path, masks / f"{path.stem}{ending}.png") for path in pictures], converted


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError) as error:
        there = sorted(file.stem for file in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        near = f"; lists there: {', '.join(there)}" if there else ""
        raise DataError(f"{path} cannot be read: {error}{near}") from error


def _ids(files: Sequence[Path]) -> list[str]:
    ids = [line.split()[0] for file in files for line in _lines(file) if line.strip()]
    return list(dict.fromkeys(ids))


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _path(given: str | Path) -> Path:
    return Path(os.path.expanduser(given))


def _folder_pairs(images: Path, masks: Path, suffix: str) -> list[Pair]:
    """Pairs of two folders, sorted by name; the masks of images that have none are named all the same."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder")
    inside = masks if masks != images and masks.is_relative_to(images) else None
    pictures = _by_name(images, SUFFIXES, "", inside)
    found = _by_name(masks, MASKS, suffix, None)
    if alone := sorted(found.keys() - pictures.keys()):
        near = difflib.get_close_matches(alone[0], pictures, n=1)
        hint = f" (nearest image: {near[0]})" if near else ""
        files = [found[name].relative_to(masks).as_posix() for name in alone]
        raise DataError(report(f"folder {masks}", f"masks have no image in {images}{hint}", files))
    return [Pair(name, path, found.get(name, masks / f"{name}{suffix}.png")) for name, path in pictures.items()]


def _by_name(folder: Path, kinds: frozenset[str], suffix: str, without: Path | None) -> dict[str, Path]:
    """Files of some kinds by their path below ``folder``, less the suffix and the ending.

    Accented letters are one character or two, as the system that named a file has it; here they are one.
    """
    found: dict[str, Path] = {}
    for path in sorted(visible_files(folder)):
        stem = _stem(path.relative_to(folder).as_posix())
        if path.suffix.lower() not in kinds or not stem.endswith(suffix) or (without and path.is_relative_to(without)):
            continue
        name = unicodedata.normalize("NFC", stem.removesuffix(suffix))
        if name in found:
            raise DataError(f"{folder}: {found[name].name} and {path.name} have the same name")
        found[name] = path
    return found
