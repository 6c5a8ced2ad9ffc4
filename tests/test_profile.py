"""``fastzs profile``: warm-up and measured calls, and a trace."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from fastzs.cli import main
from fastzs.segmenter import Segmenter

SMALL = ["--weights", "shapes", "--size", "64", "--classes", "3", "--device", "cpu", "--precision", "fp32"]


def test_calls_are_warmed_up_and_counted(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(Segmenter, "__call__", lambda self, picture, vocabulary: calls.append(picture.shape))
    assert main(["profile", "maskclip", *SMALL, "--warmup", "2", "--iterations", "3"]) == 0
    assert calls == [(3, 64, 64)] * 5
    assert "ms an image over 3 calls on cpu, torch.float32" in capsys.readouterr().out


def test_the_trace_and_the_table(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert main(["profile", "maskclip", *SMALL, "--iterations", "1", "--torch-profiler", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("ph") == "X"]
    counted = Counter(event["name"] for event in events)
    assert counted["fastzs.predict.picture"] == 1  # the warm-up is not recorded
    once = ("model.tower", "predict.encode", "predict.decode", "ops.label_map")
    assert [counted[f"fastzs.{name}"] for name in once] == [1] * 4
    convolution = next(event for event in events if event["name"] == "aten::conv2d")
    tower = next(event for event in events if event["name"] == "fastzs.model.tower")
    assert tower["ts"] <= convolution["ts"] <= tower["ts"] + tower["dur"]
    page = (Path(__file__).parents[1] / "docs" / "profiling.md").read_text(encoding="utf-8")
    filters = re.findall(r'--nvtx-include "fastzs@([a-z_.]+)/"', page)  # of ncu, on the same command
    assert filters
    assert [name for name in filters if counted[f"fastzs.{name}"] == 0] == []
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert f"trace in {trace}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["--torch-profiler", "no/such/folder/trace.json"], "there is no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message, capsys):
    assert main(["profile", "maskclip", *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
