import subprocess
import sys

import pytest

from fastzs import trace


def test_off_is_one_shared_object(monkeypatch):
    monkeypatch.setattr(trace, "_ANNOTATE", None)
    assert trace.span("a") is trace.span("b")
    with trace.span("a"), trace.span("a"):
        pass


def test_on_opens_ranges_in_our_domain(monkeypatch):
    nvtx = pytest.importorskip("nvtx", reason="the nvtx package is for Linux only")
    monkeypatch.setenv("FASTZS_NVTX", "1")
    assert trace._annotate() is nvtx.annotate
    seen = []
    monkeypatch.setattr(trace, "_ANNOTATE", lambda *a, **k: seen.append((a, k)))
    trace.span("model")
    assert seen == [(("model",), {"domain": "fastzs"})]


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_variable_is_read_at_import(value):
    if value == "1":
        pytest.importorskip("nvtx", reason="the nvtx package is for Linux only")
    code = "from fastzs import trace\nwith trace.span('x'): print(trace._ANNOTATE is not None)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"FASTZS_NVTX": value, "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(value == "1"), done.stderr
