"""Score the package's own weights on scenes they never saw: ``python -m bench.score_shapes``.

MaskCLIP labels held-out scenes with all 64 colour-shape pairs and the four grounds; the table gives the share of right
pixels and the mean IoU over the pairs whose names occur in training captions and over those that never do, beside
labels drawn at random.
"""

import argparse

import torch

import fastzs
from fastzs.data import shapes

NAMES = (*shapes.PAIRS, *shapes.GROUNDS)
SEED = 20_000  # far from any scene of the training, which draws from one stream seeded with 0


def confusion(truth: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts int64 [names, names], rows the truth."""
    n = len(NAMES)
    return torch.bincount((truth.long() * n + labels.long()).flatten(), minlength=n * n).view(n, n)


def mean_iou(counts: torch.Tensor, names: tuple[str, ...]) -> float:
    hit = counts.diagonal().double()
    iou = hit / (counts.sum(0) + counts.sum(1) - hit)
    return float(iou[[NAMES.index(name) for name in names]].nanmean())


def accuracy(counts: torch.Tensor, names: tuple[str, ...]) -> float:
    rows = [NAMES.index(name) for name in names]
    return float(counts.diagonal()[rows].sum() / counts[rows].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--scenes", type=int, default=256)
    args = parser.parse_args()
    segmenter = fastzs.load("maskclip", weights=args.weights, short_side=0, precision="fp32")
    scenes = shapes.draw(args.scenes, (128, 128), seed=SEED, objects=(2, 4), radius=(10, 30))
    truth = scenes.labels(NAMES)
    vocabulary = fastzs.Vocabulary(NAMES)
    ours = torch.zeros(len(NAMES), len(NAMES), dtype=torch.int64)
    chance = ours.clone()
    generator = torch.Generator().manual_seed(SEED)
    for image, wanted in zip(scenes.images, truth, strict=True):
        ours += confusion(wanted, segmenter(image, vocabulary).labels)
        chance += confusion(wanted, torch.randint(len(NAMES), wanted.shape, generator=generator))
    print("| names | pixels right | chance | mIoU | chance |\n|---|---|---|---|---|")
    for title, names in (
        (f"{len(shapes.SEEN_PAIRS)} pairs seen in captions", shapes.SEEN_PAIRS),
        (f"{len(shapes.UNSEEN_PAIRS)} pairs never seen in captions", shapes.UNSEEN_PAIRS),
        (f"{len(shapes.GROUNDS)} grounds", shapes.GROUNDS),
    ):
        figures = [measure(counts, names) for measure in (accuracy, mean_iou) for counts in (ours, chance)]
        print(f"| {title} | " + " | ".join(f"{100 * figure:.1f} %" for figure in figures) + " |")


if __name__ == "__main__":
    main()
