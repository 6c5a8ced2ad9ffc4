"""What a backend of ``label_map`` is asked for, beside the logits and the windows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Checked already; see :func:`fastzs.ops.label_map`."""

    image_size: tuple[int, int]
    output_size: tuple[int, int]
    activation: str  # "sigmoid", "softmax" or "none"
    penalty: Tensor | None  # [C], taken from the scores
    threshold: float  # minus infinity for none; what is below it gets the label C
    top_k: int
    label_dtype: torch.dtype  # uint8 or int16
    return_scores: bool

    @property
    def resized(self) -> bool:
        """Whether there is a second bilinear step, from the resized image to the output."""
        return self.image_size != self.output_size

    def empty(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Labels ``[k, H', W']`` and, if asked for, scores alike, to be written."""
        shape = (self.top_k, *self.output_size)
        labels = torch.empty(shape, dtype=self.label_dtype, device=device)
        return labels, torch.empty(shape, dtype=dtype, device=device) if self.return_scores else None
