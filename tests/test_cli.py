import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastzs
from fastzs.cli import _as_written, main
from fastzs.data.shapes import draw
from fastzs.pictures import read_picture
from fastzs.result import Segmentation
from fastzs.yaml_files import read_classes

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data"


class FakeSegmenter:
    """Labels by brightness, under the interface of :class:`fastzs.Segmenter`."""

    loaded: dict

    def __init__(self, model, **settings):
        FakeSegmenter.loaded = {"model": model, **settings}
        clip = SimpleNamespace(
            fingerprint="fake",
            source="shapes",
            backbone=settings["backbone"],
            quick_gelu=False,
            config={},
            templates=None,
        )
        self.model = SimpleNamespace(
            clip=clip, fingerprint="", default_templates="single", seen=None, calibration=0.0, activation="softmax",
            readout=None,
            mean=(0, 0, 0), std=(1, 1, 1),
        )  # fmt: skip
        self.device, self.precision = torch.device("cpu"), "float32"
        self.short_side, self.crop, self.stride = settings["short_side"], settings["crop"], settings["stride"]
        self.long_side, self.antialias, self.windows = None, True, settings["windows"]

    def question(self, vocabulary, *, background, threshold):
        FakeSegmenter.loaded["threshold"] = threshold
        return vocabulary.names if background == "none" else (*vocabulary.names, "background")

    def view(self, picture, regions):
        return read_picture(picture)

    def answer_views(self, images, names):
        for pixels in images:
            labels = (pixels.float().mean(0) * len(names) / 256).to(torch.uint8 if len(names) <= 255 else torch.int16)
            result = Segmentation(labels, names, image=pixels)
            yield SimpleNamespace(result=lambda question, result=result: result)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("fastzs.loading.load", FakeSegmenter)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.jpg", "sub/one.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def record(folder):
    return json.loads((folder / "run.json").read_text())


def refused(capsys, *arguments):
    """Run a command that must fail; its one line on stderr."""
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.usefixtures("fake")
class TestSegment:
    def test_writes_results_and_the_record(self, pictures, tmp_path, capsys):
        out = tmp_path / "out"
        assert main(["segment", str(pictures), "--classes", "cat, dog", "--output", str(out), "--overlay"]) == 0
        stems = ["one", "sub/one", "two"]
        assert tree(out) == sorted(
            [s + e for s in stems for e in (".png", "_overlay.jpg")] + ["manifest.jsonl", "run.json"]
        )
        assert "3 of 3 images segmented" in capsys.readouterr().out
        result = Segmentation.load(out / "two.png")
        assert result.names == ("cat", "dog")
        run = record(out)
        assert run["ended"] == "complete"
        assert run["pictures"] == {"found": 3, "done": 3, "done_before": 0, "failed": 0}
        assert run["vocabulary"]["names"] == ["cat", "dog"]
        assert run["vocabulary"]["hash"] == fastzs.Vocabulary(["cat", "dog"]).hash
        assert run["versions"]["torch"]
        assert run["device"]["device"] == "cpu"
        assert run["weights"] == {"name": "shapes", "backbone": None, "fingerprint": "fake"}
        assert run["settings"]["overlay"] is True
        assert run["started"] <= run["finished"]

    def test_goes_on_where_it_was(self, pictures, tmp_path, capsys):
        out = tmp_path / "out"
        command = ["segment", str(pictures / "one.png"), "--classes", "cat,dog", "--output", str(out)]
        assert main(command) == 0
        command[1] = str(pictures)
        assert main(command) == 0
        assert "2 of 3 images segmented, 1 done before" in capsys.readouterr().out
        assert main(command) == 0
        assert "0 of 3 images segmented, 3 done before" in capsys.readouterr().out
        for change in (["--background", "prompt"], ["--classes", "cat,cow"], ["--classes", "cow,cat"]):
            assert main([*command, *change]) == 0
            assert "3 of 3 images segmented, 0 done before" in capsys.readouterr().out
        assert Segmentation.load(out / "one.png").names == ("cow", "cat")

    def test_results_inside_the_folder_of_pictures(self, pictures, capsys):
        command = ["segment", str(pictures), "--classes", "cat,dog", "--output", str(pictures / "out"), "--overlay"]
        assert main(command) == main(command) == 0
        assert "3 done before" in capsys.readouterr().out
        assert "outside of" in refused(capsys, "segment", pictures, "--classes", "cat", "--output", pictures)
        assert "one.png" in tree(pictures)

    def test_broken_picture(self, pictures, tmp_path, capsys):
        (pictures / "two.jpg").write_bytes(b"no image")
        out = tmp_path / "out"
        assert main(["segment", str(pictures), "--classes", "cat,dog", "--output", str(out)]) == 1
        said = capsys.readouterr()
        assert "2 of 3 images segmented, 0 done before, 1 failed" in said.out
        assert f"failed: {pictures / 'two.jpg'}: not an image" in said.err.replace("\n", "")
        assert "two.png" not in tree(out)
        run = record(out)
        assert run["ended"] == "incomplete"
        assert list(run["failed"]) == [str(pictures / "two.jpg")]

    def test_one_given_picture_is_named_by_its_stem(self, pictures, tmp_path):
        assert main(["segment", str(pictures / "one.png"), "--classes", "a,b", "--output", str(tmp_path / "o")]) == 0
        assert "one.png" in tree(tmp_path / "o")

    def test_same_stem_in_two_folders(self, pictures, tmp_path):
        paths = [str(pictures / "one.png"), str(pictures / "sub" / "one.png")]
        assert main(["segment", *paths, "--classes", "a,b", "--output", str(tmp_path / "o")]) == 0
        assert {"one.png", "sub/one.png"} <= set(tree(tmp_path / "o"))

    def test_settings_arrive(self, pictures, tmp_path):
        options = (
            "--model m --backbone RN50 --weights w --device cpu --precision bf16 --short-side 32 --crop [16,24] "
            "--stride 8 --batch-size 3 --background threshold --threshold 0.3 --options.dense qq --options.ffn false"
        )
        out = tmp_path / "o"
        assert main(["segment", str(pictures), "--classes", "a,b", "--output", str(out), *options.split()]) == 0
        wanted = {
            "model": "m", "backbone": "RN50", "weights": "w", "device": "cpu", "precision": "bf16", "short_side": 32,
            "crop": (16, 24), "stride": 8, "batch_size": 3, "threshold": 0.3, "dense": "qq", "ffn": False,
        }  # fmt: skip
        assert {key: FakeSegmenter.loaded[key] for key in wanted} == wanted
        assert record(out)["settings"]["crop"] == [16, 24]

    def test_config_file_is_the_command_line(self, pictures, tmp_path, capsys):
        given = ["segment", str(pictures), "--classes", "cat,dog", "--output", str(tmp_path / "o"), "--crop", "[4,6]"]
        with pytest.raises(SystemExit) as ended:
            main([*given, "--options.dense", "qq", "--print_config"])
        assert ended.value.code == 0
        config = tmp_path / "config.yaml"
        config.write_text(capsys.readouterr().out)
        assert yaml.safe_load(config.read_text())["paths"] == [str(pictures)]
        assert main(["segment", "--config", str(config)]) == 0
        assert FakeSegmenter.loaded["crop"] == (4, 6)
        assert FakeSegmenter.loaded["dense"] == "qq"
        assert len(tree(tmp_path / "o")) == 5
        # What stands on the command line wins.
        assert main(["segment", str(pictures / "one.png"), "--crop", "5", "--config", str(config)]) == 0
        assert FakeSegmenter.loaded["crop"] == 5
        assert FakeSegmenter.loaded["dense"] == "qq"
        assert record(tmp_path / "o")["pictures"]["found"] == 1

    def test_classes_in_a_config_may_be_a_list(self, pictures, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text(f"classes: [cat, 'dog, sitting']\noutput: {tmp_path / 'o'}\noverlay: true\n")
        assert main(["segment", str(pictures), "--config", str(config)]) == 0
        assert record(tmp_path / "o")["vocabulary"]["names"] == ["cat", "dog, sitting"]
        assert "one_overlay.jpg" in tree(tmp_path / "o")

    def test_templates(self, pictures, tmp_path, capsys):
        words = tmp_path / "templates.txt"
        words.write_text("a {}.\n\nthe {}\n")
        common = ["segment", str(pictures), "--classes", "cat", "--output", str(tmp_path / "o"), "--templates"]
        assert main([*common, str(words)]) == 0
        assert record(tmp_path / "o")["vocabulary"]["hash"] == fastzs.Vocabulary(["cat"], ["a {}.", "the {}"]).hash
        assert main([*common, "coco15"]) == 0
        capsys.readouterr()
        assert "templates='nonsense' is unknown" in refused(capsys, *common, "nonsense")

    def test_interrupt(self, pictures, tmp_path, capsys, monkeypatch):
        def stop(self, images, names):
            yield next(original(self, images, names))
            raise KeyboardInterrupt

        original = FakeSegmenter.answer_views
        out = tmp_path / "o"
        with monkeypatch.context() as patched:
            patched.setattr(FakeSegmenter, "answer_views", stop)
            assert main(["segment", str(pictures), "--classes", "a,b", "--output", str(out)]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert record(out)["ended"] == "interrupted"
        assert record(out)["pictures"]["done"] == 1
        assert main(["segment", str(pictures), "--classes", "a,b", "--output", str(out)]) == 0
        assert record(out)["pictures"] == {"found": 3, "done": 2, "done_before": 1, "failed": 0}

    def test_full_disk(self, pictures, tmp_path, capsys, monkeypatch):
        out = tmp_path / "o"
        failed = []

        def full(stream):
            deep = Path(os.readlink(f"/proc/self/fd/{stream}")).parent.name == "sub"
            if deep or (failed and (out / "one.png").exists()):
                failed.append(stream)
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        assert main(["segment", str(pictures), "--classes", "a,b", "--output", str(out)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"fastzs segment: cannot write {out / 'sub' / 'one.png'}: No space left on device"
        assert {"manifest.jsonl", "one.png", "run.json"} <= set(tree(out))
        assert "sub/one.png" not in tree(out)
        assert record(out)["finished"] is None

    def test_coco(self, pictures, tmp_path):
        coco = pytest.importorskip("pycocotools.mask", reason="needs the extra 'formats'")
        out = tmp_path / "o"
        assert main(["segment", str(pictures), "--classes", "a,b", "--output", str(out), "--coco"]) == 0
        data = json.loads((out / "sub" / "one_coco.json").read_text())
        labels = Segmentation.load(out / "sub" / "one.png").labels.numpy()
        for annotation in data["annotations"]:
            wanted = labels == annotation["category_id"] - 1
            assert np.array_equal(coco.decode(annotation["segmentation"]).astype(bool), wanted)
        assert sum(annotation["area"] for annotation in data["annotations"]) == labels.size

    def test_coco_without_pycocotools(self, pictures, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        said = refused(capsys, "segment", pictures, "--classes", "a", "--output", tmp_path / "o", "--coco")
        assert "pip install 'fastzs[formats]'" in said
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name the classes with --classes or with --classes-file; neither is given"),
            (["--classes", "a", "--classes-file", "x"], "both are given"),
            (["--classes", ""], "--classes has no names in it"),
            (["--classes", " "], "--classes has no names in it"),
            (["--classes", "[]"], "--classes has no names in it"),
            (["--classes", "a,,b"], "empty class name"),
            (["--classes", "cat,dog,Cat"], "'Cat' is the same name as 'cat'"),
            (["--classes-file", "gone.yaml"], "classes file gone.yaml: No such file"),
            (["--classes", "a", "--config", "gone.yaml"], "configuration gone.yaml: No such file"),
        ],
    )
    def test_classes_that_will_not_do(self, pictures, tmp_path, capsys, arguments, message):
        assert message in refused(capsys, "segment", pictures, "--output", tmp_path / "o", *arguments)
        assert not (tmp_path / "o").exists()

    def test_threshold_is_that_of_its_background(self, pictures, tmp_path, capsys):
        common = ["segment", str(pictures), "--classes", "a,b", "--output", str(tmp_path / "o")]
        for background in ("none", "prompt"):
            said = refused(capsys, *common, "--background", background, "--threshold", "0")
            assert (
                f"--threshold 0.0 is the score that --background threshold asks for, but --background is {background};"
                in said
            )
        for wrong in ("1.5", "-0.1"):
            said = refused(capsys, *common, "--background", "threshold", f"--threshold={wrong}")
            assert f"--threshold: expected a score from 0 to 1, got {wrong}" in said
        assert not (tmp_path / "o").exists()
        for given, wanted in ((["--threshold", "0"], 0.0), ([], None)):
            assert main([*common, "--background", "threshold", *given]) == 0
            assert FakeSegmenter.loaded["threshold"] == wanted
            assert record(tmp_path / "o")["decisive_settings"]["threshold"] == wanted

    def test_no_pictures(self, tmp_path, capsys):
        common = ["--classes", "a", "--output", tmp_path / "o"]
        assert "no images given" in refused(capsys, "segment", *common)
        assert "'*.xyz': no such image" in refused(capsys, "segment", "*.xyz", *common)
        assert not (tmp_path / "o").exists()

    def test_output_that_cannot_be_written(self, pictures, tmp_path, capsys):
        (tmp_path / "file").touch()
        for output in (tmp_path / "file", tmp_path / "file" / "below"):
            said = refused(capsys, "segment", pictures, "--classes", "a", "--output", output)
            assert f"cannot write to the output folder {output}: " in said

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where even root cannot write")
    def test_output_without_the_right(self, pictures, capsys):
        said = refused(capsys, "segment", pictures, "--classes", "a", "--output", "/proc/fastzs")
        assert "cannot write to the output folder /proc/fastzs" in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--background", "white"], "background"),
            (["--precision", "fp8"], "precision"),
            (["--crop", "5x"], "crop"),
            (["--threshold", "high"], "threshold"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
        ],
    )
    def test_arguments_that_will_not_do(self, pictures, tmp_path, capsys, arguments, message):
        with pytest.raises(SystemExit) as ended:
            main(["segment", str(pictures), "--classes", "a", "--output", str(tmp_path / "o"), *arguments])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said

    def test_output_is_required(self, pictures, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["segment", str(pictures), "--classes", "a"])
        assert ended.value.code == 2
        assert "output" in capsys.readouterr().err

    def test_a_defect_shows_its_traceback(self, pictures, tmp_path, monkeypatch):
        def defect(model, **settings):
            raise ZeroDivisionError

        monkeypatch.setattr("fastzs.loading.load", defect)
        with pytest.raises(ZeroDivisionError):
            main(["segment", str(pictures), "--classes", "a", "--output", str(tmp_path / "o")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "maskclop"], "unknown model 'maskclop'; nearest known: maskclip"),
        (["--backbone", "ViT-B-61", "--weights", "random"], "ViT-B-16"),
        (["--backbone", "ViT-B-32", "--weights", "opnai"], "openai"),
        (["--weights", "gone.safetensors"], "gone.safetensors"),
        (["--device", "warp9", "--weights", "random", "--backbone", "ViT-B-32"], "'warp9'"),
        (["--options.densee", "qq", "--weights", "random", "--backbone", "ViT-B-32"], "densee"),
        (["--short-side", "-3", "--weights", "random", "--backbone", "ViT-B-32"], "short_side"),
        (["--batch-size", "0", "--weights", "shapes"], "batch_size must be at least 1, got 0"),
        (["--stride", "0", "--weights", "shapes"], "stride: expected a positive integer or (height, width), got 0"),
        (["--stride", "[8,0]", "--weights", "shapes"], "or (height, width), got (8, 0)"),
        (["--crop", "-16", "--weights", "shapes"], "crop: expected a positive integer or (height, width), got -16"),
        (["--crop", "16", "--stride", "17", "--weights", "shapes"], "stride (17, 17) is larger than crop (16, 16)"),
        (
            ["--crop", "0", "--stride", "16", "--weights", "shapes"],
            "stride 16 is the distance of windows, but images are",
        ),
    ],
)
def test_models_that_will_not_do(pictures, tmp_path, capsys, arguments, message):
    out = tmp_path / "o"
    assert message in refused(capsys, "segment", pictures, "--classes", "a,b", "--output", out, *arguments)
    assert tree(out) == []


def test_real_model_on_real_photographs(tmp_path, capsys, monkeypatch):
    """The whole path with random weights: what is written reads back as what the Python API gives."""
    coco = pytest.importorskip("pycocotools.mask", reason="needs the extra 'formats'")
    files = [*(PHOTOGRAPHS / "voc12_8" / "JPEGImages").glob("*.jpg")][:2]
    files += [*(PHOTOGRAPHS / "camvid" / "test").glob("*.jpg")][:1]
    if not files:
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    settings = {"backbone": "ViT-B-32", "weights": "random", "short_side": 96, "crop": 64, "precision": "fp32"}
    options = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    common = ["--classes", "person,dog,car", "--templates", "single", "--output", str(out), "--overlay", "--coco"]
    assert main(["segment", *map(str, files), *common, *options, "--background", "prompt"]) == 0

    segmenter = fastzs.load(**settings)
    vocabulary = fastzs.Vocabulary(["person", "dog", "car"], "single")
    for file in files:
        wanted = segmenter(file, vocabulary, background="prompt")
        found = next(out.rglob(f"{file.stem}.png"))
        result = Segmentation.load(found)
        assert torch.equal(result.labels, wanted.labels)
        assert result.names == wanted.names == ("person", "dog", "car", "background")
        with Image.open(found) as image, Image.open(file) as photograph:
            assert image.mode == "P"
            assert image.size == photograph.size
            with Image.open(found.with_name(f"{file.stem}_overlay.jpg")) as overlay:
                assert overlay.width >= photograph.width
                assert overlay.height > photograph.height
        data = json.loads(found.with_name(f"{file.stem}_coco.json").read_text())
        labels = np.full(result.labels.shape, -1)
        for annotation in data["annotations"]:
            labels[coco.decode(annotation["segmentation"]).astype(bool)] = annotation["category_id"] - 1
        categories = np.where(result.labels.numpy() == result.background, -1, result.labels.numpy().astype(int))
        assert np.array_equal(labels, categories)


def test_classes_file(tmp_path):
    path = tmp_path / "names.yaml"

    def read(text):
        path.write_text(text, encoding="utf-8")
        return read_classes(path)

    assert read("- cat\n- sofa: [couch, settee]\n- dog:\n- tree: oak\n") == [
        "cat", {"sofa": ["couch", "settee"]}, {"dog": []}, {"tree": ["oak"]},
    ]  # fmt: skip
    assert read("cat:\nsofa: [couch]\n") == [{"cat": []}, {"sofa": ["couch"]}]
    assert read("[no, on, 2, 1.0, 1e3, null, 2020-01-01, 狗]") == [
        "no", "on", "2", "1.0", "1e3", "null", "2020-01-01", "狗",
    ]  # fmt: skip
    assert read("cat: []\ncat: [kitten]\n") == [{"cat": []}, {"cat": ["kitten"]}]  # the vocabulary refuses it
    assert read("{cat: [], dog: []}") == [{"cat": []}, {"dog": []}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no names in it"),
        ("# nothing\n", "has no names in it"),
        ("[]", "has no names in it"),
        ("{}", "has no names in it"),
        ("cat dog", "line 1: expected a list of names, or of names with a list of synonyms, got 'cat dog'"),
        ("- cat\n- [a, b]\n", "line 2: expected a name, or a name with a list of synonyms, got a list"),
        ("cat: {a: b}\n", "line 1: expected a list of synonyms, got a mapping"),
        ("- cat: [[a]]\n", "line 1: expected a synonym, got a list"),
        ("- [cat\n", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_classes_file_that_will_not_do(tmp_path, text, message):
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_classes(path)
    assert str(caught.value).startswith(f"classes file {path}")
    assert "\n" not in str(caught.value)


def test_classes_file_that_is_not_text(tmp_path):
    (tmp_path / "names.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_classes(tmp_path / "names.yaml")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_classes(tmp_path)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"fastzs {fastzs.__version__}" in said
    assert "label_map" in said


def test_doctor_tells_of_a_broken_op(capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("broken")

    monkeypatch.setitem(__import__("fastzs.doctor").doctor.CALLS, "label_map", ("a call", broken))
    assert main(["doctor"]) == 1
    assert "FAILED: RuntimeError: broken" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, contextlib\n"
        "from fastzs.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['segment', '--help'])\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--classes-file" in done.stdout


def test_version():
    done = subprocess.run([sys.executable, "-m", "fastzs", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"fastzs {fastzs.__version__}"


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(tmp_path):
    pictures = tmp_path / "in"
    pictures.mkdir()
    scenes = draw(3, (48, 48))
    for i, image in enumerate(scenes.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
    segment = ["fastzs", "segment", str(pictures), "--weights", "shapes", "--classes", "disc,star", "--device", "cpu"]
    for launcher, out in ((["-m"], "one"), (["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"], "two")):
        command = [sys.executable, *launcher, *segment, "--output", str(tmp_path / out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
    for i in range(3):
        assert (tmp_path / "two" / f"{i}.png").read_bytes() == (tmp_path / "one" / f"{i}.png").read_bytes()
    records = [json.loads((tmp_path / "two" / name).read_text()) for name in ("run.json", "run-1.json")]
    assert [record["pictures"]["done"] for record in records] == [2, 1]


@pytest.mark.parametrize("seen", ["no", "[no, 1, null]", "'no, 1'"])
def test_seen_classes_of_a_configuration_are_names_as_written(tmp_path, capsys, seen):
    config = tmp_path / "c.yaml"
    config.write_text(f"classes: [cat]\nseen: {seen}\noutput: {tmp_path / 'o'}\nmodel: maskclip\n")
    assert main(["segment", "--config", str(config), str(tmp_path / "no.jpg")]) == 2
    assert "Expected a" not in capsys.readouterr().err
    content = _as_written(str(config), ["classes", "seen", "output", "model"])
    assert content["seen"] == {"no": "no", "[no, 1, null]": ["no", "1", "null"], "'no, 1'": "no, 1"}[seen]
