"""Modules whose children and methods can be replaced for inference, and come back by themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import nn


class Packable(nn.Module):
    """A module with faster stand-ins for some of its children and methods.

    A stand-in is found under the child's name, while the child stays registered with its weights: the module's state,
    and so what is saved, never changes. Stand-ins are dropped as soon as they would be out of date: when the module is
    moved, cast, trained or loads weights. A copy, pickled or not, has none. They give no gradient: see
    :func:`unpack_if_trained`.

    With :meth:`let_go` the weights themselves are dropped; all of this is refused then.
    """

    _stand_ins: tuple[str, ...] = ()
    _gone: str | None = None  # why there are no weights to go back to

    def stand_in(self, replacements: Mapping[str, Any]) -> None:
        """Use other modules and functions in the place of the children and methods of these names."""
        self.__dict__.update(replacements)  # which Python looks at before the registered children and the class
        self._stand_ins = tuple(replacements)

    def let_go(self, reason: str) -> None:
        """Drop the weights of the children that have stand-ins, for good. ``reason`` begins what is refused later."""
        for name in self._modules.keys() & set(self._stand_ins):
            for parameter in cast(nn.Module, self._modules[name]).parameters():
                parameter.data = parameter.new_empty(0)
                parameter.requires_grad_(False)
        self._gone = reason
        self.register_state_dict_pre_hook(lambda module, *_: module.check_there())

    def check_there(self) -> None:
        """Raise RuntimeError if the weights were let go of."""
        if self._gone is not None:
            raise RuntimeError(
                f"{self._gone}: it cannot be trained, moved, cast, copied or saved; "
                "load it again with precision='fp32' or 'bf16'"
            )

    def unpack(self) -> None:
        """Use the children and methods again."""
        self.check_there()
        for name in self._stand_ins:
            self.__dict__.pop(name, None)
        self._stand_ins = ()

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
        self.check_there()
        gone = {*self._stand_ins, "_stand_ins"}
        return {name: value for name, value in self.__dict__.items() if name not in gone}


def unpack_if_trained(module: nn.Module, parts: Sequence[Packable]) -> None:
    """Drop the stand-ins inside a module of which a gradient is wanted, as in training that leaves it in eval mode.

    Args:
        parts: of the module, those that may have stand-ins.
    """
    wanted = torch.is_grad_enabled() and any(part._stand_ins for part in parts)
    if wanted and any(parameter.requires_grad for parameter in module.parameters()):
        for part in module.modules():
            if isinstance(part, Packable):
                part.unpack()
