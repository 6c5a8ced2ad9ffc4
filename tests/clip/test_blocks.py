"""QuickGELU between two products: what it gives, and how often the hidden layer goes through a GPU's memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastzs.clip import blocks
from fastzs.clip.blocks import Block, quick_gelu_mlp
from tests.clip.test_frozen import Adapted
from tests.kernels.tolerances import errors

WIDTH, HIDDEN = 24, 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_in_the_products_change_nothing(dtype):
    """Within the roundings of a bias, a hidden number, its activation and the products' sums, c = 4."""
    torch.manual_seed(0)
    mlp = Block(WIDTH, 3, HIDDEN, True, 1e-5).mlp.to(dtype)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, WIDTH, dtype=dtype)
    with torch.no_grad():
        found = quick_gelu_mlp(x, mlp[0], mlp[2])
        want = mlp.double()(x.double())
    assert found.dtype == dtype
    assert errors(found, want)[0] <= 4 * HIDDEN**0.5 * torch.finfo(dtype).eps


class Passes(TorchDispatchMode):
    """How many numbers of hidden layers operators other than products read and write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.namespace == "aten" and not function.is_view and "mm" not in str(function):
            seen = [
                t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.shape[-1:] == (HIDDEN,)
            ]
            self.numbers += sum(t.numel() for t in seen if t.ndim > 1)
        return out


def test_on_a_gpu_adapters_in_a_layers_place_are_heard(monkeypatch):
    monkeypatch.setattr(blocks, "_on_gpu", lambda x: True)
    layer, x = Block(WIDTH, 3, HIDDEN, True, 1e-5), torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        right = layer.add_mlp(x)
        layer.mlp.c_proj = Adapted(layer.mlp.c_proj)
        torch.testing.assert_close(layer.add_mlp(x) - x, 2 * (right - x))


@pytest.mark.parametrize(("grad", "times"), [(False, 2), (True, 6)])
def test_on_a_gpu_the_hidden_layer_is_read_and_written_once(grad, times):
    """Not so where a gradient is wanted of the weights."""
    with FakeTensorMode(), torch.device("cuda"), torch.set_grad_enabled(grad):
        layer, x = Block(WIDTH, 3, HIDDEN, True, 1e-5), torch.empty(2, 7, WIDTH)
        with Passes() as passes:
            assert layer.add_mlp(x).shape == x.shape
    assert passes.numbers == times * 2 * 7 * HIDDEN
