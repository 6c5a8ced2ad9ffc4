"""What the numbers in published label files mean, where they are no labels yet."""

from fastzs.data.masks import Meaning

# ids of the raw COCO-Stuff files (stuffthingmaps) that never occur
_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# Cityscapes' ids of the classes that are trained and scored, in their order
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
UNLABELLED = 255


def stuff_labels() -> Meaning:
    """Raw ids of COCO-Stuff -> labels 0 to 170; None where there is nothing."""
    ids = [raw for raw in range(182) if raw not in _GAPS]
    return {**{raw: label for label, raw in enumerate(ids)}, **dict.fromkeys(_GAPS)}


def object_labels() -> Meaning:
    """Raw ids of COCO-Stuff -> COCO-Object's labels: 1 to 80 for things, 0 for stuff and for unlabelled pixels."""
    labels: dict[int | tuple[int, int, int], int | None] = dict.fromkeys((*range(91, 182), *_GAPS, UNLABELLED), 0)
    for raw, label in stuff_labels().items():
        if isinstance(raw, int) and raw < 90 and label is not None:
            labels[raw] = label + 1
    return labels


def cityscapes_labels() -> Meaning:
    """Cityscapes' ids -> labels 0 to 18; None for all that is not scored."""
    return {**dict.fromkeys(range(256)), **{raw: label for label, raw in enumerate(_CITYSCAPES_IDS)}}
