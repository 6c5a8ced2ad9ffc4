"""The built-in model under every operator and refinement, on drawn scenes: the table of docs/training-free.md.

    python -m bench.experiments.operators            # under five minutes on two cores; --scenes 2 --seeds 1 for a look

Scenes of 384 x 512 pixels with 4 to 8 objects, whose exact label maps are known; the model sees them at half the size,
where objects are as large as in its training, in windows of 128 pixels. Asked for are all 64 colour-shape pairs and the
four grounds. mIoU is over the names that occur. Boundary IoU (Cheng et al., CVPR 2021) compares only the pixels of a
mask that lie within 2 % of the image's diagonal from its edge; where a mask ends with the image is no edge here. Every
figure is the mean over the seeds, with half the distance of the largest from the smallest.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import describe
from fastzs import clip
from fastzs.data import shapes
from fastzs.files import write_atomically
from fastzs.models import NACLIP, PEARL, ProxyCLIP
from fastzs.models.training_free import TrainingFree
from fastzs.readout import Refinement
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

NAMES = (*shapes.PAIRS, *shapes.GROUNDS)
SIZE, WINDOWS = (384, 512), {"short_side": 192, "crop": 128, "stride": 64}
SEED = 30_000  # far from any scene of the training
BAND = round(0.02 * (SIZE[0] ** 2 + SIZE[1] ** 2) ** 0.5)  # pixels
REFINEMENTS: tuple[Refinement, ...] = ("none", "pamr", "laplacian")
DOCS = Path(__file__).parents[2] / "docs" / "training-free.md"
TABLE = ("<!-- drawn: begin -->\n", "<!-- drawn: end -->\n")


def colours(images: Tensor) -> Tensor:
    """The image's own colours on a grid of 8 pixels, in place of a second network."""
    return F.avg_pool2d(images, 8)


def naclip(dense: str, whole: bool = False) -> Callable[[Any], TrainingFree]:
    return lambda weights: NACLIP(weights, dense=dense, residual=whole, ffn=whole)


class Row(NamedTuple):
    """A line of the table."""

    title: str
    make: Callable[[Any], TrainingFree]
    windows: Any = "separate"
    regions: str | None = None


ROWS = [
    Row("`identity`, whole block (MaskCLIP)", naclip("identity", True)),
    Row("`qk`, whole block (CLIP)", naclip("qk", True)),
    Row("`qq+kk`, whole block (SCLIP)", naclip("qq+kk", True)),
    Row("`kk+gaussian`, whole block", naclip("kk+gaussian", True)),
    Row("`qq`, bare (ClearCLIP)", naclip("qq")),
    Row("`kk`, bare", naclip("kk")),
    Row("`kk+gaussian`, bare (NACLIP)", naclip("kk+gaussian")),
    Row("Procrustes, bare (PEARL)", PEARL),
    Row("`proxy`, colours as the second network", lambda weights: ProxyCLIP(weights, affinity=colours, multiple=8)),
    Row("`kk+gaussian`, bare, stitched", naclip("kk+gaussian"), windows="stitched"),
    Row("`kk+gaussian`, whole block, stitched", naclip("kk+gaussian", True), windows="stitched"),
    Row("`kk+gaussian`, whole block, SLIC regions", naclip("kk+gaussian", True), regions="slic"),
]


class Counts:
    """Sums of one data set for both scores."""

    def __init__(self) -> None:
        self.whole, self.edges = (torch.zeros(2, len(NAMES), dtype=torch.int64) for _ in range(2))
        self.there = torch.zeros(len(NAMES), dtype=torch.bool)

    def add(self, truth: Tensor, labels: Tensor) -> None:
        """Label maps [H, W]."""
        truth, labels = truth.long(), labels.long()
        self.there |= torch.bincount(truth.flatten(), minlength=len(NAMES)) > 0
        everywhere = torch.ones_like(truth, dtype=torch.bool)
        for counts, of_truth, of_labels in (
            (self.whole, everywhere, everywhere),
            (self.edges, edges(truth), edges(labels)),
        ):
            parts = (truth[of_truth & of_labels & (truth == labels)], truth[of_truth], labels[of_labels])
            hits, wanted, found = (torch.bincount(part, minlength=len(NAMES)) for part in parts)
            counts += torch.stack([hits, wanted + found - hits])

    def scores(self) -> tuple[float, float]:
        """mIoU and mean boundary IoU over the names that occur, in percent."""
        means = [100 * (c[0, self.there] / c[1, self.there].clamp_min(1)).mean() for c in (self.whole, self.edges)]
        return float(means[0]), float(means[1])


def edges(labels: Tensor) -> Tensor:
    """bool [H, W]: pixels with another label within :data:`BAND`."""
    x = labels[None, None].float()
    for window in ((2 * BAND + 1, 1), (1, 2 * BAND + 1)):
        pad = (window[0] // 2, window[1] // 2)
        x = torch.cat([F.max_pool2d(x[:, :1], window, 1, pad), -F.max_pool2d(-x[:, -1:], window, 1, pad)], 1)
    return x[0, 0] != x[0, 1]


def labelled(segmenter: Segmenter, row: Row, image: Tensor, asked: Vocabulary) -> Iterator[Tensor]:
    """Labels under each refinement; the image is encoded once."""
    features = segmenter.encode(image, regions=row.regions)
    before = segmenter.model.readout
    assert before is not None
    for method in REFINEMENTS:
        segmenter.model.readout = replace(before, refine=method)
        yield segmenter.label(features, asked, regions=row.regions).labels
    segmenter.model.readout = before


def measure(scenes: int, seeds: int) -> list[dict[str, list[tuple[float, float]]]]:
    """For each row and refinement the scores of each seed."""
    weights, asked = clip.load("shapes", "shapes"), Vocabulary(NAMES)
    segmenters = [Segmenter(row.make(weights).float(), **WINDOWS, windows=row.windows) for row in ROWS]
    found: list[dict[str, list[tuple[float, float]]]] = [{method: [] for method in REFINEMENTS} for _ in ROWS]
    for seed in range(seeds):
        drawn = shapes.draw(scenes, SIZE, seed=SEED + seed, objects=(4, 8), radius=(20, 60))
        truth = drawn.labels(NAMES)
        for row, segmenter, scores in zip(ROWS, segmenters, found, strict=True):
            counts = {method: Counts() for method in REFINEMENTS}
            for image, wanted in zip(drawn.images, truth, strict=True):
                for method, labels in zip(REFINEMENTS, labelled(segmenter, row, image, asked), strict=True):
                    counts[method].add(wanted, labels)
            for method in REFINEMENTS:
                scores[method].append(counts[method].scores())
    return found


def commit() -> str:
    """The commit that is measured, "unknown" outside of a repository."""
    asked = ["git", "-C", str(DOCS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def table(found: list[dict[str, list[tuple[float, float]]]]) -> str:
    """Markdown, and what refinement does to the boundaries."""
    titles = ["not refined", "PAMR", "Laplacian"]
    heads = ["last block", *(f"{score}, {title}" for title in titles for score in ("mIoU", "boundary IoU"))]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row, scores in zip(ROWS, found, strict=True):
        lines.append([row.title, *(cell([s[i] for s in scores[m]]) for m in REFINEMENTS for i in (0, 1))])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    for method, title in zip(REFINEMENTS[1:], titles[1:], strict=True):
        means = [statistics.mean(a[1] - b[1] for a, b in zip(s[method], s["none"], strict=True)) for s in found]
        text += (
            f"- {title} changes the boundary IoU by {min(means):+.1f} to {max(means):+.1f} points and raises it in "
            f"{sum(mean > 0 for mean in means)} of {len(means)} rows.\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=6, help="of each seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-page", action="store_true", help="print the table, and leave the page as it is")
    args = parser.parse_args()
    begun = time.monotonic()
    about = describe("cpu")
    made = (
        f"`python -m bench.experiments.operators`: {args.seeds} seeds of {args.scenes} scenes, fp32, "
        f"{about['device']}, torch {about['torch']}, commit {commit()}.\n\n{table(measure(args.scenes, args.seeds))}"
    )
    print(made, f"{time.monotonic() - begun:.0f} s")
    if not args.no_page:
        before, rest = DOCS.read_text(encoding="utf-8").split(TABLE[0])
        write_atomically(DOCS, (before + TABLE[0] + made + TABLE[1] + rest.split(TABLE[1])[1]).encode())


if __name__ == "__main__":
    main()
