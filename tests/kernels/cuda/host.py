"""Runs csrc/*.cu without a GPU: compiled for the host against ``include/``, whose cuda_runtime.h says how.

:func:`compile_for_host` gives the operators of a source and of changed copies of it. :class:`OnHost` calls one: with
every tensor in memory that may not be left, with a block's threads in three orders, and requires the same bits from
all. :func:`installed` puts such an operator in the place of the CPU's, so that tests of the public functions run it.
"""

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..mutants import Change, compile_variants

INCLUDE = Path(__file__).parent / "include"
FORWARD, BACKWARD, RANDOM = range(3)

REWRITES = [
    # kernel<T, 1><<<grid, block, shared, stream>>>(a): the arguments stay where they are
    (r"(\w+)((?:<[^<>;(){}]*>)?)<<<([^;]*?)>>>\((?=[^)])", r'cuda_on_host::launch("\1", \3)(\1\2, '),
    (r"__shared__ (\w+) (\w+)((?:\[[^]]+\])*);", r"auto& \2 = cuda_on_host::shared_array<\1\3>(__LINE__);"),
    (r"aoti_torch_get_current_cuda_stream", "cuda_on_host_stream"),
    (r"torch::stable::accelerator::DeviceGuard", "cuda_on_host::DeviceGuard"),
    (r"torch::stable::(new_empty|to)\(", r"cuda_on_host::\1("),
    (r", CUDA, m\)", ", CPU, m)"),
]
INLINE = re.compile(r'asm\("([\w.]+) %0, %1;" : "=f"\((\w+)\) : "f"\((\w+)\)\);')


def translate(source: str) -> str:
    """CUDA C++ as the C++ that cuda_runtime.h completes; line by line, so that lines keep their numbers."""
    for pattern, replacement in REWRITES:
        source = re.sub(pattern, replacement, source)
    source = INLINE.sub(lambda found: f"{found[2]} = cuda_on_host::{found[1].replace('.', '_')}({found[3]});", source)
    left = re.search(r"<<<|__shared__|\basm\b", source)
    assert left is None, f"translate does not know this CUDA: {source[left.start() :].splitlines()[0]}"
    return source


class OnHost:
    """An operator of a translated source.

    Args:
        operator: of ``torch.ops``, registered for the CPU.
        library: the loaded library that it is in.
        written: places of the arguments that it writes.
    """

    def __init__(self, operator, library: ctypes.CDLL, written: Sequence[int] = ()):
        self.operator, self.library, self.written = operator, library, written
        library.cuda_on_host_allocate.restype = ctypes.c_void_p
        library.cuda_on_host_allocate.argtypes = [ctypes.c_size_t]
        library.cuda_on_host_release.argtypes = [ctypes.c_void_p]

    def __call__(self, *arguments):
        """The result; AssertionError if it depends on the order of the threads, RuntimeError for what is undefined."""
        results = [self.once(order, *arguments) for order in (FORWARD, BACKWARD, RANDOM)]
        for result, written in results[1:]:
            for mine, first in zip((*result, *written), (*results[0][0], *results[0][1]), strict=True):
                assert same_bits(mine, first), "the result depends on the order in which threads run"
        result, written = results[-1]
        for place, value in zip(self.written, written, strict=True):
            if value is not None:
                arguments[place].copy_(value)
        return result[0] if len(result) == 1 else result or None

    def once(self, order: int, *arguments) -> tuple[tuple, list]:
        """What it returns, and what it wrote into its arguments."""
        self.library.cuda_on_host_order(order, 0)
        kept: list[int] = []
        try:
            guarded = [self._guarded(a, kept) if isinstance(a, Tensor) else a for a in arguments]
            result = self.operator(*guarded)
            written = [None if guarded[place] is None else guarded[place].clone() for place in self.written]
            result = result if isinstance(result, tuple) else () if result is None else (result,)
            return tuple(tensor.clone() for tensor in result), written
        finally:
            for address in kept:
                self.library.cuda_on_host_release(address)

    def _guarded(self, tensor: Tensor, kept: list[int]) -> Tensor:
        """The same tensor, strides and all, in memory of its own between pages that cannot be touched."""
        if tensor.numel() == 0:
            return tensor
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = elements * tensor.element_size()
        address = self.library.cuda_on_host_allocate(size)
        kept.append(address)
        ctypes.memmove(address, tensor.data_ptr(), size)
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else a.equal(b)


def compile_for_host(folder: Path, source: str, name: str, variants: Sequence[Sequence[Change]]) -> list[OnHost]:
    """The operator ``name`` of a source in csrc, for each variant with its changes."""
    written = {"label_map_cuda": (14, 15)}.get(name, ())

    def with_schema(text: str) -> str:
        if "_LIBRARY_FRAGMENT" not in text:  # it is declared by the CPU's source
            schema = str(getattr(torch.ops.fastzs, name).default._schema).removeprefix("fastzs::")
            declared = f'STABLE_TORCH_LIBRARY_FRAGMENT(\\1, m) {{ m.def("{schema}"); }} \\g<0>'
            text = re.sub(r"STABLE_TORCH_LIBRARY_IMPL\((\w+),", declared, text)
        return translate(text)

    spaces = compile_variants(folder, source, variants, translate=with_schema, include=INCLUDE)
    library = ctypes.CDLL(str(folder / "variants.so"))
    return [OnHost(getattr(space, name), library, written) for space in spaces]


@contextmanager
def installed(operator: OnHost, name: str) -> Iterator[None]:
    """The operator in the place of the CPU's ``fastzs::name``."""
    library = torch.library.Library("fastzs", "IMPL")
    try:
        library.impl(name, operator, "CPU")
        yield
    finally:
        library._destroy()
