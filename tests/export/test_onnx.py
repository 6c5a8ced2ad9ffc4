"""A model exported to ONNX: three calls as before, an example without torch, other formats, int8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import fastzs
from fastzs.cli import main
from fastzs.data.shapes import draw
from fastzs.export.check import openvino_package
from fastzs.export.package import export
from fastzs.vocabulary import Vocabulary
from tests.export.systems import tiny

pytestmark = pytest.mark.slow
NAMES = ["red disc", "blue square", {"paper": ["slate", "wood"]}]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scene():
    return draw(1, (150, 190), seed=3).images[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MaskCLIP with the built-in weights, images of one size."""
    out = tmp_path_factory.mktemp("exported") / "maskclip"
    arguments = ["--weights", "shapes", "--classes", "red disc,blue square,paper", "--labels"]
    assert main(["export", "maskclip", "--output", str(out), *arguments]) == 0
    return out


def agree(one, other, share=0.999):
    """Labels may differ where two classes tie within rounding."""
    assert one.names == other.names
    assert (one.labels == other.labels).double().mean() >= share


def test_three_calls_as_before(folder, scene, tmp_path):
    ours = fastzs.load("maskclip", weights="shapes", device="cpu", precision="fp32")
    exported = fastzs.load(folder / "model.onnx")
    agree(exported(scene, NAMES), ours(scene, NAMES))
    features = exported.encode(scene)
    agree(exported.label(features, NAMES, scores=True), ours(scene, NAMES))
    agree(exported.label(features, ["paper", "green ring"]), ours(scene, ["paper", "green ring"]))
    agree(*(seg(scene, NAMES[:2], background="prompt") for seg in (exported, ours)))
    agree(next(exported([scene, scene], NAMES)), ours(scene, NAMES))
    assert torch.allclose(features.dense, ours.encode(scene).dense, atol=1e-4)
    features.save(tmp_path / "features.safetensors")
    agree(exported.label(fastzs.ImageFeatures.load(tmp_path / "features.safetensors"), NAMES), ours(scene, NAMES))
    with pytest.raises(ValueError, match="exported for windows of 128 x 128 pixels, got 64 x 64"):
        fastzs.load(folder, crop=64)(scene, NAMES)


def test_graphs_are_plain_and_share_their_weights(folder):
    weights = (folder / "weights.bin").stat().st_size
    used = set()
    for name in ("model", "encoder", "decoder", "text"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        assert {node.domain for node in graph.node} == {""}
        used |= {(place[0].value, place[1].value) for x in graph.initializer if (place := x.external_data)}
        assert (folder / f"{name}.onnx").stat().st_size < weights / 4
    model = fastzs.load("maskclip", weights="shapes", precision="fp32", optimize=False).model
    kept = sum(p.nbytes for p in [*model.parameters(), *model.clip.text().parameters()])
    assert weights < 1.1 * kept + 4096 * len(used)


def test_an_example_without_torch(folder, scene, tmp_path):
    Image.fromarray(scene[:, :128, :128].permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    blocked = "import sys; sys.modules['torch'] = sys.modules['fastzs'] = None; import runpy; "
    script = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    example = ROOT / "examples" / "onnx_without_torch.py"
    command = [sys.executable, "-I", "-c", blocked + script, example, folder, "scene.png", "labels.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "paper: " in run.stdout
    ours = fastzs.load("maskclip", weights="shapes", device="cpu", precision="fp32")
    wanted = ours(tmp_path / "scene.png", ["red disc", "blue square", "paper"]).labels.numpy()
    found = np.asarray(Image.open(tmp_path / "labels.png"))
    assert (found == wanted).mean() > 0.999
    assert len(example.read_text().splitlines()) <= 50


def test_images_of_any_size(tmp_path, scene):
    """CLIP-RC, whose bridge depends on the grid of patches; one graph for all sizes and numbers of names."""
    model = tiny("clip_rc")
    about = export(model, tmp_path / "out", "onnx", size=(64, 64), dynamic=True)
    assert about.size is None
    assert {"ONNX Runtime, 64 x 64", "ONNX Runtime, 101 x 67"} <= set(about.checks)
    assert all(found["labels"] > 0.99 for found in about.checks.values())
    exported = fastzs.load(tmp_path / "out", short_side=90, crop=0)
    for count in (1, 40):
        text = torch.nn.functional.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(1)), dim=1)
        names = Vocabulary([f"class {i}" for i in range(count)], embeddings=text)
        ours = fastzs.Segmenter(model, short_side=90, crop=0)
        agree(exported(scene, names, scores=True), ours(scene, names))


def test_a_refinement_stays_outside(tmp_path, scene):
    """NACLIP: cosines come from the graphs, and the readout with its refinement works as before."""
    arguments = ["--weights", "shapes", "--size", "64", "--labels", "--options.positions=bicubic", "--dynamic"]
    assert main(["export", "naclip", "--output", str(tmp_path / "out"), *arguments]) == 0
    options = {"short_side": 80, "crop": 48, "stride": 24}
    ours = fastzs.load("naclip", weights="shapes", positions="bicubic", device="cpu", precision="fp32", **options)
    agree(fastzs.load(tmp_path / "out", **options)(scene, NAMES), ours(scene, NAMES), 0.99)


@pytest.mark.parametrize(("form", "int8"), [("onnx", True), ("openvino", False), ("openvino", True), ("torch", False)])
def test_other_formats_and_int8(tmp_path, form, int8, scene):
    if form == "openvino" and int8:
        pytest.importorskip("nncf", reason="needs the extra 'export'")
    about = export(tiny("zegclip"), tmp_path / "out", form, size=(64, 64), int8=int8)
    assert about.checks
    assert all(found.get("labels", 1) > (0.9 if int8 else 0.99) for found in about.checks.values())
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["format"] == form
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    if form == "openvino":
        model = openvino_package().Core().read_model(tmp_path / "out" / "model.xml")
        types = {op.get_element_type().to_string() for op in model.get_ops() if op.get_type_name() == "Constant"}
        assert bool(types & {"i8", "u8"}) == int8
    if int8 and form == "onnx":
        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert "MatMulInteger" in {node.op_type for node in graph.node}
        assert fastzs.load(tmp_path / "out").model.fingerprint.endswith("int8")
    elif form != "onnx":
        with pytest.raises(fastzs.FastzsError, match=f"expected a model exported to onnx, got {form}"):
            fastzs.load(tmp_path / "out")


def test_openvino_and_nncf_tell_nobody(tmp_path):
    """Their telemetry would begin with a number for this user in the home folder."""
    program = "from fastzs.export.check import openvino_package; openvino_package(); import nncf; print(nncf.__name__)"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment["HOME"] = str(tmp_path)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "nncf", run.stderr
    assert not (tmp_path / "intel").exists()
