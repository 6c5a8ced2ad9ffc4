import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastzs
from fastzs.cli import main
from fastzs.commands.scores import show, show_fold
from fastzs.data.datasets import DataError, FolderDataset, ShapesDataset
from fastzs.data.protocols import Protocol, protocol
from fastzs.evaluate import evaluate, evaluate_predictions, own_calibration, report, save_overlay, summary
from fastzs.folds import FoldScores
from fastzs.metrics import ConfusionMatrix
from fastzs.models import ClipRC
from fastzs.result import Segmentation
from fastzs.vocabulary import Vocabulary
from tests.data.folders import camvid, put_mask, put_picture

SHAPES = protocol("shapes")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def segmenter():
    return fastzs.load("maskclip", weights="shapes", precision="fp32", crop=0)


@pytest.fixture(scope="module")
def scenes():
    return ShapesDataset("val", length=4, size=64)


def test_agrees_with_segmenting_each_picture(segmenter, scenes):
    steps = []
    matrices = evaluate(segmenter, scenes, SHAPES, step=lambda *step: steps.append(step))
    assert list(matrices) == [0.0]
    expected = torch.zeros_like(matrices[0.0].counts)
    for (picture, truth), (name, shown, labels) in zip(scenes, steps, strict=True):
        wanted = segmenter(picture.as_subclass(torch.Tensor), SHAPES.classes).labels
        assert torch.equal(labels, wanted)
        assert torch.equal(shown, picture)
        assert name in scenes.names
        for t, p in zip(truth.flatten().tolist(), wanted.flatten().tolist(), strict=True):
            expected[t, p] += 1
    assert torch.equal(matrices[0.0].counts, expected)


def test_windows_change_the_maps_but_not_the_pixels_counted(scenes):
    whole = fastzs.load("maskclip", weights="shapes", precision="fp32", crop=0)
    slid = fastzs.load("maskclip", weights="shapes", precision="fp32", crop=48, stride=16)
    first, second = (evaluate(s, scenes, SHAPES)[0.0].counts for s in (whole, slid))
    assert first.sum() == second.sum() == 4 * 64 * 64
    assert not torch.equal(first, second)


def test_a_sweep_runs_the_model_once_and_moves_pixels_to_unseen_classes(segmenter, scenes, monkeypatch):
    calls = []
    encode, decode = segmenter._encode, segmenter._decode
    monkeypatch.setattr(segmenter, "_encode", lambda *a: calls.append("encode") or encode(*a))
    monkeypatch.setattr(segmenter, "_decode", lambda *a: calls.append("decode") or decode(*a))
    matrices = evaluate(segmenter, scenes, SHAPES, calibrations=[0.0, 0.3, 1.0])
    assert calls == ["encode", "decode"]  # of all four together
    unseen = [int(m.counts[:, list(SHAPES.unseen)].sum()) for m in matrices.values()]
    assert unseen[0] < unseen[1] <= unseen[2] == 4 * 64 * 64


def test_own_calibration_needs_this_protocols_seen_classes(segmenter):
    seen = [SHAPES.classes[i] for i in SHAPES.seen]
    make = {"backbone": "", "weights": "shapes", "prompts": 2, "crop": 64, "recovery": False}
    assert own_calibration(ClipRC(**make, seen=seen), SHAPES) == 0.1
    assert own_calibration(ClipRC(**make, seen=seen[1:]), SHAPES) == 0.0
    assert own_calibration(ClipRC(**make, seen=["cat"]), SHAPES) == 0.0
    assert own_calibration(ClipRC(**make), SHAPES) == 0.0
    assert own_calibration(ClipRC(**make, seen=seen), Protocol("all", SHAPES.classes)) == 0.0
    assert own_calibration(segmenter.model, SHAPES) == 0.0


def test_another_vocabulary(segmenter, tmp_path):
    images, masks = pictures(tmp_path)
    own = Protocol("own", ("warm", "cold"))
    dataset = FolderDataset(images, masks, own.classes)
    words = Vocabulary([{"red thing": ["orange thing"]}, {"blue thing": ["cyan thing"]}])
    matrix = evaluate(segmenter, dataset, own, words)[0.0]
    assert matrix.counts.sum() == 2 * 64 * 64
    with pytest.raises(ValueError, match="the vocabulary has 1 classes, but protocol own has 2"):
        evaluate(segmenter, dataset, own, Vocabulary(["red thing"]))
    with pytest.raises(ValueError, match="the data set has 2 classes, but protocol shapes has 68"):
        evaluate(segmenter, dataset, SHAPES)
    with pytest.raises(ValueError, match="no constant"):
        evaluate(segmenter, dataset, own, words, calibrations=[])
    with pytest.raises(ValueError, match="workers: expected at least 0, got -1"):
        evaluate(segmenter, dataset, own, words, workers=-1)


def test_worker_processes_change_nothing(segmenter, scenes):
    first, second = (evaluate(segmenter, scenes, SHAPES, workers=n)[0.0].counts for n in (0, 1))
    assert torch.equal(first, second)


def pictures(root: Path, count: int = 2) -> tuple[Path, Path]:
    for i in range(count):
        put_picture(root / "images" / f"{i}.png", (64, 64), i)
        put_mask(root / "masks" / f"{i}.png", [0, 1], (64, 64))
    return root / "images", root / "masks"


def test_predictions(tmp_path):
    images, masks = pictures(tmp_path)
    own = Protocol("own", ("a", "b"))
    dataset = FolderDataset(images, masks, own.classes)
    scores = evaluate_predictions(masks, dataset, own).scores_of(own)
    assert scores.pAcc == scores.mIoU == 1
    other = tmp_path / "predictions"
    put_mask(other / "0.png", [0], (64, 64))
    with pytest.raises(DataError, match=r"1 of 2 label maps are missing: 1.png"):
        evaluate_predictions(other, dataset, own)
    put_mask(other / "1.png", [255], (64, 64))  # no answer anywhere
    assert evaluate_predictions(other, dataset, own).scores_of(own).pAcc == 0.25
    put_mask(other / "1.png", [0], (32, 64))
    with pytest.raises(DataError, match=r"1.png is 64 x 32 pixels, its truth 64 x 64"):
        evaluate_predictions(other, dataset, own)


def test_report_and_summary(segmenter, scenes):
    matrix = evaluate(segmenter, scenes, SHAPES)[0.0]
    content = report(matrix, SHAPES)
    assert json.loads(json.dumps(content)) == content
    assert content["classes"]["red disc"]["unseen"]
    absent = content["scores"]["absent"]
    assert absent
    assert all(content["classes"][name]["accuracy"] is None for name in absent)
    assert np.array(content["confusion"]).sum() == 4 * 64 * 64
    assert summary(matrix.scores_of(SHAPES))["hIoU"] == content["scores"]["hIoU"]
    assert "hIoU" not in summary(matrix.scores(SHAPES.classes))


def test_overlay(tmp_path, scenes):
    picture, truth = scenes[0]
    save_overlay(tmp_path, "a/b", picture.as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor), SHAPES)
    with Image.open(tmp_path / "a" / "b.jpg") as image:
        assert image.height > 64  # a legend below
    truth[:8] = 255
    save_overlay(tmp_path, "c", picture.as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor), SHAPES)


MODEL = ["--weights", "shapes", "--crop", "0", "--precision", "fp32", "--device", "cpu"]


def data(root: Path, count: int = 3) -> list[str]:
    images, masks = pictures(root, count)
    names = root / "names.yaml"
    names.write_text("[red thing, blue thing]\n")
    return ["--images", str(images), "--masks", str(masks), "--classes-file", str(names)]


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", *data(tmp_path), *MODEL, "--output", str(out), "--overlays"]
    assert main([*arguments, "--calibration", "[0, 0.1]"]) == 0
    shown = capsys.readouterr()
    assert "protocol names (2 classes, all seen, background: ignored)" in shown.out
    assert "3/3" in shown.err
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["classes"] == ["red thing", "blue thing"]
    assert [entry["calibration"] for entry in results["results"]] == [0, 0.1]
    assert results["pictures"] == 3
    assert results["results"][0]["scores"]["pixels"] == 3 * 64 * 64
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_command_scores_predictions(tmp_path, capsys):
    assert main(["evaluate", *data(tmp_path), "--predictions", str(tmp_path / "masks")]) == 0
    shown = capsys.readouterr().out
    assert "100.0" in shown
    assert "protocol names" in shown


def test_no_name_is_cut_in_the_printed_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = (*(f"class {i} 道路" for i in range(90)), "a very long name " * 5 + "!")
    matrix, dataset = ConfusionMatrix(len(names)), SimpleNamespace(what="drawn")
    everything = torch.arange(len(names))
    matrix.add(everything, everything)
    show({0.0: matrix}, Protocol("own", names, unseen=(90,)), dataset, {"model": "m", "pictures": 1})
    show_fold(FoldScores(dict.fromkeys(names, 1.0), 1.0, 1.0), Protocol("own", names), dataset, "m")
    shown = capsys.readouterr().out
    assert "…" not in shown
    for name in names:
        assert shown.count(f" {name} ") == 2


def test_command_on_a_benchmark_layout(tmp_path, capsys):
    vectors = tmp_path / "text.npy"
    np.save(vectors, np.random.default_rng(0).normal(size=(11, 128)).astype(np.float32))
    arguments = ["evaluate", "--protocol", "camvid", "--data", str(camvid(tmp_path / "data")), "--split", "test"]
    assert main([*arguments, *MODEL, "--embeddings", str(vectors), "--output", str(tmp_path / "out")]) == 0
    assert "CamVid test, 3 images" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["results"][0]["scores"]["hIoU"] is None


def test_command_one_class_at_a_time(tmp_path, capsys):
    (tmp_path / "pair.yaml").write_text("classes: [red thing, blue thing]\nunseen: [blue thing]\n")
    arguments = ["evaluate", *data(tmp_path)[:4], "--protocol", str(tmp_path / "pair.yaml"), *MODEL]
    arguments += ["--against", "a thing"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "blue thing" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == "maskclip"
    (scores,) = results["results"]
    assert list(scores["iou"]) == ["blue thing"]
    assert scores["mIoU"] == scores["iou"]["blue thing"]
    assert main([*arguments, "--calibration", "0.1"]) == 2
    assert "leave out --calibration" in capsys.readouterr().err
    assert main(["evaluate", *data(tmp_path), *MODEL, "--against", "a thing"]) == 2
    assert "protocol names has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the protocol"),
        (["--protocol", "voc15"], "nearest known: voc15-5"),
        (["--protocol", "voc15-5"], "needs the folder of its data set"),
        (["--protocol", "shapes", "--overlays"], "name a folder for them with --output"),
        (
            ["--protocol", "shapes", "--predictions", "x", "--calibration", "0"],
            "--predictions are labels without scores",
        ),
        (["--protocol", "shapes", "--images", "x"], "go together"),
        (["--protocol", "shapes", "--pairs", "x", "--data", "y"], "name the data once"),
        (["--protocol", "voc15-5", "--data", "/nowhere"], "no folder JPEGImages"),
        (["--protocol", "shapes", "--model", "clip_rq"], "unknown model 'clip_rq'"),
        (["--protocol", "shapes", *MODEL, "--options.dense=no"], "dense"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_plots_need_matplotlib_or_are_drawn(tmp_path, capsys):
    plots = pytest.importorskip("matplotlib") and [*data(tmp_path), "--plots", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *plots, "--predictions", str(tmp_path / "masks")]) == 0
    for name in ("iou.png", "confusion.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 100
            assert np.array(image.convert("L")).std() > 5


@pytest.mark.slow
def test_two_processes_give_the_same_figures(tmp_path):
    # three images between two processes: none is counted twice to make the shares even
    arguments = ["evaluate", *data(tmp_path), *MODEL, "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastzs"]
    command = [*torchrun, *arguments, str(tmp_path / "two")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("protocol names") == 1
    assert main([*arguments, str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["results"] == two["results"]


def test_predictions_are_scored_by_their_names(tmp_path):
    """Label maps of fastzs in any order of names; a name that is no class is refused where it occurs."""
    for name in ("images", "masks", "found"):
        (tmp_path / name).mkdir()
    truth = np.resize(np.array([0, 1, 2, 255], np.uint8), (6, 8))
    put_picture(tmp_path / "images" / "a.jpg")
    Image.fromarray(truth).save(tmp_path / "masks" / "a.png")
    wanted = Protocol("own", ("road", "car", "sky"), synonyms=((), ("auto",), ()))
    dataset = FolderDataset(tmp_path / "images", tmp_path / "masks", wanted.classes)

    def score(values, names):
        labels = torch.from_numpy(np.resize(np.array(values, np.uint8), (6, 8)))
        Segmentation(labels, names).save(tmp_path / "found" / "a.png")
        return evaluate_predictions(tmp_path / "found", dataset, wanted).counts

    right = score([0, 1, 2, 0], ("road", "car", "sky"))
    assert right.diagonal().sum() == 36
    assert torch.equal(score([2, 0, 1, 0], ("Auto", "sky", "road")), right)
    assert torch.equal(score([1, 2, 3, 1], ("plant", "road", "car", "sky")), right)
    assert score([0, 1, 3, 0], ("road", "car", "sky", "background"))[2, 3] == 12
    with pytest.raises(DataError, match=r"a\.png has pixels of 'plant', which is no class of protocol own"):
        score([0, 1, 3, 0], ("road", "car", "sky", "plant"))
    Image.new("RGB", (8, 6)).save(tmp_path / "found" / "a.png")
    with pytest.raises(DataError, match=r"a\.png is no label map"):
        evaluate_predictions(tmp_path / "found", dataset, wanted)
