"""What goes between host and GPU, seen without a GPU.

``FakeTensorMode`` runs the package's own code on tensors of a GPU that is not there: they have shapes and a device but
no values, so asking for a value fails. Every copy between devices is written down.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastzs.kernels.label_map.api import _kept_penalty
from fastzs.kernels.label_map.tables import build_tables
from fastzs.kernels.refine import kept as refine_tables
from fastzs.losses import _among
from fastzs.models.base import kept_groups
from fastzs.segmenter import _on_levels
from fastzs.stitching import _shared

MIXED = {torch.ops.fastzs.label_map.default, torch.ops.fastzs.refine.default}  # windows are on the host


class _Moves(TorchDispatchMode):
    """Copies between devices."""

    def __init__(self, seen: list[tuple[str, str, bool]]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "aten":
            with self:  # in inference mode, what is made of other operators comes whole
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = function(*args, **kwargs)
        if function is torch.ops.aten.copy_.default:
            source, target, goes_on = args[1], args[0], len(args) > 2 and args[2]
        elif function is torch.ops.aten._to_copy.default:
            source, target, goes_on = args[0], out, kwargs.get("non_blocking", False)
        else:
            # a number of the host may take part in the work of a GPU, a tensor may not
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.ndim]
            assert len({t.device.type for t in tensors}) <= 1 or function in MIXED, function
            return out
        if source.device.type != target.device.type:
            self.seen.append((source.device.type, target.device.type, bool(goes_on)))
        return out


class _Gpu(TorchFunctionMode):
    """Tensors of a GPU are not there, those of the host are as ever.

    Tensors that are made of Python's numbers are copied to a GPU below the level of operators, so they are seen here.
    """

    def __init__(self, fake: FakeTensorMode, seen: list[tuple[str, str, bool]], default: bool):
        super().__init__()
        self.fake, self.seen, self.default = fake, seen, default

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # it takes a driver
        if self.default and function in _device_constructors():
            kwargs.setdefault("device", torch.device("cuda"))
        if not any(_is_there(leaf) for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        with self.fake, _Moves(self.seen):
            out = function(*args, **kwargs)
        makes = function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor)
        if makes and out.device.type != "cpu":
            self.seen.append(("cpu", out.device.type, False))
        return out


def _is_there(leaf: object) -> bool:
    """Whether an argument makes a call the GPU's."""
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


@contextlib.contextmanager
def gpu_that_is_not_there(default: bool = False) -> Iterator[list[tuple[str, str, bool]]]:
    """Meanwhile tensors may be made on a GPU; the list is of every copy: from, to, and whether the host goes on.

    Args:
        default: tensors are made there unless something else is said.
    """
    seen: list[tuple[str, str, bool]] = []
    with _Gpu(FakeTensorMode(allow_non_fake_inputs=True), seen, default):
        yield seen


def forget_tables() -> None:
    """What is kept on a device must not be kept on one that is not there."""
    for kept in (_kept_penalty, build_tables, kept_groups, _among, _on_levels, _shared, *refine_tables.TABLES):
        kept.cache_clear()
