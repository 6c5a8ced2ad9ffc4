"""DeepLab on torchvision's ResNets: a dilated backbone and the heads of DeepLabV2 and DeepLabV3+.

Sources: Chen et al., "DeepLab" (V2), TPAMI 2018; Chen et al., "Encoder-Decoder with Atrous Separable Convolution"
(V3+), ECCV 2018. The heads of :class:`DeepLab` carry mmsegmentation's names, under which MaskCLIP+ was published;
:class:`SumHead` and :class:`PlainV3PlusHead` are those of the systems before CLIP.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet

from fastzs.clip.memo import Memo
from fastzs.decoders.resnet import DilatedResNet

HEADS = ("deeplabv2", "deeplabv3+")
RESNETS = ("resnet50", "resnet101", "resnet152")  # those that torchvision can dilate
SMALL = "resnet26"  # of our own, a quarter as wide, for drawn scenes and other small data


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

    Batch norm over the mean needs at least two images in training.
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
        resnet: torchvision's name: resnet50, resnet101 or resnet152; or "resnet26", which is narrow and always new.
        head: "deeplabv2" (stride 8) or "deeplabv3+" (stride 4).
        pretrained: start from torchvision's ImageNet weights.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self, output_dim: int, resnet: str, head: Literal["deeplabv2", "deeplabv3+"], *, pretrained: bool = False
    ):
        super().__init__()
        for what, value, known in (("resnet", resnet, (*RESNETS, SMALL)), ("network", head, HEADS)):
            if value not in known:
                raise ValueError(f"DeepLab: {what} must be one of {', '.join(known)}, got {value!r}")
        self.small = DilatedResNet(SMALL, 16) if resnet == SMALL else None
        if self.small is not None:
            wide = self.small.channels[-1]
        else:
            weights = "DEFAULT" if pretrained else None
            dilated = [False, True, True]
            made = torchvision.models.get_model(resnet, weights=weights, replace_stride_with_dilation=dilated)
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
        if self.small is not None:
            fine, *_, x = self.small(images)
        else:
            fine = self.layer1(self.stem(images))
            x = self.layer4(self.layer3(self.layer2(fine)))
        return self.head(x, fine) if isinstance(self.head, DeepLabV3PlusHead) else self.head(x)


class SumHead(nn.Module):
    """DeepLabV2's first form: the sum of parallel 3x3 convolutions with bias, without norm or ReLU.

    Nothing non-linear follows, so that a matrix on its result can be multiplied into the kernels: :meth:`scores`.
    """

    def __init__(self, inner: int, outer: int, dilations: Sequence[int] = (6, 12, 18, 24), std: float = 0.01):
        super().__init__()
        convs = nn.ModuleList(nn.Conv2d(inner, outer, 3, padding=d, dilation=d) for d in dilations)
        self.convs = cast(Sequence[nn.Conv2d], convs)  # what a ModuleList holds is not in its type
        self._kernels: Memo[tuple[list[Tensor], Tensor]] = Memo()
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=std)
        for bias in self._biases():
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, h, w] -> [B, outer, h, w]."""
        return self._sum(x, [conv.weight for conv in self.convs], self.bias)

    def _biases(self) -> list[Tensor]:
        return [cast(Tensor, conv.bias) for conv in self.convs]

    @property
    def bias(self) -> Tensor:
        """All branches' biases together, [outer]."""
        return torch.stack(self._biases()).sum(0)

    def scores(self, x: Tensor, text: Tensor) -> Tensor:
        """Products of the result with ``text`` [C, outer]: [B, inner, h, w] -> [B, C, h, w].

        With fewer classes than channels the kernels are contracted with the text, exactly: C outputs are computed
        instead of ``outer``, once for a text while it and the weights stay as they are.
        """
        rows = text.shape[0]  # of any number in torch.export, where len() would make it a constant
        if isinstance(rows, torch.SymInt) or rows >= text.shape[1]:
            return torch.einsum("cd,bdhw->bchw", text, self(x))
        weights = [conv.weight for conv in self.convs]
        kernels, bias = self._kernels((text, *weights, *self._biases()), lambda: self._folded(text))
        return self._sum(x, kernels, bias)

    def _folded(self, text: Tensor) -> tuple[list[Tensor], Tensor]:
        return [torch.einsum("cd,dikl->cikl", text, conv.weight) for conv in self.convs], text @ self.bias

    def _sum(self, x: Tensor, kernels: Sequence[Tensor], bias: Tensor) -> Tensor:
        out = bias[:, None, None]
        for conv, kernel in zip(self.convs, kernels, strict=True):
            out = out + F.conv2d(x, kernel, None, 1, conv.padding, conv.dilation)
        return out


class PlainV3PlusHead(nn.Module):
    """DeepLabV3+ with ordinary convolutions, as ZS3 and Joint have it; enlargements keep the corners.

    Args:
        inner: channels of the coarse map.
        fine: channels of the map of stride 4.
        outer: channels of the result; published: 256.
        fine_out: channels that the fine map is brought to; published: 48.
        dropout: after the joined branches, and in both steps of the refinement.
    """

    def __init__(
        self,
        inner: int,
        fine: int,
        outer: int = 256,
        fine_out: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
        dropout: Sequence[float] = (0.5, 0.5, 0.1),
    ):
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvNorm(inner, outer, 1), *(ConvNorm(inner, outer, 3, rate) for rate in dilations)]
        )
        self.pool = ConvNorm(inner, outer, 1)
        self.project = ConvNorm((len(dilations) + 2) * outer, outer, 1)
        self.low = ConvNorm(fine, fine_out, 1)
        self.refine = nn.ModuleList([ConvNorm(outer + fine_out, outer, 3), ConvNorm(outer, outer, 3)])
        self.drop = nn.ModuleList(nn.Dropout(rate) for rate in dropout)

    def context(self, x: Tensor) -> Tensor:
        """The joined branches: [B, inner, h, w] -> [B, outer, h, w]."""
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.drop[0](self.project(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1)))

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        """x [B, inner, h, w] and features of stride 4 [B, fine, H / 4, W / 4] -> [B, outer, H / 4, W / 4]."""
        x = F.interpolate(self.context(x), fine.shape[2:], mode="bilinear", align_corners=True)
        x = torch.cat([x, self.low(fine)], dim=1)
        for conv, drop in zip(self.refine, self.drop[1:], strict=True):
            x = drop(conv(x))
        return x


_ZS3_HEAD = (
    (r"aspp\.aspp(\d)\.atrous_conv\.", lambda m: f"branches.{int(m[1]) - 1}.conv."),
    (r"aspp\.aspp(\d)\.bn\.", lambda m: f"branches.{int(m[1]) - 1}.bn."),
    (r"aspp\.convs\.([0-3])\.0\.", lambda m: f"branches.{m[1]}.conv."),
    (r"aspp\.convs\.([0-3])\.1\.", lambda m: f"branches.{m[1]}.bn."),
    (r"aspp\.(global_avg_pool|convs\.4)\.1\.", lambda m: "pool.conv."),
    (r"aspp\.(global_avg_pool|convs\.4)\.2\.", lambda m: "pool.bn."),
    (r"aspp\.(conv1|project\.0)\.", lambda m: "project.conv."),
    (r"aspp\.(bn1|project\.1)\.", lambda m: "project.bn."),
    (r"decoder\.(conv1|project\.0)\.", lambda m: "low.conv."),
    (r"decoder\.(bn1|project\.1)\.", lambda m: "low.bn."),
    (r"decoder\.last_conv\.([04])\.", lambda m: f"refine.{int(m[1]) // 4}.conv."),
    (r"decoder\.last_conv\.([15])\.", lambda m: f"refine.{int(m[1]) // 4}.bn."),
)


def from_zs3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ZS3's or Joint's names (``aspp.``, ``decoder.``) by those of :class:`PlainV3PlusHead`."""
    out = {}
    for name, tensor in state.items():
        for pattern, rename in _ZS3_HEAD:
            if found := re.match(pattern, name):
                out[rename(found) + name[found.end() :]] = tensor
    return out
