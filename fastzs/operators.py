"""Last-block operators of one's own: what a training-free system does in place of CLIP's last attention.

A function of a :class:`LastBlock` gives what each patch attends to, ``[B, heads, h * w, d]``; the tower does the rest.
It runs under the same windows, refinements, vocabularies and benchmarks as the operators that are built in::

    @operator("near", blocks=())
    def near(block):
        weights = (block.k @ block.k.mT * block.scale).softmax(-1)
        return weights[:, :, block.prefix :] @ block.v

    fastzs.load("naclip", dense="near")

On the command line ``--operator mine.py:near`` names a function in a file, which is run.
"""

import difflib
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fastzs.kernels.dense_attention.api import KINDS

Function = Callable[["LastBlock"], Tensor]


@dataclass(frozen=True)
class LastBlock:
    """What an operator sees of the last block, for a batch of images or windows of one size.

    Attributes:
        tokens: [B, P + N, C], what enters the block; P prefix tokens (CLS first), then N = h * w patches.
        q, k, v: [B, heads, P + N, d], the block's projections of the normalised tokens.
        grid: rows and columns of the patches.
        maps: for each block that the operator asked for, its softmax attention, [B, heads, P + N, P + N].
        affinity: features [B, C', h', w'] of another network, where the system has one.
        regions: int64 [B, h, w], or [B, h', w'] where there is an affinity: the region of each patch, 0 and below for
            none, where the image has regions. An operator decides itself what to make of them.
    """

    tokens: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]
    maps: Mapping[int, Tensor] = field(default_factory=dict)
    affinity: Tensor | None = None
    regions: Tensor | None = None

    @property
    def prefix(self) -> int:
        """P, the tokens before the patches."""
        return self.q.shape[2] - self.grid[0] * self.grid[1]

    @property
    def scale(self) -> float:
        """d^-1/2."""
        return self.q.shape[-1] ** -0.5


_known: dict[str, Function] = {}


def operator(name: str, *, blocks: Sequence[int] = ()) -> Callable[[Function], Function]:
    """Register a function as a last-block operator, a decorator.

    Args:
        name: what ``dense=`` calls it.
        blocks: earlier blocks, counted from 0, whose attention maps it wants in ``LastBlock.maps``.

    Raises:
        ValueError: the name is an operator already, of another file.
    """

    def register(function: Function) -> Function:
        file = getattr(function, "__code__", None) and function.__code__.co_filename
        known = _known.get(name)
        again = known is not None and file is not None and known.__code__.co_filename == file  # the file is read anew
        if name in KINDS or (known is not None and not again):
            raise ValueError(f"operator {name!r} exists already; choose another name")
        function.blocks = tuple(blocks)  # type: ignore[attr-defined]
        _known[name] = function
        return function

    return register


def find(dense: str | Function) -> str | Function:
    """A kind of :func:`fastzs.ops.dense_attention`, or the function behind a name or ``FILE.py:FUNCTION``.

    Raises:
        ValueError: no such operator (nearest known names are given), file or function.
    """
    if not isinstance(dense, str) or dense in KINDS:
        return dense
    if dense in _known:
        return _known[dense]
    path, _, name = dense.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path).expanduser(), name)
    known = [*KINDS, *_known]
    near = difflib.get_close_matches(dense, known, n=3, cutoff=0.3) or known
    raise ValueError(f"unknown operator {dense!r}; nearest known: {', '.join(near)}; or FILE.py:FUNCTION")


def why_not(setting: str, backbone: str, takes: Sequence[str]) -> str:
    """The sentence for an operator, as a user set it, that is not among those a backbone's tower takes."""
    reason = "" if "kk" in takes else ", since its last stage has no attention"
    return f"{setting} does not apply to {backbone}; expected dense to be one of {', '.join(takes)}{reason}"


def identity_of(dense: str | Callable[..., object]) -> str:
    """What tells an operator from others in the key of a result: its name, or what its file or itself is made of."""
    if isinstance(dense, str):
        return dense
    name = f"{dense.__module__}.{getattr(dense, '__qualname__', type(dense).__qualname__)}"
    try:
        source = inspect.getsource(dense)
    except (OSError, TypeError):  # typed at a prompt, or an object that can be called
        source = ""
    return getattr(dense, "contents", None) or f"{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def blocks_of(dense: str | Function) -> tuple[int, ...]:
    """The earlier blocks whose maps an operator wants."""
    return getattr(dense, "blocks", ())


def _from_file(path: Path, name: str) -> Function:
    if not path.is_file():
        raise ValueError(f"operator {path}:{name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"operator {path}:{name}: {path} defines no function {name!r}")
    cast(Any, function).contents = f"{name} of {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return cast(Function, function)
