"""A moving average of weights, which is what is tested and saved in their stead."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Average:
    """A moving average of the trained parameters.

    Attributes:
        aside: the averages; while they are applied, the raw weights in their stead.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.aside = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        for average, p in zip(self.aside, self.parameters, strict=True):
            average.lerp_(p, 1 - self.decay)

    def restore(self, raw: Sequence[Tensor]) -> None:
        """Restore a checkpoint, whose model holds the averages."""
        for own, value in zip(self.aside, raw, strict=True):
            own.copy_(value)
        self._swap()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the model, for testing and saving."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for aside, p in zip(self.aside, self.parameters, strict=True):
            held = p.clone()
            p.copy_(aside)
            aside.copy_(held)
