"""Running CUDA on the host: right kernels give right results, and every kind of fault is noticed."""

from pathlib import Path

import pytest
import torch

from .host import compile_for_host, translate

FAULTS = {  # in faults.cu, with what says so
    4: (AssertionError, "depends on the order"),  # no barrier
    5: (RuntimeError, r"thread 63 touches memory at byte 256 of a buffer of 256 bytes"),
    6: (RuntimeError, r"thread 0 touches memory at byte -4 of a buffer of 256 bytes"),
    7: (RuntimeError, r"thread 63 touches memory at byte 256 of a buffer of 256 bytes"),
    8: (RuntimeError, "offset_kernel wrote outside a buffer of 256 bytes"),
    9: (RuntimeError, "a barrier that some threads never reach"),
    10: (RuntimeError, "threads wait for each other at different places"),
    11: (RuntimeError, r"block \(0, 0, 0\), thread 0 waits for a lane that has left"),
    12: (RuntimeError, "thread 63 touches memory at byte 256"),
    14: (AssertionError, "depends on the order"),  # one block reads what another writes
    16: (RuntimeError, r"stopping_kernel.*thread 9 stopped the program"),
    17: (RuntimeError, "invalid configuration argument"),
    18: (RuntimeError, "invalid configuration argument"),
    19: (RuntimeError, "launched into another stream"),
    20: (RuntimeError, "launched without a device guard"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    source = Path(__file__).parent / "faults.cu"
    (operator,) = compile_for_host(tmp_path_factory.mktemp("faults"), str(source), "run_on_host", [[]])
    return operator


def values(blocks=1):
    return torch.arange(64.0 * blocks)


def test_right_kernels(run):
    x = values(3)
    assert torch.equal(run(x, 0), 2 * x.view(3, 64).flip(1).flatten())
    x = values()
    assert torch.equal(run(x, 1), x.view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten())
    assert torch.equal(run(x, 2), x.view(16, 4).sum(1, keepdim=True).expand(16, 4).flatten())
    assert torch.equal(run(x, 3), x)
    assert run(x, 21).view(2, 32).unique(dim=1).flatten().tolist() == [132, 108]  # how many are below 40, and the first


@pytest.mark.parametrize("which", FAULTS)
def test_faults_are_noticed_and_do_no_harm(run, which):
    error, words = FAULTS[which]
    with pytest.raises(error, match=words):
        run(values(2) if which in (4, 14) else values(), which)
    assert torch.equal(run(values(), 3), values())


def test_what_was_not_written_is_nan(run):
    assert run(values(), 15).isnan().nonzero().tolist() == [[7]]
    seen = [run.once(order, values(2), 13)[0][0].isnan() for order in range(3)]
    assert all(nan[64:].all() and not nan[:64].any() for nan in seen)


def test_what_a_kernel_prints_is_seen(run, capfd):
    with pytest.raises(RuntimeError, match="stopped"):
        run(values(), 16)
    assert "stopped at 9" in capfd.readouterr().out


def test_unknown_cuda_is_refused():
    with pytest.raises(AssertionError, match=r"does not know this CUDA: __shared__ float values"):
        translate("extern __shared__ float values[];")
