"""Named ranges: none by default, NVTX's or torch's on request, and the names that the docs promise."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastzs
from fastzs import trace
from tests.training import train_small

ROOT = Path(fastzs.__file__).parents[1]


@pytest.fixture
def seen(monkeypatch):
    """Names of the ranges that are opened."""
    names = []

    def note(name):
        names.append(name)
        return trace._NOTHING

    monkeypatch.setattr(trace, "_open", note)
    return names


def test_off_is_one_shared_object(monkeypatch):
    monkeypatch.setattr(trace, "_open", None)
    assert trace.span("a") is trace.span("b")
    with trace.span("a"), trace.span("a"):
        pass


def test_a_traced_function_is_the_function(monkeypatch, seen):
    @trace.traced("name")
    def double(x, *, plus=0):
        """What it does."""
        return 2 * x + plus

    assert double.__doc__ == "What it does."
    assert double(3, plus=1) == 7
    assert seen == ["name"]
    monkeypatch.setattr(trace, "_open", None)
    assert double(3) == 6
    assert seen == ["name"]


def test_on_opens_ranges_in_our_domain(monkeypatch):
    nvtx = pytest.importorskip("nvtx", reason="the nvtx package is for Linux only")
    monkeypatch.setenv("FASTZS_NVTX", "1")
    opened = trace._nvtx()
    assert opened is not None
    assert (opened.func, opened.keywords) == (nvtx.annotate, {"domain": "fastzs"})
    with opened("model"):
        pass


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_variable_is_read_at_import(value):
    if value == "1":
        pytest.importorskip("nvtx", reason="the nvtx package is for Linux only")
    code = "from fastzs import trace\nwith trace.span('x'): print(trace._open is not None)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"FASTZS_NVTX": value, "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(value == "1"), done.stderr


def test_ranges_in_torchs_profiler():
    before = trace._open
    with trace.torch_ranges(), torch.profiler.profile() as recording, trace.span("outer"), trace.span("outer.inner"):
        torch.ones(2) + 1
    assert trace._open is before
    assert {"fastzs.outer", "fastzs.outer.inner"} <= {event.key for event in recording.key_averages()}


def test_no_range_breaks_a_graph(seen):
    @trace.traced("inside")
    def double(x):
        return 2 * x

    class Model(torch.nn.Module):
        def forward(self, x):
            with trace.span("around"):
                return double(x) + 1

    x = torch.arange(3.0)
    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    for way in (compiled, torch.export.export(Model(), (x,)).module()):
        assert torch.equal(way(x), 2 * x + 1)
    assert seen == []
    Model()(x)
    assert seen == ["around", "inside"]


def test_a_step_of_training(seen, tmp_path):
    train_small(tmp_path, max_steps=1)
    step = [name for name in seen if name not in ("model.tower.block", "ops.bridged_attention")]
    train = ["train.data", "train.forward", "model.tower", "model.decoder", "model.decoder", "train.loss"]
    assert step[:9] == [*train, "ops.mask_loss", "train.backward", "train.optimizer"]
    assert {"train.evaluate", "train.save"} <= set(step)
    assert seen.count("model.tower.block") >= 2


def test_the_docs_list_all_names():
    used = set()
    for path in [*(ROOT / "fastzs").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("span", "traced"):
                used |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    table = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8").partition("## On any machine")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]
    assert sorted(used) == sorted(named)
    assert len(used) > 15


def test_the_docs_name_nothing_else():
    """Neither in the text, nor in the filters of ncu's lines; and the lines of `fastzs profile` are understood."""
    from fastzs.commands import profile, train
    from fastzs.commands.train import preset_files

    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    table, _, rest = page.partition("## On any machine")
    names = set(re.findall(r"`([a-z]+\.[a-z._]+)`", table))
    kinds = ("predict", "model", "train", "ops")
    mentioned = {name for name in re.findall(r"`([a-z_.]+)`", rest) if name.partition(".")[0] in kinds}
    filters = set(re.findall(r'--nvtx-include "fastzs@([a-z_.]+)/"', rest))
    assert filters
    assert mentioned | filters <= names, mentioned | filters - names
    lines = re.findall(r"fastzs profile (maskclip[^\n]*)", rest.replace("\\\n", " "))
    assert len(lines) >= 4
    for line in lines:
        profile.parser().parse_args(line.split())
    (trained,) = re.findall(r"fastzs train ([^\n]*)", rest.replace("\\\n", " "))
    assert preset_files(trained.split(), [])
    train.parser().parse_args(trained.split())


def test_every_op_is_a_range():
    from fastzs import ops

    for name in ops.__all__:
        op = getattr(ops, name)
        if not isinstance(op, type):
            assert op.__wrapped__.__name__ == name
