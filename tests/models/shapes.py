"""Drawn scenes to train a model on for a few steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastzs.data.shapes import draw
from fastzs.models.trained import TrainedModel
from fastzs.vocabulary import Vocabulary

NAMES = ("red disc", "blue square", "green star", "paper", "slate", "wood", "gravel")


def words(dim: int, names: tuple[str, ...] = NAMES) -> Vocabulary:
    """Random text vectors for ``names``."""
    vectors = torch.randn(len(names), dim, generator=torch.Generator().manual_seed(1))
    return Vocabulary(names, embeddings=nn.functional.normalize(vectors, dim=1))


def scenes(model: TrainedModel, size: int = 64, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images normalised for ``model`` [B, 3, size, size] and their labels [B, size, size]."""
    drawn = draw(count, (size, size), seed=3, objects=(2, 3), pairs=NAMES[:3])
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    return (drawn.images / 255 - mean) / std, drawn.labels(NAMES)


def train(model: TrainedModel, loss: Callable[[], Tensor], steps: int, rate: float = 1e-3) -> list[float]:
    """The loss before each of ``steps`` Adam steps, and after the last."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    return [*seen, loss().item()]


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that have a gradient that is not all zero."""
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
