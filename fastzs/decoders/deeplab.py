"""DeepLab on torchvision's ResNets: a dilated backbone and the heads of DeepLabV2 and DeepLabV3+.

Sources: Chen et al., "DeepLab" (V2), TPAMI 2018; Chen et al., "Encoder-Decoder with Atrous Separable Convolution"
(V3+), ECCV 2018. The heads carry mmsegmentation's names, under which MaskCLIP+ was published.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet

HEADS = ("deeplabv2", "deeplabv3+")
RESNETS = ("resnet50", "resnet101", "resnet152")  # those that torchvision can dilate


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; "same" padding."""

    def __init__(self, inner: int, outer: int, side: int, dilation: int = 1, groups: int = 1):
        super().__init__()
        padding = dilation * (side // 2)
        self.conv = nn.Conv2d(inner, outer, side, padding=padding, dilation=dilation, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SeparableConvNorm(nn.Module):
    """3x3 for each channel by itself, then 1x1 over the channels."""

    def __init__(self, inner: int, outer: int, dilation: int = 1):
        super().__init__()
        self.depthwise_conv = ConvNorm(inner, inner, 3, dilation, groups=inner)
        self.pointwise_conv = ConvNorm(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class DeepLabV2Head(nn.Module):
    """The sum of parallel convolutions, 3x3 at each dilation (1x1 at dilation 1), each with batch norm and ReLU."""

    def __init__(self, inner: int, outer: int, dilations: Sequence[int] = (6, 12, 18, 24)):
        super().__init__()
        self.aspp_modules = nn.ModuleList(ConvNorm(inner, outer, 1 if d == 1 else 3, d) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, h, w] -> [B, outer, h, w]."""
        return torch.stack([module(x) for module in self.aspp_modules]).sum(0)


class DeepLabV3PlusHead(nn.Module):
    """Separable convolutions at several dilations beside 1x1 and the mean, joined, and refined with stride-4 features.

    Batch norm over the mean needs at least two pictures in training.
    """

    def __init__(self, inner: int, fine: int, outer: int, dilations: Sequence[int] = (12, 24, 36), fine_out: int = 48):
        super().__init__()
        self.image_pool = ConvNorm(inner, outer, 1)
        self.aspp_modules = nn.ModuleList(
            [ConvNorm(inner, outer, 1), *(SeparableConvNorm(inner, outer, d) for d in dilations)]
        )
        self.bottleneck = ConvNorm((len(dilations) + 2) * outer, outer, 3)
        self.c1_bottleneck = ConvNorm(fine, fine_out, 1)
        self.sep_bottleneck = nn.Sequential(SeparableConvNorm(outer + fine_out, outer), SeparableConvNorm(outer, outer))

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        """x [B, inner, h, w] and features of stride 4 [B, fine, H / 4, W / 4] -> [B, outer, H / 4, W / 4]."""
        mean = self.image_pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.bottleneck(torch.cat([mean, *(module(x) for module in self.aspp_modules)], dim=1))
        x = F.interpolate(x, fine.shape[2:], mode="bilinear", align_corners=False)
        return self.sep_bottleneck(torch.cat([x, self.c1_bottleneck(fine)], dim=1))


class DeepLab(nn.Module):
    """A ResNet of stride 8 (the last two stages dilated) with one of the heads.

    Args:
        output_dim: channels D of the result.
        resnet: torchvision's name: resnet50, resnet101 or resnet152.
        head: "deeplabv2" (stride 8) or "deeplabv3+" (stride 4).
        pretrained: start from torchvision's ImageNet weights.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self, output_dim: int, resnet: str, head: Literal["deeplabv2", "deeplabv3+"], *, pretrained: bool = False
    ):
        super().__init__()
        for what, value, known in (("resnet", resnet, RESNETS), ("network", head, HEADS)):
            if value not in known:
                raise ValueError(f"DeepLab: {what} must be one of {', '.join(known)}, got {value!r}")
        weights = "DEFAULT" if pretrained else None
        made = torchvision.models.get_model(resnet, weights=weights, replace_stride_with_dilation=[False, True, True])
        net = cast(ResNet, made)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        wide = net.fc.in_features
        if head == "deeplabv2":
            self.head = DeepLabV2Head(wide, output_dim)
        else:
            self.head = DeepLabV3PlusHead(wide, wide // 8, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> features [B, D, H / 8, W / 8], or of stride 4."""
        fine = self.layer1(self.stem(images))
        x = self.layer4(self.layer3(self.layer2(fine)))
        return self.head(x, fine) if isinstance(self.head, DeepLabV3PlusHead) else self.head(x)
