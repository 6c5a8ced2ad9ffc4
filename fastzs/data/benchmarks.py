"""The eight benchmarks of the training-free line: protocols, the words each system asks for, and its settings there.

Sources: the published configurations of SCLIP, NACLIP, ClearCLIP, ProxyCLIP, ResCLIP and PEARL. Settings that differ
from benchmark to benchmark can only have been chosen on the validation sets that are scored; say so beside any number.
"""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from fastzs import yaml_files
from fastzs.data.protocols import PROTOCOLS, Protocol

SYSTEMS = ("sclip", "clearclip", "naclip", "resclip", "proxyclip", "pearl")
LONG_SIDE = 2048  # images are resized to (2048, short side), whichever is reached first, without antialiasing


@dataclass(frozen=True)
class Setting:
    """How one system is run on one benchmark.

    Attributes:
        short_side: of the resized images.
        crop, stride: of the windows; 0: images are taken whole.
        threshold: pixels with a lower score get label 0, which is the background; 0 where there is none.
        options: of the model.
    """

    short_side: int
    crop: int
    stride: int
    threshold: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One of the eight.

    Attributes:
        protocol: its name.
        words: files of words in ``fastzs/data/words``, by system; "" for all others.
        settings: by system, for each of :data:`SYSTEMS`.
        folder: what the data folder has to hold, for messages.
    """

    protocol: str
    words: dict[str, str]
    settings: dict[str, Setting]
    folder: str

    def of(self, system: str) -> Setting:
        """The published settings of a system here, one of :data:`SYSTEMS`."""
        return self.settings[system]

    def phrases(self, system: str) -> list[list[str]]:
        """What is asked for each class of the protocol, in the order of its labels."""
        name = self.words.get(system, self.words[""])
        path = Path(str(resources.files("fastzs.data") / "words" / f"{name}.yaml"))
        root = yaml_files.read(path, "words")
        assert root is not None
        entries = yaml_files.class_entries(root)
        found = [[e] if isinstance(e, str) else [n for name, more in e.items() for n in (name, *more)] for e in entries]
        assert len(found) == len(PROTOCOLS[self.protocol].classes), path
        return found

    @property
    def rules(self) -> Protocol:
        return PROTOCOLS[self.protocol]


def _voc_words(classes: int) -> dict[str, str]:
    if classes == 20:
        return {"": "voc20_sclip", "clearclip": "voc20_proxyclip", "proxyclip": "voc20_proxyclip"}
    return {"": "voc21_sclip", "clearclip": "voc21_clearclip", "proxyclip": "voc21_proxyclip"}


def _settings(
    *,
    sclip: Setting,
    clearclip: Setting,
    naclip: Setting,
    proxyclip: Setting,
    resclip: dict[str, Any],
    pearl: dict[str, Any],
) -> dict[str, Setting]:
    windows = Setting(naclip.short_side, naclip.crop, naclip.stride, naclip.threshold, resclip)
    return {
        "sclip": sclip,
        "clearclip": clearclip,
        "naclip": naclip,
        "proxyclip": proxyclip,
        "resclip": windows,
        "pearl": Setting(naclip.short_side, naclip.crop, naclip.stride, naclip.threshold, pearl),
    }


def _feedback(certain: float, mix: float, strength: float, feedback: float) -> dict[str, Any]:
    return {"certain": certain, "mix": mix, "strength": strength, "feedback": feedback}


VOC_FOLDER = "VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets/Segmentation/val.txt"
CONTEXT_FOLDER = "VOCdevkit/VOC2010 with JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext/val.txt"
COCO_FOLDER = "coco_stuff164k with images/val2017 and annotations/val2017 (raw stuffthingmaps or converted files)"
BENCHMARKS = {
    benchmark.protocol: benchmark
    for benchmark in (
        Benchmark(
            "voc21",
            _voc_words(21),
            _settings(
                sclip=Setting(336, 224, 112, 0.1, {"scale": 65.0, "area": 0.1}),
                clearclip=Setting(448, 448, 224, 0.5),
                naclip=Setting(336, 0, 0, 0.1),
                proxyclip=Setting(336, 336, 112, 0.2),
                resclip=_feedback(0.50, 0.3, 2.2, 0.7),
                pearl={},
            ),
            VOC_FOLDER,
        ),
        Benchmark(
            "context60",
            {"": "context60"},
            _settings(
                sclip=Setting(336, 224, 112, 0.1, {"scale": 50.0}),
                clearclip=Setting(448, 448, 224, 0.15),
                naclip=Setting(336, 224, 112, 0.1),
                proxyclip=Setting(336, 336, 112, 0.15),
                resclip=_feedback(0.30, 0.3, 1.8, 0.7),
                pearl={},
            ),
            CONTEXT_FOLDER,
        ),
        Benchmark(
            "coco-object",
            {"": "coco_object_sclip", "clearclip": "coco_object_clearclip", "proxyclip": "coco_object_proxyclip"},
            _settings(
                sclip=Setting(336, 224, 112, 0.1, {"scale": 50.0}),
                clearclip=Setting(448, 448, 224, 0.4),
                naclip=Setting(336, 224, 112, 0.1),
                proxyclip=Setting(336, 336, 112, 0.25),
                resclip=_feedback(0.11, 0.4, 1.8, 0.7),
                pearl={},
            ),
            COCO_FOLDER,
        ),
        Benchmark(
            "voc20",
            _voc_words(20),
            _settings(
                sclip=Setting(336, 224, 112),
                clearclip=Setting(448, 448, 224),
                naclip=Setting(336, 0, 0),
                proxyclip=Setting(336, 336, 112),
                resclip=_feedback(0.10, 0.6, 2.1, 0.6),
                pearl={},
            ),
            VOC_FOLDER,
        ),
        Benchmark(
            "context59",
            {"": "context59"},
            _settings(
                sclip=Setting(336, 224, 112),
                clearclip=Setting(448, 448, 224),
                naclip=Setting(336, 224, 112),
                proxyclip=Setting(336, 336, 112),
                resclip=_feedback(0.25, 0.4, 1.8, 0.7),
                pearl={},
            ),
            CONTEXT_FOLDER,
        ),
        Benchmark(
            "coco-stuff171",
            {"": "coco_stuff171"},
            _settings(
                sclip=Setting(448, 224, 112),
                clearclip=Setting(448, 448, 224),
                naclip=Setting(336, 224, 112),
                proxyclip=Setting(336, 336, 112),
                resclip=_feedback(0.11, 0.4, 1.8, 0.7),
                pearl={},
            ),
            COCO_FOLDER,
        ),
        Benchmark(
            "cityscapes",
            {"": "cityscapes"},
            _settings(
                sclip=Setting(560, 224, 112),
                clearclip=Setting(448, 224, 224),
                naclip=Setting(560, 224, 112),
                proxyclip=Setting(448, 224, 112),
                resclip=_feedback(0.10, 0.2, 2.1, 0.6),
                pearl={"cells": 224, "key_weight": 0.3},
            ),
            "cityscapes with leftImg8bit/val and gtFine/val",
        ),
        Benchmark(
            "ade150",
            {"": "ade20k150"},
            _settings(
                sclip=Setting(336, 224, 112),
                clearclip=Setting(448, 448, 224),
                naclip=Setting(336, 224, 112),
                proxyclip=Setting(448, 336, 112),
                resclip=_feedback(0.25, 0.3, 2.1, 0.7),
                pearl={"key_weight": 0.3},
            ),
            "ade/ADEChallengeData2016 with images/validation and annotations/validation",
        ),
    )
}
