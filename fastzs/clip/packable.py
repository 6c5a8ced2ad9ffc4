"""Modules whose children can be replaced for inference, and come back by themselves."""

from collections.abc import Mapping
from typing import Any, Self

from torch import nn


class Packable(nn.Module):
    """A module with faster stand-ins for some of its children.

    A stand-in is found under the child's name, while the child stays registered with its weights: the module's state,
    and so what is saved, never changes. Stand-ins are dropped as soon as they would be out of date: when the module is
    moved, cast, trained or loads weights. A copy, pickled or not, has none.
    """

    def stand_in(self, replacements: Mapping[str, nn.Module]) -> None:
        """Use other modules in the place of the children of these names."""
        self.__dict__.update(replacements)  # which Python looks at before the registered children

    def unpack(self) -> None:
        """Use the children again."""
        for name in self._modules:
            self.__dict__.pop(name, None)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.unpack()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.unpack()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._modules}
