"""Dilated residual networks: one form for all systems that stand on DeepLab, of any depth and width.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the dilated forms are those of DeepLabV2
(Chen et al., TPAMI 2018) and DeepLabV3+ (Chen et al., ECCV 2018). Two families of weights are about:

- "caffe": the stride of a stage is in its first 1x1 convolution, the pooling rounds sizes up; stride 8. Images are
  BGR from 0 to 255 minus a mean. SPNet, STRICT, CaGNet, SIGN.
- "torchvision": the stride is in the 3x3 convolution, the pooling rounds down; stride 16. ZS3, Joint.

Parameters carry torchvision's names; :func:`from_caffe` renames the others. In inference the statistics of the norms
are folded into the convolutions' kernels, which are kept while the weights stay as they are, and maps are laid out
with the channels last.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.memo import Memo
from fastzs.clip.state import fit

Form = Literal["caffe", "torchvision"]
DEPTHS = {"resnet26": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class NormedConv(nn.Module):
    """How a convolution and its norm are applied, without owning them: their names are those of the published files."""

    def __init__(self):
        super().__init__()
        self._folded: Memo[tuple[Tensor, Tensor]] = Memo()

    def forward(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool = True) -> Tensor:
        """[B, C, H, W] -> norm(conv(x)), with ReLU if ``relu``."""
        parts = (conv.weight, norm.weight, norm.bias, *statistics(norm))
        if norm.training or (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parts))):
            y = norm(conv(x))
        else:
            weight, bias = self._folded(parts, lambda: fold_norm(conv, norm))
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)
        return y.relu_() if relu else y


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the one convolution that a convolution without bias and its norm are with fixed statistics.

    They are computed in fp32 at least, and rounded once.
    """
    dtype = conv.weight.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    mean, variance, gain, bias = (x.to(accurate) for x in (*statistics(norm), norm.weight, norm.bias))
    gain = gain * (variance + norm.eps).rsqrt()
    weight = (conv.weight.to(accurate) * gain[:, None, None, None]).to(dtype)
    return weight.contiguous(memory_format=torch.channels_last), (bias - mean * gain).to(dtype)


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a norm, [C] each; all norms here keep them."""
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with norms, added to the input or a 1x1 convolution of it."""

    def __init__(self, inner: int, width: int, outer: int, stride: int, dilation: int, form: Form, shortcut: bool):
        super().__init__()
        first, second = (stride, 1) if form == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(inner, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)) if shortcut else None
        )
        self._apply_conv = nn.ModuleList(NormedConv() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, short = self._apply_conv
        y = two(one(x, self.conv1, self.bn1), self.conv2, self.bn2)
        y = three(y, self.conv3, self.bn3, relu=False)
        if self.downsample is not None:
            x = short(x, *self.downsample, relu=False)
        return y.add_(x).relu_()


class DilatedResNet(nn.Module):
    """A residual network whose last stages are dilated instead of reduced.

    Args:
        blocks: bottlenecks in each of the four stages, or one of the names in :data:`DEPTHS`.
        width: channels of the stem; stages have 4, 8, 16 and 32 times as many. Published: 64.
        form: "caffe" or "torchvision", see the module's text.
        output_stride: 8 or 16 pixels for a cell of the last map.
        multi_grid: factors of the last stage's dilations, block by block; (1, 2, 4) in DeepLabV3+.
        frozen: norms keep their statistics in training, and their weights are not trained. Right for pretrained
            weights; with random ones a network without live statistics hardly learns.

    Raises:
        ValueError: an unknown name, form or stride.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        blocks: str | Sequence[int] = "resnet101",
        width: int = 64,
        *,
        form: Form = "torchvision",
        output_stride: int = 8,
        multi_grid: Sequence[int] = (1,),
        frozen: bool = False,
    ):
        super().__init__()
        if isinstance(blocks, str) and blocks not in DEPTHS:
            raise ValueError(f"resnet: expected one of {', '.join(DEPTHS)} or blocks of four stages, got {blocks!r}")
        counts = DEPTHS[blocks] if isinstance(blocks, str) else tuple(blocks)
        if len(counts) != 4 or min(counts) < 1:
            raise ValueError(f"resnet: expected the blocks of four stages, got {list(counts)}")
        if form not in ("caffe", "torchvision"):
            raise ValueError(f"resnet: form must be 'caffe' or 'torchvision', got {form!r}")
        if output_stride not in (8, 16):
            raise ValueError(f"resnet: output_stride must be 8 or 16, got {output_stride}")
        self.frozen = frozen
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=form == "caffe")
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if output_stride == 8 else ((1, 2, 2, 1), (1, 1, 1, 2))
        inner = width
        for i, (count, stride, dilation) in enumerate(zip(counts, strides, dilations, strict=True)):
            outer, stage = width * 4 * 2**i, []
            for j in range(count):
                rate = dilation * (multi_grid[min(j, len(multi_grid) - 1)] if i == 3 else 1)
                stage.append(Bottleneck(inner, width * 2**i, outer, stride if j == 0 else 1, rate, form, j == 0))
                inner = outer
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.channels = [width * 4 * 2**i for i in range(4)]
        self._apply_stem = NormedConv()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if frozen:
            for norm in self.norms():
                norm.requires_grad_(False).eval()

    def start_from(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take the weights of a classifier, whose last layer is left out.

        Args:
            state: tensors by torchvision's names, or by Caffe's, see :func:`from_caffe`.
            source: where they come from, for messages.

        Raises:
            WeightsError: tensors are missing, left over or of another shape.
        """
        stem = "layer1.conv1.conv.weight"
        found = next((name for name in state if name.endswith(stem)), None)
        used = dict(state) if found is None else from_caffe(state, found.removesuffix(stem))
        used = {name: tensor for name, tensor in used.items() if not name.startswith("fc.")}
        for name in self.state_dict():
            if name.endswith("num_batches_tracked"):
                used.setdefault(name, torch.tensor(0))
        fit(self, used, source)

    def norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            for norm in self.norms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the four stages' maps, finest (stride 4) first."""
        if not self.training:
            images = images.contiguous(memory_format=torch.channels_last)
        x, out = self.maxpool(self._apply_stem(images, self.conv1, self.bn1)), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            out.append(x)
        return out


_CAFFE = {"reduce": "1", "conv3x3": "2", "increase": "3"}


def from_caffe(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors under ``prefix`` of SPNet's, STRICT's or CaGNet's names, by the names here.

    ``layer1.conv1.{conv,bn}`` and ``layer{2..5}.block{i}.{reduce,conv3x3,increase,proj,shortcut}.{conv,bn}``.
    """
    out = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if found := re.fullmatch(r"layer1\.conv1\.(conv|bn)\.(\w+)", rest):
            out[f"{found[1]}1.{found[2]}"] = tensor
        elif found := re.fullmatch(r"layer(\d)\.block(\d+)\.(\w+)\.(conv|bn)\.(\w+)", rest):
            stage, block, part, kind, leaf = found.groups()
            place = f"downsample.{0 if kind == 'conv' else 1}" if part in ("proj", "shortcut") else kind + _CAFFE[part]
            out[f"layer{int(stage) - 1}.{int(block) - 1}.{place}.{leaf}"] = tensor
    return out


def blocks_of(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Bottlenecks in each of the four stages, from a network's tensors under ``prefix``; KeyError without any."""
    counts = []
    for stage in range(1, 5):
        start = f"{prefix}layer{stage}."
        numbers = {int(name.removeprefix(start).split(".")[0]) for name in state if name.startswith(start)}
        if not numbers:
            raise KeyError(start)
        counts.append(max(numbers) + 1)
    return counts
