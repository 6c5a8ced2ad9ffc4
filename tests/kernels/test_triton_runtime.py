"""What is found out about a GPU before a kernel is chosen for it; no GPU is here, so PyTorch's answers are replaced."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastzs.kernels import triton_runtime
from fastzs.kernels.dispatch import choose
from fastzs.kernels.label_map import compiled as label_map_compiled
from fastzs.kernels.label_map.api import reasons as label_map_reasons
from fastzs.kernels.mask_loss import api as mask_loss
from fastzs.kernels.pixel_text_logits import api as pixel_text

from .interpreter import INTERPRETED, interpreted, run_interpreted

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of the given compute capability on which a first kernel does what it is told."""
    if INTERPRETED:
        pytest.skip("asks about GPUs")
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    triton_runtime.first_kernel.cache_clear()

    def there(capability, run=lambda device: None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "fastzs.kernels.probe", SimpleNamespace(run=run))

    yield there
    triton_runtime.first_kernel.cache_clear()


def test_a_first_kernel_is_run_once(gpu):
    runs = []
    gpu((9, 0), runs.append)
    for _ in range(3):
        assert triton_runtime.why_not_triton("x is", DEVICE) is None
    assert runs == [DEVICE]


def test_what_it_raises_is_the_reason_and_the_next_backend_is_taken(gpu):
    def broken(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    gpu((9, 0), broken)
    reason = triton_runtime.why_not_triton("x is", DEVICE)
    assert reason == (
        "a first kernel failed: RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    )
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: a first kernel failed"):
        choose("an op", "triton", {"triton": reason, "reference": None})
    assert choose("an op", "auto", {"triton": reason, "reference": None}) == "reference"


def test_a_wrong_result_is_a_reason_too(gpu):
    from fastzs.kernels import probe

    class Stuck:  # a kernel that does nothing
        def __getitem__(self, grid):
            return lambda *args, **options: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "probe_kernel", Stuck())
        with pytest.raises(RuntimeError, match=r"1 \+ 1 is 1\.0 on cpu"):
            probe.run(torch.device("cpu"))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_older_gpus_take_no_kernel_of_ours(gpu, capability, monkeypatch):
    """Triton supports 8.0 and up, and csrc/*.cu is compiled for it; PyTorch's own operators run there."""
    gpu(capability)
    monkeypatch.setattr(label_map_compiled, "MISSING_CUDA", None)
    for module in (mask_loss, pixel_text):
        monkeypatch.setattr(module, "MISSING", {"cpu": None, "cuda": None})
    there = SimpleNamespace(device=DEVICE, dtype=torch.float32, shape=(1, 3, 4, 4))
    target = SimpleNamespace(device=DEVICE, dtype=torch.uint8, shape=(1, 16, 16))
    asked = [
        label_map_reasons(there, 1),
        mask_loss._reasons(there, target),
        pixel_text.reasons(there, torch.float32),
    ]
    for reasons in asked:
        for backend in ("cuda", "triton"):
            assert f"compute capability {capability[0]}.{capability[1]}; expected 8.0" in reasons[backend]
        assert choose("an op", "auto", reasons) in ("cpu", "reference")


def test_a_traced_program_asks_too(gpu):
    """torch.compile does not look into the first kernel: it takes the answer."""
    gpu((9, 0))

    def function(x):
        return x + (1 if triton_runtime._why_broken(0) is None else 2)

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(())).item() == 1


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
def test_the_first_kernel_runs():
    from fastzs.kernels import probe

    probe.run(torch.device("cpu"))
