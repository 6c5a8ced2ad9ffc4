"""Launchers of Triton's kernels do nothing that a CUDA graph would not bear, nor a GPU that is to be kept busy.

From the second call on they neither ask for a value nor copy between host and GPU. Seen on tensors of a GPU that is not
there.
"""

import contextlib

import pytest
import torch

from tests.copies import forget_tables, gpu_that_is_not_there

from .interpreter import INTERPRETED

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="nothing is launched"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
if not INTERPRETED:
    from bench.aot import launched_for
    from fastzs.kernels import triton_runtime
    from fastzs.kernels.label_map import tables
    from fastzs.kernels.refine import kept

    from .test_machine_code import CASES, labels
else:
    CASES = {}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def on_cpu(function):
        def call(*arguments):
            with torch._C.DisableTorchFunction():
                return function(*arguments)

        return call

    for module, name in ((tables, "host_tables"), (kept, "window_axis")):
        monkeypatch.setattr(module, name, on_cpu(getattr(module, name)))
    yield
    forget_tables()


def copies_of(call) -> list:
    with launched_for(90, compiled=False) as launches, gpu_that_is_not_there(default=True) as seen:
        call()
        seen.clear()
        call()
    tensors = [value for launch in launches for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    return seen


@pytest.mark.parametrize("case", [case for case in CASES if case != "probe"])
def test_a_launcher_waits_for_nothing(case, gpu):
    call, _ = CASES[case]
    assert copies_of(call) == []


def test_tables_that_are_not_kept_show(gpu, monkeypatch):
    monkeypatch.setattr(tables, "build_tables", tables.build_tables.__wrapped__)
    seen = copies_of(lambda: labels(torch.float32, "none", (64, 96)))
    assert len(seen) >= 9
    assert {(source, target) for source, target, _ in seen} == {("cpu", "cuda")}


def test_architecture_is_the_devices(gpu):
    assert triton_runtime.architecture(torch.device("cuda", 0)) == 90
