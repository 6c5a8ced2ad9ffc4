"""Compile what the GPU tests and the bench launch, on all cores, into ``TRITON_CACHE_DIR``.

    python -m bench.warm_cache 90

Without it the first tests wait for a compiler that uses one core: 1 to 2 seconds a kernel.
"""

import argparse
import concurrent.futures
import itertools
import math
import os
from collections.abc import Callable

import torch

from fastzs.kernels.bridged_attention import triton as bridged
from fastzs.kernels.bridged_attention.layout import TokenLayout
from fastzs.kernels.dense_attention import proxy_triton as proxy
from fastzs.kernels.dense_attention import triton as dense
from fastzs.kernels.key_smoothing import triton as smoothing
from fastzs.kernels.label_map import triton as label_map
from fastzs.kernels.label_map.options import Options
from fastzs.kernels.mask_loss import triton as mask_loss
from fastzs.kernels.pixel_text_logits import triton as pixel_text
from fastzs.kernels.refine.operator import refine

from .aot import launched_for

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
WIDTHS = (64, 128)
ACTIVATIONS = ("sigmoid", "softmax", "none")


def _attention(dtype: torch.dtype, width: int, bridge: tuple[int, int] | None) -> None:
    layout = TokenLayout(1, (32, 32), bridge)
    q, k, v = torch.empty(2, layout.length, 3, 3, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    prompts = torch.empty(1, 3, 10, width, dtype=dtype)
    out, lse = bridged.forward(q, k, v, prompts, prompts, layout, width**-0.5)
    bridged.backward(out, q, k, v, prompts, prompts, out, lse, layout, width**-0.5)


def _dense(dtype: torch.dtype, width: int, std: float | None) -> None:
    q = torch.empty(2, 3, 1025, width, dtype=dtype)
    dense.attention(q, q, q, (32, 32), std)


def _smoothing(dtype: torch.dtype, classes: int, mode: str) -> None:
    smoothing.key_smoothing(
        torch.empty(1, 1024, 768, dtype=dtype), torch.empty(1, classes, 1024, dtype=dtype), mode, 0.9
    )


def _mask_loss(dtype: torch.dtype, target: torch.dtype, with_nodes: bool) -> None:
    labels = torch.zeros(2, 512, 512, dtype=target)
    mask_loss.mask_sums(torch.empty(2, 150, 32, 32, dtype=dtype), labels, 0.25, 2.0, 255, with_nodes)


def _pixel_text(dtype: torch.dtype, classes: int) -> None:
    pixel_text.pixel_text_logits(torch.empty(1, 512, 32, 32, dtype=dtype), torch.empty(classes, 512, dtype=dtype), 1.0)


def _proxy(dtype: torch.dtype, smallest: float | None) -> None:
    tokens, row = torch.empty(1, 1764, 768, dtype=dtype), torch.empty(1, 1764)
    proxy.attention(tokens, row, row, tokens, torch.empty(1), 3.0, smallest)


def _label_map(dtype: torch.dtype, activation: str, output: tuple[int, int], scores: bool) -> None:
    penalty = torch.zeros(171) if activation == "sigmoid" else None
    options = Options((512, 683), output, activation, penalty, -math.inf, 1, torch.uint8, scores)
    windows = [[0, 0, 512, 512], [0, 171, 512, 512]]
    label_map.label_map_triton(torch.empty(2, 171, 32, 32, dtype=dtype), windows, options)


def _refine(method: str, scale: float | None) -> None:
    windows = torch.tensor([[0, x, 336, 336] for x in (0, 112)])
    text, steps = torch.ones(40, 8), 0 if method == "none" else 2
    arguments = (torch.zeros(3, 375, 500), [336, 448], method, [8, 16], steps, text, 80, scale, False, "triton")
    refine(torch.zeros(2, 40, 21, 21), windows, *arguments)


def jobs() -> list[tuple[Callable, tuple]]:
    """Launchers and what they are called with."""
    return [
        *((_attention, job) for job in itertools.product(DTYPES, WIDTHS, ((4, 4), None))),
        *((_dense, job) for job in itertools.product(DTYPES, WIDTHS, (5.0, None))),
        *((_mask_loss, job) for job in itertools.product(DTYPES, (torch.uint8, torch.int16), (True, False))),
        *((_smoothing, job) for job in itertools.product(DTYPES, (20, 171), ("paper", "official"))),
        *((_label_map, job) for job in itertools.product(DTYPES, ACTIVATIONS, ((512, 683), (375, 500)), (True, False))),
        *((_refine, job) for job in itertools.product(("pamr", "laplacian", "none"), (40.0, None))),
        *((_proxy, job) for job in itertools.product(DTYPES, (1e-6, None))),
        *((_pixel_text, job) for job in itertools.product(DTYPES, (20, 171))),
    ]


def compile_one(arch: int, job: tuple[Callable, tuple]) -> int:
    """Launches of one call, compiled."""
    torch.set_num_threads(1)
    call, arguments = job
    with launched_for(arch) as launches:
        call(*arguments)
    return len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.warm_cache", description=__doc__)
    parser.add_argument("arch", type=int, help="compute capability times ten")
    parser.add_argument("--dry", action="store_true", help="two calls only")
    given = parser.parse_args()
    todo = jobs()[-2:] if given.dry else jobs()
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(todo))) as pool:
        done = [pool.submit(compile_one, given.arch, job) for job in todo]
        count = sum(future.result() for future in concurrent.futures.as_completed(done))
    print(f"{count} launches compiled for sm_{given.arch} into {os.environ.get('TRITON_CACHE_DIR', '~/.triton/cache')}")


if __name__ == "__main__":
    main()
