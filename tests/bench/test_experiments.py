"""The experiments run from end to end at reduced length, and go on where they stopped."""

import json

import numpy as np
import pytest
import torch

from bench.experiments import camvid, operators, page, shapes
from bench.experiments.variants import OneStage, WithoutAlignment, WithoutBridge
from fastzs.data.datasets import ShapesDataset
from fastzs.vocabulary import Vocabulary, text_vectors
from tests.data import folders

SMALL = shapes.MODEL | {"prompts": 2}
CLASSES = shapes.PROTOCOL.classes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path_factory.mktemp("cache")))


def batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [ShapesDataset("train", count, shapes.SIZE, **shapes.SCENES)[i] for i in range(count)]
    images = torch.stack([picture.as_subclass(torch.Tensor) / 127.5 - 1 for picture, _ in samples])
    return images, torch.stack([labels.as_subclass(torch.Tensor) for _, labels in samples])


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: OneStage(exclusive=True, **SMALL),
        lambda: OneStage(exclusive=False, **SMALL | {"prompts": 0}),
        lambda: WithoutBridge(**SMALL, **shapes.BRIDGE),
        lambda: WithoutAlignment(**SMALL, **shapes.BRIDGE),
    ],
)
def test_variants_train_all_they_say_they_train(make):
    torch.manual_seed(0)
    model = make().train()
    images, target = batch()
    text = text_vectors(model, Vocabulary(CLASSES))
    seen = list(shapes.PROTOCOL.seen)
    losses = model.losses(images, target, text, seen=seen)
    losses["total"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    first = losses["total"].item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-5)
    for _ in range(6):
        optimizer.step()
        optimizer.zero_grad()
        loss = model.losses(images, target, text, seen=seen)["total"]
        loss.backward()
    assert loss.item() < first
    assert model.eval()(images, text).shape == (2, len(CLASSES), 8, 8)


def test_exclusive_classes_leave_ignored_pixels_out():
    torch.manual_seed(0)
    model = OneStage(exclusive=True, **SMALL).eval()
    images, target = batch()
    text = text_vectors(model, Vocabulary(CLASSES))
    whole = model.losses(images, target, text)["total"]
    target[:, ::2] = 255
    half = model.losses(images, target, text)["total"]
    assert whole.item() != half.item()
    target[:] = 255
    target[0, 0, 0] = 3
    one = model.losses(images, target, text)["total"]
    logits = torch.nn.functional.interpolate(model(images, text), (64, 64), mode="bilinear")
    assert one.item() == pytest.approx(-logits[0, :, 0, 0].log_softmax(0)[3].item(), rel=1e-5)


def test_regions_without_a_bridge_are_means_of_their_patches():
    torch.manual_seed(0)
    model = WithoutBridge(**SMALL, **shapes.BRIDGE).eval()
    encoded = model.encode(batch()[0])
    corner = encoded.patches[:, :4, :4].flatten(1, 2).mean(1)
    torch.testing.assert_close(encoded.bridge[:, 0], torch.nn.functional.normalize(corner, dim=-1))
    assert not any("region_level_bridge" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_a_row_runs_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--smoke", "--rows", "maskclip,clip_rc_transductive", "--work", str(tmp_path)]
    assert shapes.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| CLIP-RC, transductive |" in shown
    assert "protocol shapes (68 classes, 52 seen, 16 unseen" in shown
    kept = tmp_path / "smoke" / "clip_rc_transductive" / "seed0" / "result.json"
    scores = json.loads(kept.read_text())["scores"]
    assert set(scores) == {"0.0"}  # no constant is taken in the transductive setting
    assert (tmp_path / "smoke" / "clip_rc" / "seed0" / "result.json").is_file()  # what it started from
    before = kept.stat().st_mtime_ns
    assert shapes.main(arguments) == 0
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        shapes.main(["--rows", "clip_rq"])


def test_boundary_iou_by_distances(monkeypatch):
    """Pixels with another label within two, rows and columns apart; both scores counted pixel by pixel."""
    monkeypatch.setattr(operators, "BAND", 2)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (2, 3), generator=generator).repeat_interleave(6, 0).repeat_interleave(5, 1)
    labels = truth.roll(1, 1)
    near = [
        torch.tensor(
            [[(x[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] != x[i, j]).any() for j in range(15)] for i in range(12)]
        )
        for x in (truth, labels)
    ]
    counts = operators.Counts()
    counts.add(truth, labels)
    everywhere = torch.ones_like(near[0])
    for found, (a, b) in zip(counts.scores(), [(everywhere, everywhere), near], strict=True):
        masks = [((truth == c) & a, (labels == c) & b) for c in truth.unique()]
        ious = [((one & two).sum() / (one | two).sum()).item() for one, two in masks]
        assert found == pytest.approx(100 * sum(ious) / len(ious))
        assert 0 < found < 100


@pytest.mark.slow
def test_operators_run(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["operators", "--scenes", "1", "--seeds", "1", "--no-page"])
    operators.main()
    printed = capsys.readouterr().out
    assert printed.count("± 0.0") == 6 * len(operators.ROWS)
    assert "PAMR changes the boundary IoU by" in printed


@pytest.mark.slow
def test_photographs_run_and_go_on_where_they_stopped(tmp_path, capsys):
    np.save(tmp_path / "coco_multi.npy", np.random.default_rng(0).standard_normal((171, 512)))
    data, output = folders.camvid(tmp_path / "data"), tmp_path / "page.md"
    arguments = [str(data), str(tmp_path / "coco_multi.npy"), "--max-steps", "1"]
    arguments += ["--work", str(tmp_path / "runs"), "--output", str(output)]
    assert camvid.main(arguments) == 0
    first = output.read_text()
    for name in ("commonest class at each place", "ZegCLIP", "CLIP-RC"):
        assert f"| {name} |" in first
    assert first.count("| 1 |") == 2  # steps
    assert "step 1/1" in capsys.readouterr().err
    assert camvid.main(arguments) == 0
    assert "step 1/1" not in capsys.readouterr().err  # nothing is trained again
    assert output.read_text() == first


def test_the_reading_survives_a_new_table(tmp_path):
    path = tmp_path / "shapes.md"
    page.write_page(path, "# Title\n\ntable 1\n")
    path.write_text(path.read_text() + f"\n{page.READING}\n\nWhat holds.\n")
    page.write_page(path, "# Title\n\ntable 2\n")
    assert path.read_text() == f"# Title\n\ntable 2\n\n{page.READING}\n\nWhat holds.\n"
