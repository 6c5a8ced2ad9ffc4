"""Specification of the training-free last-block attention operators, in plain PyTorch."""

import torch
from torch import Tensor


def neighbour_bias(grid: tuple[int, int], std: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NACLIP's bias exp(-|x_i - x_j|^2 / (2 std^2)) between patch positions, [h * w, h * w] (Hajimiri et al., 2025)."""
    rows = torch.arange(grid[0], dtype=dtype, device=device)
    columns = torch.arange(grid[1], dtype=dtype, device=device)
    row_part = torch.exp(-((rows[:, None] - rows) ** 2) / (2 * std**2))
    column_part = torch.exp(-((columns[:, None] - columns) ** 2) / (2 * std**2))
    return torch.einsum("ij,kl->ikjl", row_part, column_part).reshape(grid[0] * grid[1], -1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, kind: str, grid: tuple[int, int], std: float) -> Tensor:
    """See :func:`fastzs.kernels.dense_attention.api.dense_attention`."""
    prefix = q.shape[-2] - grid[0] * grid[1]
    if kind == "identity":
        return v[..., prefix:, :]
    scale = q.shape[-1] ** -0.5
    pairs = {"qk": [(q, k)], "qq": [(q, q)], "kk": [(k, k)], "vv": [(v, v)], "qq+kk": [(q, q), (k, k)]}
    pairs["kk+gaussian"] = pairs["kk"]
    weights = torch.zeros((), dtype=q.dtype, device=q.device)
    for a, b in pairs[kind]:
        scores = a[..., prefix:, :] @ b.transpose(-1, -2) * scale  # [B, H, N, prefix + N]
        if kind == "kk+gaussian":
            scores[..., prefix:] += neighbour_bias(grid, std, scores.dtype, scores.device)
        weights = weights + scores.softmax(-1)
    return weights @ v
