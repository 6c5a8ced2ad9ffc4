"""FCN-32s: VGG-16 read densely, and maps brought back to the image's pixels. Names are those published for it.

Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. The image is
padded by 100 pixels, so that the 7x7 convolution fc6 has room in images of any size; maps of stride 32 are enlarged
by a transposed convolution of 64x64 and cut out at an offset of 19.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each of VGG-16's five stages
PADDING, STRIDE, OFFSET = 100, 32, 19


class FCN(nn.Module):
    """VGG-16's features with fc6 and fc7 as convolutions.

    Args:
        widths: channels of the five stages; VGG-16's are 64, 128, 256, 512, 512.
        hidden: channels of fc6 and fc7; 4096.
    """

    def __init__(self, widths: Sequence[int], hidden: int):
        super().__init__()
        channels = 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS, widths, strict=True), start=1):
            for i in range(1, count + 1):
                padding = PADDING if stage == i == 1 else 1
                self.add_module(f"conv{stage}_{i}", nn.Conv2d(channels, width, 3, padding=padding))
                channels = width
        self.fc6 = nn.Conv2d(channels, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        for module in self.modules():  # fifteen layers without norms fall silent as PyTorch makes them
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, hidden, h, w] at stride 32."""
        x = images
        for stage, count in enumerate(CONVOLUTIONS, start=1):
            for i in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{i}")(x))
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = F.dropout2d(F.relu(self.fc6(x)), 0.5, self.training)
        return F.dropout2d(F.relu(self.fc7(x)), 0.5, self.training)

    def start_from(self, vgg: nn.Module) -> None:
        """Take the weights of torchvision's ``vgg16``."""
        ours = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        theirs = [module for module in vgg.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            for mine, other in zip(ours, theirs[: len(ours)], strict=True):
                for name, tensor in mine.named_parameters():
                    tensor.copy_(other.get_parameter(name).view_as(tensor))


def bilinear_kernel() -> Tensor:
    """The kernel [64, 64] with which a transposed convolution of stride 32 interpolates."""
    ramp = 1 - (torch.arange(2 * STRIDE) - STRIDE + 0.5).abs() / STRIDE
    return ramp[:, None] * ramp


def upscore(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The fixed bilinear transposed convolution, without its kernel: [B, C, h, w] -> [B, C, *size].

    Outside the map its values count as 0. A transposed convolution with :func:`bilinear_kernel` for every channel,
    cut at :data:`OFFSET`, is interpolation of the map with a border of zeros.
    """
    top = STRIDE // 2 + OFFSET
    wide = F.interpolate(F.pad(maps, (1, 1, 1, 1)), scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return wide[:, :, top : top + size[0], top : top + size[1]]
