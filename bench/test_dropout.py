"""dropout after a relu, forward and backward, against PyTorch's: the hidden layer of CLIP-RC's decoder in training.

    pytest bench/test_dropout.py --benchmark-only                         # the CPU, where it is used
    pytest bench/test_dropout.py --benchmark-only -m "full and not gpu"   # 20 classes instead of 171

The classes and 16 regions are queries with 2048 hidden channels each. Draws differ, so rivals are judged without
dropout here, and with it in tests/kernels/test_dropout.py.
"""

import pytest
import torch
import torch.nn.functional as F

from fastzs.ops import dropout

from .rivals import Contest, Rival, compete

ROWS = [pytest.param(16 * 171, marks=pytest.mark.quick), pytest.param(16 * 20, marks=pytest.mark.full)]
CHANNELS, RATE = 2048, 0.1


def published(x, rate):
    return F.dropout(F.relu(x), rate)


def ours(x, rate):
    return dropout(x, rate, relu=True)


FUNCTIONS = {"published": published, "torch.compile": torch.compile(published, dynamic=False), "fastzs": ours}


def with_gradient(function, rate):
    """The result and the gradient of x under weights of one."""

    def run(x):
        leaf = x.detach().requires_grad_()
        out = function(leaf, rate)
        return [out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))]

    return run


def contest(rows):
    return Contest(
        f"dropout after a relu [{rows}, {CHANNELS}] fp32, forward + backward, cpu",
        "cpu",
        lambda seed, dtype: (torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed)),),
        {
            name: Rival(with_gradient(function, RATE), answer=with_gradient(function, 0.0))
            for name, function in FUNCTIONS.items()
        },
        with_gradient(published, 0.0),
        nbytes=4 * 4 * rows * CHANNELS,
        info={"op": "dropout", "headline": rows == 16 * 171},
    )


@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_cpu(benchmark, rows, rival):
    compete(benchmark, rival, contest, rows)
