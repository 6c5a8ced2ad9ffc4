"""Generators of pixel features from word vectors, and the distance between sets by which they are trained.

Sources: Bucher et al., "Zero-Shot Semantic Segmentation" (ZS3), NeurIPS 2019; Gu et al., "Context-aware Feature
Generation for Zero-shot Semantic Segmentation" (CaGNet), ACM MM 2020. The distance is the maximum mean discrepancy of
two sets X and Y of n rows with a sum of Gaussian kernels (Li, Swersky, Zemel, 2015)::

    MMD = sqrt( mean k(x, x') + mean k(y, y') - 2 mean k(x, y) ),   k(a, b) = sum over s of exp(-|a - b|^2 / (2 s))
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMAS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)  # ZS3's; CaGNet's last one is 60


class PixelMLP(nn.Module):
    """Linear layers with LeakyReLU (0.2) and dropout between them: rows [..., widths[0]] -> [..., widths[-1]].

    Args:
        widths: of the input, the hidden layers and the output. ZS3: (600, 256, 256); CaGNet: (1200, 1024, 960, 864,
            784, 720, 600).
        dropout: after each hidden layer.
        sigmoid: at the end (CaGNet).
    """

    def __init__(self, widths: Sequence[int], dropout: Sequence[float], sigmoid: bool = False):
        super().__init__()
        if len(dropout) != len(widths) - 2:
            raise ValueError(f"generator: expected {len(widths) - 2} rates of dropout, got {len(dropout)}")
        linears = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(widths))
        self.linears = cast(Sequence[nn.Linear], linears)  # what a ModuleList holds is not in its type
        self.dropout, self.sigmoid = tuple(dropout), sigmoid
        for linear in self.linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.constant_(linear.bias, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        for linear, rate in zip(self.linears, self.dropout, strict=False):
            x = F.dropout(F.leaky_relu(linear(x), 0.2), rate, self.training)
        x = self.linears[-1](x)
        return x.sigmoid() if self.sigmoid else x


class GraphMLP(nn.Module):
    """ZS3's generator for the parts of a label map: two graph convolutions A (X W) + b, LeakyReLU 0.2 between them.

    Source: Kipf, Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017; as published
    in ZS3 the matrix A is not normalised and has no loops.
    """

    def __init__(self, inner: int, hidden: int, outer: int, dropout: float = 0.5):
        super().__init__()
        linears = nn.ModuleList([nn.Linear(inner, hidden), nn.Linear(hidden, outer)])
        self.linears = cast(Sequence[nn.Linear], linears)
        self.dropout = dropout

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Rows of nodes x [N, inner], adjacency [N, N] of 0 and 1 -> [N, outer]."""
        first, last = self.linears
        x = F.leaky_relu(adjacency @ F.linear(x, first.weight) + first.bias, 0.2)
        x = F.dropout(x, self.dropout, self.training)
        return adjacency @ F.linear(x, last.weight) + last.bias


def label_graph(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The connected parts (8 neighbours) of a label map [h, w] as a graph.

    Returns:
        part of each pixel, int64 [h, w], numbered by first pixels in raster order; adjacency [N, N] of 0 and 1, parts
        that touch; first pixel of each part, int64 [N], in the flattened map.
    """
    h, w = labels.shape
    part = torch.arange(h * w, device=labels.device).view(h, w)
    shifts = [(0, 1), (1, 0), (1, 1), (1, -1)]

    def pairs(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
        a, b = x[: h - dy], x[dy:]
        return (a[:, : w - dx], b[:, dx:]) if dx >= 0 else (a[:, -dx:], b[:, :dx])

    links = []  # positions in the flattened map of neighbours
    for dy, dx in shifts:
        a, b = pairs(part, dy, dx)
        links.append(torch.stack([a.flatten(), b.flatten()]))
    a, b = torch.cat(links, dim=1)
    flat = labels.flatten()
    same = flat[a] == flat[b]
    part, (inner_a, inner_b) = part.flatten(), (a[same], b[same])
    while True:  # the smallest position of a part spreads through it; jumps halve what is left
        low = torch.minimum(part[inner_a], part[inner_b])
        new = part.scatter_reduce(0, inner_a, low, "amin").scatter_reduce(0, inner_b, low, "amin")
        new = new[new]
        if torch.equal(new, part):
            break
        part = new
    first, node = part.unique(return_inverse=True)
    adjacency = torch.zeros(len(first), len(first), device=labels.device)
    u, v = node[a[~same]], node[b[~same]]
    adjacency[u, v] = adjacency[v, u] = 1
    return node.view(h, w), adjacency, first


def runs(labels: Tensor) -> Tensor:
    """Group of each of the N labels: runs of equal neighbours, numbered from 0. int64 [N]."""
    if len(labels) == 0:
        return labels.long()
    return F.pad((labels[1:] != labels[:-1]).long().cumsum(0), (1, 0))


def mmd(x: Tensor, y: Tensor, sigmas: Sequence[float] = SIGMAS) -> Tensor:
    """MMD of two sets of rows, x and y [..., n, D]: [...]. Sets that are equal give 0 with a gradient of 0."""
    return _mmd(x, y, None, sigmas)


def grouped_mmd(x: Tensor, y: Tensor, groups: Tensor, sigmas: Sequence[float] = SIGMAS) -> Tensor:
    """MMD of the rows of x and y [N, D] within each group, [G], where the published code loops over the groups.

    Groups of like size are computed together, padded to the largest of them.

    Args:
        groups: int64 [N]: the group of row i of x and of row i of y, numbered from 0 without gaps.

    Raises:
        ValueError: shapes that differ.
    """
    if x.shape != y.shape or groups.shape != x.shape[:1]:
        raise ValueError(f"grouped_mmd: x {list(x.shape)}, y {list(y.shape)} and groups {list(groups.shape)} differ")
    if len(groups) == 0:
        return x.new_zeros(0)
    order = groups.argsort(stable=True)
    sizes = groups.bincount()  # [G]
    starts = sizes.cumsum(0) - sizes
    out = x.new_zeros(len(sizes))
    classes = (sizes - 1).clamp(min=1).log2().floor().long() + (sizes > 1)  # 0: one row; k: up to 2^k rows
    for kind in classes.unique().tolist():
        members = (classes == kind).nonzero().flatten()
        longest = int(sizes[members].max())
        place = torch.arange(longest, device=x.device)
        inside = place < sizes[members, None]  # [g, n]
        rows = order[(starts[members, None] + place).clamp(max=len(order) - 1)]
        whole = longest == 1 or bool(inside.all())
        out = out.index_put((members,), _mmd(x[rows], y[rows], None if whole else inside, sigmas))
    return out


def _mmd(x: Tensor, y: Tensor, inside: Tensor | None, sigmas: Sequence[float]) -> Tensor:
    """MMD of x and y [..., n, D], of the rows ``inside`` [..., n]."""
    both = torch.cat([x, y], dim=-2)  # [..., 2 n, D]
    weight = both.new_tensor([1.0, -1.0]).repeat_interleave(x.shape[-2])
    if inside is None:
        weight = weight / x.shape[-2]
    else:
        weight = weight * torch.cat([inside, inside], dim=-1) / inside.sum(-1, keepdim=True)
    # distances do not change when all rows move, and come out truer of rows near 0
    both = both - both.detach().mean(-2, keepdim=True)
    square = both.square().sum(-1)
    distance = (square[..., :, None] + square[..., None, :] - 2 * both @ both.mT).clamp(min=0)
    kernel = kernel_sum(distance, sigmas)
    value = torch.einsum(
        "...i,...ij,...j->...", weight.expand(kernel.shape[:-1]), kernel, weight.expand(kernel.shape[:-1])
    )
    return value.clamp(min=torch.finfo(value.dtype).tiny).sqrt()


def kernel_sum(distance: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The sum over s of exp(-distance / (2 s)); a width that is half of another's is its square."""
    found: dict[float, Tensor] = {}
    total = torch.zeros_like(distance)
    for sigma in sorted(sigmas, reverse=True):
        found[sigma] = found[2 * sigma].square() if 2 * sigma in found else (distance * (-0.5 / sigma)).exp()
        total = total + found[sigma]
    return total
