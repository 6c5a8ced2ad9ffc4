"""Evaluation protocols: which classes, which of them unseen in training, and what becomes of the background.

A number without its protocol means little: PASCAL-Context alone is used in three ways that cannot be compared.
``context50-10-bg`` (MaskCLIP+, and with ZegCLIP's class list) has 60 classes with the background among them;
``context49-10`` (OTSeg) takes the same ten names as unseen among the 59 classes without it; ``context49-10-cascade``
(Cascade-CLIP's configuration) takes ten others.

``pascal5i-0`` to ``-3`` are PASCAL-5i's folds (Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC
2017): VOC with its background as a class, five classes unseen in each. They are scored one class at a time, see
:mod:`fastzs.folds`.

``zs3-voc-2`` to ``-10`` and ``zs3-context-2`` to ``-10`` are ZS3's (Bucher et al., NeurIPS 2019): 21 and 60 classes
with the background as a seen class, two to ten of them unseen, each list the next one's beginning; images that show
an unseen class are left out of training. ``context33-4`` is CaGNet's (Gu et al., ACM MM 2020): VOC's classes and 13
more of PASCAL-Context's, all other pixels ignored.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastzs import yaml_files
from fastzs.data.classes import ADE20K, CAMVID, CITYSCAPES, COCO_OBJECT, COCO_STUFF, CONTEXT, VOC
from fastzs.data.shapes import GROUNDS, PAIRS, UNSEEN_PAIRS

IGNORE, WIDE_IGNORE = 255, 65535  # the label of ignored pixels, up to 255 classes and above


def ignore_label(classes: int) -> int:
    """The label that marks ignored pixels among labels of so many classes."""
    return IGNORE if classes <= IGNORE else WIDE_IGNORE


@dataclass(frozen=True)
class Protocol:
    """A list of classes and its split.

    Attributes:
        name: as it is printed beside results.
        classes: names in the order of the labels; label ``i`` is ``classes[i]``, :func:`ignore_label` is ignored.
        unseen: indices of the classes whose labels training must not read, ascending; empty: all are seen.
        dataset: the data set it belongs to, see :func:`fastzs.data.datasets.open_dataset`; "folder" for own ones.
        background: what becomes of pixels of no class: "ignored", "class" (they are one of the classes) or "none"
            (every pixel has a class).
        reduce_zero_label: 0 in the mask files means "no class" and all labels there are one higher than here.
        drop_unseen: images that show an unseen class are left out of training; otherwise they are trained on, and
            these pixels are ignored.
        synonyms: further names of each class, or empty.

    Raises:
        ValueError: no classes, a name twice, an index out of range or twice, more than 65,535 classes.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[int, ...] = ()
    dataset: str = "folder"
    background: str = "ignored"
    reduce_zero_label: bool = False
    drop_unseen: bool = False
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "unseen", tuple(sorted(self.unseen)))
        if not self.classes or len(self.classes) > WIDE_IGNORE:
            raise ValueError(
                f"protocol {self.name}: {len(self.classes)} classes; expected 1 to {WIDE_IGNORE}, since the label "
                f"{WIDE_IGNORE} marks ignored pixels"
            )
        if twice := sorted({name for name in self.classes if self.classes.count(name) > 1}):
            raise ValueError(f"protocol {self.name}: classes given twice: {', '.join(twice)}")
        wrong = [i for i in self.unseen if not 0 <= i < len(self.classes)]
        if wrong or len(set(self.unseen)) < len(self.unseen) or len(self.unseen) == len(self.classes):
            raise ValueError(
                f"protocol {self.name}: unseen: expected different indices from 0 to {len(self.classes) - 1} that "
                f"leave at least one class to be seen, got {list(self.unseen)}"
            )
        if self.background not in ("ignored", "class", "none"):
            raise ValueError(
                f"protocol {self.name}: background: expected 'ignored', 'class' or 'none', got {self.background!r}"
            )

    @property
    def entries(self) -> list[str | dict[str, list[str]]]:
        """The classes with their synonyms, as :class:`fastzs.Vocabulary` takes them."""
        others = self.synonyms or ((),) * len(self.classes)
        return [{name: list(more)} if more else name for name, more in zip(self.classes, others, strict=True)]

    @property
    def seen(self) -> tuple[int, ...]:
        """Indices of the seen classes, ascending."""
        return tuple(i for i in range(len(self.classes)) if i not in set(self.unseen))

    def __str__(self) -> str:
        split = f"{len(self.seen)} seen, {len(self.unseen)} unseen" if self.unseen else "all seen"
        return f"{self.name} ({len(self.classes)} classes, {split}, background: {self.background})"

    def check_classes(self, classes: Sequence[str], what: str) -> None:
        """See that a class list is this protocol's.

        Raises:
            ValueError: it has another length, or another name somewhere; ``what`` says whose list it is.
        """
        if len(classes) != len(self.classes):
            raise ValueError(f"{what} has {len(classes)} classes, but protocol {self.name} has {len(self.classes)}")
        for i, (given, wanted) in enumerate(zip(classes, self.classes, strict=True)):
            if given != wanted:
                raise ValueError(f"{what}: class {i} is {given!r}, but in protocol {self.name} it is {wanted!r}")


def _indices(classes: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    return tuple(classes.index(name) for name in names)


# in ZS3's order; all ten are those of MaskCLIP+, also OTSeg's
_ZS3_CONTEXT = (
    "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "aeroplane", "keyboard"
)  # fmt: skip
_CASCADE_UNSEEN = (
    "aeroplane", "bed", "bedclothes", "boat", "bottle", "car", "cloth", "cow", "keyboard", "plate"
)  # fmt: skip
_VOC_21 = ("background", *VOC)
_CONTEXT_60 = ("background", *CONTEXT)
_ZS3_VOC = ("cow", "motorbike", "aeroplane", "sofa", "cat", "tvmonitor", "train", "bottle", "chair", "pottedplant")
_CONTEXT_33 = (
    *("table" if name == "diningtable" else name for name in VOC),
    "sky", "grass", "ground", "road", "building", "tree", "water", "mountain", "wall", "floor", "track",
    "keyboard", "ceiling"
)  # fmt: skip
_SHAPES = (*PAIRS, *GROUNDS)


def _zs3(name: str, classes: tuple[str, ...], unseen: Sequence[str], dataset: str) -> list[Protocol]:
    return [
        Protocol(
            f"zs3-{name}-{count}",
            classes,
            _indices(classes, unseen[:count]),
            dataset,
            background="class",
            drop_unseen=True,
        )
        for count in (2, 4, 6, 8, 10)
    ]


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("voc15-5", VOC, tuple(range(15, 20)), "voc2012", reduce_zero_label=True),
        *(
            Protocol(f"pascal5i-{i}", _VOC_21, tuple(range(5 * i + 1, 5 * i + 6)), "voc2012", background="class")
            for i in range(4)
        ),
        Protocol(
            "coco156-15",
            COCO_STUFF,
            (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
            "coco_stuff164k",
        ),
        Protocol(
            "context50-10-bg", _CONTEXT_60, _indices(_CONTEXT_60, _ZS3_CONTEXT), "pascal_context", background="class"
        ),
        Protocol("context49-10", CONTEXT, _indices(CONTEXT, _ZS3_CONTEXT), "pascal_context", reduce_zero_label=True),
        Protocol(
            "context49-10-cascade",
            CONTEXT,
            _indices(CONTEXT, _CASCADE_UNSEEN),
            "pascal_context",
            reduce_zero_label=True,
        ),
        *_zs3("voc", _VOC_21, _ZS3_VOC, "voc2012"),
        *_zs3("context", _CONTEXT_60, _ZS3_CONTEXT, "pascal_context"),
        Protocol(
            "context33-4",
            _CONTEXT_33,
            _indices(_CONTEXT_33, _ZS3_CONTEXT[:4]),
            "pascal_context",
            reduce_zero_label=True,
        ),
        Protocol("voc21", _VOC_21, (), "voc2012", background="class"),
        Protocol("voc20", VOC, (), "voc2012", reduce_zero_label=True),
        Protocol("context60", _CONTEXT_60, (), "pascal_context", background="class"),
        Protocol("context59", CONTEXT, (), "pascal_context", reduce_zero_label=True),
        Protocol("coco-object", COCO_OBJECT, (), "coco_object", background="class"),
        Protocol("coco-stuff171", COCO_STUFF, (), "coco_stuff164k"),
        Protocol("cityscapes", CITYSCAPES, (), "cityscapes"),
        Protocol("ade150", ADE20K, (), "ade20k", reduce_zero_label=True),
        Protocol("camvid", CAMVID, (), "camvid"),
        Protocol("shapes", _SHAPES, _indices(_SHAPES, UNSEEN_PAIRS), "shapes", background="none"),
    )
}


def protocol(name: str | Path) -> Protocol:
    """A protocol by its name, or one's own from a YAML file.

    The file holds ``classes`` (a list of names, or of names with a list of synonyms) and, as far as needed, ``name``
    (the file's name if omitted),
    ``unseen`` (names or indices), ``background``, ``reduce_zero_label`` and ``drop_unseen`` as in
    :class:`Protocol`.

    Raises:
        ValueError: unknown name (the nearest known are given); the file cannot be read, has an unknown key (the
            nearest known is given), a value of another type or an unseen class that is not among the classes.
    """
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    path = Path(os.path.expanduser(name))
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(str(name), PROTOCOLS, n=3, cutoff=0.3) or list(PROTOCOLS)
        raise ValueError(f"unknown protocol {str(name)!r}; nearest known: {', '.join(near)}; own ones are .yaml files")
    root = yaml_files.read(path, "protocol")
    if root is None:
        raise ValueError(f"protocol {path}: is empty; expected a mapping with a list of names under 'classes'")
    content = root.mapping("a mapping with a list of names under 'classes'")
    known = ("name", "classes", "unseen", "background", "reduce_zero_label", "drop_unseen")
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise value.error(f"unknown key {key!r}; nearest known: {near!r}")
    if "classes" not in content:
        raise root.wrong("a mapping with a list of names under 'classes'")
    entries = yaml_files.class_entries(content["classes"])
    classes = tuple(entry if isinstance(entry, str) else next(iter(entry)) for entry in entries)
    synonyms = tuple(() if isinstance(entry, str) else tuple(*entry.values()) for entry in entries)
    return Protocol(
        name=content["name"].text() if "name" in content else path.stem,
        classes=classes,
        unseen=_unseen(classes, content["unseen"]) if "unseen" in content else (),
        background=content["background"].text() if "background" in content else "ignored",
        synonyms=synonyms if any(synonyms) else (),
        reduce_zero_label="reduce_zero_label" in content and content["reduce_zero_label"].flag(),
        drop_unseen="drop_unseen" in content and content["drop_unseen"].flag(),
    )


def _unseen(classes: tuple[str, ...], given: yaml_files.Item) -> tuple[int, ...]:
    """Indices of classes by name or, where no class is called so, by number."""
    found = []
    for item in [] if given.is_null else given.items("a list of names or numbers of classes"):
        name = item.text()
        if name in classes:
            found.append(classes.index(name))
        elif item.is_number:
            found.append(item.number())
        else:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)[0]
            raise item.error(f"unseen class {name!r} is none of the classes; nearest: {near!r}")
    return tuple(found)
