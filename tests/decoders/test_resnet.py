import pytest
import torch
import torchvision

from fastzs.decoders.resnet import DilatedResNet, blocks_of, from_caffe

TINY = {"blocks": (2, 1, 2, 1), "width": 4}


def random_statistics(net: DilatedResNet) -> DilatedResNet:
    torch.manual_seed(0)
    for norm in net.norms():
        for tensor, low, high in (
            (norm.weight.data, 0.5, 1.5),
            (norm.bias.data, -0.5, 0.5),
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 2.0),
        ):
            tensor.uniform_(low, high)
    return net


def test_the_first_stages_are_torchvisions():
    theirs = torchvision.models.resnet50(weights=None).double().eval()
    ours = DilatedResNet("resnet50", output_stride=16).double().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"fc.weight", "fc.bias"}
    images = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        found = ours(images)
        for i, stage in enumerate((theirs.layer1, theirs.layer2, theirs.layer3)):
            x = stage(x)
            torch.testing.assert_close(found[i], x)
    assert found[3].shape == (1, 2048, 3, 4)  # dilated instead of reduced


@pytest.mark.parametrize("form", ["caffe", "torchvision"])
def test_folded_norms_change_nothing(form):
    net = random_statistics(DilatedResNet(**TINY, form=form)).double().eval()
    images = torch.randn(2, 3, 41, 60, dtype=torch.float64)
    with_gradients = net(images)  # norms by themselves
    with torch.no_grad():
        for ours, wanted in zip(net(images), with_gradients, strict=True):
            torch.testing.assert_close(ours, wanted)
        before = net(images)[-1]
        net.layer3[0].bn2.running_var.mul_(4)  # what is kept follows the statistics
        after = net(images)[-1]
    torch.testing.assert_close(after, net(images)[-1])
    assert not torch.allclose(before, after)


def test_forms_differ_in_the_stride_and_the_pooling():
    caffe, other = (DilatedResNet(**TINY, form=form) for form in ("caffe", "torchvision"))
    assert (caffe.layer2[0].conv1.stride, caffe.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (other.layer2[0].conv1.stride, other.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    images = torch.zeros(1, 3, 68, 68)
    assert caffe(images)[0].shape[2:] == (18, 18)  # 34 cells, rounded up
    assert other(images)[0].shape[2:] == (17, 17)


def test_dilations():
    net = DilatedResNet(**TINY, output_stride=16, multi_grid=(1, 2, 4))
    assert [block.conv2.dilation[0] for block in net.layer4] == [2]
    wide = DilatedResNet((1, 1, 1, 4), 4, output_stride=16, multi_grid=(1, 2, 4))
    assert [block.conv2.dilation[0] for block in wide.layer4] == [2, 4, 8, 8]
    assert [block.conv2.dilation[0] for block in DilatedResNet(**TINY).layer3] == [2, 2]


def test_frozen_norms_keep_their_statistics_from_the_start():
    for net in (DilatedResNet(**TINY, frozen=True), DilatedResNet(**TINY, frozen=True).eval().train()):
        before = net.bn1.running_mean.clone()
        net(torch.randn(2, 3, 32, 32))
        assert torch.equal(net.bn1.running_mean, before)
        assert not any(p.requires_grad for norm in net.norms() for p in norm.parameters())
    live = DilatedResNet(**TINY)
    live(torch.randn(2, 3, 32, 32))
    assert live.bn1.running_mean.abs().max() > 0


def test_names_of_the_caffe_form():
    net = DilatedResNet(**TINY, form="caffe")
    parts = {
        "conv1": "reduce",
        "conv2": "conv3x3",
        "conv3": "increase",
        "bn1": "reduce",
        "bn2": "conv3x3",
        "bn3": "increase",
    }
    published = {}
    for name, tensor in net.state_dict().items():
        words = name.split(".")
        if words[0] in ("conv1", "bn1"):
            published[f"back.layer1.conv1.{words[0][:-1]}.{words[1]}"] = tensor
            continue
        part = "shortcut" if words[2] == "downsample" else parts[words[2]]
        kind = {"0": "conv", "1": "bn"}[words[3]] if words[2] == "downsample" else words[2][:-1]
        published[f"back.layer{int(words[0][-1]) + 1}.block{int(words[1]) + 1}.{part}.{kind}.{words[-1]}"] = tensor
    found = from_caffe(published | {"other.weight": torch.zeros(1)}, "back.")
    assert found.keys() == net.state_dict().keys()
    assert all(found[name] is tensor or torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    assert blocks_of({f"net.{name}": t for name, t in found.items()}, "net.") == [2, 1, 2, 1]
    with pytest.raises(KeyError):
        blocks_of({}, "net.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "resnet34"}, "expected one of resnet26, resnet50, resnet101"),
        ({"blocks": (1, 1, 1)}, "blocks of four stages"),
        ({"form": "keras"}, "'caffe' or 'torchvision'"),
        ({"output_stride": 4}, "8 or 16"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DilatedResNet(**TINY | options)
