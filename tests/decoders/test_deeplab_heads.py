import re

import pytest
import torch

from fastzs.decoders.deeplab import DeepLab, PlainV3PlusHead, SumHead, from_zs3


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = SumHead(6, 12, (1, 2, 3), std=0.3).double()
    for conv in head.convs:
        torch.nn.init.normal_(conv.bias)
    return head


@pytest.mark.parametrize("classes", [3, 12, 20])
def test_scores_are_products_of_the_result(head, classes):
    x, text = torch.randn(2, 6, 7, 9, dtype=torch.float64), torch.randn(classes, 12, dtype=torch.float64)
    wanted = torch.einsum("cd,bdhw->bchw", text, head(x))
    torch.testing.assert_close(head.scores(x, text), wanted)
    grads = [torch.autograd.grad(y.square().sum(), list(head.parameters())) for y in (head.scores(x, text), wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_folded_kernels_follow_text_and_weights(head):
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        for text in torch.randn(2, 4, 12, dtype=torch.float64):
            for _ in range(2):
                torch.testing.assert_close(head.scores(x, text), torch.einsum("cd,bdhw->bchw", text, head(x)))
                head.convs[1].weight.mul_(1.5)
                head.convs[0].bias.add_(1)


def test_fewer_classes_than_channels_cost_fewer_outputs(head, monkeypatch):
    outputs = []
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, kernel, *rest: outputs.append(len(kernel)) or x.new_zeros(1, len(kernel), 5, 5),
    )
    x = torch.zeros(1, 6, 5, 5, dtype=torch.float64)
    head.scores(x, torch.zeros(4, 12, dtype=torch.float64))
    assert set(outputs) == {4}


def test_names_of_both_publishers_of_the_v3_plus_head():
    head = PlainV3PlusHead(8, 4, 6, 5)
    wanted = head.state_dict()
    leaf = r"(conv|bn)\.(\w+)$"
    zs3, joint = {}, {}
    for name, tensor in wanted.items():
        rest = name.split(".")[-1]
        kind, number = re.search(leaf, name)[1], name.split(".")[1]
        bn = kind == "bn"
        names = {
            "branches": (f"aspp.aspp{number}.X", f"aspp.convs.{number}.{int(bn)}"),
            "pool": (f"aspp.global_avg_pool.{1 + bn}", f"aspp.convs.4.{1 + bn}"),
            "project": (f"aspp.{'bn1' if bn else 'conv1'}", f"aspp.project.{int(bn)}"),
            "low": (f"decoder.{'bn1' if bn else 'conv1'}", f"decoder.project.{int(bn)}"),
            "refine": (f"decoder.last_conv.{'N'}", f"decoder.last_conv.{'N'}"),
        }[name.split(".")[0]]
        if "branches" in name:
            names = (f"aspp.aspp{int(number) + 1}.{'bn' if bn else 'atrous_conv'}", names[1])
        if "refine" in name:
            names = (f"decoder.last_conv.{4 * int(number) + bn}",) * 2
        zs3[f"{names[0]}.{rest}"], joint[f"{names[1]}.{rest}"] = tensor, tensor
    for published in (zs3, joint):
        assert from_zs3(published | {"decoder.pred_conv.weight": torch.zeros(1)}).keys() == wanted.keys()


def test_the_v3_plus_head_gives_the_fine_maps_size():
    head = PlainV3PlusHead(8, 4, 6, 5).eval()
    assert head(torch.zeros(2, 8, 3, 4), torch.zeros(2, 4, 9, 13)).shape == (2, 6, 9, 13)


@pytest.mark.parametrize(("head", "stride"), [("deeplabv2", 8), ("deeplabv3+", 4)])
def test_the_small_network(head, stride):
    net = DeepLab(5, "resnet26", head).eval()
    assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 64 // stride, 96 // stride)
    assert sum(p.numel() for p in net.parameters()) < 12e6
