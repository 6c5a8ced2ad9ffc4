"""``fastzs evaluate --benchmarks`` and ``fastzs benchmarks`` on tiny copies of the eight data sets."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs import clip as clip_module
from fastzs.cli import main
from fastzs.data.benchmarks import BENCHMARKS, LONG_SIDE
from fastzs.data.datasets import open_dataset
from fastzs.models import NACLIP
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

from .data.benchmark_folders import make
from .tiny import tiny_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make(folder)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.manual_seed(0)
    network = NACLIP(tiny_clip()).visual.state_dict()

    class Same(NACLIP):  # the same random weights each time it is loaded
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.visual.load_state_dict(network)

    Same.__name__ = "NACLIP"
    monkeypatch.setattr(clip_module, "load", lambda *_, **__: tiny_clip())
    monkeypatch.setitem(__import__("fastzs.registry").registry._systems, "naclip", _as(Same))


def _as(kind):
    import dataclasses

    from fastzs.registry import system

    return dataclasses.replace(system("naclip"), kind=kind)


def evaluate(data, wanted, *more):
    return main(
        ["evaluate", "--benchmarks", wanted, "--data", str(data), "--model", "naclip", "--templates", "single", *more]
    )


def test_figures_are_those_of_an_independent_count(data, tmp_path, capsys):
    assert evaluate(data, "voc21,cityscapes", "--output", str(tmp_path / "out"), "--precision", "fp32") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| mIoU | voc21 | cityscapes | mean |"
    for name, text in zip(("voc21", "cityscapes"), printed[2].split("|")[2:4], strict=True):
        benchmark = BENCHMARKS[name]
        setting, classes = benchmark.of("naclip"), benchmark.rules.classes
        from fastzs.registry import system

        model = system("naclip").kind(tiny_clip(), guide="enlarged", working_side=1 << 20)
        segmenter = Segmenter(model)
        segmenter.short_side, segmenter.crop, segmenter.stride = setting.short_side, setting.crop, setting.stride
        segmenter.long_side, segmenter.antialias = LONG_SIDE, False
        vocabulary = Vocabulary.of_phrases(classes, benchmark.phrases("naclip"), "single")
        counts = np.zeros((len(classes), 3))
        for picture, truth in open_dataset(benchmark.rules, data, "val"):
            found = segmenter(torch.Tensor(picture).to(torch.uint8), vocabulary, scores=True)
            labels, truth = found.labels.numpy().copy(), truth.numpy()
            labels[found.scores.numpy() < setting.threshold] = 0
            counted = truth != 255
            for c in range(len(classes)):
                a, b = labels[counted] == c, truth[counted] == c
                counts[c] += ((a & b).sum(), (a | b).sum(), b.sum())
        iou = counts[counts[:, 1] > 0]
        assert float(text) == pytest.approx(100 * (iou[:, 0] / iou[:, 1]).mean(), abs=0.02)


def test_what_was_scored_is_not_scored_again(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert evaluate(data, "voc20", "--output", str(out)) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("fastzs.evaluate.evaluate", lambda *_, **__: pytest.fail("scored again"))
    assert evaluate(data, "voc20", "--output", str(out)) == 0
    assert capsys.readouterr().out == first
    saved = json.loads((out / "voc20.json").read_text())
    assert saved["settings"]["benchmark"] == "voc20"
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        evaluate(data, "voc20", "--output", str(out), "--refine", "none")


def test_other_data_and_damaged_scores_are_scored_again(tmp_path, capsys):
    make(tmp_path / "data")
    out = tmp_path / "out"
    assert evaluate(tmp_path / "data", "voc20", "--output", str(out)) == 0
    first = capsys.readouterr().out
    for mask in (tmp_path / "data").rglob("SegmentationClass/*.png"):
        labels = np.array(Image.open(mask))
        Image.fromarray(labels[::-1].copy()).save(mask)  # of the same size
    assert evaluate(tmp_path / "data", "voc20", "--output", str(out)) == 0
    assert (second := capsys.readouterr().out) != first
    (out / "voc20.json").write_text("{")
    assert evaluate(tmp_path / "data", "voc20", "--output", str(out)) == 0
    assert capsys.readouterr().out == second


def test_missing_data_are_named_before_anything_is_scored(data, tmp_path, capsys, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr("fastzs.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    gone = sorted((tmp_path / "data").rglob("*_gtFine_label*.png"))[0]
    gone.unlink()
    shutil.rmtree(next((tmp_path / "data").rglob("ADEChallengeData2016")))
    assert evaluate(tmp_path / "data", "all") == 2
    problems = capsys.readouterr().err
    assert gone.name in problems
    assert "ade150: " in problems
    assert "voc21" not in problems


def test_an_own_operator_stitched_and_refined(data, tmp_path, capsys):
    """A function in a file runs under all of it, and gives what the built-in operator gives that it computes."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def keys(block):\n"
        "    weights = (block.k[:, :, block.prefix :] @ block.k.mT * block.scale).softmax(-1)\n"
        "    return weights @ block.v\n"
    )
    rows = []
    for operator in (f"{path}:keys", "kk"):
        more = ["--operator", operator, "--windows", "stitched", "--refine", "pamr", "--precision", "fp32"]
        assert evaluate(data, "context59", *more) == 0
        rows.append(float(capsys.readouterr().out.splitlines()[2].split("|")[2]))
    assert rows[0] == pytest.approx(rows[1], abs=0.1)  # pixels that tie within rounding


@pytest.mark.slow
def test_all_eight(data, tmp_path, capsys):
    assert evaluate(data, "all", "--output", str(tmp_path / "out")) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == row.count("|") == 11
    assert len(list((tmp_path / "out").glob("*.json"))) == 8


def test_list(data, tmp_path, capsys):
    assert main(["benchmarks", "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 images") == 8
    assert main(["benchmarks", "--data", str(tmp_path)]) == 0
    assert "there is no folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--benchmarks", "voc22", "--data", "x", "--model", "naclip"],
            "unknown benchmark 'voc22'; nearest known: voc2",
        ),
        (["--benchmarks", "all", "--model", "naclip"], "--data DIR"),
        (["--benchmarks", "voc20", "--data", "nowhere", "--model", "naclip"], "there is no folder JPEGImages"),
    ],
)
def test_bad_input(arguments, words, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err
