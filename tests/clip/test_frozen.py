"""Blocks with frozen weights in training against the ordinary layers of the same blocks."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastzs.clip.prompted import keys_values, step
from fastzs.clip.vision import Block
from fastzs.models import ClipRC, ZegCLIP
from fastzs.ops import TokenLayout
from tests.models.official import model

LAYOUT = TokenLayout(1, (4, 5), (2, 2))
WIDTH = 24


def block(dtype: torch.dtype = torch.float64, hidden: int = 96, quick_gelu: bool = True) -> Block:
    torch.manual_seed(0)
    made = Block(WIDTH, 3, hidden, quick_gelu, 1e-5).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False).train()


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        2, LAYOUT.length, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


def run(layer: Block, x: Tensor) -> Tensor:
    return step(layer, x, LAYOUT, None)


def both(layer: Block, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of the tokens by the frozen halves, and by the ordinary ones."""
    found = []
    for training in (True, False):
        layer.train(training)
        y = run(layer, x)
        (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x)
        found.append((y.detach(), grad))
    return found


def names(y: Tensor) -> set[str]:
    """Of all nodes that backward from ``y`` goes through."""
    seen, found = [y.grad_fn], set()
    while seen:
        node = seen.pop()
        if node is not None and node not in found:
            found.add(node)
            seen += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("hidden", [96, 60, 16])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_gives_what_ordinary_layers_give(hidden, quick_gelu):
    (y, grad), (right_y, right) = both(block(hidden=hidden, quick_gelu=quick_gelu), tokens())
    assert (y - right_y).abs().max() <= 1e-12 * right_y.abs().max()  # measured: 3e-16
    assert (grad - right).abs().max() <= 1e-12 * right.abs().max()  # measured: 6e-16


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_gradcheck(quick_gelu):
    layer = block(quick_gelu=quick_gelu)
    x = tokens()[:1, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


def test_which_blocks_are_taken():
    layer, x = block(), tokens()
    ours = {"_MlpBackward", "_ProjectionsBackward"}
    assert ours <= names(run(layer, x))
    assert not ours & names(run(layer.eval(), x))
    layer.train()
    bias, scale = layer.get_parameter("mlp.c_proj.bias"), layer.ln_1.weight
    bias.requires_grad_()
    assert names(run(layer, x)) & ours == {"_ProjectionsBackward"}
    scale.requires_grad_()
    y = run(layer, x)
    assert not ours & names(y)
    y.sum().backward()
    assert bias.grad is not None
    assert scale.grad is not None
    assert not run(layer.requires_grad_(False), x.detach()).requires_grad


class Adapted(torch.nn.Module):
    """What adapters such as LoRA put in a linear layer's place: its weight is that of the layer."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("place", ["mlp.c_fc", "mlp.c_proj"])
def test_adapters_in_a_layers_place_are_heard(place):
    layer = block()
    parent, _, name = place.rpartition(".")
    setattr(layer.get_submodule(parent), name, Adapted(layer.get_submodule(place)))
    (y, grad), (right_y, right) = both(layer, tokens())
    assert torch.equal(y, right_y)
    assert torch.equal(grad, right)


def test_hooks_are_heard():
    layer, heard = block(), []
    layer.mlp[1].register_forward_hook(lambda *_: heard.append(1))
    both(layer, tokens())
    assert len(heard) == 2


def test_any_strides():
    layer, x = block(), tokens()
    right, right_grad = both(layer, x)[1]
    turned = x.detach().transpose(0, 1).transpose(1, 2).contiguous().permute(2, 0, 1).requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    y = run(layer.train(), turned)
    y.backward(weights.transpose(1, 2).contiguous().transpose(1, 2))
    assert not turned.is_contiguous()
    assert torch.allclose(layer.train().add_mlp(turned), layer.eval().add_mlp(turned), rtol=1e-12, atol=1e-12)
    assert (y - right).abs().max() <= 1e-12 * right.abs().max()
    assert turned.grad is not None
    assert (turned.grad - right_grad).abs().max() <= 1e-12 * right_grad.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [ClipRC, ZegCLIP])
def test_trained_parameters_get_the_gradient_of_an_open_tower(kind, checkpointing):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    text = torch.nn.functional.normalize(
        torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    target = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(4))
    found = []
    for frozen in (True, False):
        net = model(kind).double().train()
        trained = [name for name, parameter in net.backbone.named_parameters() if parameter.requires_grad]
        net.backbone.checkpointing = frozen and checkpointing
        for module in net.modules():
            for attribute in ("dropout", "prompt_dropout"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if not frozen:
            net.requires_grad_()
        net.losses(images, target, text)["total"].backward()
        found.append({name: net.backbone.get_parameter(name).grad for name in trained})
    for name, right in found[1].items():
        assert (found[0][name] - right).abs().max() <= 1e-10 * right.abs().max(), name


def test_prompts_get_their_gradient():
    prompts = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = []
    for training in (True, False):
        layer = block().train(training)
        y = step(layer, tokens(), LAYOUT, keys_values(layer, prompts))
        found += torch.autograd.grad(y.square().sum(), prompts)
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[1].abs().max()  # measured: 3e-16


def test_keeps_less_for_backward(monkeypatch):
    """Nothing besides q, k, v, the attention's own, the tokens twice and the hidden layer once.

    And of each token the logarithms of three heads' denominators, and two numbers of each norm.
    """
    monkeypatch.delenv("FASTZS_IMPL", raising=False)  # the attention's reference keeps its maps
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer, sizes = block(torch.float32), []
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    for low in (False, True):
        for training in (True, False):
            kept.clear()
            x = tokens(torch.float32)
            kept_of = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with kept_of, torch.autocast("cpu", torch.bfloat16, enabled=low):
                y = run(layer.train(training), x)
            sizes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
            del y
    frozen, ordinary, frozen_low, ordinary_low = sizes
    one = 4 * x.numel()
    assert frozen <= (10 + (3 + 4) / WIDTH) * one
    assert frozen <= ordinary
    assert frozen_low < 0.75 * ordinary_low  # the weights in bf16 are not kept


def test_a_norm_reads_its_tokens_once_in_each_direction():
    """Its mean and deviation are kept."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "layer_norm" in str(function):
                calls.append(str(function))
            return function(*args, **kwargs or {})

    calls: list[str] = []
    layer, x = block(torch.float32), tokens(torch.float32)
    with Seen(), torch.autocast("cpu", torch.bfloat16):
        run(layer, x).sum().backward()
    forward, backward = "aten.native_layer_norm.default", "aten.native_layer_norm_backward.default"
    assert calls == [forward, forward, backward, backward]


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_autocast(quick_gelu):
    layer, x = block(torch.float32, quick_gelu=quick_gelu), tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y, grad), (right_y, right) = both(layer, x)
    assert y.dtype == right_y.dtype == grad.dtype == torch.float32
    assert (y - right_y).abs().max() <= 2e-2 * right_y.abs().max()  # measured: 4e-3, and 6e-3 of the gradient
    assert (grad - right).abs().max() <= 2e-2 * right.abs().max()


def test_checkpointed():
    layer, x = block(), tokens()
    (right,) = torch.autograd.grad(run(layer, x).square().sum(), x)
    y = checkpoint(run, layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, right)


@pytest.mark.slow
def test_compiled():
    layer, x = block(torch.float32), tokens(torch.float32)
    compiled = torch.compile(run, fullgraph=True)
    (right,) = torch.autograd.grad(run(layer, x).square().sum(), x)
    (grad,) = torch.autograd.grad(compiled(layer, x).square().sum(), x)
    assert (grad - right).abs().max() <= 1e-5 * right.abs().max()
