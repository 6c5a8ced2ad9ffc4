"""The table of drawn shapes: what is done is not done again; means, spread and the control."""

import json
import sys

import pytest
import torch

from bench import systems_shapes
from bench.systems_shapes import SHAPES, main, settings, summary, words
from fastzs import clip, models
from fastzs.registry import systems


def test_every_trained_system_has_a_preset():
    for name, entry in systems().items():
        assert bool(settings(name)) == bool(entry.trained), name


def test_means_and_spread():
    rows = [
        {"system": "x", "steps": 5, "pictures": 2, "parameters": 7, "seconds": s, "pAcc": 1.0, "mIoU(S)": 2.0}
        | {"mIoU(U)": None, "hIoU": h}
        for s, h in ((10, 1.0), (20, 4.0))
    ]
    found = summary(rows, {"hIoU": 0.5})
    assert (found["hIoU"], found["spread"], found["seconds"], found["seeds"]) == (2.5, 3.0, 15, 2)
    assert (found["mIoU(U)"], found["control"]) == (None, 0.5)
    assert "control" not in summary(rows, None)


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
    monkeypatch.setattr(systems_shapes, "train", lambda *a, **o: calls.append(a[5].parent.name) or real(*a, **o))
    main()
    assert calls == ["seed-0", "seed-0", "control", "control"]
    first = capsys.readouterr().out.splitlines()[-1]
    assert {"hIoU", "spread", "control"} <= json.loads(first).keys()
    calls.clear()
    main()
    assert not calls
    assert capsys.readouterr().out.splitlines()[-1] == first
