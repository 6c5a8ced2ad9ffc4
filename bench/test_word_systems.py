"""Parts of the systems before CLIP: the grouped MMD against a loop over the groups, the dilated ResNet in inference.

    pytest bench/test_word_systems.py --benchmark-only

The MMD is CaGNet's: pictures of 312 x 312 with 21 classes, features of stride 8, a set for each run of equal labels in
raster order, forward and backward. "published" goes through the runs one by one, each kernel width by itself. The
ResNet is a ResNet-50 of stride 8; "torchvision" is its own with channels last and norms folded into convolutions. The
first blocks of dilated stages have another dilation there, so that each is judged by itself in fp64.
"""

import functools

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import ResNet

from fastzs.decoders.generator import grouped_mmd, runs
from fastzs.decoders.resnet import DilatedResNet
from fastzs.models.cagnet import SIGMAS

from .rivals import Contest, Rival, compete

SIDE, STRIDE, CLASSES, CHANNELS, BATCH = 312, 8, 21, 256, 2
IMAGE = (1, 3, 320, 320)


def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Made and real features [N, D] in (0, 1), and each row's run; labels are squares of 4 x 4 cells, some alone."""
    generator = torch.Generator().manual_seed(seed)
    cells = SIDE // STRIDE
    coarse = torch.randint(CLASSES, (BATCH, 10, 10), generator=generator)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :cells, :cells].contiguous()
    alone = torch.rand(labels.shape, generator=generator) < 0.02
    labels[alone] = torch.randint(CLASSES, labels.shape, generator=generator)[alone]
    x, y = (torch.rand(labels.numel(), CHANNELS, generator=generator, dtype=dtype) for _ in range(2))
    return x, y, runs(labels.flatten())


def one_by_one(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    out = []
    for group in range(int(groups.max()) + 1):
        both = torch.cat([x[groups == group], y[groups == group]])
        n = len(both) // 2
        square = both.square().sum(1)
        distance = square[:, None] + square[None] - 2 * both @ both.T
        kernel = torch.stack([(-distance / (2 * s)).exp() for s in SIGMAS]).sum(0)
        value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
        out.append(value.clamp(min=1e-30).sqrt())
    return torch.stack(out)


def ours(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    return grouped_mmd(x, y, groups, SIGMAS)


def with_gradient(function):
    def run(x: Tensor, y: Tensor, groups: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf, y, groups)
        return [out.detach(), *torch.autograd.grad(out.mean(), leaf)]

    return run


MMD = {"published": one_by_one, "fastzs": ours}


def mmd_contest() -> Contest:
    return Contest(
        f"MMD of {BATCH} pictures of {SIDE} x {SIDE}, {CLASSES} classes, {CHANNELS} channels, forward + backward, cpu",
        "cpu",
        inputs,
        {name: Rival(with_gradient(function), bound=1e-3) for name, function in MMD.items()},
        with_gradient(one_by_one),
        info={"op": "grouped MMD"},
    )


@pytest.mark.parametrize("rival", MMD)
def test_mmd(benchmark, rival):
    compete(benchmark, rival, mmd_contest)


class Stages(nn.Module):
    """torchvision's network without its pooling and classifier."""

    def __init__(self, net: ResNet):
        super().__init__()
        parts = (net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


@functools.cache
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    net = DilatedResNet("resnet50").eval().requires_grad_(False)
    net.load_state_dict(theirs.state_dict(), strict=False)
    return {"torchvision": Stages(theirs).eval().requires_grad_(False), "fastzs": net}


@functools.cache
def fused() -> nn.Module:
    return fuse(networks()["torchvision"]).to(memory_format=torch.channels_last)


@torch.no_grad()
def theirs(x: Tensor) -> Tensor:
    return fused()(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def mine(x: Tensor) -> Tensor:
    return networks()["fastzs"](x)[-1]


@torch.no_grad()
def right(name: str, x: Tensor) -> Tensor:
    out = networks()[name].double()(x.double())
    networks()[name].float()
    return out[-1] if isinstance(out, list) else out


RESNETS = {"torchvision": theirs, "fastzs": mine}


def resnet_contest() -> Contest:
    return Contest(
        f"ResNet-50 of stride 8, {IMAGE[2]} x {IMAGE[3]}, inference, cpu",
        "cpu",
        lambda seed, dtype: (torch.randn(IMAGE, generator=torch.Generator().manual_seed(seed), dtype=dtype),),
        {name: Rival(run, bound=1e-3, judge=functools.partial(right, name)) for name, run in RESNETS.items()},
        functools.partial(right, "fastzs"),
        pictures=1,
        info={"op": "dilated ResNet"},
    )


@pytest.mark.parametrize("rival", RESNETS)
def test_resnet(benchmark, rival):
    compete(benchmark, rival, resnet_contest)
