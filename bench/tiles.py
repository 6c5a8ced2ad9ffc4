"""Which tiles an attention kernel can have on an architecture, from the machine code: no GPU is needed.

    python -m bench.tiles fwd --bytes 2 --width 64 --arch 90        # the candidates below, best last
    python -m bench.tiles fwd --bytes 2 --width 64 --arch 90 --tile 128 128 8 2

A candidate is printed with its registers, spilled accesses, shared memory, and how many products of a multiply-add it
makes for each number that it loads into shared memory: more is better, spills and too much shared memory rule it out.
``kernels/configs/tiles.json`` is made of these; no entry of it has been timed.
"""

import argparse
from collections.abc import Iterator

import torch

from fastzs.kernels.bridged_attention import triton as bridged
from fastzs.kernels.bridged_attention.layout import TokenLayout
from fastzs.kernels.configs import Tile
from fastzs.kernels.dense_attention import triton as dense

from .aot import ARCHITECTURES, SHARED_LIMIT, Launch, launched_for

LAYOUT = TokenLayout(1, (8, 8), (2, 2))
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
    tiles, module = None, dense if kernel == "dense" else bridged
    if tile is not None:
        tiles, module.tile = module.tile, lambda *_: tile
    try:
        with launched_for(arch) as launches:
            if kernel == "dense":
                dense.attention(tokens, tokens, tokens, LAYOUT.grid, 5.0)
            elif kernel == "fwd":
                bridged.forward(tokens, tokens, tokens, prompts, prompts, LAYOUT, 0.1)
            else:
                lse = torch.empty(1, 2, LAYOUT.length)
                bridged.backward(tokens, tokens, tokens, tokens, prompts, prompts, tokens, lse, LAYOUT, 0.1)
    finally:
        if tiles is not None:
            module.tile = tiles
    return launches[which]


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
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--bytes", type=int, choices=DTYPES, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--tile", type=int, nargs=4, metavar=("ROWS", "KEYS", "WARPS", "STAGES"))
    given = parser.parse_args()
    tiles = [Tile(*given.tile)] if given.tile else [Tile(*tile) for tile in CANDIDATES[given.bytes]]
    for line in lines(given.kernel, given.bytes, given.width, given.arch, tiles):
        print(line, flush=True)


if __name__ == "__main__":
    main()
