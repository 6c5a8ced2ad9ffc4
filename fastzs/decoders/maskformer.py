"""MaskFormer's class-agnostic part: an image becomes a fixed number of mask proposals, each with an embedding.

Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation" (MaskFormer), NeurIPS
2021; the decoder is that of Carion et al., "End-to-End Object Detection with Transformers" (DETR), ECCV 2020. A ResNet
gives features at strides 4 to 32, a feature pyramid joins them into pixel embeddings E at stride 4, and Q learnt
queries attend to the features at stride 32::

    x_0 = 0;  x_l = layer_l(x_{l-1} + query, res5 + position)      l = 1..L
    mask_q = MLP(norm(x_l))_q . E                                 logits, one map for each query

Parameters have names of our own; :mod:`fastzs.models.deop_files` renames published ones.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from fastzs.decoders.resnet import NormedConv
from fastzs.trace import traced
from fastzs.windows import next_multiple

STRIDE = 4  # pixels of a mask's cell
COARSEST = 32


class Proposals(NamedTuple):
    """What the queries found, by the decoder layers asked for: all L in training, the last one (L = 1) otherwise."""

    embeddings: Tensor  # [L, B, Q, D]
    masks: Tensor  # [L, B, Q, H / 4, W / 4], logits


class Pyramid(nn.Module):
    """The features of a ResNet at strides 4, 8, 16 and 32: torchvision's, or DeepLab's form of it ("resnet101c").

    That one's stem has three convolutions of 3x3, and the blocks of its last stage have dilations of 1, 2 and 4. In
    inference norms are folded into the convolutions and channels lie last, as in :mod:`fastzs.decoders.resnet`.
    """

    def __init__(self, name: str, pretrained: str | None):
        super().__init__()
        known = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet50c", "resnet101c")
        if name not in known:
            raise ValueError(f"MaskFormer: resnet={name!r} is unknown; use one of {', '.join(known)}")
        deep = name.endswith("c")
        if deep and pretrained is not None:
            raise ValueError(f"MaskFormer: torchvision has no weights of {name}; expected pretrained=None")
        net = cast(ResNet, torchvision.models.get_model(name.removesuffix("c"), weights=pretrained))
        if deep:
            _make_deep(net)
        first = cast(nn.Sequential, net.conv1) if deep else (net.conv1, net.bn1, net.relu)
        self.stem = nn.Sequential(*first, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self._applied = nn.ModuleDict()  # how each convolution and its norm are applied, by the convolution's place
        for place, module in list(self.named_modules()):
            if isinstance(module, nn.Conv2d):
                self._applied[place.replace(".", "/")] = NormedConv()
        last = net.fc.in_features
        self.channels = [last // 8, last // 4, last // 2, last]

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> four maps [B, C_i, H / s, W / s], finest first."""
        if not self.training:
            images = images.contiguous(memory_format=torch.channels_last)
        x, out = images, []
        *convolutions, pool = self.stem
        for i in range(0, len(convolutions), 3):
            x = self._apply_at(f"stem/{i}", x, convolutions[i], convolutions[i + 1])
        x = pool(x)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(cast(nn.Sequential, stage)):
                x = self._residual(f"stages/{i}/{j}", block, x)
            out.append(x)
        return out

    def _residual(self, place: str, block: nn.Module, x: Tensor) -> Tensor:
        """torchvision's BasicBlock or Bottleneck."""
        count = 3 if isinstance(block, Bottleneck) else 2
        y = x
        for k in range(1, count + 1):
            conv, norm = block.get_submodule(f"conv{k}"), block.get_submodule(f"bn{k}")
            y = self._apply_at(f"{place}/conv{k}", y, conv, norm, relu=k < count)
        if (short := block.downsample) is not None:
            x = self._apply_at(f"{place}/downsample/0", x, *cast(nn.Sequential, short), relu=False)
        return (y + x).relu_()

    def _apply_at(self, place: str, x: Tensor, conv: nn.Module, norm: nn.Module, relu: bool = True) -> Tensor:
        if x.dtype.itemsize < 4:  # a kernel that is rounded once more moves masks' borders, which decide what CLIP sees
            y = norm(conv(x))
            return y.relu_() if relu else y
        return self._applied[place](x, conv, norm, relu)


def _make_deep(net: ResNet) -> None:
    """Give torchvision's network DeepLab's stem and dilations; the stem is as wide again as it was."""
    width: int = cast(nn.BatchNorm2d, net.bn1).num_features
    stem: list[nn.Module] = []
    for inner, outer, stride in ((3, width, 2), (width, width, 1), (width, 2 * width, 1)):
        stem += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
    net.conv1 = nn.Sequential(*stem)  # type: ignore[assignment]
    entry = cast(Bottleneck, net.layer1[0])
    entry.conv1 = nn.Conv2d(2 * width, width, 1, bias=False)
    cast(nn.Sequential, entry.downsample)[0] = nn.Conv2d(2 * width, 4 * width, 1, bias=False)
    for block, dilation in zip(net.layer4, (1, 2, 4), strict=True):
        conv = cast(Bottleneck, block).conv2
        conv.dilation = conv.padding = (dilation, dilation)


class PixelDecoder(nn.Module):
    """Feature pyramid: coarse maps, enlarged by nearest neighbour, are added to finer ones."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        *finer, coarsest = channels
        self.lateral = nn.ModuleList(_norm_conv(c, width, 1) for c in finer)
        self.output = nn.ModuleList(nn.Sequential(_norm_conv(c, width, 3), nn.ReLU()) for c in (width,) * len(finer))
        self.coarsest = nn.Sequential(_norm_conv(coarsest, width, 3), nn.ReLU())
        self.embed = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of the pyramid, finest first -> what ``embed`` makes pixel embeddings of, [B, D, H / 4, W / 4]."""
        x = self.coarsest(maps[-1])
        for i in reversed(range(len(self.lateral))):
            fine = self.lateral[i](maps[i])
            x = self.output[i](fine + F.interpolate(x, fine.shape[2:], mode="nearest"))
        return x

    def products(self, queries: Tensor, x: Tensor) -> Tensor:
        """Products of queries [L, B, Q, D] and the pixel embeddings of x [B, D, h, w]: [L, B, Q, h, w].

        In inference the last kernel is contracted with the queries first, if they are fewer than its outputs. Nothing
        non-linear lies between them, so this is exact.
        """
        layers, images, count, width = queries.shape
        if self.training or layers > 1 or count >= width or x.dtype.itemsize < 4:
            return torch.einsum("lbqd,bdhw->lbqhw", queries, self.embed(x))
        kernels = torch.einsum("bqd,dcij->bqcij", queries[0], self.embed.weight)
        biases = queries[0] @ cast(Tensor, self.embed.bias)
        maps = [F.conv2d(x[i : i + 1], kernels[i], biases[i], padding=1) for i in range(images)]
        return torch.cat(maps)[None]


def _norm_conv(inner: int, outer: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, side, padding=side // 2, bias=False), nn.GroupNorm(32, outer))


class QueryLayer(nn.Module):
    """DETR's decoder layer, post-norm: attention among the queries, to the image, then an MLP."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.among, self.to_picture = (nn.MultiheadAttention(width, heads, dropout, batch_first=True) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, query: Tensor, picture: Tensor, position: Tensor) -> Tensor:
        """x and query [B, Q, D], image and position [B, N, D] -> [B, Q, D]."""
        q = x + query
        x = self.norm1(x + self.drop(self.among(q, q, x, need_weights=False)[0]))
        seen = self.to_picture(x + query, picture + position, picture, need_weights=False)[0]
        x = self.norm2(x + self.drop(seen))
        return self.norm3(x + self.drop(self.linear2(self.drop(F.relu(self.linear1(x))))))


class MaskFormer(nn.Module):
    """Mask proposals for images of any size.

    Args:
        resnet: "resnet18", "resnet34", "resnet50" or "resnet101" of torchvision, "resnet50c" or "resnet101c".
        pretrained: torchvision's name of the ResNet's weights, random if ``None``.
        width: channels D of queries and pixels; published: 256.
        queries: number of proposals Q; published: 100.
        layers, heads, hidden, dropout: of the query decoder; published: 6, 8, 2048, 0.1.

    Raises:
        ValueError: an unknown ResNet, a width that heads or the group norms' 32 groups do not divide.
    """

    def __init__(
        self,
        resnet: str = "resnet50",
        pretrained: str | None = "IMAGENET1K_V1",
        *,
        width: int = 256,
        queries: int = 100,
        layers: int = 6,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        if width % 32 or width % heads:
            raise ValueError(f"MaskFormer: width: expected a multiple of 32 and of the {heads} heads, got {width}")
        self.width = width
        self.pyramid = Pyramid(resnet, pretrained)
        self.pixels = PixelDecoder(self.pyramid.channels, width)
        self.project = nn.Conv2d(self.pyramid.channels[-1], width, 1)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.to_mask = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        for part in (self.pixels, self.project, self.layers):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    @traced("model.proposals")
    def forward(self, images: Tensor) -> Proposals:
        """Proposals of images [B, 3, H, W]; a mask's cell is 4 x 4 pixels of the image.

        Sides that are no multiple of 4 are enlarged to one, then padded with zeros to multiples of 32.
        """
        size = [next_multiple(side, STRIDE) for side in images.shape[2:]]
        if size != list(images.shape[2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        down, across = (next_multiple(side, COARSEST) - side for side in size)
        images = F.pad(images, (0, across, 0, down))
        maps = self.pyramid(images)
        pixels = self.pixels(maps)
        picture = self.project(maps[-1])
        position = sine_position(picture).flatten(2).transpose(1, 2)  # [1, N, D]
        picture = picture.flatten(2).transpose(1, 2)  # [B, N, D]
        query = self.queries.expand(len(images), -1, -1)  # [B, Q, D]
        x, kept = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, query, picture, position)
            kept.append(x)
        embeddings = self.norm(torch.stack(kept if self.training else kept[-1:]))  # [L, B, Q, D]
        masks = self.pixels.products(self.to_mask(embeddings), pixels)
        return Proposals(embeddings, masks[..., : size[0] // STRIDE, : size[1] // STRIDE])


def sine_position(like: Tensor) -> Tensor:
    """DETR's fixed embedding of rows and columns, [1, D, h, w], for a map [B, D, h, w]; half of D for either."""
    channels, (h, w) = like.shape[1], like.shape[2:]
    half, dtype = channels // 2, torch.promote_types(like.dtype, torch.float32)
    frequency = 10000.0 ** (torch.arange(0, half, 2, device=like.device, dtype=dtype) / half)  # [D / 4]
    angles = []
    for length in (h, w):
        place = torch.arange(1, length + 1, device=like.device, dtype=dtype) / (length + 1e-6) * (2 * math.pi)
        angle = place[:, None] / frequency
        angles.append(torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).T)  # [D / 2, length]
    rows, columns = angles
    both = torch.cat([rows[:, :, None].expand(-1, h, w), columns[:, None, :].expand(-1, h, w)])
    return both[None].to(like.dtype)
