"""Which tiles an attention kernel can have on an architecture, from the machine code: no GPU is needed.

    python -m bench.tiles fwd --bytes 2 --width 64 --arch 90        # the candidates below, best last
    python -m bench.tiles fwd --bytes 2 --width 64 --arch 90 --tile 128 128 8 2
    python -m bench.tiles --measure tiles.jsonl                     # on a GPU: how long each usable one takes there

A candidate is printed with its registers, spilled accesses, shared memory, and how many products of a multiply-add it
makes for each number that it loads into shared memory: more is better, spills and too much shared memory rule it out.
``kernels/configs/tiles.json`` is made of these; no entry of it has been timed. ``python -m bench gpu-report`` proposes
others where a GPU found them faster.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from fastzs.kernels.bridged_attention import triton as bridged
from fastzs.kernels.bridged_attention.layout import TokenLayout
from fastzs.kernels.configs import Tile
from fastzs.kernels.configs import tile as tile_of
from fastzs.kernels.dense_attention import triton as dense

from .aot import ARCHITECTURES, SHARED_LIMIT, Launch, launched_for
from .timing import sampler

LAYOUT = TokenLayout(1, (8, 8), (2, 2))
CLIP_RC = TokenLayout(1, (32, 32), (4, 4))
DTYPES = {2: torch.bfloat16, 4: torch.float32}
KERNELS = ("fwd", "bwd_q", "bwd_kv", "dense")
# rows, keys, warps, stages
CANDIDATES = {
    2: [(32, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2)],
    4: [(16, 16, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (32, 32, 8, 2)],
}


def compiled(kernel: str, itemsize: int, width: int, arch: int, tile: Tile | None = None) -> Launch:
    """One kernel as it is launched for heads of ``width``; with another tile than the table's if one is given."""
    tokens = torch.empty(1, 2, LAYOUT.length, width, dtype=DTYPES[itemsize])
    prompts = torch.empty(1, 2, 10, width, dtype=DTYPES[itemsize])
    which = 1 if kernel == "bwd_kv" else 0  # of backward's two launches
    with launched_for(arch) as launches, forced(kernel, tile):
        if kernel == "dense":
            dense.attention(tokens, tokens, tokens, LAYOUT.grid, 5.0)
        elif kernel == "fwd":
            bridged.forward(tokens, tokens, tokens, prompts, prompts, LAYOUT, 0.1)
        else:
            lse = torch.empty(1, 2, LAYOUT.length)
            bridged.backward(tokens, tokens, tokens, tokens, prompts, prompts, tokens, lse, LAYOUT, 0.1)
    return launches[which]


@contextlib.contextmanager
def forced(kernel: str, tile: Tile | None) -> Iterator[None]:
    """Meanwhile launches of ``kernel`` take this tile, those of others the table's; None changes nothing."""
    module = dense if kernel == "dense" else bridged
    table = module.tile
    if tile is not None:
        module.tile = lambda name, *rest: tile if name == kernel else table(name, *rest)
    try:
        yield
    finally:
        module.tile = table


def seconds(kernel: str, itemsize: int, width: int, tile: Tile, device: str, layout: TokenLayout) -> float:
    """Median of a call that launches ``kernel`` with the tile, two images of CLIP-RC's tokens with 12 heads.

    Forward alone, or the two kernels of backward together, of which the other keeps its tile.
    """
    heads = 12 if device == "cuda" else 1
    shape, options = (2, layout.length, 3, heads, width), {"dtype": DTYPES[itemsize], "device": device}
    q, k, v = torch.randn(shape, **options).permute(2, 0, 3, 1, 4).unbind(0)
    prompts = torch.randn(1, heads, 10, width, **options)
    scale = width**-0.5
    out, lse = bridged.forward(q, k, v, prompts, prompts, layout, scale)

    def call(q, k, v):
        if kernel == "dense":
            return dense.attention(q, k, v, layout.grid, 5.0)
        if kernel == "fwd":
            return bridged.forward(q, k, v, prompts, prompts, layout, scale)
        return bridged.backward(out, q, k, v, prompts, prompts, out, lse, layout, scale)

    with forced(kernel, tile):
        call(q, k, v)
        sample = sampler(call, [(q, k, v)], device)
        return statistics.median(sample()["seconds"] for _ in range(5 if device == "cuda" else 1))


def measure(path: Path, dry: bool) -> None:
    """A line of JSON for each candidate that does not spill and fits, as it comes."""
    device, arch, layout = ("cpu", 90, TokenLayout(1, (2, 2), (1, 1))) if dry else ("cuda", 0, CLIP_RC)
    if not dry:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    for kernel in KERNELS[:1] if dry else KERNELS:
        for width in (64, 128):
            own = tile_of(kernel, 2, width, arch)
            for tile in dict.fromkeys([own, *(Tile(*numbers) for numbers in CANDIDATES[2][: 1 if dry else None])]):
                if not dry and not usable(compiled(kernel, 2, width, arch, tile), arch):
                    continue
                taken = seconds(kernel, 2, width, tile, device, layout)
                found = {"kernel": kernel, "entry": f"2 bytes, {width} wide", "arch": arch, "tile": tile, "own": own}
                with path.open("a") as file:
                    file.write(json.dumps(found | {"seconds": taken, "dry": dry}) + "\n")
                print(f"{kernel:<6} {width:3} wide {tuple(tile)}: {1e6 * taken:.1f} us", flush=True)


def usable(launch: Launch, arch: int) -> bool:
    """Whether it spills nothing and fits."""
    seen = launch.resources()
    return seen.local_accesses == 0 and seen.shared <= SHARED_LIMIT[arch]


def lines(kernel: str, itemsize: int, width: int, arch: int, tiles: list[Tile]) -> Iterator[str]:
    for tile in sorted(tiles, key=intensity):
        launch = compiled(kernel, itemsize, width, arch, tile)
        seen = launch.resources()
        yield (
            f"sm_{arch} {kernel:<6} {itemsize} bytes, {width:3} wide, {tile.rows:3} x {tile.keys:3}, "
            f"{tile.warps} warps, {tile.stages} stages: {seen.registers:3} registers, {seen.local_accesses:3} spilled, "
            f"{seen.shared / 1024:5.1f} kB, {intensity(tile):5.1f} products a number"
            f"{'' if usable(launch, arch) else '; not usable'}"
        )


def intensity(tile: Tile) -> float:
    """Multiply-adds for each number loaded: a tile of ``rows`` x ``keys`` scores loads both sides once."""
    return tile.rows * tile.keys / (tile.rows + tile.keys)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("kernel", choices=KERNELS, nargs="?", default="fwd")
    parser.add_argument(
        "--measure", type=Path, metavar="FILE", help="time candidates on the GPU, lines of JSON into FILE"
    )
    parser.add_argument("--dry", action="store_true", help="with --measure: one tile, in the interpreter")
    parser.add_argument("--bytes", type=int, choices=DTYPES, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--tile", type=int, nargs=4, metavar=("ROWS", "KEYS", "WARPS", "STAGES"))
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.dry)
        return
    tiles = [Tile(*given.tile)] if given.tile else [Tile(*tile) for tile in CANDIDATES[given.bytes]]
    for line in lines(given.kernel, given.bytes, given.width, given.arch, tiles):
        print(line, flush=True)


if __name__ == "__main__":
    main()
