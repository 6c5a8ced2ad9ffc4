"""CaGNet's contextual module and SIGN's spatial ones: maps that know their surroundings, and where they are.

Sources: Gu et al., "Context-aware Feature Generation for Zero-shot Semantic Segmentation", ACM MM 2020; Cheng et al.,
"SIGN: Spatial-information Incorporated Generative Network", ICCV 2021. Convolutions have no bias unless said; all sides
are kept.
"""

import torch
from torch import Tensor, nn


def _conv(inner: int, outer: int, side: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, side, padding=dilation * (side // 2), dilation=dilation, bias=False)


class Gated(nn.Module):
    """Three 3x3 convolutions of growing dilation, one after the other, weighed pixel by pixel and joined.

    g_1 = relu C(x), g_2 = relu C_2(g_1), g_3 = relu C_5(g_2); a = sigmoid(relu C[g_1, g_2, g_3]), a map for each;
    the result is relu C_1x1[a_1 g_1, a_2 g_2, a_3 g_3].
    """

    def __init__(self, inner: int, hidden: int, outer: int):
        super().__init__()
        self.steps = nn.ModuleList([_conv(inner, hidden, 3), _conv(hidden, hidden, 3, 2), _conv(hidden, hidden, 3, 5)])
        self.gate, self.pool = _conv(3 * hidden, 3, 3), _conv(3 * hidden, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, h, w] -> [B, outer, h, w]."""
        maps = []
        for step in self.steps:
            x = step(x).relu()
            maps.append(x)
        gates = self.gate(torch.cat(maps, dim=1)).relu().sigmoid()  # [B, 3, h, w], 0.5 and more
        weighed = [m * gates[:, i : i + 1] for i, m in enumerate(maps)]
        return self.pool(torch.cat(weighed, dim=1)).relu()


class Contextual(nn.Module):
    """The latent code Z of each pixel's surroundings: mean and logarithm of the variance, both [B, D, h, w]."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__()
        self.gated = Gated(dim, hidden, dim)
        self.mean, self.log_variance = _conv(dim, dim, 3), _conv(dim, dim, 3)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features h [B, D, h, w], of any sign."""
        pooled = self.gated(h.sigmoid())
        return self.mean(pooled), self.log_variance(pooled).relu()


def relative_positions(like: Tensor, extent: float = 511.0) -> Tensor:
    """Sines and cosines of where a pixel is in the image, [1, D, h, w]: half of the channels for columns, then rows.

    The first column lies at 0, the last at ``extent``, whatever the size; channels 2 k and 2 k + 1 of a half are sine
    and cosine of that times 10000^(-2 k / (D / 2)).
    """
    half, (h, w) = like.shape[1] // 2, like.shape[2:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(0, half, 2, device=like.device, dtype=dtype) / half)

    def along(length: int) -> Tensor:
        place = torch.arange(length, device=like.device, dtype=dtype) * (extent / max(1, length - 1))
        angle = place[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).T  # [D / 2, length]

    columns, rows = along(w)[:, None].expand(-1, h, -1), along(h)[:, :, None].expand(-1, -1, w)
    return torch.cat([columns, rows])[None].to(like.dtype)


class SpatialGates(nn.Module):
    """SIGN's default: h + gated convolutions of [sigmoid h, positions]."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__()
        self.gated = Gated(2 * dim, hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        """[B, D, h, w] -> the same."""
        return h + self.gated(with_positions(h))


class SelfAttention(nn.Module):
    """y + W_o softmax(Q K^T) V of a map's pixels, not scaled, all with bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, y: Tensor) -> Tensor:
        q, k, v = (conv(y).flatten(2).mT for conv in (self.query, self.key, self.value))  # [B, N, D]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return y + self.out(attended.mT.unflatten(2, y.shape[2:]))


class SpatialAttention(nn.Module):
    """SIGN's attention form (its network type 7), without a residual to h; self-attention's residual counts twice."""

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__()
        self.enter = _conv(2 * dim, dim, 1)
        self.reduce, self.between, self.leave = _conv(dim, hidden, 1), _conv(hidden, hidden, 1), _conv(hidden, dim, 1)
        self.attention = nn.ModuleList([SelfAttention(hidden), SelfAttention(hidden)])

    def forward(self, h: Tensor) -> Tensor:
        """[B, D, h, w] -> the same."""
        first, second = self.attention
        y = self.reduce(self.enter(with_positions(h)).relu()).relu()
        z = y + first(y)
        z = z + self.between(z).relu()
        return self.leave(z + second(z)).relu()


def with_positions(h: Tensor) -> Tensor:
    """[sigmoid h, positions], [B, 2 D, h, w]."""
    return torch.cat([h.sigmoid(), relative_positions(h).expand(len(h), -1, -1, -1)], dim=1)
