"""The table of drawn shapes: what is done is not done again, unless something else decides it; the page."""

import json
import signal
import sys

import pytest
import torch

from bench import shapes_page, systems_shapes
from bench.systems_shapes import BARS, PICTURES, SHAPES, decided_by, main, settings, words
from fastzs import clip, models
from fastzs.registry import systems
from fastzs.train import Outcome


def test_every_trained_system_has_a_preset_and_a_row():
    for name, entry in systems().items():
        assert bool(settings(name)) == bool(entry.trained), name
        assert not entry.trained or name in BARS


def test_the_control_gives_every_class_a_vector_of_the_list():
    model = models.MaskCLIP(clip.load(weights="shapes"))
    plain, shuffled = words(model, False), words(model, True)
    ours = plain.embed(model.clip, model.default_templates)
    assert not torch.equal(ours, shuffled.embeddings)
    assert torch.equal(ours.sort(0).values, shuffled.embeddings.sort(0).values)
    assert shuffled.names == SHAPES.classes


@pytest.mark.slow
def test_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    command = ["", "strict", "--output", str(tmp_path), "--max-steps", "1", "--pictures", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", command)
    real, calls = systems_shapes.train, []

    def counted(*arguments, **options):
        calls.append(arguments[5])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(systems_shapes, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        main()
    calls.clear()
    monkeypatch.setattr(systems_shapes, "train", lambda *a, **o: calls.append(a[5].parent.name[:6]) or real(*a, **o))
    main()
    assert calls == ["seed-0", "seed-0", "contro", "contro"]
    first = capsys.readouterr().out.splitlines()[-1]
    assert {"hIoU", "steps", "seconds"} <= json.loads(first).keys()
    calls.clear()
    main()
    assert not calls
    assert capsys.readouterr().out.splitlines()[-1] == first
    monkeypatch.setitem(systems_shapes.REVISIONS, "strict", 2)
    main()
    assert len(calls) == 4


def test_what_a_signal_stopped_is_not_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(systems_shapes, "train", lambda *a, **o: Outcome(0, stopped_by=signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        systems_shapes.run("spnet", tmp_path, pictures=1, results=tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("seed-0.json"))


def result(folder, name, title, hIoU, **changes):
    seed = 0 if title == "control" else int(title[-1])
    row = {"pAcc": 50.0, "mIoU(S)": 20.0, "mIoU(U)": 10.0, "hIoU": hIoU, "steps": 1500, "seconds": 120}
    row |= {"parameters": 1_500_000, "commit": "abc", "machine": "a CPU", "threads": 1, "torch": "2.14"}
    row["decided by"] = decided_by(name, seed, title == "control", PICTURES, None) | changes
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{title}.json").write_text(json.dumps(row))


def test_the_page_says_what_is_there_and_which_bars_are_met(tmp_path):
    result(tmp_path, "spnet", "seed-0", 14.0)
    result(tmp_path, "spnet", "seed-1", 17.0)
    result(tmp_path, "spnet", "control", 3.0)
    result(tmp_path, "joint", "seed-0", 30.0, revision="0.0")
    result(tmp_path, "maskclip", "seed-0", 53.0)
    for seed, hIoU in enumerate((70.0, 52.0, 71.0)):
        result(tmp_path, "clip_rc", f"seed-{seed}", hIoU)
    result(tmp_path, "zs3", "seed-0", 16.0)
    result(tmp_path, "zs3", "control", 16.0)
    for title in ("seed-0", "seed-1", "seed-2", "control"):
        result(tmp_path, "zsseg", title, 5.0 if title == "control" else 40.0)
    page = shapes_page.table(tmp_path)
    many = " | 50.0 | 20.0 | 10.0 | "
    assert f"| `spnet` | 2 of 3{many}15.5 | 3.0 | 3.0 | 15 | so far | 1500 | 2.0 | 1.50 |" in page
    assert "| `joint` | not run yet |" in page
    assert f"| `maskclip` | 1{many}53.0 |" in page
    assert f"| `clip_rc` | 3{many}64.3 | 19.0 |  | 60 | no: `maskclip` |" in page
    assert f"| `zs3` | 1 of 3{many}16.0 |  | 16.0 | 15 | no: control |" in page
    assert f"| `zsseg` | 3{many}40.0 | 0.0 | 5.0 | 35 | yes |" in page
    assert page.endswith("Machine: a CPU, 1 thread(s), torch 2.14. Commits: abc.")
