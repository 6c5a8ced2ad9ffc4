"""The eight benchmarks: words, label conversion and folders."""

import numpy as np
import pytest
from PIL import Image

from fastzs.data.benchmarks import BENCHMARKS, SYSTEMS
from fastzs.data.classes import CITYSCAPES, COCO_OBJECT, COCO_STUFF
from fastzs.data.datasets import DataError, open_dataset
from fastzs.data.label_ids import cityscapes_labels, object_labels, stuff_labels

from .benchmark_folders import make


def test_there_are_eight_and_every_class_has_words():
    assert len(BENCHMARKS) == 8
    for benchmark in BENCHMARKS.values():
        for system in SYSTEMS:
            phrases = benchmark.phrases(system)
            assert len(phrases) == len(benchmark.rules.classes)
            assert all(phrases)
            assert benchmark.of(system).threshold == 0 or benchmark.rules.background == "class"


@pytest.mark.parametrize(
    ("name", "system", "count"),
    [("voc21", "naclip", 56), ("voc21", "proxyclip", 46), ("voc21", "clearclip", 21), ("coco-object", "sclip", 113)],
)
def test_numbers_of_words_are_those_published(name, system, count):
    assert sum(map(len, BENCHMARKS[name].phrases(system))) == count


def test_raw_ids_of_coco_stuff():
    labels = stuff_labels()
    assert sorted(label for label in labels.values() if label is not None) == list(range(171))
    assert (labels[0], labels[12], labels[89], labels[91], labels[181]) == (0, 11, 79, 80, 170)
    assert labels[11] is None
    assert (COCO_STUFF[labels[0]], COCO_STUFF[labels[17]]) == ("person", "dog")
    things = object_labels()
    assert things[0] == 1
    assert things[89] == 80
    assert things[91] == things[255] == things[11] == 0
    assert COCO_OBJECT[things[17]] == "dog"


def test_ids_of_cityscapes():
    labels = cityscapes_labels()
    assert {CITYSCAPES[labels[raw]] for raw in (7, 26, 33)} == {"road", "car", "bicycle"}
    assert labels[0] is labels[30] is labels[255] is None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    make(folder)
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_folder_is_read_as_it_is_published(name, root):
    dataset = open_dataset(BENCHMARKS[name].rules, root, "val")
    assert len(dataset) == 2
    for picture, truth in dataset:
        assert picture.shape[1:] == truth.shape == (30, 40)
        values = set(truth.unique().tolist())
        assert values <= {*range(len(BENCHMARKS[name].rules.classes)), 255}
        assert name != "coco-object" or 255 not in values


def test_converted_files_are_preferred(tmp_path):
    make(tmp_path)
    stuff, things = (open_dataset(BENCHMARKS[n].rules, tmp_path, "val") for n in ("coco-stuff171", "coco-object"))
    before = [dataset[0][1].numpy().copy() for dataset in (stuff, things)]
    for i in range(2):
        mask = tmp_path / f"coco_stuff164k/annotations/val2017/{i:012}.png"
        for dataset, suffix in ((stuff, "labelTrainIds"), (things, "instanceTrainIds")):
            labels = dataset[i][1].numpy().astype(np.uint8)
            Image.fromarray(labels).save(mask.with_name(f"{i:012}_{suffix}.png"))
    after = [open_dataset(BENCHMARKS[n].rules, tmp_path, "val") for n in ("coco-stuff171", "coco-object")]
    for dataset, labels in zip(after, before, strict=True):
        assert "TrainIds" in dataset.pairs[0].mask.name
        assert (dataset[0][1].numpy() == labels).all()


def test_missing_files_are_named(tmp_path):
    make(tmp_path)
    (tmp_path / "cityscapes/gtFine/val/town/town_000001_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"town_000001_gtFine_labelIds\.png"):
        open_dataset(BENCHMARKS["cityscapes"].rules, tmp_path, "val")
