"""The proposals' ResNets: torchvision's own and DeepLab's form; norms are folded in inference, not in training."""

from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

from fastzs.decoders.maskformer import MaskFormer, Pyramid


def unlike(net: nn.Module) -> nn.Module:
    """In fp64, with norms whose statistics and weights count."""
    for name, tensor in net.state_dict().items():
        if "bn" in name or "stem" in name or "downsample.1" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return net.double()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_is_torchvisions(name):
    ours = unlike(Pyramid(name, None))
    theirs = torchvision.models.get_model(name, weights=None).double()
    stem = nn.Sequential(theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool)
    stages = (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    stem.load_state_dict(ours.stem.state_dict())
    nn.ModuleList(stages).load_state_dict(ours.stages.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        with torch.no_grad():
            x, found = stem(images), ours(images)
            for stage, map_ in zip(stages, found, strict=True):
                x = stage(x)
                torch.testing.assert_close(map_, x, rtol=1e-9, atol=1e-9)
    assert not any("_applied" in key for key in ours.state_dict())


def test_deeplabs_form():
    net = Pyramid("resnet50c", None).eval().requires_grad_(False)
    steps = [(64, 96), *((64 // 2**i, 96 // 2**i) for i in (2, 3, 4, 5))]
    maps = net(torch.randn(1, 3, 64, 96))
    assert [x.shape[1:] for x in maps] == [(c, *s) for c, s in zip((256, 512, 1024, 2048), steps[1:], strict=True)]
    assert all(a[0] > b[0] for a, b in pairwise(steps))
    assert [block.conv2.dilation for block in net.stages[3]] == [(1, 1), (2, 2), (4, 4)]
    assert [conv.stride for conv in net.stem if isinstance(conv, nn.Conv2d)] == [(2, 2), (1, 1), (1, 1)]
    with pytest.raises(ValueError, match="no weights of resnet50c"):
        Pyramid("resnet50c", "IMAGENET1K_V1")
    with pytest.raises(ValueError, match="'resnet9' is unknown"):
        Pyramid("resnet9", None)


@torch.no_grad()
def test_masks_are_products_of_queries_and_pixels():
    """Fewer queries than channels: the kernel is contracted with them, and gives what the long way gives."""
    net = unlike(MaskFormer("resnet18", None, width=32, queries=5, layers=2, hidden=16)).eval()
    net.pixels.embed.bias.normal_()
    images = torch.randn(2, 3, 64, 90, dtype=torch.float64)
    found = net(images)
    assert found.masks.shape == (1, 2, 5, 16, 23)
    called = []
    net.pixels.embed.register_forward_hook(lambda *_: called.append(1))
    net.training = net.pixels.training = True  # the norms stay as they are
    long = net(images)
    assert called == [1]
    assert long.masks.shape[0] == 2
    torch.testing.assert_close(found.masks[0], long.masks[1], rtol=1e-9, atol=1e-9)
    net.training = net.pixels.training = False
    net(images)
    assert called == [1]
