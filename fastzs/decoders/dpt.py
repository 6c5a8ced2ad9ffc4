"""DPT: dense prediction from tokens of four transformer blocks. Parameters carry LSeg's published names.

Source: Ranftl, Bochkovskiy, Koltun, "Vision Transformers for Dense Prediction", ICCV 2021, section 3; the fusion
block is RefineNet's (Lin et al., CVPR 2017).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.windows import next_multiple

Readout = Literal["project", "add", "ignore"]
READOUTS = ("project", "add", "ignore")


class ReadOut(nn.Module):
    """What becomes of the CLS token: [B, 1 + N, W] -> [B, N, W].

    "project": GELU(Linear([patch; CLS])); "add": patch + CLS; "ignore": the patches alone.
    """

    def __init__(self, kind: Readout, width: int):
        super().__init__()
        if kind not in READOUTS:
            raise ValueError(f"DPT: readout must be one of {', '.join(READOUTS)}, got {kind!r}")
        self.kind = kind
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) if kind == "project" else None

    def forward(self, tokens: Tensor) -> Tensor:
        cls, patches = tokens[:, :1], tokens[:, 1:]
        if self.project is not None:
            return self.project(torch.cat([patches, cls.expand_as(patches)], dim=-1))
        return patches + cls if self.kind == "add" else patches


class Reassemble(nn.Sequential):
    """Tokens back to a map, as wide and as fine as level ``level`` of a pyramid: 4, 2, 1 and 1/2 times the grid."""

    def __init__(self, level: int, width: int, out: int, readout: Readout):
        super().__init__()
        self.add_module("0", ReadOut(readout, width))
        self.add_module("3", nn.Conv2d(width, out, 1))
        if level < 2:
            side = 4 >> level
            self.add_module("4", nn.ConvTranspose2d(out, out, side, stride=side))
        elif level == 3:
            self.add_module("4", nn.Conv2d(out, out, 3, stride=2, padding=1))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens [B, 1 + h * w, W] -> [B, out, h', w']."""
        readout, *convolutions = self
        x = readout(tokens).transpose(1, 2).unflatten(2, grid)
        for convolution in convolutions:
            x = convolution(x)
        return x


class ResidualUnit(nn.Module):
    """x + BN(conv(ReLU(BN(conv(ReLU x))))), 3x3 without biases."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class Fusion(nn.Module):
    """Adds a level to the coarser ones and doubles the result (bilinear, align_corners=True).

    The coarsest level has nothing to add, so its first residual unit, which published checkpoints hold, does not exist.
    """

    def __init__(self, width: int, coarsest: bool):
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        """level [B, W, h, w] and the coarser result [B, W, h, w] -> [B, W, 2 h, 2 w]."""
        x = level
        if self.resConfUnit1 is not None and coarser is not None:
            x = coarser + self.resConfUnit1(level)
        return self.out_conv(double(self.resConfUnit2(x)))


def double(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, 2 h, 2 w], bilinear with align_corners=True."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


class DPTDecoder(nn.Module):
    """Four levels fused from coarse to fine, and a 1x1 convolution into the space of the text.

    Args:
        levels: channels of the four levels, fine to coarse.
        width: channels inside the decoder.
        output_dim: channels of the result.
    """

    def __init__(self, levels: Sequence[int], width: int, output_dim: int):
        super().__init__()
        for i, channels in enumerate(levels, start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(channels, width, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", Fusion(width, coarsest=i == len(levels)))
        self.levels = len(levels)
        self.head1 = nn.Conv2d(width, output_dim, 1)

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps fine to coarse -> [B, width, h, w], twice as fine as the finest."""
        path = None
        for i in range(self.levels, 0, -1):
            level = self.get_submodule(f"layer{i}_rn")(levels[i - 1])
            path = self.get_submodule(f"refinenet{i}")(level, path)
        assert path is not None
        return path

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps fine to coarse -> [B, output_dim, h, w], twice as fine as the finest."""
        return self.head1(self.fuse(levels))


class SpatialBlock(nn.Module):
    """LSeg's spatial regularisation: one 3x3 kernel, shared by all classes, over each class's scores.

    "bottleneck" adds the largest score over the classes to every class. Nothing in it depends on how many there are.

    Args:
        kind: "depthwise" or "bottleneck".
        depth: how often it is applied, with the same weights; the last time without the activation. 0 is the identity.
        activation: "relu", "lrelu" (slope 0.01) or "tanh".
    """

    ACTIVATIONS = {"relu": torch.relu, "lrelu": F.leaky_relu, "tanh": torch.tanh}  # noqa: RUF012

    def __init__(self, kind: Literal["depthwise", "bottleneck"], depth: int, activation: str):
        super().__init__()
        if kind not in ("depthwise", "bottleneck"):
            raise ValueError(f"LSeg: block must be None, 'depthwise' or 'bottleneck', got {kind!r}")
        if activation not in self.ACTIVATIONS:
            raise ValueError(f"LSeg: block_activation must be one of {', '.join(self.ACTIVATIONS)}, got {activation!r}")
        if depth < 0:
            raise ValueError(f"LSeg: block_depth must be at least 0, got {depth}")
        self.kind, self.depth, self.activation = kind, depth, self.ACTIVATIONS[activation]
        self.depthwise = nn.Sequential()
        self.depthwise.add_module("depthwise", nn.Conv2d(1, 1, 3, padding=1))

    def forward(self, scores: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        for step in range(self.depth):
            across = scores.max(1, keepdim=True).values if self.kind == "bottleneck" else None
            scores = self.depthwise(scores.flatten(0, 1)[:, None])[:, 0].unflatten(0, scores.shape[:2])
            if across is not None:
                scores = scores + across
            if step + 1 < self.depth:
                scores = self.activation(scores)
        return scores


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of a tower, which the decoder reads."""
    return tuple(depth * (i + 1) // 4 - 1 for i in range(4))


def enlarged(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, 3, H, W] with sides enlarged to multiples of two patches, which the coarsest level needs."""
    size = [next_multiple(side, 2 * patch_size) for side in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False)
