"""Keeping what depends on weights alone, while the weights stay as they are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Memo(Generic[T]):
    """Holds the last result of a computation on tensors that rarely change (weights, a vocabulary).

    The result is computed anew when a source is another tensor, was written to, moved or cast, or when autocast or
    inference mode changed; and it is neither kept nor used while gradients of a source are being recorded, under
    torch.compile and torch.export, or when a source's writes cannot be counted (tensors made in inference mode).
    """

    def __init__(self):
        self._sources: tuple[Tensor, ...] = ()
        self._state: object = None
        self._value: T | None = None

    def __call__(self, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        recording = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if recording or torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            return compute()
        device = sources[0].device.type
        state = (
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            [(source.data_ptr(), source._version, source.dtype, source.device) for source in sources],
        )
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if not same or state != self._state:
            # the sources are held, so that none of their addresses can be given to another tensor
            self._value, self._sources, self._state = compute(), tuple(sources), state
        return self._value  # pyright: ignore[reportReturnType]

    def __deepcopy__(self, memo: dict) -> "Memo[T]":
        return Memo()  # a copied model has tensors of its own

    def __reduce__(self):
        return (Memo, ())


class Recent(Generic[T]):
    """Holds the ``size`` results that were used last, by key."""

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = compute()
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def __deepcopy__(self, memo: dict) -> "Recent[T]":
        return Recent(self.size)

    def __reduce__(self):
        return (Recent, (self.size,))
